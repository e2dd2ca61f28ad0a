"""
All ranks of a prefill or a decode instance in one process: `python -m tests.e2e.instance JSON`, driven by JSON lines.

The real nodes, each with its own engine, link and lease; only the model is missing (tests/e2e/model.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from contextlib import AsyncExitStack
from dataclasses import asdict
from typing import Any

import numpy as np

from pdctl.config import Settings
from pdctl.core.comparing import Checksum
from pdctl.core.pairing import Paired
from pdctl.core.transfer import RoomTimeouts
from pdctl.engine.settings import MooncakeSettings
from pdctl.errors import NotReady
from pdctl.node import DecodeNode, PrefillNode, decode_node, prefill_node
from pdctl.sections import NodeSettings, ServeSettings
from tests.e2e.model import Model, Rank, Split
from tests.engine.processes import live, obey


class Prefill:
    def __init__(self, model: Model, seed: int) -> None:
        self.model, self.seed = model, seed
        self.nodes: list[tuple[Rank, PrefillNode]] = []

    async def open(self, stack: AsyncExitStack, settings: Settings, split: Split) -> None:
        self.shares = split.sharded or split.layered
        for seat in sorted(split.shape(self.model).seats()):
            rank = Rank(self.model, split, seat)
            rank.fill(self.seed)
            opening = prefill_node(
                settings, pools=rank.pools, arena=rank.arena.region, seat=seat, shape=split.shape(self.model)
            )
            self.nodes.append((rank, await stack.enter_async_context(opening)))

    async def send(self, room: int, dp: int, chunks: list[list[int]], groups: int = 1, row: int = 1) -> dict[str, Any]:
        """Chunk after chunk, each in so many groups of layers, from every rank of the DP group that is heard."""
        ranks = [(rank, node) for rank, node in self.nodes if rank.seat.dp == dp and (rank.seat.cp == 0 or self.shares)]
        await ranks[0][1].client.announce_room(room, dp)
        await asyncio.gather(*(self._send(rank, node, room, chunks, groups, row) for rank, node in ranks))
        return {}

    async def _send(
        self, rank: Rank, node: PrefillNode, room: int, chunks: list[list[int]], groups: int, row: int
    ) -> None:
        async with node.sender.open(room) as sending:
            await sending.peers_ready()
            layers = sorted({layer for _, layer in rank.entries})
            skipped = sending.prefix_len // self.model.page_size
            for chunk in chunks:
                pages, skipped = chunk[skipped:], max(0, skipped - len(chunk))
                for some in np.array_split(layers, groups):
                    if len(some) and pages:
                        await sending.send(pages, range(int(some[0]), int(some[-1]) + 1))
            await sending.finish(row, state_rows=[[row]] if rank.state else ())

    async def idle(self) -> dict[str, Any]:
        tables = [(it.rooms, it.early, it.quarantine) for it in (node.sender for _, node in self.nodes)]
        return {"left": [str(each) for table in tables for each in table if each]}

    async def registered(self) -> dict[str, Any]:
        async with asyncio.timeout(60):
            while not all(node.registered for _, node in self.nodes):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        return {}


class Decode:
    def __init__(self, model: Model, seed: int) -> None:
        self.model, self.seed = model, seed
        self.nodes: list[tuple[Rank, DecodeNode]] = []

    async def open(self, stack: AsyncExitStack, settings: Settings, split: Split) -> None:
        self.registry = settings.node.registry
        for seat in sorted(split.shape(self.model).seats()):
            rank = Rank(self.model, split, seat)
            opening = decode_node(
                settings,
                pools=rank.pools,
                arena=rank.arena.region,
                shape=split.shape(self.model),
                tp_rank=seat.tp,
                pp_rank=seat.pp,
            )
            self.nodes.append((rank, await stack.enter_async_context(opening)))

    async def receive(
        self, room: int, pages: list[int], sent: list[int], row: int = 3, prefix: int = 0
    ) -> dict[str, Any]:
        """`pages` into which `sent` go; the first `prefix` of both are here already. What is wrong afterwards."""
        for rank, _ in self.nodes:
            rank.begin(sent, pages, prefix, self.seed)
        await asyncio.gather(*(self._receive(rank, node, room, pages, row, prefix) for rank, node in self.nodes))
        return {"wrong": [each for rank, _ in self.nodes for each in rank.wrong(sent, pages, 1, row, self.seed)]}

    async def _receive(self, rank: Rank, node: DecodeNode, room: int, pages: list[int], row: int, prefix: int) -> None:
        async with asyncio.timeout(60):
            paired = await self._pair(node, room)
            arriving = node.receiver.open(
                room,
                paired,
                pages[rank.n_named(prefix) :],
                row,
                prefix_len=prefix * self.model.page_size,
                state_rows=[[row]] if rank.state else (),
            )
            async with arriving as it:
                await it.arrived()

    async def _pair(self, node: DecodeNode, room: int) -> Paired:
        while True:  # until the prefill has said which of its DP ranks has the room
            with contextlib.suppress(NotReady):
                return await node.pair(self.registry, room)
            await asyncio.sleep(0.01)

    async def idle(self) -> dict[str, Any]:
        tables = [(it.rooms, it.quarantine) for it in (node.receiver for _, node in self.nodes)]
        return {"left": [str(each) for table in tables for each in table if each]}


def arguments(
    role: str, model: Model, split: Split, registry: str, seed: int = 5, checksum: Checksum = Checksum.OFFERED
) -> str:
    given = {"role": role, "model": asdict(model), "split": asdict(split), "registry": registry, "seed": seed}
    return json.dumps(given | {"checksum": checksum})


def settings_at(registry: str, checksum: Checksum = Checksum.OFFERED) -> Settings:
    return Settings(
        node=NodeSettings(registry=registry),
        serve=ServeSettings(port=0, grace_s=0.5),
        room=RoomTimeouts(drain_margin_s=0.05, checksum=checksum),
        engine=MooncakeSettings(progress_timeout_s=2, handshake_timeout_s=10.0),  # a busy machine is no dead peer
    )


async def main(given: dict[str, Any]) -> None:
    model, split = Model.of(given["model"]), Split(**given["split"])
    settings = settings_at(given["registry"], Checksum(given["checksum"]))
    instance = (Prefill if given["role"] == "prefill" else Decode)(model, given["seed"])
    async with AsyncExitStack() as stack:
        await instance.open(stack, settings, split)
        await obey(instance, {"ranks": len(instance.nodes)})


if __name__ == "__main__":
    live(main(json.loads(sys.argv[1])))
