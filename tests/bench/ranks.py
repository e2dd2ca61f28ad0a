"""
A rank for the benches, its node in this process or at an agent's socket: `python -m tests.bench.ranks JSON`, asked in
JSON lines.

Rooms are driven from here, many to one question, so that what they take is measured where they are and no line of the
conversation is in it. A room's pages are those of its slot, scattered over the pool, and no two at once share one.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pdctl import config, logs
from pdctl.agent_client import AgentClient, AgentReceiver, AgentSender
from pdctl.config import Settings
from pdctl.core.layout import KvLayout, Pool, RankPools
from pdctl.core.plan import CopyPlan, item_plan
from pdctl.core.route import Seat, Shape
from pdctl.engine import wheel
from pdctl.logs import LogSettings
from pdctl.memory import Arena
from pdctl.node import DecodeNode, PrefillNode, decode_node, prefill_node
from tests.bench.engine import by_hand
from tests.engine.processes import Child, die_with_parent

ROW_NBYTES, BEAT_S = 256, 0.001
_ENGINES: list[Any] = []  # for as long as the process: to destroy one holds the interpreter for a second (H9)


@dataclass(frozen=True)
class Given:
    """`lens[e]` bytes a page of entry e. `socket`: the agent's; None for a node in this process. `shared`: where the
    pool lies that an agent shall map."""

    role: str
    registry: str
    lens: list[int]
    n_pages: int
    n_rows: int = 64
    page_size: int = 16
    seed: int = 0
    socket: str | None = None
    shared: str | None = None

    @property
    def page_nbytes(self) -> int:
        return sum(self.lens)


def rank(given: Given) -> Child:
    return Child("tests.bench.ranks", json.dumps(asdict(given)))


class Memory:
    """A pool and aux rows, private or to be handed over."""

    def __init__(self, given: Given) -> None:
        nbytes = given.n_pages * given.page_nbytes + given.n_rows * ROW_NBYTES + 64 * (len(given.lens) + 1)
        self.arena = Arena(nbytes, shared=None if given.shared is None else Path(given.shared))
        self.kv = [self.arena.array((given.n_pages, nbytes), np.uint8) for nbytes in given.lens]
        self.aux = self.arena.array((given.n_rows, ROW_NBYTES), np.uint8)
        self.pools = RankPools(_pool(self.kv), _pool([self.aux]), KvLayout(page_size=given.page_size))


class Opened(Protocol):
    """What both kinds of rank do with a whole room."""

    @property
    def session(self) -> str: ...

    async def registered(self) -> bool: ...

    async def room(self, room: int, pages: Sequence[int], row: int) -> float:
        """When it was handed over (prefill) or asked for (decode), by the clock that all processes share."""


@dataclass(frozen=True)
class PrefillHere:
    node: PrefillNode

    @property
    def session(self) -> str:
        return self.node.engine.session

    async def registered(self) -> bool:
        return self.node.registered

    async def room(self, room: int, pages: Sequence[int], row: int) -> float:
        async with self.node.sender.open(room) as sending:
            await sending.peers_ready()
            began = time.monotonic()
            await sending.finish(row, pages=pages)
        return began


@dataclass(frozen=True)
class DecodeHere:
    node: DecodeNode
    registry: str

    @property
    def session(self) -> str:
        return self.node.engine.session

    async def registered(self) -> bool:
        return True

    async def room(self, room: int, pages: Sequence[int], row: int) -> float:
        began = time.monotonic()
        paired = await self.node.pair(self.registry, room)
        async with self.node.receiver.open(room, paired, pages, row) as arriving:
            await arriving.arrived()
        return began


@dataclass(frozen=True)
class PrefillThere:
    rank: AgentSender

    @property
    def session(self) -> str:
        return self.rank.session

    async def registered(self) -> bool:
        return bool((await self.rank.status())["registered"])

    async def room(self, room: int, pages: Sequence[int], row: int) -> float:
        began = time.monotonic()
        await self.rank.send(room, pages, row)
        return began


@dataclass(frozen=True)
class DecodeThere:
    rank: AgentReceiver

    @property
    def session(self) -> str:
        return self.rank.session

    async def registered(self) -> bool:
        return True

    async def room(self, room: int, pages: Sequence[int], row: int) -> float:
        began = time.monotonic()
        await self.rank.receive(room, pages, row)
        return began


@asynccontextmanager
async def opened(given: Given, memory: Memory, settings: Settings) -> AsyncIterator[Opened]:
    shape = Shape(1, 1, 1, 1, given.page_size, "uint8")
    if given.socket is None:
        async with _here(given, memory, settings, shape) as it:
            yield it
        return
    async with AgentClient(given.socket) as agent:
        pools, handed = memory.pools, [memory.arena.handed]
        if given.role == "prefill":
            async with agent.prefill(pools, handed, seat=Seat(0, 0, 0, 0), shape=shape) as sender:
                yield PrefillThere(sender)
        else:
            async with agent.decode(pools, handed, shape=shape) as receiver:
                yield DecodeThere(receiver)


@asynccontextmanager
async def _here(given: Given, memory: Memory, settings: Settings, shape: Shape) -> AsyncIterator[Opened]:
    pools, arena = memory.pools, memory.arena.region
    if given.role == "prefill":
        async with prefill_node(settings, pools=pools, arena=arena, seat=Seat(0, 0, 0, 0), shape=shape) as prefill:
            yield PrefillHere(prefill)
    else:
        async with decode_node(settings, pools=pools, arena=arena, shape=shape) as decode:
            yield DecodeHere(decode, given.registry)


class Rank:
    """What can be asked of it."""

    def __init__(self, given: Given, memory: Memory, opened: Opened) -> None:
        self.given, self.memory, self.opened = given, memory, opened
        self.pages = np.random.default_rng(given.seed).permutation(given.n_pages)

    async def registered(self) -> dict[str, Any]:
        async with asyncio.timeout(30):
            while not await self.opened.registered():  # noqa: ASYNC110  the registry's word
                await asyncio.sleep(0.02)
        return {}

    async def rooms(
        self, first: int, count: int, at_once: int, n_pages: int, *, beating: bool = True
    ) -> dict[str, Any]:
        """`count` rooms, `at_once` at a time, each of `n_pages`: when each began and ended, and how late the loop was,
        for which a beat takes 4 % of a core."""
        numbers, times = iter(range(first, first + count)), dict[int, tuple[float, float]]()

        async def go_on(slot: int) -> None:
            for room in numbers:
                began = await self.opened.room(room, self.slot(slot, n_pages), slot)
                times[room] = (began, time.monotonic())

        cpu_s = time.process_time()
        async with beats(every_s=BEAT_S if beating else 1.0) as late, asyncio.TaskGroup() as group:
            for slot in range(at_once):
                group.create_task(go_on(slot))
        return {"times": [times[room] for room in sorted(times)], "late": late, "cpu_s": time.process_time() - cpu_s}

    async def idle(self, seconds: float) -> dict[str, Any]:
        """How late the loop is when there is nothing to do."""
        async with beats() as late:
            await asyncio.sleep(seconds)
        return {"late": late}

    async def bare(self, count: int, session: str, kv: list[int], aux: list[int], n_pages: int) -> dict[str, Any]:
        """The blocks of such a room `count` times by the engine alone, in the shortest way: submit, ask, no sleep."""
        plan = self._plan(kv, aux, n_pages)
        if not _ENGINES:
            import mooncake.engine

            wheel.silence(mooncake.engine)
            _ENGINES.append(mooncake.engine.TransferEngine())
            assert _ENGINES[0].initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") == 0
            assert _ENGINES[0].register_memory(*self._region()) == 0
        took = []
        for _ in range(count):
            began = time.monotonic()
            by_hand(_ENGINES[0], session, plan)
            took.append(time.monotonic() - began)
        return {"took": took}

    async def digest(self, slots: int, n_pages: int) -> dict[str, Any]:
        digest = hashlib.sha256()
        for slot in range(slots):
            for entry in self.memory.kv:
                digest.update(entry[self.slot(slot, n_pages)].tobytes())
            digest.update(self.memory.aux[slot].tobytes())
        return {"sha": digest.hexdigest()}

    def slot(self, number: int, n_pages: int) -> list[int]:
        found: list[int] = self.pages[number * n_pages : (number + 1) * n_pages].tolist()
        assert len(found) == n_pages, "more pages at once than the pool has"
        return found

    def _plan(self, kv: list[int], aux: list[int], n_pages: int) -> CopyPlan:
        """The decode's slot 0 into itself: where exactly does not matter to the engine."""
        pages = self.slot(0, n_pages)
        ours = self.memory.pools
        theirs = Pool(tuple(kv), ours.kv.item_lens, ours.kv.n_items), Pool(tuple(aux), ours.aux.item_lens)
        return CopyPlan.join(
            item_plan(ours.kv, theirs[0], pages, pages, "KV"),
            item_plan(ours.aux, theirs[1], [0], [0], "aux"),
        )

    def _region(self) -> tuple[int, int]:
        return self.memory.arena.region.pointer, self.memory.arena.region.nbytes


@asynccontextmanager
async def beats(every_s: float = BEAT_S) -> AsyncIterator[list[tuple[float, float]]]:
    """Of each beat of a millisecond while the block lasts: by how many seconds it came late, and what the loop's thread
    has computed meanwhile; the rest of the lateness is others', who had the cores or the interpreter."""
    late: list[tuple[float, float]] = []

    async def beat() -> None:
        while True:
            due, own = time.monotonic() + every_s, time.thread_time()
            await asyncio.sleep(every_s)
            late.append((time.monotonic() - due, time.thread_time() - own))

    beating = asyncio.create_task(beat(), name="beats")
    try:
        yield late
    finally:
        beating.cancel()
        await asyncio.wait({beating})


def _pool(arrays: list[np.ndarray]) -> Pool:
    return Pool(tuple(a.ctypes.data for a in arrays), tuple(a.shape[1] for a in arrays), len(arrays[0]))


async def main(given: Given) -> None:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    settings = config.load({"node.registry": given.registry, "serve.port": 0})
    memory = Memory(given)
    if given.role == "prefill":
        rng = np.random.default_rng(given.seed + 1)
        for array in (*memory.kv, memory.aux):
            array[:] = rng.integers(0, 256, array.shape, np.uint8)
    async with opened(given, memory, settings) as it:
        told = Rank(given, memory, it)
        kv, aux = memory.pools.kv.pointers, memory.pools.aux.pointers
        print(json.dumps({"session": it.session, "kv": kv, "aux": aux}), flush=True)
        while line := await reader.readline():
            asked = json.loads(line)
            done = await getattr(told, asked.pop("do"))(**asked)
            print(json.dumps(done), flush=True)
    memory.arena.close()


if __name__ == "__main__":
    die_with_parent()
    logs.configure(LogSettings(level="warning"))
    asyncio.run(main(Given(**json.loads(sys.argv[1]))))
    sys.stdout.flush()
    os._exit(0)
