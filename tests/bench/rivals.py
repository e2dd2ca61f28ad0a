"""
Two ways to do one thing, timed in turns.

Turns, because a shared machine drifts: what slows one round slows both. Nothing is timed before both have been shown
to give the same result.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

ROUNDS = 9


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the bench: the same work by `ours` and by `rival`; the times are seconds a call, one a round.

    Where memory is compared, `unit` is "B" and the numbers are bytes.
    """

    what: str
    ours: str
    rival: str
    ours_s: tuple[float, ...]
    rival_s: tuple[float, ...]
    unit: str = "s"

    def __post_init__(self) -> None:
        if not len(self.ours_s) == len(self.rival_s) >= 7:
            raise ValueError(f"{self.what}: {len(self.ours_s)} and {len(self.rival_s)} rounds: take 7 or more of both")

    @property
    def ratio(self) -> float:
        """How many times faster ours is: median over median."""
        return statistics.median(self.rival_s) / statistics.median(self.ours_s)

    @property
    def spread(self) -> tuple[float, float]:
        """The lowest and the highest ratio of any single round."""
        ratios = [rival / ours for ours, rival in zip(self.ours_s, self.rival_s, strict=True)]
        return min(ratios), max(ratios)


def race(
    what: str,
    ours: tuple[str, Callable[[], object]],
    rival: tuple[str, Callable[[], object]],
    *,
    rounds: int = ROUNDS,
    round_s: float = 0.05,
) -> Row:
    """Time both in turns, each round about `round_s` long; who begins changes from round to round."""
    sides = [(call, calls_in(call, round_s)) for _, call in (ours, rival)]
    times: list[list[float]] = [[], []]
    for number in range(rounds):
        for side in (0, 1) if number % 2 else (1, 0):
            times[side].append(timed(*sides[side]))
    return Row(what, ours[0], rival[0], tuple(times[0]), tuple(times[1]))


def calls_in(call: Callable[[], object], seconds: float) -> int:
    """How many calls fill `seconds`; the first, cold call is not counted."""
    call()
    return max(1, round(seconds / max(timed(call, 3), 1e-9)))


def timed(call: Callable[[], object], calls: int) -> float:
    """Seconds a call, the collector off as `timeit` has it."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        began = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - began) / calls
    finally:
        if collecting:
            gc.enable()
