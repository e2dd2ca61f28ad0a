"""
The memory of an instance's ranks and what must stand in it, for tests that compare every byte.

What a byte must be follows from where it belongs (part, layer, page, token, head, byte), so that each side of a
transfer, ours or stock, knows it without asking the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pdctl.core.layout import Heads, Kind, KvLayout, Pool, RankPools
from pdctl.core.route import Seat, Shape
from pdctl.memory import Arena

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
            array[:] = self.content(part, layer, range(self.model.n_pages), seed)
        self.aux[:] = np.arange(N_ROWS)[:, None] + 100
        for at, array in enumerate(self.state):
            array[:] = np.arange(N_ROWS)[:, None] * 16 + (self.entries[0][1] + at)

    def begin(self, sent: list[int], named: list[int], prefix: int, seed: int) -> None:
        """Nothing here but the first `prefix` of the pages."""
        for array in (*self.kv, self.aux, *self.state):
            array[:] = 0
        for array, (part, layer) in zip(self.kv, self.entries, strict=True):
            array[named[:prefix]] = self.content(part, layer, sent[:prefix], seed)

    def wrong(self, sent: list[int], named: list[int], source_row: int, row: int, seed: int) -> list[str]:
        """What is not as the prefill's `sent` pages and its aux and state of `source_row`, or not 0 elsewhere."""
        others = sorted(set(range(self.model.n_pages)) - set(named))
        found = []
        for array, (part, layer) in zip(self.kv, self.entries, strict=True):
            if not (array[named] == self.content(part, layer, sent, seed)).all() or array[others].any():
                found.append(f"part {part} of layer {layer} at {self.seat}")
        wanted = [source_row + 100, *(source_row * 16 + self.entries[0][1] + at for at in range(len(self.state)))]
        for number, (array, value) in enumerate(zip((self.aux, *self.state), wanted, strict=True)):
            if not (array[row] == value).all() or np.delete(array, row, axis=0).any():
                found.append(f"state {number - 1} at {self.seat}" if number else f"aux at {self.seat}")
        return found

    def content(self, part: int, layer: int, pages: npt.ArrayLike, seed: int) -> Bytes:
        full = _content(part, layer, pages, self.model.page_size, self.heads, self.model.lens[part], seed)
        return full.reshape(len(full), self._nbytes(part))

    def _nbytes(self, part: int) -> int:
        return self.model.page_size * len(self.heads) * self.model.lens[part]


def _pool(arrays: list[Bytes]) -> Pool:
    return Pool(tuple(a.ctypes.data for a in arrays), tuple(a.shape[1] for a in arrays), len(arrays[0]))
