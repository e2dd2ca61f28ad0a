"""One line an event, in either format, with the rank wherever there is one."""

from __future__ import annotations

import contextlib
import io
import json
import logging
from collections.abc import Iterator

import pytest
import structlog

from pdctl import logs
from pdctl.errors import ConfigError


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.contextvars.clear_contextvars()
    structlog.reset_defaults()


def lines(settings: logs.LogSettings) -> tuple[io.StringIO, structlog.stdlib.BoundLogger]:
    stream = io.StringIO()
    logs.configure(settings, stream)
    return stream, structlog.get_logger("tests")


def test_an_event_is_one_line_of_key_value_pairs() -> None:
    stream, log = lines(logs.LogSettings())
    log.warning("registration attempt failed", attempt=3, cause="connection refused", text="two\nlines")
    line = stream.getvalue()
    assert line.count("\n") == 1
    assert 'event="registration attempt failed"' in line
    assert "attempt=3" in line
    assert 'cause="connection refused"' in line
    assert "level=warning" in line


def test_json_is_one_object_a_line() -> None:
    stream, log = lines(logs.LogSettings(format="json"))
    log.info("seat taken", epoch=2)
    log.info("seat taken", epoch=3)
    assert [json.loads(line)["epoch"] for line in stream.getvalue().splitlines()] == [2, 3]


def test_the_rank_stands_in_every_line_also_in_those_of_libraries() -> None:
    stream, log = lines(logs.LogSettings(format="json"))
    with logs.rank_bound("dp0/cp0/tp1/pp0", role="prefill"):
        log.info("ours")
        logging.getLogger("uvicorn.error").error("theirs %s", "too")
    log.info("after it")
    first, second, third = (json.loads(line) for line in stream.getvalue().splitlines())
    assert first["rank"] == second["rank"] == "dp0/cp0/tp1/pp0"
    assert (second["event"], second["role"]) == ("theirs too", "prefill")
    assert "rank" not in third


def test_what_is_below_the_level_is_not_printed() -> None:
    stream, log = lines(logs.LogSettings(level="warning"))
    log.info("small talk")
    assert not stream.getvalue()


def test_an_exception_stays_in_its_line() -> None:
    stream, log = lines(logs.LogSettings(format="json"))
    with contextlib.suppress(ZeroDivisionError):
        try:
            _ = 1 / 0
        except ZeroDivisionError:
            log.exception("broke")
            raise
    assert "ZeroDivisionError" in json.loads(stream.getvalue())["exception"]


@pytest.mark.parametrize("wrong", [-1.0, float("inf"), float("nan")])
def test_lines_of_rooms_are_so_many_a_second_and_not_fewer_than_none(wrong: float) -> None:
    with pytest.raises(ConfigError, match="rooms_a_second is"):
        logs.LogSettings(rooms_a_second=wrong)
