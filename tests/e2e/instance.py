"""
All ranks of a prefill or a decode instance in one process: `python -m tests.e2e.instance JSON`, driven by JSON lines.

The real nodes, each with its own engine, link and lease; only the model is missing. What a byte must be follows from
where it belongs (part, layer, page, token, head, byte), so that each side knows it without asking the other.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pdctl import logs
from pdctl.config import NodeSettings, ServeSettings, Settings
from pdctl.core.layout import Heads, Kind, KvLayout, Pool, RankPools
from pdctl.core.route import Seat, Shape
from pdctl.core.transfer import RoomTimeouts
from pdctl.engine.environment import MooncakeSettings
from pdctl.logs import LogSettings
from pdctl.memory import Arena
from pdctl.node import DecodeNode, PrefillNode, decode_node, prefill_node
from tests.engine.processes import die_with_parent

Bytes = npt.NDArray[np.uint8]

N_ROWS, AUX_NBYTES = 8, 48


@dataclass(frozen=True)
class Model:
    """What both instances serve. `lens`: bytes of a head of a token, of K and of V; one number for MLA.

    `state`: bytes of a row of state in each layer, 0 for none. `ids`: whether the entries say their layers.
    """

    kind: str = "mha"
    layers: int = 2
    heads: int = 2
    lens: tuple[int, ...] = (16, 16)
    page_size: int = 4
    n_pages: int = 24
    state: int = 0
    ids: bool = False


@dataclass(frozen=True)
class Split:
    """How one instance shares the model out."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    cp: int = 1
    follow: bool = True

    def shape(self, model: Model) -> Shape:
        return Shape(self.tp, self.cp, self.dp, self.pp, model.page_size, "uint8", follow_bootstrap_room=self.follow)


def content(part: int, layer: int, pages: npt.ArrayLike, page_size: int, heads: range, nbytes: int, seed: int) -> Bytes:
    """What stands in these pages: shape (pages, tokens, heads, bytes)."""
    axes = [np.asarray(pages), np.arange(page_size), np.asarray(heads), np.arange(nbytes)]
    mixed = np.uint64(seed * 131 + part * 17 + layer * 7919 + 1)
    total = np.zeros((1, 1, 1, 1), np.uint64)
    for number, axis in enumerate(axes):
        shape = [1] * 4
        shape[number] = -1
        total = total * np.uint64(1_000_003) + axis.astype(np.uint64).reshape(shape)
    return ((total * np.uint64(0x9E37_79B9) + mixed * np.uint64(0x85EB_CA6B)) >> np.uint64(13)).astype(np.uint8)


class Rank:
    """The memory of one seat."""

    def __init__(self, model: Model, split: Split, seat: Seat) -> None:
        self.model, self.seat = model, seat
        n = model.layers // split.pp
        self.entries = [(part, seat.pp * n + at) for part in range(len(model.lens)) for at in range(n)]
        heads = Heads(model.heads, split.tp, seat.tp) if model.kind == "mha" else None
        self.heads = range(1) if heads is None else heads.held
        self.arena = Arena(1 << 20)
        self.kv = [self.arena.array((model.n_pages, self._nbytes(part)), np.uint8) for part, _ in self.entries]
        self.aux = self.arena.array((N_ROWS, AUX_NBYTES), np.uint8)
        self.state = [self.arena.array((N_ROWS, model.state), np.uint8) for _ in range(n)] if model.state else []
        ids = tuple(layer for _, layer in self.entries) if model.ids else ()
        layout = KvLayout(Kind(model.kind), model.page_size, heads, first_layer=seat.pp * n, layer_ids=ids)
        states = (_pool(self.state),) if self.state else ()
        layers = (tuple(seat.pp * n + at for at in range(n)),) if self.state else ()
        self.pools = RankPools(_pool(self.kv), _pool([self.aux]), layout, states, layers)

    def fill(self, seed: int) -> None:
        for array, (part, layer) in zip(self.kv, self.entries, strict=True):
            array[:] = self._content(part, layer, range(self.model.n_pages), seed)
        self.aux[:] = np.arange(N_ROWS)[:, None] + 100
        for at, array in enumerate(self.state):
            array[:] = np.arange(N_ROWS)[:, None] * 16 + (self.entries[0][1] + at)

    def wrong(self, seed: int, sent: list[int], named: list[int]) -> list[str]:
        """Entries in which `named` pages hold something else than `sent` pages of the prefill, or others are not 0."""
        others = sorted(set(range(self.model.n_pages)) - set(named))
        found = []
        for array, (part, layer) in zip(self.kv, self.entries, strict=True):
            if not (array[named] == self._content(part, layer, sent, seed)).all() or array[others].any():
                found.append(f"part {part} of layer {layer} at {self.seat}")
        return found

    def clear(self) -> None:
        for array in (*self.kv, self.aux, *self.state):
            array[:] = 0

    def _content(self, part: int, layer: int, pages: npt.ArrayLike, seed: int) -> Bytes:
        full = content(part, layer, pages, self.model.page_size, self.heads, self.model.lens[part], seed)
        return full.reshape(len(full), self._nbytes(part))

    def _nbytes(self, part: int) -> int:
        return self.model.page_size * len(self.heads) * self.model.lens[part]


class Prefill:
    def __init__(self, model: Model, seed: int) -> None:
        self.model, self.seed = model, seed
        self.nodes: list[tuple[Rank, PrefillNode]] = []

    async def open(self, stack: AsyncExitStack, settings: Settings, split: Split) -> None:
        for seat in sorted(split.shape(self.model).seats()):
            rank = Rank(self.model, split, seat)
            rank.fill(self.seed)
            opening = prefill_node(
                settings, pools=rank.pools, arena=rank.arena.region, seat=seat, shape=split.shape(self.model)
            )
            self.nodes.append((rank, await stack.enter_async_context(opening)))

    async def send(self, room: int, dp: int, chunks: list[list[int]], groups: int = 1, row: int = 1) -> dict[str, Any]:
        """Chunk after chunk, each in so many groups of layers, from every rank of the DP group that is heard."""
        ranks = [(rank, node) for rank, node in self.nodes if rank.seat.dp == dp and rank.seat.cp == 0]
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
        async with asyncio.timeout(20):
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
            rank.clear()
            for array, (part, layer) in zip(rank.kv, rank.entries, strict=True):
                array[pages[:prefix]] = rank._content(part, layer, sent[:prefix], self.seed)
        await asyncio.gather(*(self._receive(rank, node, room, pages, row, prefix) for rank, node in self.nodes))
        wrong = [each for rank, _ in self.nodes for each in rank.wrong(self.seed, sent, pages)]
        wrong += [f"aux at {rank.seat}" for rank, _ in self.nodes if not (rank.aux[row] == 101).all()]
        for rank, _ in self.nodes:
            for at, array in enumerate(rank.state):
                if not (array[row] == 16 + rank.entries[0][1] + at).all():
                    wrong.append(f"state {at} at {rank.seat}")
        return {"wrong": wrong}

    async def _receive(self, rank: Rank, node: DecodeNode, room: int, pages: list[int], row: int, prefix: int) -> None:
        async with asyncio.timeout(20):
            paired = await node.pair(self.registry, room)
            arriving = node.receiver.open(
                room,
                paired,
                pages[prefix:],
                row,
                prefix_len=prefix * self.model.page_size,
                state_rows=[[row]] if rank.state else (),
            )
            async with arriving as it:
                await it.arrived()

    async def idle(self) -> dict[str, Any]:
        tables = [(it.rooms, it.quarantine) for it in (node.receiver for _, node in self.nodes)]
        return {"left": [str(each) for table in tables for each in table if each]}


def _pool(arrays: list[Bytes]) -> Pool:
    return Pool(tuple(a.ctypes.data for a in arrays), tuple(a.shape[1] for a in arrays), len(arrays[0]))


def arguments(role: str, model: Model, split: Split, registry: str, seed: int = 5) -> str:
    return json.dumps(
        {"role": role, "model": asdict(model), "split": asdict(split), "registry": registry, "seed": seed}
    )


async def main(given: dict[str, Any]) -> None:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    model, split = Model(**given["model"] | {"lens": tuple(given["model"]["lens"])}), Split(**given["split"])
    settings = Settings(
        node=NodeSettings(registry=given["registry"]),
        serve=ServeSettings(port=0, grace_s=0.5),
        room=RoomTimeouts(drain_margin_s=0.05, checksum=True),  # every split is checked from both sides
        engine=MooncakeSettings(progress_timeout_s=2),
    )
    instance = (Prefill if given["role"] == "prefill" else Decode)(model, given["seed"])
    async with AsyncExitStack() as stack:
        await instance.open(stack, settings, split)
        print(json.dumps({"ranks": len(instance.nodes)}), flush=True)
        while line := await reader.readline():
            asked = json.loads(line)
            try:
                done = await getattr(instance, asked.pop("do"))(**asked)
            except Exception as error:  # told to the test, which fails by it
                done = {"error": repr(error)}
            print(json.dumps(done), flush=True)


if __name__ == "__main__":
    die_with_parent()
    logs.configure(LogSettings())
    asyncio.run(main(json.loads(sys.argv[1])))
    sys.stdout.flush()
    os._exit(0)
