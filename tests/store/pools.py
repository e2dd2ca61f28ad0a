"""Host pools of every layout that a store carries, over real memory; and a page of one, cut out plainly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pdctl.core.hostpool import HostLayout, HostPool, Names, mha_pool, mla_pool
from pdctl.core.layout import Kind
from pdctl.memory import Arena

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Case:
    layout: HostLayout
    kind: Kind
    shards: int = 1

    def __str__(self) -> str:
        return f"{self.kind} {self.layout}" + (f" in {self.shards} shards" if self.shards > 1 else "")


CASES = (
    *(Case(layout, Kind.MHA) for layout in list(HostLayout)[:4]),
    Case(HostLayout.PAGE_HEAD, Kind.MHA, shards=2),
    *(Case(layout, Kind.MLA) for layout in HostLayout if layout is not HostLayout.PAGE_HEAD),
)


@dataclass(frozen=True)
class Model:
    """`head`: bytes of a head of a layer of a token; of MLA, `head` and a quarter of it where it lies apart."""

    pages: int = 6
    tokens: int = 4
    layers: int = 3
    heads: int = 4
    head: int = 64


def pool_in(arena: Arena, case: Case, model: Model) -> HostPool:
    shape = {"n_pages": model.pages, "page_size": model.tokens, "layers": model.layers}
    at = arena.region.pointer
    if case.kind is Kind.MHA:
        return mha_pool(case.layout, at, heads=model.heads, head_nbytes=model.head, shards=case.shards, **shape)
    widths = [model.head, model.head // 4] if case.layout is HostLayout.PAGE_FIRST_KV_SPLIT else [model.head]
    plane = model.pages * model.tokens * model.layers * model.head
    return mla_pool(case.layout, [at + n * plane for n in range(len(widths))], widths, **shape)


def nbytes_of(model: Model) -> int:
    """Enough for both planes of an MHA pool, and for any MLA pool."""
    return 2 * model.pages * model.tokens * model.layers * model.heads * model.head


def obvious(memory: Bytes, case: Case, model: Model, page: int) -> bytes:
    """All bytes of a page, layer by layer, by indexing an array in the shape that the layout has."""
    heads = model.heads if case.kind is Kind.MHA else 1
    widths = [model.head, model.head] if case.kind is Kind.MHA else [model.head]
    if case.layout is HostLayout.PAGE_FIRST_KV_SPLIT:
        widths = [model.head, model.head // 4]
    found, at = [], 0
    for width in widths:
        size = model.pages * model.tokens * model.layers * heads * width
        found.append(_page(memory[at : at + size], case.layout, model, heads, width, page).tobytes())
        at += model.pages * model.tokens * model.layers * heads * model.head
    return b"".join(found)


def _page(plane: Bytes, layout: HostLayout, model: Model, heads: int, width: int, page: int) -> Bytes:
    tokens = slice(page * model.tokens, (page + 1) * model.tokens)
    rows: Bytes = plane.reshape(model.pages, -1)
    if layout is HostLayout.LAYER_FIRST:
        return plane.reshape(model.layers, -1, heads, width)[:, tokens]
    return plane.reshape(-1, model.layers, heads, width)[tokens] if layout is HostLayout.PAGE_FIRST else rows[page]


def names_of(pool: HostPool, pages: Sequence[str], model: str) -> list[str]:
    return Names.for_pool(pool, tp_rank=1, model=model).of(pages)
