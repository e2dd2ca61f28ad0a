"""`pdctl status`: what is shown of a fleet, to whom, and how it ends."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import re
import signal
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from pdctl import config
from pdctl.commands.drawing import nbytes, seconds, shown
from pdctl.commands.status import Rates, of, sections, short, state
from pdctl.errors import BadField, RegistryRefused, Unreachable
from pdctl.onlooker import Onlooker
from tests.commands.conftest import BLOCKED, Fleet
from tests.test_cli import SOON_S, ended

Run = Callable[..., Awaitable[int]]
COLOUR = re.compile(rb"\x1b\[[0-9;]*3[0-7][0-9;]*m")


def planted(ranks: int, out: int = 0) -> dict[str, Any]:
    """An overview of one instance of so many ranks, `out` of which have a link that is out."""
    seats = [
        {"seat": f"dp0/cp0/tp{tp}/pp0", "address": f"10.0.0.1:{tp}", "standing": "alive", "ttl_s": 15.0}
        for tp in range(ranks)
    ]
    reports = [
        {
            "instance": "p",
            "seat": f"tp{tp}",
            "epoch": tp,
            "unready": [],
            "bytes": 10**9,
            "links": [BLOCKED],
            "rooms": {"sender": {"transferring": 2}},
            "ended": {"success": 5, "failed": 1},
            "quarantined": 0,
            "doubt": False,
            "store": None,
        }
        for tp in range(out)
    ]
    counts = {"instances": 1, "ready": 1, "seats": ranks, "alive": ranks, "rooms": 0}
    row = {"name": "p", "role": "prefill", "ready": True, "draining": False, "dead": False, "seats": ranks}
    return {
        "service": {
            "version": "1",
            "journal": "memory",
            "age_s": 0.0,
            "unready": [],
            "uptime_s": 1.0,
            "counts": counts,
        },
        "instances": [
            {**row, "alive": ranks, "missing": 0, "missing_seats": [], "alive_seats": seats, "forming": None}
        ],
        "reports": reports,
        "sessions": [],
    }


async def test_the_fleet_is_shown_in_lines_for_a_pipe(
    fleet: Fleet, pdctl_here: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    await fleet.seat(0)
    await fleet.report(0, links=[BLOCKED], rooms={"sender": {"transferring": 2}}, bytes=1_234_567, unready=["is cold"])
    capsys.readouterr()  # the registry's own log, which is not a command's output
    assert await pdctl_here("status") == 0
    out = capsys.readouterr().out
    lines = [re.split(r"  +", line) for line in out.splitlines()]
    assert lines[0][0].startswith(f"registry {fleet.url}, pdctl ")
    assert lines[0][0].endswith("0 of 1 instances ready, 1 of 2 ranks there, 0 rooms known")
    assert ["p", "prefill", "not ready", "1/2", "tp1", "2 open, 0 done, 0 failed", "1.2 MB"] in lines
    assert ["p/tp0", "127.0.0.1:40300", "alive", "-", "2 transferring", "1", "1.2 MB", "is cold"] in lines
    assert ["p/tp0", "10.0.0.9:16001", "blocked", "12 s", "1.5 s", "blocked after 3 failures"] in lines
    assert "\x1b" not in out


async def test_the_document_is_the_registrys_overview(
    fleet: Fleet, pdctl_here: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    await fleet.seat(0)
    capsys.readouterr()
    assert await pdctl_here("status", "p", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["instances"][0]["name"], told["service"]["counts"]["alive"]) == ("p", 1)
    with pytest.raises(BadField, match="'q' is not known there: there is p"):
        await pdctl_here("status", "q")


async def test_a_watch_says_what_it_cannot_see_and_goes_on(fleet: Fleet, capsys: pytest.CaptureFixture[str]) -> None:
    nobody = config.load({"node.registry": "http://127.0.0.1:9"})
    async with Onlooker(nobody) as onlooker:
        with pytest.raises(Unreachable, match=r"127\.0\.0\.1:9 does not answer: connection refused"):
            await onlooker.overview()
    both = config.load({"node.registry": f"http://127.0.0.1:9,{fleet.url}"})
    async with Onlooker(both) as onlooker:
        assert "instances" in await onlooker.overview()
        assert onlooker.url == fleet.url, "who has answered is asked first from then on"


async def test_what_is_no_registry_is_told_by_name(fleet: Fleet) -> None:
    async with Onlooker(config.load({"node.registry": f"{fleet.url}/metrics"})) as onlooker:
        with pytest.raises(Unreachable, match=r"has no /v1/overview \(404\): there is another HTTP service"):
            await onlooker.overview()
    async with Onlooker(config.load({"node.registry": fleet.url})) as onlooker:
        with pytest.raises(RegistryRefused, match="refused the question"):
            await onlooker.events(-1)


def test_of_thousands_of_ranks_those_in_trouble_are_shown() -> None:
    _, _, ranks, links = sections(planted(3000, out=50), "u")
    assert (len(ranks.rows), ranks.title) == (50, "ranks in trouble")
    assert ranks.note == "2950 ranks without trouble are not shown: --ranks"
    assert (len(links.rows), links.note) == (40, "and 10 more: pdctl status --json")
    assert len(list(sections(planted(3000), "u", every_rank=True))[2].rows) == 3000
    assert len(list(sections(planted(64), "u"))[2].rows) == 64


def test_one_instance_is_shown_without_the_others_reports() -> None:
    both = planted(2, out=1)
    both["reports"].append({**both["reports"][0], "instance": "q"})
    assert [row["instance"] for row in of(both, "p")["reports"]] == ["p"]


@pytest.mark.parametrize(
    ("row", "word"),
    [
        ({"dead": True, "draining": True, "ready": True}, "dead"),
        ({"dead": False, "draining": True, "ready": True}, "draining"),
        ({"dead": False, "draining": False, "ready": True}, "ready"),
        ({"dead": False, "draining": False, "ready": False}, "not ready"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_instance_has_one_state(row: dict[str, bool], word: str) -> None:
    assert state(row) == word


def test_what_flows_is_of_the_lives_that_were_seen_twice() -> None:
    rates = Rates()
    rates.look([{"instance": "p", "seat": "tp0", "epoch": 1, "bytes": 1000}], 10.0)
    assert rates.now == {}
    seen = [
        {"instance": "p", "seat": "tp0", "epoch": 1, "bytes": 5000},
        {"instance": "p", "seat": "tp1", "epoch": 2, "bytes": 9},
    ]
    rates.look(seen, 12.0)
    assert rates.now == {"p": 2000.0}
    rates.look([{"instance": "p", "seat": "tp0", "epoch": 3, "bytes": 10}], 14.0)
    assert rates.now == {}, "a new life counts from 0: nothing is known of its flow"


def test_units_are_those_that_people_read() -> None:
    assert [nbytes(n) for n in (0, 999, 1000, 1_234_567, 123_456_789, 2.5e12)] == ["0 B", "999 B", "1.0 KB", "1.2 MB", "123 MB", "2.5 TB"]  # fmt: skip  # noqa: E501
    assert [seconds(n) for n in (0.42, 12, 119, 600, 7200, 200_000)] == [
        "0.4 s",
        "12 s",
        "119 s",
        "10 min",
        "2 h",
        "2 d",
    ]
    assert [short(s) for s in ("dp0/cp0/tp0/pp0", "dp1/cp0/tp3/pp0", "tp2")] == ["tp0", "dp1-tp3", "tp2"]


def test_what_was_read_elsewhere_cannot_steer_a_terminal() -> None:
    assert shown("a\x1b[2Jb\r\nc\u202ed\x9b") == "a?[2Jb??c?d?"


async def test_a_pipe_is_given_no_colours_and_a_terminal_that_was_watched_is_given_back(
    fleet: Fleet,
) -> None:
    await fleet.seat(0)
    await fleet.report(0, links=[BLOCKED])
    status, out, err = await ended("status", "--at", fleet.url)
    assert (status, err, "\x1b" in out, "blocked" in out) == (0, "", False, True)
    drawn, status = await on_a_terminal("status", "--watch", "--every", "0.1", "--at", fleet.url)
    assert status == 130
    assert COLOUR.search(drawn)
    assert b"Traceback" not in drawn
    assert drawn.index(b"\x1b[?1049h") < drawn.rindex(b"\x1b[?1049l"), "the screen is given back as it was"
    assert drawn.rindex(b"\x1b[?25h") > drawn.rindex(b"\x1b[?25l"), "and its cursor"


async def test_a_terminal_without_colours_is_given_none(fleet: Fleet) -> None:
    await fleet.seat(0)
    await fleet.report(0, links=[BLOCKED])
    drawn, _ = await on_a_terminal("status", "--watch", "--every", "0.1", "--at", fleet.url, NO_COLOR="1")
    assert b"blocked" in drawn
    assert not COLOUR.search(drawn)


async def on_a_terminal(*words: str, **environ: str) -> tuple[bytes, int]:
    """All that a command draws on a terminal of its own until SIGINT, 10 pieces in; and its exit status."""
    ours, its = pty.openpty()
    env = os.environ | {"TERM": "xterm-256color", "COLUMNS": "120", "LINES": "40"} | environ
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "pdctl", *words), stdin=its, stdout=its, stderr=its, env=env
    )
    os.close(its)
    drawn, looks = bytearray(), 0
    told = asyncio.Event()

    def read() -> None:
        nonlocal looks
        try:
            drawn.extend(os.read(ours, 1 << 16))
        except OSError:  # its side is closed
            asyncio.get_running_loop().remove_reader(ours)
            return
        if drawn.count(b"instances ready") >= 2:
            told.set()

    asyncio.get_running_loop().add_reader(ours, read)
    try:
        await asyncio.wait_for(told.wait(), SOON_S)
        child.send_signal(signal.SIGINT)
        status = await asyncio.wait_for(child.wait(), SOON_S)
        await asyncio.sleep(0)
    finally:
        asyncio.get_running_loop().remove_reader(ours)
        if child.returncode is None:
            child.kill()
            await child.wait()
        os.close(ours)
    return bytes(drawn), status
