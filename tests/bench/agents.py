"""
Rooms of an engine whose pool a `pdctl agent` moves, beside rooms of one whose node is in its own process.

Both pairs live at the same time, two processes each and two agents more for the first, with one registry; rooms are
driven in turns, so that what slows one slows the other. Aim: at least 0.9 x.
"""

from __future__ import annotations

import itertools
import os
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import psutil

from tests.agents import agent
from tests.bench.ranks import Given, rank
from tests.bench.rivals import Row, race
from tests.bench.small import Pair
from tests.service import service

ENTRIES, PAGE_NBYTES, N_PAGES = 16, 64 << 10, 512


def bench() -> list[Row]:
    with pairs() as (there, here):
        return [
            one(there, here, "4 rooms of 64 MiB, 64 pages each, 4 at once", 4, 4, 64),
            one(there, here, "32 rooms of 4 MiB, 4 pages each, 8 at once", 32, 8, 4),
            one(there, here, "256 rooms of one page, 1 MiB, 32 at once", 256, 32, 1),
            one(there, here, "64 rooms of one page, 1 MiB, one after another", 64, 1, 1),
        ]


def one(there: Pair, here: Pair, what: str, count: int, at_once: int, n_pages: int) -> Row:
    for it in (there, here):
        it.check(at_once, n_pages)
    spent = {it: list[list[float]]() for it in ("agent", "in process")}

    def move(who: str, it: Pair) -> None:
        movers = [] if who == "in process" else it.movers
        before = [cpu_s(process) for process in movers]
        sides = it.rooms(count, at_once, n_pages, beating=False)
        engines = [side["cpu_s"] for side in sides]
        agents = [cpu_s(process) - then for process, then in zip(movers, before, strict=True)]
        spent[who].append([taken / count for taken in (*engines, *agents)])

    row = race(
        what,
        ("agent", lambda: move("agent", there)),
        ("in process", lambda: move("in process", here)),
        round_s=0.4,
    )
    for who, rounds in spent.items():
        names = ("prefill", "decode", "prefill's agent", "decode's agent")
        each = [
            f"{name} {statistics.median(taken) * 1e3:.2f}"
            for name, taken in zip(names, zip(*rounds, strict=True), strict=False)
        ]
        print(f"{what}: {who}, ms of CPU a room: {', '.join(each)}")
    print(f"load {os.getloadavg()[0]:.1f}", flush=True)
    return row


def cpu_s(process: psutil.Process) -> float:
    """Of all its threads, to the nanosecond: what psutil knows goes by hundredths of a second."""
    tasks = Path(f"/proc/{process.pid}/task")
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks.iterdir()) / 1e9


@contextmanager
def pairs() -> Iterator[tuple[Pair, Pair]]:
    """Rooms by way of agents, and rooms in process; an instance and a registry of its own for each."""
    with ExitStack() as stack:
        at = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pdctl-bench-")))
        found: list[Pair] = []
        for kind in ("there", "here"):
            registry = stack.enter_context(service(at / f"{kind}.log", "--journal", "memory:"))
            sides, movers = [], list[psutil.Process]()
            for seed, role in enumerate(("prefill", "decode")):
                given = Given(role, registry.url, [PAGE_NBYTES] * ENTRIES, N_PAGES, seed=seed)
                if kind == "there":
                    mover = stack.enter_context(
                        agent(at / role, "--registry", registry.url, PDCTL_LOG__LEVEL="warning")
                    )
                    movers += mover.movers()
                    given = replace(given, socket=str(mover.socket), shared=str(at / f"{role}.kv"))
                sides.append(stack.enter_context(rank(given)))
            sides[0].ask_now("registered")
            found.append(Pair(sides[0], sides[1], itertools.count(len(found) * 1000 + 1), movers))
        yield found[0], found[1]
