"""
A million rooms live, then all of them over: what they cost in memory, and for how long the loop serves nobody else.

Each registry in a process of its own, told by its own code: stock's handler and its clean-up, our registrar and its
sweep. A heartbeat beside it says how much of its thread's own time went by between two beats, whoever else is busy on
this machine: the longest stop of each round counts.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from tests.bench.rivals import Row
from tests.wire.stock.conftest import installed

N_ROOMS = 1_000_000
ROUNDS = 7
BEAT_S = 0.0005
ROOT = Path(__file__).parents[2]

Found = dict[str, Any]


def bench() -> list[Row]:
    ours, stock = (found(name) for name in ("ours", "stock"))
    print(f"bytes a room: pdctl {ours['nbytes']:.0f}, stock {stock['nbytes']:.0f}")
    return [
        Row("a million rooms end: longest stop", "pdctl", "stock", tuple(ours["stops_s"]), tuple(stock["stops_s"])),
        Row("announcing a room, no wire", "pdctl", "stock", tuple(ours["puts_s"]), tuple(stock["puts_s"])),
    ]


def found(name: str) -> Found:
    environment = {**os.environ, "PYTHONPATH": f"{installed()}{os.pathsep}{ROOT}"}
    command = (sys.executable, "-m", "tests.bench.rooms", name)
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=True, timeout=600)
    answer: Found = json.loads(done.stdout.splitlines()[-1])
    return answer


# --- in the child


async def measured(
    fill: Callable[[], None], held: Callable[[], int], expire: Callable[[], Coroutine[Any, Any, Any]]
) -> Found:
    before, nbytes = resident(), 0.0
    stops_s: list[float] = []
    puts_s: list[float] = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        fill()
        puts_s.append((time.perf_counter() - began) / N_ROOMS)
        assert held() == N_ROOMS
        nbytes = nbytes or (resident() - before) / N_ROOMS
        cleaner = asyncio.create_task(expire())
        stops_s.append(await longest_stop(lambda: held() == 0))
        cleaner.cancel()
        await asyncio.wait({cleaner})
    return {"nbytes": nbytes, "stops_s": stops_s, "puts_s": puts_s}


async def longest_stop(over: Callable[[], bool]) -> float:
    longest = 0.0
    while not over():
        began = time.thread_time()
        await asyncio.sleep(BEAT_S)
        longest = max(longest, time.thread_time() - began)
    return longest


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def room(number: int) -> int:
    """As large and as scattered as SGLang's: 63 bits."""
    return number * 0x9E37_79B9_7F4A_7C15 + 1 & 2**63 - 1


async def ours() -> Found:
    from pdctl.core.registry import Registry
    from pdctl.core.rooms import RoomBook
    from pdctl.metrics import Metrics
    from pdctl.persistence.memory import MemoryJournal
    from pdctl.registrar import Registrar

    now = 0.0
    book = RoomBook(N_ROOMS)
    registrar = Registrar(Registry(), book, MemoryJournal(), Metrics(), lambda: now)

    def fill() -> None:
        for place in range(N_ROOMS):
            book.put(room(place), place % 8, now + place / 20_000)

    async def expire() -> None:
        nonlocal now
        now += 10_000.0
        await registrar.sweep()

    return await measured(fill, lambda: len(book), expire)


async def stock() -> Found:
    from tests.bench.registries import Said, stock_class

    class Quiet(stock_class()):  # type: ignore[misc]  # what it is is known at run time only
        def run(self) -> None:
            """In this loop, not in a thread of its own."""

    server = Quiet("127.0.0.1", 0)
    server.entry_cleanup_interval = 0.2

    def fill() -> None:
        for place in range(N_ROOMS):
            step(server._handle_register_dp_rank(Said({"bootstrap_room": room(place), "dp_rank": place % 8})))

    return await measured(fill, lambda: len(server.room_to_dp_rank), server._cleanup_expired_entries)


def step(handler: Coroutine[Any, Any, Any]) -> None:
    """Run a handler that waits for nothing."""
    try:
        handler.send(None)
    except StopIteration:
        return
    raise RuntimeError("the handler waits for something")


if __name__ == "__main__":
    import uvloop

    print(json.dumps(uvloop.run({"ours": ours, "stock": stock}[sys.argv[1]]())))
