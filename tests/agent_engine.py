"""
An engine without a transfer engine: `python -m tests.agent_engine JSON`, driven by JSON lines.

It has a pool in shared memory, hands it over to the agent at a socket, and computes what the pages should hold.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pdctl.agent_client import AgentClient, AgentReceiver, AgentSender
from pdctl.core.layout import KvLayout, Pool, RankPools
from pdctl.core.route import Seat, Shape
from pdctl.memory import Arena
from tests.engine.processes import live, obey

N_PAGES, PAGE_NBYTES, N_ENTRIES, N_ROWS, ROW_NBYTES = 64, 512, 4, 8, 48
SHAPE = Shape(1, 1, 1, 1, 4, "uint8")
ABSENT = 0xEE  # in every byte that nobody has sent

Bytes = npt.NDArray[np.uint8]


class Memory:
    """What an engine has: two layers of K and V, aux rows."""

    def __init__(self, shared: str | Path, n_pages: int = N_PAGES, page_nbytes: int = PAGE_NBYTES) -> None:
        nbytes = N_ENTRIES * (n_pages * page_nbytes + 64) + (N_ROWS * ROW_NBYTES + 64)
        self.arena = Arena(nbytes, shared=shared)
        self.kv = [self.arena.array((n_pages, page_nbytes), np.uint8) for _ in range(N_ENTRIES)]
        self.aux = self.arena.array((N_ROWS, ROW_NBYTES), np.uint8)
        self.pools = RankPools(_pool(self.kv), _pool([self.aux]), KvLayout(page_size=4))

    def fill(self) -> None:
        for entry, array in enumerate(self.kv):
            array[:] = expected(entry, array)
        self.aux[:] = np.arange(N_ROWS)[:, None] + 100

    def clear(self) -> None:
        for array in (*self.kv, self.aux):
            array[:] = ABSENT

    def wrong(self, sent: list[int], named: list[int], row: int) -> list[str]:
        """Where something else stands than was sent, or anything where nothing was."""
        found = []
        for entry, array in enumerate(self.kv):
            want = np.full_like(array, ABSENT)
            want[named] = expected(entry, array)[sent]
            if not (array == want).all():
                found.append(f"entry {entry}")
        return found + ([] if (self.aux[row] == 101).all() else ["aux"])


def expected(entry: int, array: Bytes) -> Bytes:
    mixed = np.arange(array.size, dtype=np.uint64) * np.uint64(0x9E37_79B9) + np.uint64(entry * 7919 + 1)
    return (mixed >> np.uint64(11)).astype(np.uint8).reshape(array.shape)


def _pool(arrays: list[Bytes]) -> Pool:
    return Pool(tuple(a.ctypes.data for a in arrays), tuple(a.shape[1] for a in arrays), len(arrays[0]))


class Engine:
    def __init__(self, memory: Memory, stack: AsyncExitStack, agent: AgentClient, given: dict[str, Any]) -> None:
        self.memory, self.stack, self.agent, self.given = memory, stack, agent, given
        self.rank: AgentSender | AgentReceiver
        self.freed: list[int] = []
        self.under_way: list[asyncio.Task[Any]] = []

    async def hand_over(self) -> dict[str, Any]:
        pools, memory, instance = self.memory.pools, [self.memory.arena.handed], self.given.get("instance")
        if self.given["role"] == "prefill":
            prefill = self.agent.prefill(pools, memory, seat=Seat(0, 0, 0, 0), shape=SHAPE, instance=instance)
            self.rank = await self.stack.enter_async_context(prefill)
        else:
            decode = self.agent.decode(pools, memory, shape=SHAPE, instance=instance)
            self.rank = await self.stack.enter_async_context(decode)
        return {"agent_pid": self.rank.agent_pid, "session": self.rank.session}

    async def registered(self) -> dict[str, Any]:
        async with asyncio.timeout(60):
            while not (await self.rank.status())["registered"]:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        return {}

    async def send(self, room: int, chunks: list[list[int]], row: int = 1) -> dict[str, Any]:
        assert isinstance(self.rank, AgentSender)
        async with self.rank.room(room, self.free) as sending:
            await sending.peers_ready()
            *first, last = chunks
            for chunk in first:
                await sending.send(chunk)
            await sending.finish(row, pages=last)
        return {"n_pages": sending.n_pages}

    async def send_at_once(self, room: int, pages: list[int], row: int = 1) -> dict[str, Any]:
        assert isinstance(self.rank, AgentSender)
        await self.rank.send(room, pages, row, release=self.free)
        return {}

    async def open(self, room: int) -> dict[str, Any]:
        """Begin to wait for the room's peers, or its pages; `outcomes` says what came of it."""
        work = self.send(room, [[1]]) if isinstance(self.rank, AgentSender) else self._receive(room, [1, 2], 3)
        self.under_way.append(asyncio.create_task(work))
        return {}

    async def outcomes(self) -> dict[str, Any]:
        found = await asyncio.gather(*self.under_way, return_exceptions=True)
        self.under_way.clear()
        return {"outcomes": [str(each) for each in found]}

    async def cancel(self) -> dict[str, Any]:
        for task in self.under_way:
            task.cancel()
        await asyncio.gather(*self.under_way, return_exceptions=True)
        self.under_way.clear()
        return {}

    async def abort(self, room: int) -> dict[str, Any]:
        await self.rank.abort(room)
        return {}

    async def receive(self, room: int, pages: list[int], sent: list[int], row: int = 3) -> dict[str, Any]:
        self.memory.clear()
        await self._receive(room, pages, row)
        return {"wrong": self.memory.wrong(sent, pages, row)}

    async def _receive(self, room: int, pages: list[int], row: int) -> None:
        assert isinstance(self.rank, AgentReceiver)
        await self.rank.receive(room, pages, row, release=self.free)

    async def status(self) -> dict[str, Any]:
        """What the agent says, and the tickets whose pages this side has not heard to be free."""
        card = await self.rank.status()
        return card | {"held": list(self.rank._stream._held)}

    async def fork(self) -> dict[str, Any]:
        """A child that does nothing, but has all that we have open."""
        if (pid := os.fork()) == 0:
            signal.pause()
        return {"pid": pid}

    async def lost(self) -> dict[str, Any]:
        async with asyncio.timeout(60):
            return {"why": await self.rank.lost()}

    async def free_pages(self) -> dict[str, Any]:
        """Since the last question."""
        freed, self.freed = sorted(self.freed), []
        return {"freed": freed}

    async def leave(self) -> dict[str, Any]:
        """Take the pool back, and its name away."""
        await self.stack.aclose()
        self.memory.arena.close()
        return {}

    def free(self, pages: npt.NDArray[np.int64]) -> None:
        self.freed += pages.tolist()


def arguments(role: str, socket: Path, shared: str | Path, **more: object) -> str:
    where = {"path": str(shared)} if isinstance(shared, Path) else {"name": shared}
    return json.dumps({"role": role, "socket": str(socket), **where, **more})


async def main(given: dict[str, Any]) -> None:
    memory = Memory(Path(given["path"]) if "path" in given else given["name"])
    memory.fill()
    async with AgentClient(given["socket"]) as agent, AsyncExitStack() as stack:
        engine = Engine(memory, stack, agent, given)
        await obey(engine, {"mooncake": any(name.startswith("mooncake") for name in sys.modules)})


if __name__ == "__main__":
    live(main(json.loads(sys.argv[1])))
