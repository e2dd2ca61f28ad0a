"""
What a room of one page takes of the loop of the prefill that sends it, in CPU time of the loop's own thread.

The real sender, its gate and the engine's promises; no wire, and a carrier that has each transfer at rest at the next
turn of the loop. So nothing is in it but our own steps, and the least of many rounds says them on a busy machine too.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import random
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from pdctl.core.address import Endpoint
from pdctl.core.ejection import ProbePolicy
from pdctl.core.layout import KvLayout, Pool, RankPools, Region
from pdctl.core.sessions import SessionTable
from pdctl.core.transfer import RoomTimeouts
from pdctl.core.wire import Metadata, RegisterBuffers
from pdctl.engine.asking import Asking
from pdctl.engine.base import Capabilities, PeerCard
from pdctl.engine.blocks import Lane, Transfer
from pdctl.engine.handshake import Descriptor
from pdctl.engine.promises import PromisedEngine
from pdctl.engine.settings import Patience
from pdctl.metrics import Metrics
from pdctl.prober import Prober
from pdctl.sender import Sender
from tests.bench.rivals import Row

ROUNDS, AT_ONCE = 60, (64, 8, 1)
ENTRIES, PAGES, PAGE_NBYTES, ROWS, ROW_NBYTES = 32, 1024, 4 << 10, 64, 256
HERE, THERE = 1 << 32, 1 << 40  # no byte of it is ever touched
SIZE = ENTRIES * PAGES * PAGE_NBYTES + ROWS * ROW_NBYTES
REPLY, SESSION = Endpoint("127.0.0.1", 7), "127.0.0.1:2"
STEPS = ("opened", "named by decode", "sent", "left")


class Nowhere:
    """A carrier: nothing moves, and all is at rest at once."""

    session, is_open, gathers, engines = "127.0.0.1:1", True, True, 1
    capabilities = Capabilities("nowhere", "1", send_probe=True, async_read=False)

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()

    def has_made(self, engine: int) -> bool:
        return True

    async def register(self, region: Region) -> int:
        return 0

    async def unregister(self, region: Region) -> int:
        return 0

    async def describe(self, session: str, deadline_s: float) -> Descriptor:
        return Descriptor(PeerCard(session, 9, (Region(THERE, SIZE),)), b"")

    async def knock(self, session: str, found: Descriptor, deadline_s: float) -> None: ...

    async def lane(self, session: str, found: Descriptor, engine: int) -> Lane:
        return Lane(itertools.repeat(session))

    def add(self, transfer: Transfer) -> None:
        for _ in transfer.blocks:
            transfer.submitted += 1
        self._loop.call_soon(transfer.settle)

    def nudge(self) -> None: ...

    def own_fault(self, spans: Iterable[Region]) -> str | None:
        return None


async def unheard(to: Endpoint, frames: Sequence[bytes]) -> None:
    await asyncio.sleep(0)


def pools(base: int) -> RankPools:
    kv = Pool(tuple(base + n * PAGES * PAGE_NBYTES for n in range(ENTRIES)), (PAGE_NBYTES,) * ENTRIES, PAGES)
    return RankPools(kv, Pool((base + ENTRIES * PAGES * PAGE_NBYTES,), (ROW_NBYTES,), ROWS), KvLayout(page_size=16))


def bench() -> list[Row]:
    asyncio.run(measure())
    return []


async def measure() -> None:
    metrics, theirs = Metrics(), pools(THERE)
    engine = PromisedEngine(Nowhere(), Patience(1.0, 3600.0, 5.0, 1 << 20))
    await engine.register(Region(HERE, SIZE))
    gate = Prober(SessionTable(ProbePolicy(), random.random), Asking(engine), clock=time.monotonic, metrics=metrics)
    async with Sender(engine, unheard, pools(HERE), 0, gate, RoomTimeouts(), time.monotonic, metrics) as sender:
        said = RegisterBuffers(
            REPLY, SESSION, theirs.kv.pointers, theirs.aux.pointers, 0, 1, PAGE_NBYTES, theirs.kv.item_lens
        )
        sender.handle(said.to_frames())
        numbers = itertools.count(1)
        gc.freeze()
        for n in AT_ONCE:
            rounds = [await rooms(sender, numbers, n) for _ in range(ROUNDS + 2)][2:]
            least, middle = (
                [pick(taken) * 1e6 for taken in zip(*rounds, strict=True)] for pick in (min, statistics.median)
            )
            steps = ", ".join(f"{name} {each:.0f}" for name, each in zip(STEPS, least, strict=True))
            print(f"{n} rooms at once, us of CPU a room: {steps}; {sum(least):.0f} in all (medians {sum(middle):.0f})")


async def rooms(sender: Sender, numbers: Iterator[int], n: int) -> list[float]:
    """Seconds of CPU a room, by step."""
    named = [Metadata(next(numbers), REPLY, SESSION, np.array([2 * k], np.int32), k).to_frames() for k in range(n)]
    opened = [sender.open(int(frames[0])) for frames in named]
    marks = [time.thread_time()]
    for room in opened:
        await room.__aenter__()
    marks.append(time.thread_time())
    for frames in named:
        sender.handle(frames)
    marks.append(time.thread_time())
    await asyncio.gather(*(room.finish(k, pages=[2 * k + 1]) for k, room in enumerate(opened)))
    marks.append(time.thread_time())
    for room in opened:
        await room.__aexit__(None, None, None)
    while len(sender.words.reports):  # noqa: ASYNC110  they have no end that one could wait for
        await asyncio.sleep(0)
    marks.append(time.thread_time())
    return [(late - early) / n for early, late in itertools.pairwise(marks)]
