"""What a stock engine says of its load, and for how long it has had nothing under way."""

from __future__ import annotations

from typing import Any

import pytest

from pdctl.core.draining import DrainPolicy, Load, Quiet, load_of, read_loads
from pdctl.errors import BadField, ConfigError

COUNTS = ("num_running_reqs", "num_waiting_reqs", "num_used_tokens")
DISAGGREGATION = ("prefill_bootstrap_queue_reqs", "prefill_inflight_queue_reqs")
QUEUES = ("waiting", "grammar", "paused", "retracted")


def load(dp: int = 0, at: float = 1000.0, **busy: int) -> dict[str, Any]:
    """As SGLang 0.5.23 has it, the parts that are looked at."""
    core, disaggregation, queues = ({n: busy.get(n, 0) for n in names} for names in (COUNTS, DISAGGREGATION, QUEUES))
    parts = {"disaggregation": {"mode": "prefill", **disaggregation}, "queues": queues}
    return {"dp_rank": dp, "timestamp": at, "token_usage": 0.0, **core, **parts}


def body(*rows: dict[str, Any]) -> dict[str, Any]:
    return {"version": "0.5.23", "loads": list(rows)}


@pytest.mark.parametrize("name", [*COUNTS, *DISAGGREGATION, *QUEUES])
def test_whatever_is_counted_anywhere_is_under_way(name: str) -> None:
    assert read_loads(body(load())) == {0: Load(0, 1000.0)}
    assert read_loads(body(load(**{name: 2})))[0].under_way == 2


@pytest.mark.parametrize("name", [*COUNTS, "timestamp", "dp_rank", "disaggregation", "queues"])
def test_what_is_not_said_may_be_under_way(name: str) -> None:
    row = load()
    del row[name]
    with pytest.raises(BadField, match=name):
        read_loads(body(row))


@pytest.mark.parametrize(
    "wrong",
    [{}, [], {"loads": {}}, body(), body(load(), load()), body(load(num_running_reqs=-1)), {"loads": [1]}],
    ids=["none", "array", "no array", "nobody", "twice", "below nothing", "no object"],
)
def test_what_is_no_load_is_not_taken_for_an_idle_one(wrong: object) -> None:
    with pytest.raises(BadField):
        read_loads(wrong)


def test_dp_ranks_are_told_apart_where_they_are_those_of_the_instance_and_counted_together_where_not() -> None:
    loads = read_loads(body(load(0), load(1, at=999.0, num_running_reqs=3)))
    assert [load_of(loads, dp, 2) for dp in (0, 1)] == [Load(0, 1000.0), Load(3, 999.0)]
    assert load_of(loads, 0, 1) == load_of(loads, 3, 4) == Load(3, 999.0)
    assert load_of({}, 0, 1) is None


QUIET = [(float(s), Load(0, 100.0 + s)) for s in range(6)]


def quiet_for(*told: tuple[float, Load | None]) -> float:
    quiet = Quiet([1])
    for at, said in told:
        quiet.heard(said, at)
    return quiet.for_s(told[-1][0])


def test_it_is_quiet_since_it_first_said_so() -> None:
    assert [quiet_for(*QUIET[: n + 1]) for n in range(6)] == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert Quiet([1]).for_s(99.0) == 0.0


@pytest.mark.parametrize("between", [Load(1, 104.0), None], ids=["busy", "no answer"])
def test_one_request_or_one_answer_that_is_missing_and_it_begins_anew(between: Load | None) -> None:
    assert quiet_for(*QUIET[:4], (4.0, between), (5.0, Load(0, 105.0)), (6.0, Load(0, 106.0))) == 1.0


def test_a_scheduler_that_stands_still_shows_its_last_count_and_is_not_believed() -> None:
    assert quiet_for(*((float(s), Load(0, 100.0)) for s in range(60))) == 0.0


@pytest.mark.parametrize("url", ["loads", "http://{host", "ftp://{host}/", "http://{hots}/"])
def test_a_url_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="drain loads_url is"):
        DrainPolicy(url)
