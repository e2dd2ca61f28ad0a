"""
Page indices -> byte copies, in whole-array numpy.

No pointers are followed here and no byte is moved: a plan is three arrays that an engine performs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pdctl.core.layout import Pool, check_pair
from pdctl.errors import LayoutMismatch

Ints = npt.NDArray[np.int64]


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
        return int(self.nbytes.sum())

    @classmethod
    def of(cls, *copies: tuple[int, int, int]) -> CopyPlan:
        """From (src, dst, nbytes) triples."""
        table = np.asarray(copies, dtype=np.int64).reshape(-1, 3)
        return cls(table[:, 0].copy(), table[:, 1].copy(), table[:, 2].copy())

    @classmethod
    def join(cls, *plans: CopyPlan) -> CopyPlan:
        return cls(
            *(
                np.concatenate([getattr(p, name) for p in plans] or [np.empty(0, np.int64)])
                for name in ("src", "dst", "nbytes")
            )
        )


def item_plan(
    source: Pool, destination: Pool, src_items: npt.ArrayLike, dst_items: npt.ArrayLike, what: str
) -> CopyPlan:
    """Copy item `src_items[i]` of every entry to item `dst_items[i]`; runs that go on at both sides become one copy.

    Both index arrays have shape (k,). Raises LayoutMismatch when the pools do not pair, when the arrays differ in
    length, or when an index is negative or past a pool whose size is known.
    """
    check_pair(source, destination, what)
    src, dst = np.asarray(src_items, dtype=np.int64).ravel(), np.asarray(dst_items, dtype=np.int64).ravel()
    if len(src) != len(dst):
        raise LayoutMismatch(f"{what}: {len(src)} items to send into {len(dst)} places: give one place for each")
    for pool, items, side in ((source, src, "sender"), (destination, dst, "receiver")):
        _check_items(pool, items, f"{what} of the {side}")
    if not len(src):
        return CopyPlan.of()
    starts = np.flatnonzero(np.r_[True, (np.diff(src) != 1) | (np.diff(dst) != 1)])
    counts = np.diff(np.r_[starts, len(src)])
    lens = np.asarray(source.item_lens, dtype=np.int64)[:, None]
    return CopyPlan(
        (_column(source) + src[starts] * lens).ravel(),
        (_column(destination) + dst[starts] * lens).ravel(),
        (counts * lens).ravel(),
    )


def _column(pool: Pool) -> Ints:
    return np.asarray(pool.pointers, dtype=np.uint64).astype(np.int64)[:, None]


def _check_items(pool: Pool, items: Ints, what: str) -> None:
    if not len(items):
        return
    low, high = int(items.min()), int(items.max())
    if low < 0 or (pool.n_items is not None and high >= pool.n_items):
        size = "" if pool.n_items is None else f", the pool has {pool.n_items}"
        raise LayoutMismatch(
            f"{what}: index {low if low < 0 else high} is outside the pool{size}: check the page table"
        )
