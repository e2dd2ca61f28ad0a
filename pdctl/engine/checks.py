"""
What a region and a plan must be before any engine sees them, in whole-array numpy.

The engine registers NULL, addresses that were never mapped and spans that wrap round, and answers 0 (MOONCAKE_FACTS 2);
one bad block costs its peer a lane and a second of everybody's time (4.4). So nothing of the kind gets that far.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from pdctl.core.layout import Region
from pdctl.core.plan import CopyPlan, Ints
from pdctl.errors import BadField

_INT64_END = 1 << 63


def check_region(region: Region, held: Iterable[Region]) -> None:
    """Raise BadField if `region` is empty, null, wraps round, or overlaps one that is `held`."""
    if region.nbytes <= 0:
        raise BadField("nbytes", f"is {region.nbytes}: a region needs at least one byte")
    if region.pointer <= 0 or region.end > _INT64_END:
        raise BadField("pointer", f"{region.pointer:#x} is no address of a process: register memory that you hold")
    for other in held:
        if region.pointer < other.end and other.pointer < region.end:
            raise BadField("pointer", f"{region} overlaps {other}, which is registered: unregister that one first")


def check_plan(plan: CopyPlan) -> None:
    """Raise BadField if a copy is empty or negative: the engine calls an empty one done without looking at it."""
    if len(plan) and int(np.minimum.reduce(plan.nbytes)) <= 0:
        raise BadField(
            "nbytes", f"copy {int(plan.nbytes.argmin())} has {int(plan.nbytes.min())} bytes: give at least one"
        )


def first_outside(regions: Iterable[Region], pointers: Ints, nbytes: Ints) -> int | None:
    """Index of the first span that lies inside no single region; None when each lies in one. Shapes (n,), (n,)."""
    regions = tuple(regions)
    if _within_one(regions, pointers, nbytes):
        return None
    table = np.array(sorted((r.pointer, r.end) for r in regions), dtype=np.int64).reshape(-1, 2)
    if not len(pointers):
        return None
    if not len(table):
        return 0
    at = np.searchsorted(table[:, 0], pointers, side="right") - 1
    # Room left in the region, not the span's end: an end past int64 would wrap and look small.
    inside = (at >= 0) & (nbytes <= table[at, 1] - pointers) & (pointers > 0)
    return None if inside.all() else int(np.argmin(inside))


def _within_one(regions: tuple[Region, ...], pointers: Ints, nbytes: Ints) -> bool:
    """Whether one region plainly holds them all, as an arena does. To find each its own takes four times as long, and
    two of these looks were a third of what a turn costs the loop."""
    if not len(pointers):
        return True
    # Not pointers.min(): a room of one page looks five times, and the wrapper takes as long again as the look.
    first, longest = int(np.minimum.reduce(pointers)), int(np.maximum.reduce(nbytes))
    last = int(np.maximum.reduce(pointers)) + longest  # no int64: it cannot wrap
    for region in regions:
        if region.pointer <= first and last > region.end > first and last < _INT64_END:
            last = int(np.maximum.reduce(pointers + nbytes))  # a short row at the very end of it, beside long pages
        if 0 < first >= region.pointer and last <= region.end:
            return True
    return False
