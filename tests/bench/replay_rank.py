"""
A prefill or a decode engine of the replay: `python -m tests.bench.replay_rank JSON`, asked in JSON lines, many at once.

The real node in this process; only the model is missing. A page holds one block of the trace, and what its bytes must
be follows from the block's hash: so decode can tell of every request whether all is here, also of the blocks that it
had kept from requests before.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import stat
import sys
import time
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pdctl import config, logs
from pdctl.core.layout import KvLayout, Pool, RankPools
from pdctl.core.route import Seat, Shape
from pdctl.demo.talk import Answer, Request, converse, tell
from pdctl.errors import CallerError
from pdctl.logs import LogSettings
from pdctl.memory import Arena
from pdctl.node import DecodeNode, PrefillNode, decode_node, prefill_node

PAGE_SIZE = 16  # tokens a page, for the wire; a block of the trace is one page
ROW_NBYTES, N_ROWS = 64, 64
CHUNK = 16  # pages that prefill computes, and then sends


@dataclass(frozen=True)
class Given:
    """`settings`: of pdctl, by dotted names."""

    role: str
    settings: dict[str, str]
    entries: int = 8
    item_nbytes: int = 16 << 10
    n_pages: int = 1024


def arguments(given: Given) -> str:
    return json.dumps(asdict(given))


class Memory:
    def __init__(self, given: Given) -> None:
        nbytes = given.entries * (given.n_pages * given.item_nbytes + 64) + N_ROWS * ROW_NBYTES + 64
        self.arena = Arena(nbytes)
        self.kv = [self.arena.array((given.n_pages, given.item_nbytes // 8), np.uint64) for _ in range(given.entries)]
        self.aux = self.arena.array((N_ROWS, ROW_NBYTES // 8), np.uint64)
        self.pools = RankPools(_pool(self.kv), _pool([self.aux]), KvLayout(page_size=PAGE_SIZE))
        self._base = np.arange(given.item_nbytes // 8, dtype=np.uint64) * np.uint64(0x9E37_79B9_7F4A_7C15)

    def fill(self, pages: Sequence[int], hashes: Sequence[int]) -> None:
        for entry, array in enumerate(self.kv):
            array[pages] = self._content(entry, hashes)

    def wrong(self, pages: Sequence[int], hashes: Sequence[int]) -> list[int]:
        """Places among `pages` where other bytes stand."""
        same = [(array[pages] == self._content(entry, hashes)).all(axis=1) for entry, array in enumerate(self.kv)]
        return [int(at) for at in np.flatnonzero(~np.all(same, axis=0))]

    def _content(self, entry: int, hashes: Sequence[int]) -> npt.NDArray[np.uint64]:
        mixed = np.asarray(hashes, np.uint64) * np.uint64(0xC2B2_AE3D_27D4_EB4F) + np.uint64(entry * 7919 + 1)
        return mixed[:, None] ^ self._base


class Places:
    """Pages, or rows: those that nobody has. Who wants more than there are waits; `spare` may find some."""

    def __init__(self, n: int, spare: Callable[[int], list[int]] = lambda _: []) -> None:
        self.free, self._spare = list(range(n)), spare
        self._news = asyncio.Condition()

    async def take(self, n: int) -> list[int]:
        async with self._news:
            while len(self.free) < n:
                self.free += self._spare(n - len(self.free))
                if len(self.free) < n:
                    await self._news.wait()
            taken, self.free = self.free[-n:] if n else [], self.free[: len(self.free) - n]
            return taken

    def give(self, places: Sequence[int]) -> None:
        self.free += places
        _BESIDE.add(task := asyncio.ensure_future(self._tell()))
        task.add_done_callback(_BESIDE.discard)

    async def _tell(self) -> None:
        async with self._news:
            self._news.notify_all()


_BESIDE: set[asyncio.Future[None]] = set()


class Engine:
    """What both kinds have: memory, and the rooms under way as tasks, so that each can be given up."""

    def __init__(self, given: Given, memory: Memory) -> None:
        self.given, self.memory = given, memory
        self.rows = Places(N_ROWS)
        self.under_way: dict[int, asyncio.Task[Answer]] = {}

    async def run(self, request: Request) -> Answer:
        """One room, to its end, or to its `abort`."""
        room = int(request["room"])
        task = self.under_way[room] = asyncio.create_task(self.room(**request), name=f"room {room}")
        try:
            await asyncio.wait({task})
        finally:
            task.cancel()
            del self.under_way[room]
        return {"error": "given up", "kind": "RoomFailed"} if task.cancelled() else task.result()

    async def abort(self, request: Request) -> Answer:
        if (task := self.under_way.get(int(request["room"]))) is not None:
            task.cancel()
        return {}

    async def room(self, room: int, hashes: list[int], **more: Any) -> Answer:
        raise CallerError(f"room {room}: this engine does nothing with {len(hashes)} blocks, {more}")

    def left(self) -> list[str]:
        return []

    async def idle(self, request: Request) -> Answer:
        """Wait until nothing of any room is left; what is, when the time is over."""
        with suppress(TimeoutError):
            async with asyncio.timeout(float(request["within_s"])):
                while self.left():  # noqa: ASYNC110  tables of several
                    await asyncio.sleep(0.02)
        return {"left": self.left()}

    async def cut(self, request: Request) -> Answer:
        """End every connection that this process has with other engines, again and again: the link is cut."""
        n, until = 0, time.monotonic() + float(request["seconds"])
        while time.monotonic() < until:
            n += _end_connections(frozenset(request["spared_ports"]))
            await asyncio.sleep(0.02)
        return {"ended": n}


class Prefill(Engine):
    def __init__(self, given: Given, memory: Memory, node: PrefillNode) -> None:
        super().__init__(given, memory)
        self.node, self.pages = node, Places(given.n_pages)

    async def room(self, room: int, hashes: list[int], **_: Any) -> Answer:
        taken = list[int]()
        (row,) = await self.rows.take(1)

        def release(_: object) -> None:
            self.pages.give(taken)
            self.rows.give([row])

        self.memory.aux[row] = room
        async with self.node.sender.open(room, release=release) as sending:
            await sending.peers_ready()
            new = hashes[sending.prefix_len // PAGE_SIZE :]
            for start in range(0, len(new), CHUNK):
                chunk = new[start : start + CHUNK]
                pages = await self.pages.take(len(chunk))
                taken += pages
                self.memory.fill(pages, chunk)
                await sending.send(pages)
            await sending.finish(row)
        return {"sent": len(new)}

    def left(self) -> list[str]:
        sender = self.node.sender
        tables = {"rooms": sender.rooms, "early": sender.early, "quarantine": sender.quarantine}
        found = [f"{len(table)} in {name}" for name, table in tables.items() if table]
        missing = self.given.n_pages - len(self.pages.free)
        return found + ([f"{missing} pages"] if missing else [])


class Decode(Engine):
    def __init__(self, given: Given, memory: Memory, node: DecodeNode) -> None:
        super().__init__(given, memory)
        self.node, self.pages = node, Places(given.n_pages, self._evict)
        self.kept: OrderedDict[int, int] = OrderedDict()  # a block's hash -> its page
        self.pinned: Counter[int] = Counter()

    async def room(self, room: int, hashes: list[int], registry: str = "", **_: Any) -> Answer:
        had = self._prefix(hashes)
        self.pinned.update(had)
        try:
            return await self._receive(room, hashes, had, registry)
        finally:
            self.pinned.subtract(had)
            self.pinned += Counter()

    async def _receive(self, room: int, hashes: list[int], had: list[int], registry: str) -> Answer:
        pages, new = await self.pages.take(len(hashes) - len(had)), hashes[len(had) :]
        (row,) = await self.rows.take(1)
        arrived = False

        def release(_: object) -> None:
            self.rows.give([row])
            self.pages.give(self._keep(pages, new) if arrived else pages)

        began = time.monotonic()
        try:
            paired = await self.node.pair(registry, room)
        except BaseException:
            release(None)
            raise
        prefix_len = len(had) * PAGE_SIZE
        async with self.node.receiver.open(room, paired, pages, row, prefix_len, release) as arriving:
            await arriving.arrived()
            took_s = time.monotonic() - began
            wrong = self.memory.wrong([*(self.kept[each] for each in had), *pages], hashes)
            if not (self.memory.aux[row] == room).all():
                wrong.append(-1)
            arrived = not wrong
        return {"took_s": took_s, "had": len(had), "wrong": wrong, "nbytes": len(new) * _page_nbytes(self.given)}

    def _prefix(self, hashes: list[int]) -> list[int]:
        """Blocks at the beginning that are here already; never all: the last one's page is always sent."""
        had = []
        for each in hashes[:-1]:
            if each not in self.kept:
                break
            self.kept.move_to_end(each)
            had.append(each)
        return had

    def _keep(self, pages: list[int], hashes: list[int]) -> list[int]:
        """Those that are not wanted: their blocks are here already."""
        spare = []
        for page, each in zip(pages, hashes, strict=True):
            if each in self.kept:
                spare.append(page)
            else:
                self.kept[each] = page
        return spare

    def _evict(self, n: int) -> list[int]:
        oldest = [each for each in self.kept if not self.pinned[each]][:n]
        return [self.kept.pop(each) for each in oldest]

    def left(self) -> list[str]:
        receiver = self.node.receiver
        tables = {"rooms": receiver.rooms, "quarantine": receiver.quarantine}
        found = [f"{len(table)} in {name}" for name, table in tables.items() if table]
        missing = self.given.n_pages - len(self.pages.free) - len(self.kept)
        return found + ([f"{missing} pages"] if missing else [])


def _end_connections(spared_ports: frozenset[int]) -> int:
    """Shut every TCP connection of this process down, at its own sockets; not those with ports to be spared."""
    n = 0
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            if not stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                continue
            with socket.socket(fileno=os.dup(int(name))) as sock:
                if sock.family in (socket.AF_INET, socket.AF_INET6) and sock.getpeername()[1] not in spared_ports:
                    sock.shutdown(socket.SHUT_RDWR)
                    n += 1
    return n


def _page_nbytes(given: Given) -> int:
    return given.entries * given.item_nbytes


def _pool(arrays: list[npt.NDArray[np.uint64]]) -> Pool:
    return Pool(tuple(a.ctypes.data for a in arrays), tuple(a.shape[1] * 8 for a in arrays), len(arrays[0]))


async def _serve(engine: Engine, registered: Callable[[], bool]) -> None:
    async def ready(_: Request) -> Answer:
        async with asyncio.timeout(60):
            while not registered():  # noqa: ASYNC110  the registry's word
                await asyncio.sleep(0.01)
        return {}

    ops: dict[str, Callable[[Request], Awaitable[Answer]]] = {
        "room": engine.run, "abort": engine.abort, "idle": engine.idle, "cut": engine.cut, "ready": ready,
    }  # fmt: skip
    tell("opened")
    await converse(lambda request: ops[request.pop("op")](request), sys.stdin.buffer)


async def main(given: Given) -> None:
    settings, memory = config.load({"serve.port": 0, **given.settings}), Memory(given)
    shape, arena = Shape(1, 1, 1, 1, PAGE_SIZE, "uint8"), memory.arena.region
    if given.role == "prefill":
        opening = prefill_node(settings, pools=memory.pools, arena=arena, seat=Seat(0, 0, 0, 0), shape=shape)
        async with opening as prefill:
            await _serve(Prefill(given, memory, prefill), lambda: prefill.registered)
    else:
        async with decode_node(settings, pools=memory.pools, arena=arena, shape=shape) as decode:
            await _serve(Decode(given, memory, decode), lambda: True)


if __name__ == "__main__":
    logs.configure(LogSettings())
    asyncio.run(main(Given(**json.loads(sys.argv[1]))))
    sys.stdout.flush()
    os._exit(0)
