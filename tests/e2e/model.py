"""
The memory of an instance's ranks and what must stand in it, for tests that compare every byte.

What a byte must be follows from where it belongs (part, layer, page, token, head, byte), so that each side of a
transfer, ours or stock, knows it without asking the other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from pdctl.core.layout import Heads, Kind, KvLayout, Pool, RankPools, Share, Slices
from pdctl.core.pairing import pages_of
from pdctl.core.route import Seat, Shape
from pdctl.memory import Arena

Bytes = npt.NDArray[np.uint8]

N_ROWS, AUX_NBYTES = 8, 48


@dataclass(frozen=True)
class Model:
    """What both instances serve. `lens`: bytes of a head of a token, of K and of V; one number for MLA.

    `ids`: whether the entries say their layers. `state`: bytes of a unit of state in each layer, 0 for none; an item
    has `state_rows` rows of `state_units` units, which TP ranks share; 1 is the same on all. `state_parts`: the units
    of parts that are split each by itself. `state_ids`: whether it says its layers.
    """

    kind: str = "mha"
    layers: int = 2
    heads: int = 2
    lens: tuple[int, ...] = (16, 16)
    page_size: int = 4
    n_pages: int = 24
    ids: bool = False
    state: int = 0
    state_units: int = 1
    state_rows: int = 1
    state_parts: tuple[int, ...] = ()
    state_ids: bool = True

    @classmethod
    def of(cls, body: dict[str, Any]) -> Model:
        """As JSON brings it."""
        given: dict[str, Any] = {name: tuple(it) if isinstance(it, list) else it for name, it in body.items()}
        return cls(**given)


@dataclass(frozen=True)
class Split:
    """How one instance shares the model out. `dcp`: of decode's TP ranks, so many share the tokens; `sharded`: of
    prefill's CP or TP ranks, all share the pages; `layered`: of its CP ranks, all share the layers."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    cp: int = 1
    follow: bool = True
    dcp: int = 1
    sharded: bool = False
    layered: bool = False

    @property
    def n_stages(self) -> int:
        """By which the layers are divided."""
        return self.pp * self.cp if self.layered else self.pp

    def stage(self, seat: Seat) -> int:
        return seat.pp * self.cp + seat.cp if self.layered else seat.pp

    def shape(self, model: Model) -> Shape:
        plain = Shape(self.tp, self.cp, self.dp, self.pp, model.page_size, "uint8")
        return replace(
            plain,
            follow_bootstrap_room=self.follow,
            enable_kv_cache_sharding=self.sharded,
            enable_dsa_cache_layer_split=self.layered,
        )


def _content(
    part: int, layer: int, pages: npt.ArrayLike, page_size: int, heads: range, nbytes: int, seed: int
) -> Bytes:
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
        n = model.layers // split.n_stages
        first = split.stage(seat) * n
        self.entries = [(part, first + at) for part in range(len(model.lens)) for at in range(n)]
        heads = Heads(model.heads, split.tp, seat.tp) if model.kind == "mha" else None
        self.heads = range(1) if heads is None else heads.held
        self.slices = Slices(Heads(model.state_units, split.tp, seat.tp), model.state_rows, model.state_parts)
        self.units = [*self.slices.heads.held] if not model.state_parts else []
        for number, part in enumerate(self.slices.heads_of_parts()):
            self.units += [sum(model.state_parts[:number]) + unit for unit in part.held]
        self.arena = Arena(1 << 20)
        self.kv = [self.arena.array((model.n_pages, self._nbytes(part)), np.uint8) for part, _ in self.entries]
        self.aux = self.arena.array((N_ROWS, AUX_NBYTES), np.uint8)
        state_nbytes = model.state * model.state_rows * len(self.units)
        self.state = [self.arena.array((N_ROWS, state_nbytes), np.uint8) for _ in range(n)] if state_nbytes else []
        self.pages = pages_of(seat, split.shape(model), Kind(model.kind))
        self.tokens = Share(split.dcp, seat.tp % split.dcp)
        layout = KvLayout(
            Kind(model.kind),
            model.page_size,
            heads,
            first_layer=first,
            layer_ids=tuple(layer for _, layer in self.entries) if model.ids else (),
            pages=self.pages,
            tokens=self.tokens,
        )
        ids = (tuple(first + at for at in range(n)),) if self.state and model.state_ids else ()
        states = (_pool(self.state),) if self.state else ()
        slices = ((self.slices,) * n,) if self.state else ()
        self.pools = RankPools(_pool(self.kv), _pool([self.aux]), layout, states, ids, slices)

    def fill(self, seed: int) -> None:
        numbers = np.arange(self.model.n_pages) * self.pages.size + self.pages.rank
        for array, (part, layer) in zip(self.kv, self.entries, strict=True):
            array[:] = self.content(part, layer, numbers, seed)
        self.aux[:] = np.arange(N_ROWS)[:, None] + 100
        for at, array in enumerate(self.state):
            for row in range(N_ROWS):
                array[row] = self._state(row, at)

    def begin(self, sent: list[int], named: list[int], prefix: int, seed: int) -> None:
        """Nothing here but the first `prefix` of the pages that were sent."""
        for array in (*self.kv, self.aux, *self.state):
            array[:] = 0
        here = named[: self.n_named(prefix)]
        for array, (part, layer) in zip(self.kv, self.entries, strict=True):
            array[here] = self._here(part, layer, sent[:prefix], seed)

    def n_named(self, n: int) -> int:
        """How many pages here `n` pages of a prefill fill."""
        return -(-n // self.tokens.size)

    def wrong(self, sent: list[int], named: list[int], source_row: int, row: int, seed: int) -> list[str]:
        """What is not as the prefill's `sent` pages and its aux and state of `source_row`, or not 0 elsewhere."""
        others = sorted(set(range(self.model.n_pages)) - set(named))
        found = []
        for array, (part, layer) in zip(self.kv, self.entries, strict=True):
            if not (array[named] == self._here(part, layer, sent, seed)).all() or array[others].any():
                found.append(f"part {part} of layer {layer} at {self.seat}")
        if not (self.aux[row] == source_row + 100).all() or np.delete(self.aux, row, axis=0).any():
            found.append(f"aux at {self.seat}")
        for at, array in enumerate(self.state):
            if not (array[row] == self._state(source_row, at)).all() or np.delete(array, row, axis=0).any():
                found.append(f"state {at} at {self.seat}")
        return found

    def content(self, part: int, layer: int, pages: npt.ArrayLike, seed: int) -> Bytes:
        """Of whole pages, shape (pages, bytes)."""
        full = _content(part, layer, pages, self.model.page_size, self.heads, self.model.lens[part], seed)
        return full.reshape(len(full), self._nbytes(part))

    def _here(self, part: int, layer: int, pages: list[int], seed: int) -> Bytes:
        """Of this rank's tokens of those pages, packed, 0 after the last."""
        token = self._nbytes(part) // self.model.page_size
        tokens = self.content(part, layer, pages, seed).reshape(-1, token)
        mine = tokens[self.tokens.rank :: self.tokens.size]
        held = np.zeros((self.n_named(len(pages)) * self.model.page_size, token), np.uint8)
        held[: len(mine)] = mine
        return held.reshape(-1, self._nbytes(part))

    def _state(self, row: int, at: int) -> Bytes:
        """An item of this rank's state entry number `at`: shape (bytes,)."""
        rows, units = np.arange(self.model.state_rows)[:, None, None], np.asarray(self.units)[:, None]
        start = row * 16 + self.entries[0][1] + at
        values: Bytes = (start + rows * 3 + units * 7 + np.zeros(self.model.state, np.int64)).astype(np.uint8)
        return values.ravel()

    def _nbytes(self, part: int) -> int:
        return self.model.page_size * len(self.heads) * self.model.lens[part]


def _pool(arrays: list[Bytes]) -> Pool:
    return Pool(tuple(a.ctypes.data for a in arrays), tuple(a.shape[1] for a in arrays), len(arrays[0]))
