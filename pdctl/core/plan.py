"""
Page indices -> byte copies, in whole-array numpy.

No pointers are followed here and no byte is moved: a plan is three arrays that an engine performs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pdctl.core.entries import Pairs, check_items, check_pair, lengths, same_entries
from pdctl.core.layout import Heads, Pool
from pdctl.errors import LayoutMismatch

Ints = npt.NDArray[np.int64]

_FIRST = np.zeros(1, np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class CopyPlan:
    """`n` independent byte copies; all three arrays have shape (n,), dtype int64. `src` is local, `dst` the peer's."""

    src: Ints
    dst: Ints
    nbytes: Ints

    def __post_init__(self) -> None:
        if not (self.src.shape == self.dst.shape == self.nbytes.shape and self.src.ndim == 1):
            raise LayoutMismatch(f"plan arrays differ: {self.src.shape}, {self.dst.shape}, {self.nbytes.shape}")

    def __len__(self) -> int:
        return len(self.src)

    @property
    def total(self) -> int:
        """Bytes in all."""
        return int(np.add.reduce(self.nbytes))

    @classmethod
    def of(cls, *copies: tuple[int, int, int]) -> CopyPlan:
        """From (src, dst, nbytes) triples."""
        table = np.asarray(copies, dtype=np.int64).reshape(-1, 3)
        return cls(table[:, 0].copy(), table[:, 1].copy(), table[:, 2].copy())

    @classmethod
    def join(cls, *plans: CopyPlan) -> CopyPlan:
        if len(plans) == 1:
            return plans[0]
        return cls(
            *(
                np.concatenate([getattr(p, name) for p in plans] or [np.empty(0, np.int64)])
                for name in ("src", "dst", "nbytes")
            )
        )


def item_plan(
    source: Pool, destination: Pool, src_items: npt.ArrayLike, dst_items: npt.ArrayLike, what: str
) -> CopyPlan:
    """Copy item `src_items[i]` of every entry to item `dst_items[i]` of the same entry. As `page_plan`."""
    check_pair(source, destination, what)
    return page_plan(source, destination, same_entries(len(source)), src_items, dst_items, what)


def page_plan(
    source: Pool,
    destination: Pool,
    pairs: Pairs,
    src_pages: npt.ArrayLike,
    dst_pages: npt.ArrayLike,
    what: str,
) -> CopyPlan:
    """Copy page `src_pages[i]` of entry `pairs[j, 0]` to page `dst_pages[i]` of entry `pairs[j, 1]`, whole.

    Runs that go on at both sides become one copy. Both page arrays have shape (k,). Raises LayoutMismatch when items of
    a pair differ in length, when the arrays do, or when an index is negative or past a pool whose size is known.
    """
    return Paired.of(source, destination, pairs, what).plan(src_pages, dst_pages)


@dataclass(frozen=True, slots=True, eq=False)
class Paired:
    """Two pools, entry by entry: where item 0 of each begins, and how long items are; all three of shape (pairs,).

    What every room between the same two ranks has in common: made anew for each, it was half of what a plan of one page
    cost.
    """

    source: Pool
    destination: Pool
    what: str
    src: Ints
    dst: Ints
    nbytes: Ints

    @classmethod
    def of(cls, source: Pool, destination: Pool, pairs: Pairs, what: str) -> Paired:
        """Raises LayoutMismatch when items of a pair differ in length."""
        check_items(source, destination, pairs, what)
        ours, theirs = pairs[:, 0], pairs[:, 1]
        src, dst = _pointers(source)[ours], _pointers(destination)[theirs]
        return cls(source, destination, what, src, dst, lengths(source)[ours])

    def plan(self, src_items: npt.ArrayLike, dst_items: npt.ArrayLike) -> CopyPlan:
        """As `page_plan`."""
        src, dst = _checked_pages(self.source, self.destination, src_items, dst_items, self.what)
        if not len(src):
            return CopyPlan.of()
        if len(src) == 1:  # as a table it takes three times as long
            return CopyPlan(self.src + src * self.nbytes, self.dst + dst * self.nbytes, self.nbytes)
        starts = np.concatenate((_FIRST, np.flatnonzero((np.diff(src) != 1) | (np.diff(dst) != 1)) + 1))
        counts = np.diff(starts, append=len(src))
        lens = self.nbytes[:, None]
        # One table, filled in place: of large plans, touching fresh memory is most of the cost.
        table = np.empty((3, len(lens), len(starts)), np.int64)
        for row, items in zip(table, (src[starts], dst[starts], counts), strict=True):
            np.multiply(items, lens, out=row)
        table[0] += self.src[:, None]
        table[1] += self.dst[:, None]
        return CopyPlan(*table.reshape(3, -1))


def head_plan(
    source: Pool,
    destination: Pool,
    pairs: Pairs,
    src_pages: npt.ArrayLike,
    dst_pages: npt.ArrayLike,
    *,
    page_size: int,
    ours: Heads,
    theirs: Heads,
    what: str,
) -> CopyPlan:
    """As `page_plan`, for ranks that hold different heads: of each token, the heads that `ours` has for `theirs`.

    One copy a token and entry, since the heads of the other ranks lie between two tokens at one side at least
    (SGLANG_WIRE 7). Where both sides hold the same heads it is `page_plan`. Raises LayoutMismatch, besides, when a page
    is no whole number of heads, or a head has another size at the two sides.
    """
    sent = ours.to_send(theirs)
    if ours.held == theirs.held == sent:
        return page_plan(source, destination, pairs, src_pages, dst_pages, what)
    src, dst = _checked_pages(source, destination, src_pages, dst_pages, what)
    head = head_nbytes(source, destination, pairs, page_size, ours, theirs, what)
    if not len(src) or not len(sent):
        return CopyPlan.of()
    # Axes: entry pair, page, token
    tokens = np.arange(page_size, dtype=np.int64)
    addresses = [
        (_pointers(pool)[entries] + (sent.start - heads.held.start) * head)[:, None, None]
        + (pages[:, None] * page_size + tokens) * (len(heads.held) * head)[:, None, None]
        for pool, entries, pages, heads in (
            (source, pairs[:, 0], src, ours),
            (destination, pairs[:, 1], dst, theirs),
        )
    ]
    nbytes = np.broadcast_to((len(sent) * head)[:, None, None], addresses[0].shape)
    return CopyPlan(addresses[0].ravel(), addresses[1].ravel(), nbytes.ravel())


def head_nbytes(
    source: Pool, destination: Pool, pairs: Pairs, page_size: int, ours: Heads, theirs: Heads, what: str
) -> Ints:
    """Bytes of one head of one token, for each pair: shape (len(pairs),)."""
    found = []
    for pool, entries, heads, who in (
        (source, pairs[:, 0], ours, "sender"),
        (destination, pairs[:, 1], theirs, "receiver"),
    ):
        nbytes, parts = lengths(pool)[entries], page_size * len(heads.held)
        if (nbytes % parts).any():
            at = int(np.argmax(nbytes % parts != 0))
            raise LayoutMismatch(
                f"{what} entry {entries[at]} of the {who}: {nbytes[at]} bytes a page are no {page_size} tokens of "
                f"{len(heads.held)} heads: check page_size and the number of KV heads"
            )
        found.append(nbytes // parts)
    if (found[0] != found[1]).any():
        at = int(np.argmax(found[0] != found[1]))
        raise LayoutMismatch(
            f"{what} entry {pairs[at, 0]}: a head of a token has {found[0][at]} bytes at the sender and "
            f"{found[1][at]} at the receiver: start both with the same dtype and page size"
        )
    return found[0]


def item_addresses(
    source: Pool,
    destination: Pool,
    ours: Ints,
    theirs: Ints,
    src_items: npt.ArrayLike,
    dst_items: npt.ArrayLike,
    what: str,
) -> tuple[Ints, Ints]:
    """Where items begin, in entries `ours` of the source and `theirs` of the destination: both shape (entries, items).
    Raises as `page_plan` for items that are none."""
    src, dst = _checked_pages(source, destination, src_items, dst_items, what)
    here, there = (
        _pointers(pool)[entries][:, None] + items * lengths(pool)[entries][:, None]
        for pool, entries, items in ((source, ours, src), (destination, theirs, dst))
    )
    return here, there


def _checked_pages(
    source: Pool, destination: Pool, src_pages: npt.ArrayLike, dst_pages: npt.ArrayLike, what: str
) -> tuple[Ints, Ints]:
    src, dst = np.asarray(src_pages, dtype=np.int64).ravel(), np.asarray(dst_pages, dtype=np.int64).ravel()
    if len(src) != len(dst):
        raise LayoutMismatch(f"{what}: {len(src)} items to send into {len(dst)} places: give one place for each")
    _check_items(source, src, what, "sender")
    _check_items(destination, dst, what, "receiver")
    return src, dst


def _pointers(pool: Pool) -> Ints:
    return np.asarray(pool.pointers, dtype=np.uint64).astype(np.int64)


def _check_items(pool: Pool, items: Ints, what: str, side: str) -> None:
    if not len(items):
        return
    # Not items.min(): of one page, its wrapper takes as long again as the look.
    low = int(np.minimum.reduce(items))
    high = low if pool.n_items is None else int(np.maximum.reduce(items))
    if low < 0 or (pool.n_items is not None and high >= pool.n_items):
        size = "" if pool.n_items is None else f", the pool has {pool.n_items}"
        raise LayoutMismatch(
            f"{what} of the {side}: index {low if low < 0 else high} is outside the pool{size}: check the page table"
        )
