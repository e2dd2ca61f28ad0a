"""
Where the pages of a host KV pool lie, and under which names a shared store keeps them: as stock SGLang lays out and
names them, so that both can use one store.

A pool is one buffer a plane (K and V of MHA; the latent cache of MLA, or its parts), and a layout is the order of four
axes in it. All follows from that order: the strides, the runs of bytes of a page, and how an object's bytes lie.

    layer_first           layer page token head    a run a layer; the device pool's own order
    page_first            page token layer head    one run
    page_first_direct     page layer token head    one run
    page_head             page head token layer    one run, which can be cut into shards of heads
    page_first_kv_split   page layer token head    one run a plane; MLA's parts in buffers of their own

No pointer is followed here. A name says nothing of the layout (stock's neither): see `object_order`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from pdctl.core.layout import Kind, Region
from pdctl.errors import BadField, LayoutMismatch

Ints = npt.NDArray[np.int64]


class Axis(StrEnum):
    PAGE = "page"
    TOKEN = "token"  # noqa: S105  of a page
    LAYER = "layer"
    HEAD = "head"


class HostLayout(StrEnum):
    """SGLang's `--hicache-mem-layout`."""

    LAYER_FIRST = "layer_first"
    PAGE_FIRST = "page_first"
    PAGE_FIRST_DIRECT = "page_first_direct"
    PAGE_HEAD = "page_head"
    PAGE_FIRST_KV_SPLIT = "page_first_kv_split"

    @property
    def order(self) -> tuple[Axis, ...]:
        """The axes of a buffer, outermost first."""
        return _ORDERS[self]

    @property
    def needed_by(self) -> str:
        return _NEEDED_BY[self]


_ORDERS = {
    HostLayout.LAYER_FIRST: (Axis.LAYER, Axis.PAGE, Axis.TOKEN, Axis.HEAD),
    HostLayout.PAGE_FIRST: (Axis.PAGE, Axis.TOKEN, Axis.LAYER, Axis.HEAD),
    HostLayout.PAGE_FIRST_DIRECT: (Axis.PAGE, Axis.LAYER, Axis.TOKEN, Axis.HEAD),
    HostLayout.PAGE_HEAD: (Axis.PAGE, Axis.HEAD, Axis.TOKEN, Axis.LAYER),
    HostLayout.PAGE_FIRST_KV_SPLIT: (Axis.PAGE, Axis.LAYER, Axis.TOKEN, Axis.HEAD),
}
_NEEDED_BY = {
    HostLayout.LAYER_FIRST: "any device without a store; with one, SGLang moves off it",
    HostLayout.PAGE_FIRST: "CUDA and ROCm with io backend kernel, SGLang's default",
    HostLayout.PAGE_FIRST_DIRECT: "any device with io backend direct; Ascend (kernel_ascend) for MHA",
    HostLayout.PAGE_HEAD: "CUDA with io backend kernel, MHA whose TP sizes differ over one store",
    HostLayout.PAGE_FIRST_KV_SPLIT: "Ascend (kernel_ascend) for MLA",
}
_MISSPELT = {"page_first_kv_spilt": HostLayout.PAGE_FIRST_KV_SPLIT}
_ONLY_FOR = {HostLayout.PAGE_HEAD: Kind.MHA, HostLayout.PAGE_FIRST_KV_SPLIT: Kind.MLA}


def host_layout(text: str) -> tuple[HostLayout, str | None]:
    """The layout of that name, and a hint for who wrote it in a way that is only tolerated. Raises BadField."""
    if text in _MISSPELT:
        meant = _MISSPELT[text]
        return meant, f"layout {text} is read as {meant}: write it so, other programs know no other spelling"
    try:
        return HostLayout(text), None
    except ValueError:
        known = "; ".join(f"{layout} ({layout.needed_by})" for layout in HostLayout)
        raise BadField("layout", f"{text!r} is not known: choose one of {known}") from None


@dataclass(frozen=True, slots=True)
class Plane:
    """One buffer from `pointer` on: of each token of each layer, `heads` times `head_nbytes` bytes."""

    pointer: int
    layers: int
    heads: int
    head_nbytes: int

    def __post_init__(self) -> None:
        if min(self.pointer, self.layers, self.heads, self.head_nbytes) < 1:
            raise LayoutMismatch(f"{self} has a number below 1: give a pointer, and at least 1 of each")

    @property
    def token_nbytes(self) -> int:
        """Bytes of one token, all layers and heads."""
        return self.layers * self.heads * self.head_nbytes


@dataclass(frozen=True, slots=True)
class HostPool:
    """`n_pages` pages of `page_size` tokens.

    `planes`: for MHA K and V, an object each; for MLA all parts of one object. `shards`: into how many objects the
    heads of each plane are cut, for readers of a larger TP; page_head only.
    """

    layout: HostLayout
    kind: Kind
    n_pages: int
    page_size: int
    planes: tuple[Plane, ...]
    shards: int = 1

    def __post_init__(self) -> None:
        if min(self.n_pages, self.page_size, self.shards, len(self.planes)) < 1:
            raise LayoutMismatch(
                f"{self.n_pages} pages of {self.page_size} tokens in {len(self.planes)} buffers and {self.shards} "
                "shards: give at least 1 of each"
            )
        self._check_kind()
        if self.shards > 1 and self.layout is not HostLayout.PAGE_HEAD:
            raise LayoutMismatch(
                f"heads of a {self.layout} pool lie apart in every token: cut heads in {HostLayout.PAGE_HEAD} only"
            )
        for plane in self.planes:
            if plane.heads % self.shards:
                raise LayoutMismatch(f"{plane.heads} heads do not divide into {self.shards} shards: choose a divisor")

    def _check_kind(self) -> None:
        only = _ONLY_FOR.get(self.layout, self.kind)
        if only is not self.kind:
            other = HostLayout.PAGE_FIRST_DIRECT
            raise LayoutMismatch(
                f"{self.layout} is for {only} and the pool is {self.kind}: use {other}, as SGLang does"
            )
        if self.kind is Kind.MHA and len(self.planes) != 2:
            raise LayoutMismatch(f"an MHA pool has K and V, not {len(self.planes)} buffers: give both")
        if len(self.planes) > 1 and self.kind is Kind.MLA and self.layout is not HostLayout.PAGE_FIRST_KV_SPLIT:
            raise LayoutMismatch(
                f"an MLA pool of {len(self.planes)} buffers in {self.layout}: only {HostLayout.PAGE_FIRST_KV_SPLIT} "
                "has its parts apart"
            )

    @property
    def objects_per_page(self) -> int:
        return len(self.planes) * self.shards if self.kind is Kind.MHA else 1

    @property
    def object_order(self) -> tuple[Axis, ...]:
        """How the bytes of an object lie. Names do not tell: two pools share a store only where this is the same."""
        return tuple(axis for axis in self.layout.order if axis is not Axis.PAGE)

    def strides(self, plane: Plane) -> dict[Axis, int]:
        """Bytes from one to the next of each axis."""
        counts = {
            Axis.PAGE: self.n_pages,
            Axis.TOKEN: self.page_size,
            Axis.LAYER: plane.layers,
            Axis.HEAD: plane.heads,
        }
        found, below = {}, plane.head_nbytes
        for axis in reversed(self.layout.order):
            found[axis] = below
            below *= counts[axis]
        return found

    def regions(self) -> list[Region]:
        """What to register: buffers that lie behind one another as one."""
        found: list[Region] = []
        for plane in sorted(self.planes, key=lambda plane: plane.pointer):
            nbytes = plane.token_nbytes * self.page_size * self.n_pages
            if found and found[-1].end == plane.pointer:
                found[-1] = Region(found[-1].pointer, found[-1].nbytes + nbytes)
            else:
                found.append(Region(plane.pointer, nbytes))
        return found

    def runs(self, pages: npt.ArrayLike) -> tuple[Ints, Ints]:
        """Where the objects of these pages lie: pointers and lengths, both of shape (objects, runs).

        Objects of one page stand together, as their names in `Names.of`: of each shard first K, then V. Raises
        LayoutMismatch for a page that the pool has not.
        """
        at = self._checked(pages)
        offsets, nbytes = self._of_page_0()
        page_strides = np.asarray([self.strides(plane)[Axis.PAGE] for plane in self.planes], dtype=np.int64)
        if self.kind is Kind.MHA:  # a plane is an object: its runs all move by its own stride
            steps = np.tile(page_strides, self.shards)[:, None]
        else:  # a plane is one run of the only object, or the only plane has all the runs
            steps = (page_strides if len(self.planes) > 1 else page_strides.repeat(offsets.shape[1]))[None, :]
        pointers = at[:, None, None] * steps[None, :, :] + offsets[None, :, :]
        return pointers.reshape(-1, offsets.shape[1]), np.tile(nbytes, (len(at), 1))

    def _of_page_0(self) -> tuple[Ints, Ints]:
        """Pointers and lengths of the first page's objects, shape (objects a page, runs)."""
        cut = [self._runs_of(plane) for plane in self.planes]
        if self.kind is Kind.MLA:
            starts, lens = (np.concatenate(part)[None, :] for part in zip(*cut, strict=True))
            return starts, lens
        shards = np.arange(self.shards, dtype=np.int64)[:, None]
        starts = np.stack([begin[None, :] + shards * lens[:1] for begin, lens in cut], axis=1)
        nbytes = np.stack([np.broadcast_to(lens, (self.shards, len(lens))) for _, lens in cut], axis=1)
        return starts.reshape(self.objects_per_page, -1), nbytes.reshape(self.objects_per_page, -1)

    def _runs_of(self, plane: Plane) -> tuple[Ints, Ints]:
        """The first page's runs of one plane, each cut to the first of the shards."""
        step = self.strides(plane)
        page = self.page_size * plane.token_nbytes
        if self.layout.order[0] is Axis.PAGE:
            return np.asarray([plane.pointer], np.int64), np.asarray([page // self.shards], np.int64)
        starts = plane.pointer + np.arange(plane.layers, dtype=np.int64) * step[Axis.LAYER]
        return starts, np.full(plane.layers, page // plane.layers, np.int64)

    def _checked(self, pages: npt.ArrayLike) -> Ints:
        at = np.asarray(pages, dtype=np.int64)
        if at.ndim != 1:
            raise LayoutMismatch(f"pages have the shape {at.shape}: give one page a number")
        if len(at) and not (at.min() >= 0 and at.max() < self.n_pages):
            raise LayoutMismatch(f"pages {at.min()} to {at.max()} of a pool of {self.n_pages}: give numbers below that")
        return at


def mha_pool(
    layout: HostLayout,
    pointer: int,
    *,
    n_pages: int,
    page_size: int,
    layers: int,
    heads: int,
    head_nbytes: int,
    v_head_nbytes: int | None = None,
    v_pointer: int | None = None,
    shards: int = 1,
) -> HostPool:
    """K from `pointer` on, V behind it unless `v_pointer` says where."""
    behind = pointer + n_pages * page_size * layers * heads * head_nbytes
    k = Plane(pointer, layers, heads, head_nbytes)
    v = Plane(behind if v_pointer is None else v_pointer, layers, heads, v_head_nbytes or head_nbytes)
    return HostPool(layout, Kind.MHA, n_pages, page_size, (k, v), shards)


def mla_pool(
    layout: HostLayout, pointers: Sequence[int], widths: Sequence[int], *, n_pages: int, page_size: int, layers: int
) -> HostPool:
    """One buffer of `widths[0]` bytes a token and layer; for page_first_kv_split one for each part.

    Parts that stand in fewer layers (an indexer's) are planes of their own: make the HostPool from those.
    """
    if len(pointers) != len(widths):
        raise LayoutMismatch(f"{len(pointers)} pointers and {len(widths)} widths: give each buffer one of both")
    planes = tuple(Plane(pointer, layers, 1, width) for pointer, width in zip(pointers, widths, strict=True))
    return HostPool(layout, Kind.MLA, n_pages, page_size, planes)


@dataclass(frozen=True, slots=True)
class Names:
    """Under which keys a rank's objects are kept, as stock names them.

    MHA: `PREFIX_PAGE_TP[_PP]_k` and `_v`, of each head shard; the shards of TP rank r of a larger TP are its ranks
    r * shards and on. MLA is the same on every TP rank, so its names have none: `PREFIX_PAGE_[PP]_k`.
    `tag`, then `model` (its slashes as dashes), are the prefix.
    """

    kind: Kind
    tp_rank: int = 0
    pp_rank: int = 0
    pp_size: int = 1
    shards: int = 1
    model: str = ""
    tag: str | None = None

    def __post_init__(self) -> None:
        if not (self.tp_rank >= 0 and 0 <= self.pp_rank < self.pp_size and self.shards >= 1):
            raise LayoutMismatch(
                f"TP rank {self.tp_rank} of {self.shards} shards, PP rank {self.pp_rank} of {self.pp_size}: ranks "
                "count from 0, and there is at least 1 shard"
            )

    @classmethod
    def for_pool(cls, pool: HostPool, *, tp_rank: int, pp_rank: int = 0, pp_size: int = 1, **prefix: str) -> Names:
        """Names that fit the pool's objects. `prefix`: `model`, `tag`."""
        return cls(pool.kind, tp_rank, pp_rank, pp_size, pool.shards, **prefix)

    @property
    def prefix(self) -> str:
        parts = ([] if self.tag is None else [self.tag]) + ([self.model.replace("/", "-")] if self.model else [])
        return "".join(f"{part}_" for part in parts)

    @property
    def endings(self) -> tuple[str, ...]:
        """What follows a page's own name, for each of its objects in the order of `HostPool.runs`."""
        stage = f"_{self.pp_rank}" if self.pp_size > 1 else ""
        if self.kind is Kind.MLA:
            return (f"{stage or '_'}_k",)
        first = self.tp_rank * self.shards
        ranks = range(first, first + self.shards)
        return tuple(f"_{rank}{stage}_{part}" for rank in ranks for part in ("k", "v"))

    def of(self, pages: Sequence[str]) -> list[str]:
        """The keys of pages that are known by these names (hashes of their tokens)."""
        return [f"{self.prefix}{page}{ending}" for page in pages for ending in self.endings]


def pieces_per_page(pool: HostPool) -> int:
    """Runs of a page in all its objects: what a batch is measured by."""
    return math.prod(pool.runs([0])[0].shape)
