"""
Rooms of one page, between a prefill and a decode rank that are processes of their own, with a real registry.

What a room adds to the bare engine call (its blocks submitted and asked for by hand in the prefill's process, nothing
else going on): from the page being handed over to decode knowing that it is here, and all of it, from decode asking who
sends the room. Then 64 rooms at once, and by how much both event loops come late meanwhile.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.bench.ranks import Given, rank
from tests.bench.rivals import Row
from tests.engine.processes import Child
from tests.service import service

MODELS = {"1 entry of 64 KiB": [64 << 10], "32 entries of 4 KiB": [4 << 10] * 32}
ROUNDS, EACH, AT_ONCE, MOVING = 9, 60, 64, 1024
LARGE_PAGES = 16


@dataclass
class Pair:
    """A prefill and a decode that speak to one registry. `movers`: the agents that move for them, if any do."""

    prefill: Child
    decode: Child
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    movers: list[psutil.Process] = field(default_factory=list)

    def rooms(self, count: int, at_once: int, n_pages: int, **how: bool) -> tuple[dict[str, Any], dict[str, Any]]:
        """What both sides say of so many rooms."""
        first = next(self.numbers) * 1_000_000
        with ThreadPoolExecutor(2) as both:
            asked = [
                both.submit(side.ask_now, "rooms", first=first, count=count, at_once=at_once, n_pages=n_pages, **how)
                for side in (self.decode, self.prefill)
            ]
        received, sent = (each.result() for each in asked)
        return sent, received

    def check(self, at_once: int, n_pages: int) -> None:
        self.rooms(at_once, at_once, n_pages)
        found = {side.ask_now("digest", slots=at_once, n_pages=n_pages)["sha"] for side in (self.prefill, self.decode)}
        if len(found) != 1:
            raise AssertionError("other bytes arrived: nothing here is worth timing")


@contextmanager
def pair(lens: list[int], n_pages: int) -> Iterator[Pair]:
    with ExitStack() as stack:
        at = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pdctl-bench-")))
        registry = stack.enter_context(service(at / "log", "--journal", "memory:"))
        sides = [
            stack.enter_context(rank(Given(role, registry.url, lens, n_pages, seed=seed)))
            for seed, role in enumerate(("prefill", "decode"))
        ]
        sides[0].ask_now("registered")
        yield Pair(sides[0], sides[1])


def bench() -> list[Row]:
    rows: list[Row] = []
    for name, lens in MODELS.items():
        with pair(lens, AT_ONCE * LARGE_PAGES) as it:
            it.check(AT_ONCE, 1)
            rows += alone(name, it)
            print(f"{name}: {together(it)}")
    return rows


def alone(name: str, it: Pair) -> list[Row]:
    """Rooms one after another beside the bare call, in turns."""
    where = {key: it.decode.hello[key] for key in ("session", "kv", "aux")}
    bare, handed, whole = list[list[float]](), list[list[float]](), list[list[float]]()
    for number in range(ROUNDS + 1):
        sent, received = it.rooms(EACH, 1, 1)
        once = it.prefill.ask_now("bare", count=EACH, n_pages=1, **where)["took"]
        if number:  # the first is the one that opens connections
            bare.append(once)
            handed.append([end - began for (began, _), (_, end) in zip(sent["times"], received["times"], strict=True)])
            whole.append([end - began for began, end in received["times"]])
    every = {"handed over": handed, "asked for": whole}
    for what, rounds in every.items():
        added = [
            percentile(list(itertools.chain(*rounds)), p) - percentile(list(itertools.chain(*bare)), p)
            for p in (50, 99)
        ]
        print(f"{name}, one page, {what} to arrived: adds {added[0] * 1e3:.2f} ms (p50), {added[1] * 1e3:.2f} ms (p99)")
    return [
        Row(
            f"{name}, one page, {what} to arrived, p{p}",
            "room",
            "bare call",
            tuple(percentile(each, p) for each in rounds),
            tuple(percentile(each, p) for each in bare),
        )
        for what, rounds in every.items()
        for p in (50, 99)
    ]


def together(it: Pair) -> str:
    """How late both loops are while 64 rooms move, small ones and larger ones, and while none does."""
    said = []
    idle = [it.prefill.ask_now("idle", seconds=1.0), it.decode.ask_now("idle", seconds=1.0)]
    said.append(f"idle {lateness(idle)}")
    for n_pages, count in ((1, MOVING), (LARGE_PAGES, MOVING // 4)):
        both = it.rooms(count, AT_ONCE, n_pages)
        begins, ends = zip(*both[1]["times"], strict=True)
        rate = count / (max(ends) - min(begins))
        said.append(f"{AT_ONCE} rooms of {n_pages} page(s) {rate:.0f} rooms/s, {lateness(both)}")
    return "; ".join(said)


def lateness(both: Sequence[dict[str, Any]]) -> str:
    """Of both loops: by how much a beat of a millisecond came late, and for how long their own thread had computed."""
    said = []
    for name, side in zip(("prefill", "decode"), both, strict=True):
        late, own = zip(*side["late"], strict=True)
        said.append(
            f"{name} late by {percentile(late, 99) * 1e3:.1f} (p99; max {max(late) * 1e3:.1f}), "
            f"own {percentile(own, 99) * 1e3:.1f} ({max(own) * 1e3:.1f}) ms"
        )
    return ", ".join(said)


def percentile(values: Sequence[float], p: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[p - 1]
