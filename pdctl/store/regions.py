"""
Which memory was registered with a store, and whether pieces of pages lie in it.

Both adapters ask here: over TCP the wheel takes pages from memory that nobody has registered, over RDMA it cannot.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pdctl.core.layout import Region
from pdctl.errors import BadField
from pdctl.store.base import Ints


class Regions:
    """Disjoint regions, by rising address."""

    def __init__(self) -> None:
        self._held: list[Region] = []

    @property
    def held(self) -> tuple[Region, ...]:
        return tuple(self._held)

    def check_new(self, region: Region) -> None:
        """Raises BadField for a region that is empty, null, or overlaps."""
        if region.pointer <= 0 or region.nbytes <= 0:
            raise BadField("region", f"{region.nbytes} bytes at {region.pointer:#x}: give memory that is there")
        for other in self._held:
            if region.pointer < other.end and other.pointer < region.end:
                raise BadField("region", f"{region} overlaps {other}, which is registered: unregister that first")

    def check_held(self, region: Region) -> None:
        if region not in self._held:
            raise BadField("region", f"{region} was not registered: give what was, whole")

    def add(self, region: Region) -> None:
        self._held = sorted((*self._held, region), key=lambda held: held.pointer)

    def drop(self, region: Region) -> None:
        self._held.remove(region)

    def check_pages(self, keys: Sequence[str], pointers: Ints, nbytes: Ints) -> None:
        """Raises BadField for arrays of another shape than (keys, pieces), and for a piece outside of every region."""
        if pointers.ndim != 2 or pointers.shape != nbytes.shape or len(pointers) != len(keys):
            shapes = f"{pointers.shape} and {nbytes.shape} for {len(keys)} keys"
            raise BadField("pointers", f"have the shapes {shapes}: give (keys, pieces) twice")
        outside = ~self._inside(pointers, nbytes)
        if outside.any():
            row, piece = np.argwhere(outside)[0]
            what = f"{nbytes[row, piece]} bytes at {pointers[row, piece]:#x} of {keys[row]}"
            raise BadField("pointers", f"{what} lie in no registered region: register the pool first")

    def _inside(self, pointers: Ints, nbytes: Ints) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
        if not self._held:
            return np.zeros(pointers.shape, np.bool_)
        starts = np.array([region.pointer for region in self._held], np.int64)
        ends = np.array([region.end for region in self._held], np.int64)
        at = np.searchsorted(starts, pointers, side="right") - 1
        inside: np.ndarray[tuple[int, ...], np.dtype[np.bool_]] = (
            (at >= 0) & (nbytes > 0) & (pointers + nbytes <= ends[np.maximum(at, 0)])
        )
        return inside
