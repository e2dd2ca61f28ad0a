"""The address check and the splitting of long copies, against the obvious loops."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdctl.core.layout import Region
from pdctl.core.plan import CopyPlan
from pdctl.core.turns import split
from pdctl.engine.base import PeerCard
from pdctl.engine.checks import check_region, first_outside
from pdctl.errors import BadField


@st.composite
def apart(draw: st.DrawFn) -> list[Region]:
    """Regions that do not overlap, some of them touching, in any order."""
    at, found = 1, []
    for gap, nbytes in draw(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9)), max_size=6)):
        found.append(Region(at + gap, nbytes))
        at += gap + nbytes
    return draw(st.permutations(found))


Copies = list[tuple[int, int]]
copies = st.tuples(st.integers(1, 500), st.integers(1000, 1500), st.integers(1, 40))
spans = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 12)), max_size=8)


@given(apart(), spans)
def test_the_first_span_outside_is_the_one_that_the_loop_finds(
    regions: list[Region], wanted: list[tuple[int, int]]
) -> None:
    card = PeerCard("a:1", 1, tuple(regions))
    expected = next((n for n, (pointer, nbytes) in enumerate(wanted) if not card.covers(pointer, nbytes)), None)
    table = np.asarray(wanted, dtype=np.int64).reshape(-1, 2)
    assert first_outside(regions, table[:, 0], table[:, 1]) == expected


@given(
    st.lists(st.tuples(st.integers(1, 500), st.integers(1000, 1500), st.integers(1, 40)), max_size=6),
    st.integers(1, 50),
)
def test_split_copies_move_the_same_bytes_in_the_same_order(wanted: list[tuple[int, int, int]], limit: int) -> None:
    pieces = split(CopyPlan.of(*wanted), limit)
    assert len(pieces) == 0 or int(pieces.nbytes.max()) <= limit
    assert _bytes(pieces) == _bytes(CopyPlan.of(*wanted))


def _bytes(plan: CopyPlan) -> list[tuple[int, int]]:
    rows = zip(plan.src.tolist(), plan.dst.tolist(), plan.nbytes.tolist(), strict=True)
    return [(src + n, dst + n) for src, dst, nbytes in rows for n in range(nbytes)]


def test_a_region_up_to_the_last_address_is_allowed_and_one_past_it_is_not() -> None:
    check_region(Region((1 << 63) - 8, 8), [])
    with pytest.raises(BadField, match="pointer"):
        check_region(Region((1 << 63) - 8, 9), [])
