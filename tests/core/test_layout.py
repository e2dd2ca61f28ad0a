"""Pools say where their bytes are, and which two of them pair."""

from __future__ import annotations

import pytest

from pdctl.core.entries import check_pair
from pdctl.core.layout import Pool, Region
from pdctl.errors import LayoutMismatch


def test_a_region_contains_what_lies_wholly_inside() -> None:
    region = Region(100, 50)
    assert Region(100, 50) in region
    assert Region(149, 1) in region
    assert Region(149, 2) not in region
    assert Region(99, 1) not in region
    assert 120 not in region


def test_a_pool_has_one_region_for_each_entry() -> None:
    pool = Pool((1000, 9000), (10, 20), n_items=4)
    assert list(pool.regions()) == [Region(1000, 40), Region(9000, 80)]
    assert len(pool) == 2


def test_the_size_of_a_peers_pool_is_not_known() -> None:
    with pytest.raises(LayoutMismatch, match="belongs to a peer"):
        list(Pool((1000,), (10,)).regions())


@pytest.mark.parametrize("lens", [(0,), (-1,)])
def test_an_entry_without_bytes_is_refused(lens: tuple[int, ...]) -> None:
    with pytest.raises(LayoutMismatch, match="below 1"):
        Pool((1000,), lens)


def test_pointers_and_lengths_come_in_pairs() -> None:
    with pytest.raises(LayoutMismatch, match="1 pointers but 2 item lengths"):
        Pool((1000,), (1, 2))


def test_pools_of_the_same_shape_pair() -> None:
    check_pair(Pool((1, 2), (8, 16), 4), Pool((30, 40), (8, 16)), "KV")


def test_another_number_of_entries_is_refused_with_both() -> None:
    with pytest.raises(LayoutMismatch, match=r"KV: the sender has 2 entries and the receiver 1: start both"):
        check_pair(Pool((1, 2), (8, 16)), Pool((30,), (8,)), "KV")


def test_another_item_length_is_refused_with_entry_and_both() -> None:
    with pytest.raises(LayoutMismatch, match=r"KV entry 1: the sender has 16 bytes an item and the receiver 32"):
        check_pair(Pool((1, 2), (8, 16)), Pool((30, 40), (8, 32)), "KV")
