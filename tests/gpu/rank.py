"""
A rank whose KV pool is on a device: `python -m tests.gpu.rank JSON`, driven by JSON lines.

In its own process (`way` node: prefill_node, decode_node) or by the agent (`way` agent: CUDA IPC). Memory is allocated
and filled by the driver's own calls, so that nothing but the driver and Mooncake's wheel is wanted on the machine.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pdctl import config, logs
from pdctl.agent_client import AgentClient, AgentReceiver, AgentSender
from pdctl.arrays import pool_of
from pdctl.core.handover import Handed
from pdctl.core.layout import KvLayout, RankPools, Region
from pdctl.core.plan import CopyPlan
from pdctl.core.route import Seat, Shape
from pdctl.device.cuda import Cuda
from pdctl.device.open import open_device
from pdctl.engine.mooncake import open_mooncake
from pdctl.engine.settings import MooncakeSettings
from pdctl.logs import LogSettings
from pdctl.memory import Arena
from pdctl.node import DecodeNode, PrefillNode, decode_node, prefill_node
from tests.agent_engine import ABSENT, expected
from tests.device.paper import allocate, read, write
from tests.engine.processes import die_with_parent, obey

N_PAGES, PAGE_NBYTES, N_ENTRIES, N_ROWS, ROW_NBYTES = 64, 32 << 10, 4, 8, 48
SHAPE = Shape(1, 1, 1, 1, 4, "uint8")

Bytes = npt.NDArray[np.uint8]


class Rows:
    """Rows of a device's memory, as any library of arrays shows them."""

    def __init__(self, pointer: int) -> None:
        shape = (N_PAGES, PAGE_NBYTES)
        self.__cuda_array_interface__ = {"shape": shape, "typestr": "|u1", "data": (pointer, False), "version": 3}


class Memory:
    """Two layers of K and V on the device, two of them in one allocation; aux rows on the host."""

    def __init__(self, device: Cuda, shared: Path | None) -> None:
        self.device, nbytes = device, N_PAGES * PAGE_NBYTES
        one, two, both = (
            allocate(device.driver, nbytes),
            allocate(device.driver, nbytes),
            allocate(device.driver, 3 * nbytes),
        )
        self.kv = [one, two, Region(both.pointer, nbytes), Region(both.pointer + 2 * nbytes, nbytes)]
        self.arena = Arena(N_ROWS * ROW_NBYTES, shared=shared)
        self.aux = self.arena.array((N_ROWS, ROW_NBYTES), np.uint8)
        kv = pool_of(device, [Rows(region.pointer) for region in self.kv], "kv")
        assert kv.on == device.spec
        self.pools = RankPools(kv, pool_of(device, [self.aux], "aux"), KvLayout(page_size=4))

    @property
    def regions(self) -> list[Region]:
        return [*self.kv, self.arena.region]

    def handed(self) -> list[Handed]:
        return [*(self.device.share(region) for region in self.kv), self.arena.handed]

    def fill(self) -> None:
        for entry, region in enumerate(self.kv):
            write(self.device.driver, region.pointer, _pages(entry).tobytes())
        self.aux[:] = np.arange(N_ROWS)[:, None] + 100

    def clear(self) -> None:
        for region in self.kv:
            write(self.device.driver, region.pointer, bytes([ABSENT]) * region.nbytes)
        self.aux[:] = ABSENT

    def wrong(self, sent: list[int], named: list[int], row: int) -> list[str]:
        """Where something else stands than was sent, or anything where nothing was."""
        found = []
        for entry, region in enumerate(self.kv):
            want = np.full((N_PAGES, PAGE_NBYTES), ABSENT, np.uint8)
            want[named] = _pages(entry)[sent]
            if read(self.device.driver, region) != want.tobytes():
                found.append(f"entry {entry}")
        return found + ([] if (self.aux[row] == 101).all() else ["aux"])


def _pages(entry: int) -> Bytes:
    return expected(entry, np.empty((N_PAGES, PAGE_NBYTES), np.uint8))


class Rank:
    def __init__(self, memory: Memory, given: dict[str, Any], stack: AsyncExitStack) -> None:
        self.memory, self.given, self.stack = memory, given, stack
        self.rank: PrefillNode | DecodeNode | AgentSender | AgentReceiver

    async def open(self) -> dict[str, Any]:
        self.rank = await self.stack.enter_async_context(
            self._by_agent() if self.given["way"] == "agent" else self._as_node()
        )
        return {"session": self.rank.engine.session if isinstance(self.rank, PrefillNode | DecodeNode) else ""}

    @asynccontextmanager
    async def _as_node(self) -> AsyncIterator[PrefillNode | DecodeNode]:
        flags = {"node.registry": self.given["registry"], "node.accelerator": str(self.memory.device.spec)}
        settings = config.load(flags | {"room.drain_margin_s": 0.05} | self.given.get("flags", {}))
        pools, arena, device = self.memory.pools, self.memory.regions, self.memory.device
        if self.given["role"] == "prefill":
            async with prefill_node(
                settings, pools=pools, arena=arena, seat=Seat(0, 0, 0, 0), shape=SHAPE, device=device
            ) as prefill:
                yield prefill
            return
        async with decode_node(settings, pools=pools, arena=arena, shape=SHAPE, device=device) as decode:
            yield decode

    @asynccontextmanager
    async def _by_agent(self) -> AsyncIterator[AgentSender | AgentReceiver]:
        pools, memory = self.memory.pools, self.memory.handed()
        async with AgentClient(self.given["socket"]) as agent:
            if self.given["role"] == "prefill":
                async with agent.prefill(pools, memory, seat=Seat(0, 0, 0, 0), shape=SHAPE) as sender:
                    yield sender
                return
            async with agent.decode(pools, memory, shape=SHAPE) as receiver:
                yield receiver

    async def registered(self) -> dict[str, Any]:
        async with asyncio.timeout(30):
            while not await self._is_registered():  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        return {}

    async def _is_registered(self) -> bool:
        if isinstance(self.rank, PrefillNode | DecodeNode):
            return self.rank.registered
        return bool((await self.rank.status())["registered"])

    async def send(self, room: int, chunks: list[list[int]]) -> dict[str, Any]:
        assert isinstance(self.rank, PrefillNode | AgentSender)
        opening = self.rank.room(room) if isinstance(self.rank, AgentSender) else self.rank.sender.open(room)
        async with opening as sending:
            await sending.peers_ready()
            for chunk in chunks:
                await sending.send(chunk)
            await sending.finish(1)
        return {}

    async def receive(self, room: int, pages: list[int], sent: list[int]) -> dict[str, Any]:
        self.memory.clear()
        if isinstance(self.rank, DecodeNode):
            paired = await self.rank.pair(self.given["registry"], room)
            async with self.rank.receiver.open(room, paired, pages, 3, 0, lambda _: None) as arriving:
                await arriving.arrived()
        else:
            assert isinstance(self.rank, AgentReceiver)
            await self.rank.receive(room, pages, 3)
        return {"wrong": self.memory.wrong(sent, pages, 3)}

    async def engine(self) -> dict[str, Any]:
        """An engine alone, by the protocol that was given; the device's memory is all that it registers."""
        settings = MooncakeSettings(protocol=self.given["protocol"])
        self.alone = await self.stack.enter_async_context(open_mooncake(settings, self.memory.device))
        for region in self.memory.kv:
            await self.alone.register(region)
        return {"session": self.alone.session, "pointers": [region.pointer for region in self.memory.kv]}

    async def with_host(self) -> dict[str, Any]:
        """As much memory of the host beside it."""
        self.host = self.stack.enter_context(Arena(self.memory.kv[0].nbytes))
        await self.alone.register(self.host.region)
        return {"pointer": self.host.region.pointer}

    async def write_to(self, session: str, pointers: list[int]) -> dict[str, Any]:
        """All entries to a peer's."""
        regions = zip(self.memory.kv, pointers, strict=True)
        plan = CopyPlan.of(*((region.pointer, there, region.nbytes) for region, there in regions))
        await self.alone.write(session, plan, deadline_s=20)
        return {}

    async def timed(self, session: str, pointer: int, nbytes: int, n: int, host: bool) -> dict[str, Any]:
        """Seconds for `n` writes of so many bytes each, one after another."""
        mine, loop = self.host.region if host else self.memory.kv[0], asyncio.get_running_loop()
        plan = CopyPlan.of((mine.pointer, pointer, nbytes))
        began = loop.time()
        for _ in range(n):
            await self.alone.write(session, plan, deadline_s=20)
        return {"seconds": (loop.time() - began) / n}

    async def all_there(self) -> dict[str, Any]:
        every = list(range(N_PAGES))
        self.memory.aux[3] = 101
        return {"wrong": self.memory.wrong(every, every, 3)}

    async def clear(self) -> dict[str, Any]:
        self.memory.clear()
        return {}

    async def leave(self) -> dict[str, Any]:
        await self.stack.aclose()
        self.memory.arena.close()
        return {}


async def main(given: dict[str, Any]) -> None:
    async with open_device(given.get("device", "cuda:0")) as device, AsyncExitStack() as stack:
        assert isinstance(device, Cuda)
        memory = Memory(device, Path(given["shared"]) if "shared" in given else None)
        memory.fill()
        rank = Rank(memory, given, stack)
        await obey(rank, {"device": device.uuid})


if __name__ == "__main__":
    die_with_parent()
    logs.configure(LogSettings())
    asyncio.run(main(json.loads(sys.argv[1])))
    sys.stdout.flush()
    os._exit(0)
