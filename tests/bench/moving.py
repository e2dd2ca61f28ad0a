"""
Whole rooms from a prefill to a decode process: pdctl's nodes beside the bare engine and beside stock SGLang.

The clock runs from the moment that all rooms, whose pages decode has named, are given to be sent, until decode knows
the last of them as a success; for the bare engine, until its last block has ended. Pages are scattered at both sides,
so that each is a block of its own. Bytes are compared before anything is timed. The last row is of a decode of twice
the TP, for which each token is a slice; bare gives the engine a block a slice, as stock does.

A pair of processes may be a quarter faster than the next that is the same in everything, for as long as it lives: so
all are started several times, and the rounds of all starts count together.

MOVING="4 KiB,slices" takes only those.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import statistics
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tests.bench.movers import Form
from tests.bench.rivals import Row
from tests.engine.processes import Child
from tests.service import service
from tests.wire.stock.conftest import environment, installed

STARTS, ROUNDS = 3, 3
BARE = (16, 64)  # blocks in flight: MOONCAKE_FACTS 3.6 has no winner between them, so the faster one counts
QUEUES = {  # stock fails rooms of more than 2,048 blocks without: the engine's own limits
    "MC_TCP_MAX_QUEUED_TRANSFERS_PER_PEER": "65535",
    "MC_TCP_MAX_PENDING_ADMISSIONS_PER_PEER": "65535",
    "MC_TCP_ADMISSION_TIMEOUT_MS": "600000",
}


@dataclass(frozen=True, slots=True)
class Case:
    """`rooms`: how many at once, and of how many pages each. `theirs`: the decode's pool where it is another."""

    form: Form
    rooms: dict[int, int]
    theirs: Form | None = None


SLICED = Form(32 << 10, 16, 256, heads=8)
CASES = {
    "4 KiB": Case(Form(4 << 10, 32, 1024), {1: 256, 8: 64, 64: 16}),
    "64 KiB": Case(Form(64 << 10, 32, 256), {1: 128, 8: 32, 64: 4}),
    "1 MiB": Case(Form(1 << 20, 8, 64), {1: 32, 8: 8, 64: 1}),
    "slices": Case(SLICED, {1: 64}, replace(SLICED, nbytes=16 << 10, tp_size=2)),
}


@dataclass(frozen=True, slots=True)
class Rooms:
    """`n` rooms at once, of `pages` each."""

    name: str
    case: Case
    n: int
    pages: int

    @property
    def nbytes(self) -> int:
        form = self.case.theirs or self.case.form
        return self.n * self.pages * form.entries * form.nbytes

    @property
    def blocks(self) -> int:
        a_page = self.case.form.page_size if self.case.theirs else 1
        return self.n * self.pages * self.case.form.entries * a_page

    def jobs(self) -> list[dict[str, Any]]:
        rng = np.random.default_rng(self.n)
        sent, named = (scattered(rng, self.case.form.n_pages, self.n * self.pages) for _ in range(2))
        return [
            {"sent": sent[k : k + self.pages], "named": named[k : k + self.pages], "row": k // self.pages}
            for k in range(0, self.n * self.pages, self.pages)
        ]

    def __str__(self) -> str:
        each = self.nbytes // self.blocks
        kind = f"slices of {each >> 10} KiB" if self.case.theirs else f"blocks of {self.name}"
        return f"{self.n} x {self.blocks // self.n} {kind}"


def scattered(rng: np.random.Generator, n_pages: int, n: int) -> list[int]:
    """No page comes right after the one before it in the pool."""
    order = rng.permutation(n_pages)
    for at in range(1, n_pages):
        if order[at] == order[at - 1] + 1:
            order[[at - 1, at]] = order[[at, at - 1]]
    return [int(page) for page in order[:n]]


def bench() -> list[Row]:
    wanted = [name for name in os.environ.get("MOVING", "").split(",") if name] or list(CASES)
    return [row for name in wanted for row in asyncio.run(rows(name, CASES[name]))]


async def rows(name: str, case: Case) -> list[Row]:
    cells = [Rooms(name, case, n, pages) for n, pages in case.rooms.items()]
    took: dict[int, Took] = {rooms.n: {} for rooms in cells}
    for _ in range(STARTS):
        with ExitStack() as stack:
            rivals = opened(stack, case)
            for rooms in cells:
                for way, each in (await cell(rivals, rooms)).items():
                    took[rooms.n].setdefault(way, []).extend(each)
    return [row for rooms in cells for row in told(rooms, took[rooms.n])]


@dataclass(frozen=True, slots=True)
class Move:
    """All rooms once: seconds in all, of CPU of both processes, and until a room was over, in the mean. Nobody tells
    when those of the bare engine are."""

    took_s: float
    cpu_s: float
    ended_s: float


Took = dict[tuple[str, int], list[Move]]
"""By who moved, and with how many blocks in flight where that is asked for."""


class Pair:
    """A prefill and a decode of one kind, each a process."""

    def __init__(self, prefill: Child, decode: Child, tp_size: int) -> None:
        self.prefill, self.decode, self.tp_size = prefill, decode, tp_size
        self.numbers = itertools.count(1, 1000)

    async def both(self, do: str, **given: Any) -> list[dict[str, Any]]:
        return [await answered(side, do, **given) for side in (self.prefill, self.decode)]

    async def move(self, **how: Any) -> Move:
        first = next(self.numbers)
        await self.both("open", first=first)
        await answered(self.prefill, "ready")
        before = await self.both("used")
        arrived, sent = await asyncio.gather(answered(self.decode, "arrive"), answered(self.prefill, "go", **how))
        after = await self.both("used")
        await self.both("leave")
        cpu_s = sum(late["cpu_s"] - early["cpu_s"] for late, early in zip(after, before, strict=True))
        ends = [at - sent["began"] for at in arrived["ends"] or [sent["ended"]]]
        return Move(max(ends), cpu_s, statistics.mean(ends))

    async def check(self) -> None:
        await answered(self.decode, "wipe")
        await self.move()
        here, there = await self.both("crc", tp_size=self.tp_size)
        if there != here:
            raise AssertionError("other bytes arrived: nothing here is worth timing")


async def answered(side: Child, do: str, **given: Any) -> dict[str, Any]:
    said = await side.ask(do, **given)
    if "error" in said:
        raise AssertionError(f"{do}: {said['error']}")
    return said


def opened(stack: ExitStack, case: Case) -> dict[str, Pair]:
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pdctl-bench-")))
    theirs, found = case.theirs or case.form, {}
    for who in ("pdctl", "bare") if case.theirs else ("pdctl", "bare", "stock"):
        registry = stack.enter_context(service(folder / who, "--journal", "memory:")).url
        prefill = stack.enter_context(child(who, "prefill", case.form, registry))
        found[who] = Pair(prefill, stack.enter_context(child(who, "decode", theirs, registry)), theirs.tp_size)
    found["bare"].prefill.ask_now("meet", **found["bare"].decode.hello, form=asdict(theirs))
    return found


def child(who: str, role: str, form: Form, registry: str) -> Child:
    environ = {} if who == "pdctl" else environment(installed()) | QUEUES
    given = {"who": who, "role": role, "form": asdict(form), "registry": registry}
    return Child("tests.bench.movers", json.dumps(given), environ=environ)


async def cell(rivals: dict[str, Pair], rooms: Rooms) -> Took:
    for pair in rivals.values():
        await pair.both("take", jobs=rooms.jobs())
        await pair.check()
    ways = [(who, 0) for who in rivals if who != "bare"] + [("bare", window) for window in BARE]
    took: Took = {way: [] for way in ways}
    for number in range(ROUNDS):
        for k in range(len(ways)):
            who, window = way = ways[(number + k) % len(ways)]
            took[way].append(await rivals[who].move(**{"window": window} if window else {}))
    return took


def told(rooms: Rooms, took: Took) -> list[Row]:
    bare = min((took["bare", window] for window in BARE), key=median_s)
    named = {who: each for (who, window), each in took.items() if not window} | {"bare": bare}
    for who, each in named.items():
        cpu_s = statistics.median(move.cpu_s for move in each) / rooms.blocks
        over = f", a room over after {statistics.median(move.ended_s for move in each) * 1e3:.0f} ms"
        rate = rooms.nbytes / median_s(each) / 1e9
        print(f"{rooms}: {who} {rate:.3f} GB/s, {cpu_s * 1e6:.0f} us of CPU each{over if who != 'bare' else ''}")
    print(f"{rooms}: {rooms.nbytes >> 20} MiB in all, load {os.getloadavg()[0]:.1f}", flush=True)
    ours = seconds(named["pdctl"])
    return [Row(str(rooms), "pdctl", who, ours, seconds(named[who])) for who in named if who != "pdctl"]


def seconds(rounds: list[Move]) -> tuple[float, ...]:
    return tuple(move.took_s for move in rounds)


def median_s(rounds: list[Move]) -> float:
    return statistics.median(seconds(rounds))
