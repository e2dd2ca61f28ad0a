"""The door: stock clients always come in, leased ones at a pace, and who is put off is told a place that is free."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdctl.core.admission import Admission, AdmissionPolicy, Lane
from pdctl.errors import ConfigError

PACE = AdmissionPolicy(per_s=100.0, burst=10, longest_s=30.0)


def let_in(door: Admission, lane: Lane, n: int, now: float) -> int:
    return sum(door.ask(lane, now) is None for _ in range(n))


def test_after_a_quiet_time_a_group_comes_in_together_and_no_more() -> None:
    door = Admission(PACE)
    assert let_in(door, Lane.LEASED, 50, now=5.0) == 10
    assert let_in(door, Lane.LEASED, 50, now=5.05) == 5


def test_a_long_quiet_time_does_not_save_up_more_than_a_group() -> None:
    door = Admission(PACE)
    let_in(door, Lane.LEASED, 50, now=5.0)
    assert let_in(door, Lane.LEASED, 50, now=5000.0) == 10


@given(st.lists(st.floats(0, 20), min_size=1, max_size=400))
def test_no_stretch_of_time_lets_in_more_than_the_pace_and_one_group(times: list[float]) -> None:
    door = Admission(PACE)
    came_in = [now for now in sorted(times) if door.ask(Lane.LEASED, now) is None]
    for first, begin in enumerate(came_in):
        for count, end in enumerate(came_in[first:], start=1):
            assert count <= 10 + (end - begin) * 100 + 1e-6


def test_those_put_off_are_spread_over_seconds_in_the_order_in_which_they_asked() -> None:
    door = Admission(PACE)
    told = [after for _ in range(410) if (after := door.ask(Lane.LEASED, 0.0)) is not None]
    assert told == sorted(told)
    assert [told.count(second) for second in range(1, 6)] == [80] * 5  # four of five places are given out


def test_a_place_is_found_free_by_who_comes_when_told() -> None:
    door = Admission(PACE)
    told = [after for n in range(2000) if (after := door.ask(Lane.LEASED, n / 1e4)) is not None]
    spread = sorted(after + (n % 97) / 97 for n, after in enumerate(told, start=1))  # one second's jitter
    put_off_again = sum(door.ask(Lane.LEASED, now) is not None for now in spread)
    assert put_off_again < len(told) * 0.05


def test_nobody_is_told_to_wait_longer_than_the_longest() -> None:
    door = Admission(PACE)
    assert max(after for _ in range(10_000) if (after := door.ask(Lane.LEASED, 0.0)) is not None) == 30


def test_a_stock_client_is_never_put_off() -> None:
    door = Admission(PACE)
    let_in(door, Lane.LEASED, 1000, now=0.0)
    assert let_in(door, Lane.STOCK, 5000, now=0.0) == 5000


def test_stock_clients_take_the_places_of_leased_ones() -> None:
    with_stock, alone = Admission(PACE), Admission(PACE)
    admitted = dict.fromkeys((with_stock, alone), 0)
    for step in range(1000):
        with_stock.ask(Lane.STOCK, step / 100)
        for door in admitted:
            admitted[door] += door.ask(Lane.LEASED, step / 100) is None
    assert admitted[with_stock] < admitted[alone] / 2


def test_however_many_stock_clients_come_leased_ones_come_in_too() -> None:
    door = Admission(PACE)
    admitted = 0
    for step in range(10_000):
        let_in(door, Lane.STOCK, 5, now=step / 1000)
        admitted += door.ask(Lane.LEASED, step / 1000) is None
    assert admitted >= 0.2 * 100 * 10


def test_no_pace_lets_everybody_in() -> None:
    assert let_in(Admission(AdmissionPolicy(per_s=0)), Lane.LEASED, 5000, now=0.0) == 5000


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"per_s": -1.0}, "per_s is -1"),
        ({"per_s": math.inf}, "per_s is inf"),
        ({"burst": 0}, "burst is 0"),
        ({"longest_s": 0.5}, "longest_s is 0.5"),
    ],
    ids=["negative pace", "endless pace", "no burst", "below a second"],
)
def test_a_policy_that_cannot_be_is_refused(wrong: dict[str, float], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        AdmissionPolicy(**wrong)  # type: ignore[arg-type]
