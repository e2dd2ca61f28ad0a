"""A plan moves exactly the bytes that the obvious loop moves, in as few copies as the runs allow."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdctl.core.layout import Pool
from pdctl.core.plan import CopyPlan, item_plan
from pdctl.errors import LayoutMismatch

N_ITEMS = 12
HIGH = 0x7F00_0000_0000  # where the kernel really puts arenas


def pool(lens: Sequence[int], base: int) -> Pool:
    """Entries one after another from `base` on, with a gap of 3 bytes that nothing may touch."""
    pointers, at = [], base
    for nbytes in lens:
        pointers.append(at)
        at += nbytes * N_ITEMS + 3
    return Pool(tuple(pointers), tuple(lens), N_ITEMS)


def obvious(source: Pool, destination: Pool, src: Sequence[int], dst: Sequence[int]) -> dict[int, int]:
    """Destination byte -> source byte, one at a time."""
    return {
        destination.pointers[e] + q * nbytes + i: source.pointers[e] + p * nbytes + i
        for e, nbytes in enumerate(source.item_lens)
        for p, q in zip(src, dst, strict=True)
        for i in range(nbytes)
    }


def planned(plan: CopyPlan) -> dict[int, int]:
    pairs = [
        (int(d) + i, int(s) + i) for s, d, n in zip(plan.src, plan.dst, plan.nbytes, strict=True) for i in range(n)
    ]
    assert len(dict(pairs)) == len(pairs), "a byte is written twice"
    return dict(pairs)


indices = st.lists(st.integers(0, N_ITEMS - 1), max_size=N_ITEMS)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), indices, st.permutations(range(N_ITEMS)))
def test_the_bytes_are_those_of_the_obvious_loop(lens: list[int], src: list[int], places: list[int]) -> None:
    source, destination, dst = pool(lens, HIGH), pool(lens, HIGH + 2**32), places[: len(src)]
    assert planned(item_plan(source, destination, src, dst, "KV")) == obvious(source, destination, src, dst)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.integers(0, 4), st.integers(1, 3))
def test_runs_that_go_on_at_both_sides_are_one_copy(runs: list[int], skip: int, n_entries: int) -> None:
    src: list[int] = []
    dst: list[int] = []
    at = 0
    for length in runs:
        src += range(at, at + length)
        dst += range(at + skip, at + skip + length)
        at += length + 2
    big = Pool((0x1000, 0x900000, 0xA00000)[:n_entries], (64,) * n_entries)
    plan = item_plan(big, big, src, dst, "KV")
    assert len(plan) == len(runs) * n_entries
    assert plan.total == sum(runs) * 64 * n_entries


def test_a_run_at_one_side_only_is_not_merged() -> None:
    one = Pool((0,), (8,))
    plan = item_plan(one, one, [1, 2, 3], [7, 6, 5], "KV")
    assert list(zip(plan.src, plan.dst, plan.nbytes, strict=True)) == [(8, 56, 8), (16, 48, 8), (24, 40, 8)]


def test_nothing_to_copy_is_an_empty_plan() -> None:
    one = Pool((0,), (8,))
    plan = item_plan(one, one, [], [], "KV")
    assert (len(plan), plan.total) == (0, 0)


@pytest.mark.parametrize("items", [np.array([1, 2], np.int32), [1, 2], (1, 2), np.array([[1], [2]])])
def test_indices_of_any_integer_shape_will_do(items: object) -> None:
    one = Pool((0,), (8,))
    assert item_plan(one, one, items, [1, 2], "KV").total == 16  # type: ignore[arg-type]


def test_each_item_needs_a_place() -> None:
    one = Pool((0,), (8,))
    with pytest.raises(LayoutMismatch, match="KV: 2 items to send into 1 places"):
        item_plan(one, one, [1, 2], [1], "KV")


@pytest.mark.parametrize(("src", "dst", "said"), [([-1], [0], "sender: index -1"), ([0], [-2], "receiver: index -2")])
def test_an_index_below_zero_is_refused(src: list[int], dst: list[int], said: str) -> None:
    one = Pool((0,), (8,))
    with pytest.raises(LayoutMismatch, match=said):
        item_plan(one, one, src, dst, "KV")


def test_an_index_past_a_pool_of_known_size_is_refused() -> None:
    ours, theirs = Pool((0,), (8,), 4), Pool((0,), (8,))
    with pytest.raises(LayoutMismatch, match="sender: index 4 is outside the pool, the pool has 4"):
        item_plan(ours, theirs, [4], [100], "KV")
    assert len(item_plan(ours, theirs, [3], [100], "KV")) == 1


def test_pools_that_do_not_pair_have_no_plan() -> None:
    with pytest.raises(LayoutMismatch, match="entries"):
        item_plan(Pool((0,), (8,)), Pool((0, 1), (8, 8)), [0], [0], "KV")


def test_plans_join_in_order() -> None:
    joined = CopyPlan.join(CopyPlan.of((1, 2, 3)), CopyPlan.of(), CopyPlan.of((4, 5, 6), (7, 8, 9)))
    assert joined.src.tolist() == [1, 4, 7]
    assert joined.total == 18
    assert len(CopyPlan.join()) == 0


def test_the_three_arrays_have_one_shape() -> None:
    with pytest.raises(LayoutMismatch, match="plan arrays differ"):
        CopyPlan(np.zeros(2, np.int64), np.zeros(2, np.int64), np.zeros(1, np.int64))
