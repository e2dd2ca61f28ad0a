"""
A prefill or a decode node in a process of its own: `python -m tests.monitoring.node ROLE REGISTRY`, by JSON lines.

`begin` opens a room and sends or awaits its page; a prefill that is `held` waits for `go` when the decode has named its
page. `end` waits for the room and says why it failed, if it did.
"""

from __future__ import annotations

import asyncio
import sys
from collections import defaultdict
from collections.abc import Coroutine
from typing import Any

from pdctl.config import Settings
from pdctl.core.comparing import Checksum
from pdctl.core.ejection import ProbePolicy
from pdctl.core.transfer import RoomTimeouts
from pdctl.engine.settings import MooncakeSettings
from pdctl.errors import PdctlError
from pdctl.node import DecodeNode, PrefillNode, decode_node, prefill_node
from pdctl.retry import RetryPolicy
from pdctl.sections import NodeSettings, ServeSettings
from tests.engine.processes import live, obey
from tests.node_rig import FIRST, SHAPE, Memory


class Node:
    def __init__(self) -> None:
        self.rooms: dict[int, asyncio.Task[None]] = {}

    def start(self, room: int, work: Coroutine[Any, Any, None]) -> dict[str, Any]:
        self.rooms[room] = asyncio.create_task(work)
        return {}

    async def end(self, room: int) -> dict[str, str]:
        try:
            await self.rooms.pop(room)
        except PdctlError as error:
            return {"why": str(error)}
        return {"why": ""}


class Prefill(Node):
    def __init__(self, node: PrefillNode) -> None:
        super().__init__()
        self.node = node
        self.named: defaultdict[int, asyncio.Event] = defaultdict(asyncio.Event)
        self.gone: defaultdict[int, asyncio.Event] = defaultdict(asyncio.Event)

    async def begin(self, room: int, held: bool = False) -> dict[str, Any]:
        if not held:
            self.gone[room].set()
        return self.start(room, self._send(room))

    async def is_named(self, room: int) -> dict[str, Any]:
        await self.named[room].wait()
        return {}

    async def go(self, room: int) -> dict[str, Any]:
        self.gone[room].set()
        return {}

    async def _send(self, room: int) -> None:
        async with self.node.sender.open(room) as sending:
            await sending.peers_ready()
            self.named[room].set()
            await self.gone[room].wait()
            await sending.send([3])
            await sending.finish(2)


class Decode(Node):
    def __init__(self, node: DecodeNode, registry: str) -> None:
        super().__init__()
        self.node, self.registry = node, registry

    async def begin(self, room: int) -> dict[str, Any]:
        return self.start(room, self._receive(room))

    async def _receive(self, room: int) -> None:
        at = await self.node.pair(self.registry, room)
        async with self.node.receiver.open(room, at, [room % 16], 1) as arriving:
            await arriving.arrived()


def settings(registry: str) -> Settings:
    return Settings(
        node=NodeSettings(registry=registry, ttl_s=12.0),
        serve=ServeSettings(port=0, grace_s=0.5),
        retry=RetryPolicy(first_wait_s=0.1, max_wait_s=0.5),
        room=RoomTimeouts(drain_margin_s=0.05, checksum=Checksum.OFFERED),
        engine=MooncakeSettings(progress_timeout_s=1),
        probe=ProbePolicy(max_interval_s=0.5, deadline_s=0.5),
    )


async def main(role: str, registry: str) -> None:
    memory, how = Memory(), settings(registry)
    if role == "prefill":
        async with prefill_node(how, **memory.pools, seat=FIRST, shape=SHAPE) as prefill:
            await obey(Prefill(prefill), {"metrics": prefill.metrics_url})
    else:
        async with decode_node(how, **memory.pools, shape=SHAPE, registry=registry) as decode:
            await obey(Decode(decode, registry), {"metrics": decode.metrics_url})


if __name__ == "__main__":
    live(main(*sys.argv[1:]))
