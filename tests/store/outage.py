"""
The store's master taken away from an engine that reads and writes pages all the time.

`python -m tests.store.outage [SECONDS]` (60) does it in each way there is and says what the engine saw.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field

import numpy as np
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from pdctl.core.kvstore import KVStoreConfig
from pdctl.counts.store import StoreTrafficMetrics
from pdctl.store import master as asking
from pdctl.store.attachment import Attachment, attached
from tests.engine.processes import die_with_parent
from tests.store.conftest import Bench, Kept, bench
from tests.store.master import Master, free_ports, master, until_listens

WAYS = ("killed", "stopped", "cut")
PAGES = 8
Do = Callable[[], object]


@dataclass
class Seen:
    """What one engine saw, in its own clock's seconds from the moment when the master went."""

    calls: int = 0
    hits: int = 0
    hits_away: int = 0
    slowest_s: float = 0.0
    lag_s: float = 0.0
    left_s: float | None = None
    back_s: float | None = None
    wrong: int = 0
    told: list[str] = field(default_factory=list)
    counted: dict[str, float] = field(default_factory=dict)


async def outage(way: str, seconds: float) -> Seen:
    """Readers and writers for 1 s, then without a master for `seconds`, then until pages are hits again."""
    kept = Kept()
    with master() as running, between(running, way) as (reached, leave, come_back):
        try:
            async with engine(kept, running, reached) as (attachment, stand, registry):
                seen = await _through(attachment, stand, seconds, leave, come_back)
                seen.counted = counts(registry)
        finally:
            come_back()
            kept.end()
    return seen


@asynccontextmanager
async def engine(kept: Kept, running: Master, rpc: int) -> AsyncIterator[tuple[Attachment, Bench, CollectorRegistry]]:
    config = KVStoreConfig(f"127.0.0.1:{rpc}", protocol="tcp", master_metrics_port=running.http)
    registry = CollectorRegistry()
    async with kept.open(running, master=f"127.0.0.1:{rpc}") as store, bench(store) as stand:
        asked = attached(store, lambda: asking.ask(config, deadline_s=0.5), metrics=StoreTrafficMetrics(registry))
        async with asked as attachment:
            yield attachment, stand, registry


async def _through(attachment: Attachment, stand: Bench, seconds: float, leave: Do, come_back: Do) -> Seen:
    seen, done = Seen(), asyncio.Event()
    with capture_logs() as told:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(_lag(seen, done))
            for lane in range(4):
                tasks.create_task(_load(attachment, stand, lane, seen, done))
            await asyncio.sleep(1.0)
            leave()
            went = time.monotonic()
            while attachment.is_attached:  # noqa: ASYNC110  nothing tells of it
                await asyncio.sleep(0.005)
            seen.left_s = time.monotonic() - went
            await asyncio.sleep(max(0.0, seconds - seen.left_s))
            come_back()
            back, before = time.monotonic(), seen.hits
            while seen.hits == before and time.monotonic() - back < 30:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
            seen.back_s = time.monotonic() - back if seen.hits > before else None
            done.set()
    seen.told = [line["event"] for line in told if line["event"].startswith("store ")]
    return seen


async def _load(attachment: Attachment, stand: Bench, lane: int, seen: Seen, done: asyncio.Event) -> None:
    """New pages written and read back, over and over; whatever is raised ends the test."""
    first, back = lane * PAGES, 64 + lane * PAGES
    at, sizes = stand.at(*[(first + n,) for n in range(PAGES)])
    there, _ = stand.at(*[(back + n,) for n in range(PAGES)])
    turn = 0
    while not done.is_set():
        turn += 1
        keys = [stand.key(f"{lane}-{turn % 64}-{n}") for n in range(PAGES)]
        began = time.monotonic()
        await attachment.put_pages(keys, at, sizes)
        stand.memory[back * 4096 :][: PAGES * 4096] = 0
        away = not attachment.is_attached
        hits = await attachment.get_pages(keys, there, sizes)
        seen.slowest_s = max(seen.slowest_s, time.monotonic() - began)
        seen.calls += 2
        seen.hits += sum(hits)
        seen.hits_away += sum(hits) if away and not attachment.is_attached else 0
        seen.wrong += sum(hit and not _same(stand, first + n, back + n) for n, hit in enumerate(hits))
        await asyncio.sleep(0.01)


def _same(stand: Bench, one: int, other: int) -> bool:
    return bool(np.array_equal(stand.memory[one * 4096 :][:4096], stand.memory[other * 4096 :][:4096]))


async def _lag(seen: Seen, done: asyncio.Event) -> None:
    while not done.is_set():
        due = time.monotonic() + 0.005
        await asyncio.sleep(0.005)
        seen.lag_s = max(seen.lag_s, time.monotonic() - due)


def counts(registry: CollectorRegistry) -> dict[str, float]:
    found: dict[str, float] = {}
    for metric in registry.collect():
        for sample in metric.samples:
            if sample.name.endswith("_total") and sample.value:
                found["/".join([sample.name, *sample.labels.values()])] = sample.value
    return found


@contextmanager
def between(running: Master, way: str) -> Iterator[tuple[int, Do, Do]]:
    """The port under which the master is reached, and how it goes and comes back."""
    if way == "killed":
        yield running.rpc, running.kill, lambda: None if running.is_running else running.start(wait=False)
    elif way == "stopped":
        yield running.rpc, running.stop, running.resume
    else:
        (port,) = free_ports(1)
        line = subprocess.Popen(
            [sys.executable, "-m", "tests.store.outage", "line", str(port), str(running.rpc)],
            preexec_fn=die_with_parent,
        )
        try:
            until_listens(port)
            yield port, lambda: os.kill(line.pid, signal.SIGSTOP), lambda: os.kill(line.pid, signal.SIGCONT)
        finally:
            line.kill()
            line.wait()


async def line(port: int, to: int) -> None:
    """What lies between an engine and its master: stopped, it takes connections and brings nothing."""

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
        writer.close()

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up, down = await asyncio.open_connection("127.0.0.1", to)
        await asyncio.gather(carry(reader, down), carry(up, writer), return_exceptions=True)

    async with await asyncio.start_server(connect, "127.0.0.1", port) as server:
        await server.serve_forever()


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["line"]:
        asyncio.run(line(int(arguments[1]), int(arguments[2])))
        return 0
    seconds = float(arguments[0]) if arguments else 60.0
    for way in arguments[1:] or WAYS:
        print(way, asyncio.run(outage(way, seconds)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
