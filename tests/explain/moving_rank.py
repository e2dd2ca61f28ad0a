"""A rank of pdctl with a real engine, seen in a registry: `python -m tests.explain.moving_rank JSON`, JSON lines."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

from pdctl.config import Settings
from pdctl.core.ejection import ProbePolicy
from pdctl.core.pairing import Paired
from pdctl.core.route import Seat
from pdctl.errors import PdctlError
from pdctl.node import DecodeNode, PrefillNode, decode_node, prefill_node
from pdctl.sections import NodeSettings
from tests.e2e.instance import settings_at
from tests.e2e.model import Model, Rank, Split
from tests.engine.processes import live, obey

MODEL, SPLIT, SEAT = Model(), Split(), Seat(0, 0, 0, 0)
PAGES = [2, 5, 7]


class Prefill:
    def __init__(self, node: PrefillNode) -> None:
        self.node = node

    async def named(self) -> dict[str, Any]:
        """Returns when a decode has named the pages of a room that is not open here yet."""
        async with asyncio.timeout(60):
            while not len(self.node.sender.early):  # noqa: ASYNC110 - it comes over a socket
                await asyncio.sleep(0.01)
        return {}

    async def send(self, room: int) -> dict[str, Any]:
        """How the room has ended."""
        try:
            async with self.node.sender.open(room) as sending:
                await sending.peers_ready()
                await sending.send(PAGES)
                await sending.finish(1)
        except PdctlError as error:
            return {"ended": str(error)}
        return {"ended": "success"}


class Decode:
    def __init__(self, node: DecodeNode, registry: str) -> None:
        self.node, self.registry = node, registry
        self.rooms: set[asyncio.Task[None]] = set()

    async def receive(self, room: int) -> dict[str, Any]:
        """Beside the commands: whoever stops this process wants it in the middle of a room."""
        paired = await self.node.pair(self.registry, room)
        task = asyncio.create_task(self._receive(room, paired))
        self.rooms.add(task)
        task.add_done_callback(self.rooms.discard)
        return {}

    async def _receive(self, room: int, paired: Paired) -> None:
        with contextlib.suppress(PdctlError):
            async with self.node.receiver.open(room, paired, PAGES, 3) as arriving:
                await arriving.arrived()


def settings_of(given: dict[str, str]) -> Settings:
    """A link that is out stays out for as long as a test looks at it."""
    usual = settings_at(given["registry"])
    node = NodeSettings(
        registry=given["registry"], instance=given["name"], decode_instance=given["name"], report_every_s=0.3
    )
    return usual.model_copy(
        update={
            "node": node,
            "probe": ProbePolicy(interval_s=0.5, max_interval_s=1.0, deadline_s=0.5, hold_s=60.0),
            "engine": replace(usual.engine, progress_timeout_s=1),
        }
    )


async def main(given: dict[str, str]) -> None:
    settings, rank = settings_of(given), Rank(MODEL, SPLIT, SEAT)
    rank.fill(5)
    shape = SPLIT.shape(MODEL)
    async with AsyncExitStack() as stack:
        if given["role"] == "prefill":
            opening = prefill_node(settings, pools=rank.pools, arena=rank.arena.region, seat=SEAT, shape=shape)
            prefill = await stack.enter_async_context(opening)
            await obey(Prefill(prefill), {"session": prefill.engine.session})
        else:
            opened = decode_node(
                settings, pools=rank.pools, arena=rank.arena.region, shape=shape, registry=given["registry"]
            )
            decode = await stack.enter_async_context(opened)
            await obey(Decode(decode, given["registry"]), {"session": decode.engine.session})


if __name__ == "__main__":
    live(main(json.loads(sys.argv[1])))
