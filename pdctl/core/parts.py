"""
Items that are several parts after another, each split over TP ranks by itself: which bytes of them go where.

Arrays only. What is split in one piece is planned by `plan.head_plan`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pdctl.core.entries import Pairs, lengths
from pdctl.core.layout import Heads, Pool, Slices
from pdctl.core.plan import CopyPlan, Ints, item_addresses
from pdctl.core.sums import Spans
from pdctl.errors import LayoutMismatch


def part_spans(
    source: Pool, destination: Pool, pairs: Pairs, ours: Slices, theirs: Slices, what: str
) -> tuple[Spans, Spans]:
    """Of each row, the units of each part that `ours` has for `theirs`: at our side, and at the receiver's. Raises
    LayoutMismatch where a unit has another size at the two sides."""
    unit, far = (
        _unit(pool, entries, slices, what)
        for pool, entries, slices in ((source, pairs[:, 0], ours), (destination, pairs[:, 1], theirs))
    )
    if (unit != far).any():
        at = int(np.argmax(unit != far))
        raise LayoutMismatch(
            f"{what} entry {pairs[at, 0]}: a unit has {unit[at]} bytes at the sender and {far[at]} at the receiver: "
            "start both with the same model and dtype"
        )
    cuts = list(_cuts(ours.heads_of_parts(), theirs.heads_of_parts()))
    here, there, n = (np.array([cut[axis] for cut in cuts], np.int64).reshape(-1, 1) for axis in range(3))
    widths = (n * unit).ravel()
    mine, others = (np.tile(pairs[:, side], len(cuts)) for side in (0, 1))
    return (
        Spans(mine, (here * unit).ravel(), widths, ours.rows),
        Spans(others, (there * unit).ravel(), widths, ours.rows),
    )


def _cuts(ours: list[Heads], theirs: list[Heads]) -> list[tuple[int, int, int]]:
    """Of each part that is sent: its first unit in a row of ours and of theirs, and how many."""
    found, here, there = [], 0, 0
    for mine, far in zip(ours, theirs, strict=True):
        sent = mine.to_send(far)
        if len(sent):
            found.append((here + sent.start - mine.held.start, there + sent.start - far.held.start, len(sent)))
        here, there = here + len(mine.held), there + len(far.held)
    return found


def _unit(pool: Pool, entries: Ints, slices: Slices, what: str) -> Ints:
    nbytes, n = lengths(pool)[entries], slices.rows * sum(len(each.held) for each in slices.heads_of_parts())
    if (nbytes % n).any():
        raise LayoutMismatch(f"{what}: items of {nbytes.tolist()[:8]} bytes are no {n} units: check the slices")
    return nbytes // n


def span_plan(
    source: Pool, destination: Pool, spans: tuple[Spans, Spans], src: npt.ArrayLike, dst: npt.ArrayLike, what: str
) -> CopyPlan:
    """Copy those bytes of items `src` of ours into those of items `dst`: one copy an item, row and span."""
    here, there = spans
    starts = item_addresses(source, destination, here.entries, there.entries, src, dst, what)
    addresses = []
    for pool, each, start in ((source, here, starts[0]), (destination, there, starts[1])):
        row = lengths(pool)[each.entries] // each.parts
        at = (np.arange(each.parts, dtype=np.int64) * row[:, None] + each.offsets[:, None])[:, None, :]
        addresses.append(start[:, :, None] + at)
    nbytes = np.broadcast_to(here.widths[:, None, None], addresses[0].shape)
    return CopyPlan(addresses[0].ravel(), addresses[1].ravel(), nbytes.ravel())
