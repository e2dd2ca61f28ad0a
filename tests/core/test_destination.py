"""A decode rank's registration and metadata become copies into exactly the pages it named, or a refusal with values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pdctl.core.address import Endpoint
from pdctl.core.destination import Destination, LayerGroups
from pdctl.core.frames import IntLists
from pdctl.core.layout import Heads, Kind, KvLayout, Pool, RankPools
from pdctl.core.wire import Metadata, RegisterBuffers
from pdctl.errors import CallerError, LayoutMismatch

KV = Pool((1_000_000,), (64,), 16)
AUX = Pool((2_000_000,), (8,), 4)
OURS = RankPools(KV, AUX)
THEIRS = 5_000_000
THEIR_AUX = 7_000_000
REPLY = Endpoint("10.0.0.7", 7001)
SESSION = "10.0.0.7:15999"


def registered(item_len: int = 64, **more: Any) -> RegisterBuffers:
    said = RegisterBuffers(
        reply=REPLY,
        session=SESSION,
        kv_pointers=(THEIRS,),
        aux_pointers=(THEIR_AUX,),
        tp_rank=0,
        tp_size=1,
        kv_item_len=item_len,
        kv_item_lens=(item_len,),
    )
    return replace(said, **more)


def named(pages: Sequence[int] = (9, 2, 3), aux_row: int | None = 3) -> Metadata:
    return Metadata(5, REPLY, SESSION, np.array(pages, np.int32), aux_row)


def destination(pages: Sequence[int] = (9, 2, 3), aux_row: int | None = 3) -> Destination:
    return Destination.of(registered(), named(pages, aux_row), OURS)


def test_a_chunk_goes_to_the_named_pages_that_begin_where_the_last_one_ended() -> None:
    plan = destination().chunk(np.array([5, 6]), 1)
    assert plan.total == 128
    assert set(plan.dst.tolist()) == {THEIRS + 2 * 64}
    assert set(plan.src.tolist()) == {1_000_000 + 5 * 64}


def test_a_page_more_than_was_named_is_refused_with_both_numbers() -> None:
    with pytest.raises(LayoutMismatch, match="named 3 pages and page 4 is being sent"):
        destination().chunk(np.array([5, 6]), 2)


@pytest.mark.parametrize("n_sent", [2, 4])
def test_the_last_copy_waits_for_as_many_pages_as_were_named(n_sent: int) -> None:
    with pytest.raises(LayoutMismatch, match=f"named 3 pages and {n_sent} were sent"):
        destination().last(n_sent, 2)


def test_the_aux_row_goes_to_the_row_that_was_named() -> None:
    plan = destination().last(3, 2)
    assert (plan.src.tolist(), plan.dst.tolist(), plan.nbytes.tolist()) == ([2_000_016], [THEIR_AUX + 24], [8])


@pytest.mark.parametrize(("ours", "theirs"), [(None, 3), (2, None)], ids=["we have none", "they want none"])
def test_without_an_aux_row_on_either_side_nothing_is_copied(ours: int | None, theirs: int | None) -> None:
    assert len(destination(aux_row=theirs).last(3, ours)) == 0


def test_pools_that_do_not_pair_are_refused_before_anything_is_planned() -> None:
    with pytest.raises(LayoutMismatch, match="64 bytes an item and the receiver 32"):
        Destination.of(registered(item_len=32), named(), OURS)


def test_what_this_prefill_does_not_move_is_refused_by_name() -> None:
    with pytest.raises(LayoutMismatch, match="DCP rank 0 of 2 and this prefill rank, of mha, 0 of 1"):
        Destination.of(registered(dcp_size=2), named(), OURS)


# Several entries: layers, heads, state

TWO_LAYERS = RankPools(
    Pool((1_000, 2_000, 3_000, 4_000), (64,) * 4, 8), AUX, KvLayout(Kind.MHA, page_size=4, heads=Heads(2, 1, 0))
)
"""K and V of two layers; a page is 4 tokens of 2 heads of 8 bytes."""


def two_layers(**more: Any) -> RegisterBuffers:
    return registered(**{"kv_pointers": (10_000, 20_000, 30_000, 40_000), "kv_item_lens": (64,) * 4} | more)


def starts(destination: Destination, layers: range | None = None) -> list[tuple[int, int]]:
    plan = destination.chunk(np.array([0]), 0, layers)
    return list(zip(plan.src.tolist(), plan.dst.tolist(), strict=True))


def test_a_group_of_layers_is_their_k_and_v_alone() -> None:
    to = Destination.of(two_layers(), named([0]), TWO_LAYERS)
    assert starts(to) == [(1_000, 10_000), (2_000, 20_000), (3_000, 30_000), (4_000, 40_000)]
    assert starts(to, range(1, 2)) == [(2_000, 20_000), (4_000, 40_000)]
    assert starts(to, range(2, 9)) == []


def test_a_decode_of_twice_the_ranks_gets_the_heads_of_its_rank() -> None:
    said = two_layers(kv_item_lens=(32,) * 4, tp_size=2, tp_rank=3)  # rank 1 of the second DP group
    plan = Destination.of(said, named([0]), TWO_LAYERS).chunk(np.array([0]), 0, range(1))
    assert plan.src.tolist()[:4] == [1_008, 1_024, 1_040, 1_056]
    assert plan.dst.tolist()[:4] == [10_000, 10_008, 10_016, 10_024]
    assert set(plan.nbytes.tolist()) == {8}


def test_heads_that_do_not_fit_are_refused_when_the_rank_names_its_pages() -> None:
    with pytest.raises(LayoutMismatch, match="a head of a token has 8 bytes at the sender and 16"):
        Destination.of(two_layers(tp_size=2), named([0]), TWO_LAYERS)


STATES = replace(OURS, states=(Pool((8_000,), (16,), 4), Pool((9_000,), (24,), 4)))


def with_state(pointers: IntLists = ((80_000,), (90_000,)), lens: IntLists = ((16,), (24,))) -> RegisterBuffers:
    return registered(state_pointers=pointers, state_item_lens=lens)


def with_rows(rows: tuple[tuple[int, ...], ...]) -> Metadata:
    return replace(named(), state_rows=rows)


def test_rows_of_state_go_with_the_last_copy_each_group_to_its_own() -> None:
    to = Destination.of(with_state(), with_rows(((3,), (0, 1))), STATES)
    plan = to.last(3, 2, [[1], [2, 3]])
    copies = list(zip(plan.src.tolist(), plan.dst.tolist(), plan.nbytes.tolist(), strict=True))
    assert copies == [(8_016, 80_048, 16), (9_048, 90_000, 48), (2_000_016, THEIR_AUX + 24, 8)]


def test_a_group_of_which_decode_named_no_row_is_left_alone() -> None:
    to = Destination.of(with_state(), with_rows(((), (0,))), STATES)
    assert to.last(3, None, [[1], [2]]).dst.tolist() == [90_000]


def test_rows_that_are_wanted_and_not_given_are_an_error_with_the_group() -> None:
    to = Destination.of(with_state(), with_rows(((3,), (0,))), STATES)
    with pytest.raises(LayoutMismatch, match=r"state 1: .* named 1 rows and none are sent"):
        to.last(3, 2, [[1]])


@pytest.mark.parametrize(
    ("said", "error"),
    [
        (registered(), "the sender has 2 groups and the receiver 0"),
        (with_state(lens=((16,), (32,))), "state 1 entry 0: .* 24 bytes .* 32"),
        (with_state(((80_000,), (1, 2)), ((16,), (24, 24))), "state 1: the sender has 1 entries and the receiver 2"),
    ],
)
def test_state_that_does_not_pair_is_refused_with_both_values(said: RegisterBuffers, error: str) -> None:
    with pytest.raises(LayoutMismatch, match=error):
        Destination.of(said, with_rows(((3,), (0,))), STATES)


def test_state_of_a_stage_finds_its_layers_by_their_ids() -> None:
    ours = replace(OURS, states=(Pool((8_000,), (16,), 4),), state_layer_ids=((7,),))
    said = registered(state_pointers=((70_000, 80_000),), state_item_lens=((16, 16),), state_layer_ids=((3, 7),))
    assert Destination.of(said, with_rows(((0,),)), ours).last(3, None, [[0]]).dst.tolist() == [80_000]


def test_state_that_this_prefill_has_not_is_refused_by_name() -> None:
    with pytest.raises(LayoutMismatch, match="wants state beside KV"):
        Destination.of(with_state(), with_rows(((3,), (0,))), OURS)


# A chunk in groups of layers


def test_a_chunk_is_whole_when_each_layer_was_sent_once() -> None:
    pages = np.array([4, 2])
    begun = LayerGroups.of(frozenset(range(4)), pages)
    assert begun.is_new
    left = begun.sent(pages, range(2))
    assert left is not None
    assert not left.is_new
    assert left.sent(pages, range(2, 4)) is None
    assert begun.sent(pages, None) is None


def test_a_layer_twice_or_of_another_stage_or_other_pages_in_between_are_refused() -> None:
    pages = np.array([4, 2])
    left = LayerGroups.of(frozenset({0, 1, 2, 5}), pages).sent(pages, range(1, 3))
    assert left is not None
    for layers, said in ((range(2, 3), "layers 2 of this chunk"), (range(9, 11), "layers 9-10 .* which has 0-2, 5")):
        with pytest.raises(CallerError, match=said):
            left.sent(pages, layers)
    with pytest.raises(CallerError, match="layers 0, 5 of the chunk before are not sent: send them with the same 2"):
        left.sent(np.array([1]), None)
