"""Whatever the split, every byte of every named page comes from the right layer, token and head, exactly once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdctl.core.entries import pair_entries, same_entries
from pdctl.core.layout import Heads, Kind, KvLayout, Pool, Share
from pdctl.core.pairing import Pairing, check_rank, check_shapes, dp_rank_of, pages_of, pair, rank_id
from pdctl.core.plan import CopyPlan, head_plan, page_plan
from pdctl.core.route import Seat, Shape
from pdctl.errors import LayoutMismatch

N_PAGES = 6
HIGH = 0x7F00_0000_0000

Byte = tuple[int, int, int, int, int, int]
"""Part (K, V), layer, page's number in the request, token of the page, head, byte of the head."""


def shape(tp: int = 1, pp: int = 1, dp: int = 1, cp: int = 1, **more: Any) -> Shape:
    given: dict[str, Any] = {"page_size": 16, "kv_cache_dtype": "bfloat16"} | more
    return Shape(attn_tp_size=tp, attn_cp_size=cp, dp_size=dp, pp_size=pp, **given)


@dataclass(frozen=True)
class Model:
    """What all ranks serve: `lens[part]` bytes a head of a token."""

    kind: Kind
    layers: int
    heads: int
    lens: tuple[int, ...]
    page_size: int

    def layout(self, seat: Seat, tp_size: int, pp_size: int) -> KvLayout:
        heads = None if self.kind is Kind.MLA else Heads(self.heads, tp_size, seat.tp)
        return KvLayout(self.kind, self.page_size, heads, first_layer=seat.pp * self.layers // pp_size)


@dataclass(frozen=True)
class Rank:
    """One rank's pool somewhere in a made-up memory."""

    model: Model
    seat: Seat
    tp_size: int
    pp_size: int
    base: int

    @property
    def layout(self) -> KvLayout:
        return self.model.layout(self.seat, self.tp_size, self.pp_size)

    @property
    def heads(self) -> Sequence[int]:
        return range(1) if self.layout.heads is None else self.layout.heads.held

    @property
    def entries(self) -> list[tuple[int, int]]:
        """(part, layer) of each entry."""
        n = self.model.layers // self.pp_size
        return [(part, self.layout.first_layer + at) for part in range(len(self.model.lens)) for at in range(n)]

    def pool(self) -> Pool:
        lens = [self.model.page_size * len(self.heads) * self.model.lens[part] for part, _ in self.entries]
        pointers = [self.base + at * (1 << 20) for at in range(len(lens))]
        return Pool(tuple(pointers), tuple(lens), N_PAGES)

    def bytes_of(self, pages: Sequence[int]) -> Iterator[tuple[int, Byte]]:
        """Address and meaning of every byte of `pages`, by the obvious loops."""
        pool = self.pool()
        for entry, (part, layer) in enumerate(self.entries):
            nbytes = self.model.lens[part]
            for number, page in enumerate(pages):
                at = pool.pointers[entry] + page * pool.item_lens[entry]
                for token, head, byte in product(range(self.model.page_size), self.heads, range(nbytes)):
                    yield at, (part, layer, number, token, head, byte)
                    at += 1


def plan_between(source: Rank, to: Rank, src: Sequence[int], dst: Sequence[int]) -> CopyPlan:
    ours, theirs = source.layout, to.layout
    pools = source.pool(), to.pool()
    pairs = pair_entries(ours, len(pools[0]), (), len(pools[1]), "KV")
    if ours.heads is None or theirs.heads is None:
        return page_plan(*pools, pairs, src, dst, "KV")
    return head_plan(*pools, pairs, src, dst, page_size=ours.page_size, ours=ours.heads, theirs=theirs.heads, what="KV")


def written(plan: CopyPlan) -> Iterator[tuple[int, int]]:
    for s, d, n in zip(plan.src.tolist(), plan.dst.tolist(), plan.nbytes.tolist(), strict=True):
        for i in range(n):
            yield d + i, s + i


def received(model: Model, prefill: Shape, decode: Shape, src: Sequence[int], dst: Sequence[int]) -> None:
    """Let every decode rank receive from all whom it is paired with, and compare every byte."""
    for tp, pp in product(range(decode.attn_tp_size), range(decode.pp_size)):
        to = Rank(model, Seat(0, 0, tp, pp), decode.attn_tp_size, decode.pp_size, HIGH)
        wanted = dict(to.bytes_of(dst))
        came: dict[int, Byte] = {}
        for sender in pair(prefill, decode, tp, pp, model.kind).senders:
            source = Rank(model, sender, prefill.attn_tp_size, prefill.pp_size, HIGH >> 1)
            means = dict(source.bytes_of(src))
            for address, at in written(plan_between(source, to, src, dst)):
                assert address not in came, "a byte is written twice"
                came[address] = means[at]
        assert came == wanted


pages = st.permutations(range(N_PAGES))
sizes = st.sampled_from([1, 2, 4, 8])


@st.composite
def pages_both(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    n = draw(st.integers(0, 4))
    return draw(pages)[:n], draw(pages)[:n]


@given(sizes, sizes, st.sampled_from([1, 2, 4]), st.integers(1, 3), pages_both(), st.tuples(*[st.integers(1, 3)] * 2))
def test_head_slices_of_any_two_tp_sizes(
    prefill: int,
    decode: int,
    heads: int,
    page_size: int,
    which: tuple[list[int], list[int]],
    lens: tuple[int, ...],
) -> None:
    model = Model(Kind.MHA, layers=2, heads=heads, lens=lens, page_size=page_size)
    received(model, shape(prefill), shape(decode), *which)


@given(sizes, sizes, st.sampled_from([(1, 1), (2, 2), (2, 1), (4, 1)]), pages_both())
def test_mla_of_any_split(
    prefill: int, decode: int, stages: tuple[int, int], which: tuple[list[int], list[int]]
) -> None:
    model = Model(Kind.MLA, layers=4, heads=1, lens=(5,), page_size=2)
    received(model, shape(prefill, stages[0]), shape(decode, stages[1]), *which)


@given(st.sampled_from([(1, 1), (2, 2), (2, 1), (4, 1)]), st.sampled_from([(1, 1), (2, 1), (1, 2)]), pages_both())
def test_pipeline_stages_with_and_without_a_head_split(
    stages: tuple[int, int], tps: tuple[int, int], which: tuple[list[int], list[int]]
) -> None:
    model = Model(Kind.MHA, layers=4, heads=2, lens=(2, 3), page_size=2)
    received(model, shape(tps[0], stages[0]), shape(tps[1], stages[1]), *which)


def test_a_head_slice_is_one_copy_a_token_and_a_whole_page_one_a_run() -> None:
    model = Model(Kind.MHA, layers=1, heads=4, lens=(8, 8), page_size=16)
    source = Rank(model, Seat(0, 0, 0, 0), 2, 1, 0)
    half, whole = Rank(model, Seat(0, 0, 0, 0), 4, 1, 0), Rank(model, Seat(0, 0, 0, 0), 2, 1, 0)
    assert len(plan_between(source, half, [1, 2, 3], [0, 1, 2])) == 2 * 3 * 16
    assert len(plan_between(source, whole, [1, 2, 3], [0, 1, 2])) == 2


def test_of_ranks_that_hold_the_same_head_one_writes() -> None:
    receiver = Heads(total=2, tp_size=2, tp_rank=1)
    sent = {rank: list(Heads(2, 8, rank).to_send(receiver)) for rank in range(4, 8)}
    assert sent == {4: [1], 5: [], 6: [], 7: []}


# Entries


def mha(first_layer: int = 0, ids: tuple[int, ...] = ()) -> KvLayout:
    return KvLayout(Kind.MHA, 16, first_layer=first_layer, layer_ids=ids)


def test_a_stage_goes_to_its_own_layers_of_k_and_of_v() -> None:
    assert pair_entries(mha(2), 4, (), 8, "KV").tolist() == [[0, 2], [1, 3], [2, 6], [3, 7]]


def test_entries_of_a_draft_model_behind_the_models_own_are_left_out() -> None:
    # two layers here; there K0 K1 V0 V1 and one draft layer's K and V behind them
    assert pair_entries(mha(), 4, (), 6, "KV").tolist() == [[0, 0], [1, 1], [2, 2], [3, 3]]


def test_layer_ids_decide_where_both_sides_give_them() -> None:
    ours = mha(ids=(2, 3, 2, 3))
    assert pair_entries(ours, 4, (1, 2, 3, 1, 2, 3), 6, "KV").tolist() == [[0, 1], [1, 2], [2, 4], [3, 5]]


def test_layer_ids_of_one_side_only_do_for_pools_of_the_same_size() -> None:
    assert pair_entries(mha(ids=(0, 1)), 2, (), 2, "KV").tolist() == same_entries(2).tolist()


@pytest.mark.parametrize(
    ("ours", "n_ours", "ids", "n_theirs", "said"),
    [
        (mha(ids=(0, 7)), 2, (0, 1), 2, "no entry for layer 7"),
        (mha(ids=(0, 7)), 4, (0, 1), 2, "the sender has 4 entries and 2 layer ids"),
        (mha(ids=(0, 1)), 2, (), 4, "the receiver gives no layer ids"),
        (mha(), 2, (0, 0, 1, 1), 4, "the sender gives no layer ids"),
        (mha(), 4, (), 2, "do not fit into the receiver's 2"),
        (mha(3), 4, (), 8, "4 entries of mha from layer 3 on do not fit"),
        (KvLayout(Kind.MLA, first_layer=3), 2, (), 4, "2 entries of mla from layer 3 on do not fit"),
        (mha(), 3, (), 8, "do not fit"),
    ],
)
def test_entries_that_cannot_be_paired_are_refused(
    ours: KvLayout, n_ours: int, ids: tuple[int, ...], n_theirs: int, said: str
) -> None:
    with pytest.raises(LayoutMismatch, match=said):
        pair_entries(ours, n_ours, ids, n_theirs, "KV")


# Heads


@pytest.mark.parametrize(("total", "size"), [(6, 4), (4, 6), (3, 2)])
def test_heads_that_do_not_divide_are_refused_with_both_numbers(total: int, size: int) -> None:
    with pytest.raises(LayoutMismatch, match=f"{total} KV heads do not divide over {size}"):
        Heads(total, size, 0)


def test_another_models_heads_and_tp_sizes_that_do_not_divide_are_refused_with_both_values() -> None:
    with pytest.raises(LayoutMismatch, match="the sender has 4 KV heads in all and the receiver 8"):
        Heads(4, 2, 0).to_send(Heads(8, 2, 0))
    with pytest.raises(LayoutMismatch, match="attn_tp_size is 2 at the sender and 3 at the receiver"):
        Heads(6, 2, 0).to_send(Heads(6, 3, 0))


def sliced(source: Pool, destination: Pool, page_size: int = 2, **more: Any) -> CopyPlan:
    heads = {"ours": Heads(2, 1, 0), "theirs": Heads(2, 2, 1)} | more
    return head_plan(source, destination, same_entries(1), [0], [0], page_size=page_size, what="KV", **heads)


def test_a_page_that_is_no_whole_number_of_heads_is_refused() -> None:
    with pytest.raises(LayoutMismatch, match="entry 0 of the sender: 15 bytes a page are no 2 tokens of 2 heads"):
        sliced(Pool((0,), (15,)), Pool((0,), (8,)))


def test_heads_of_another_size_are_refused_with_both_values() -> None:
    with pytest.raises(LayoutMismatch, match="a head of a token has 4 bytes at the sender and 8 at the receiver"):
        sliced(Pool((0,), (16,)), Pool((0,), (16,)))


def test_pages_past_the_pool_are_refused_before_a_byte_moves() -> None:
    with pytest.raises(LayoutMismatch, match="KV of the sender: index 0 is outside the pool, the pool has 0"):
        sliced(Pool((0,), (16,), 0), Pool((0,), (8,)))


# Pairing


def seats(*places: tuple[int, int]) -> tuple[Seat, ...]:
    return tuple(Seat(0, 0, tp, pp) for tp, pp in places)


@pytest.mark.parametrize(
    ("prefill", "decode", "tp", "pp", "kind", "expected"),
    [
        (shape(2), shape(2), 1, 0, Kind.MHA, Pairing(seats((1, 0)), (), 1)),
        (shape(2), shape(4), 3, 0, Kind.MHA, Pairing(seats((1, 0)), (), 2)),
        (shape(4), shape(2), 1, 0, Kind.MHA, Pairing(seats((2, 0), (3, 0)), (), 1)),
        (shape(4), shape(2), 1, 0, Kind.MLA, Pairing(seats((2, 0)), seats((3, 0)), 1)),
        (shape(1, 2), shape(1, 2), 0, 1, Kind.MHA, Pairing(seats((0, 1)), (), 1)),
        (shape(1, 2), shape(1), 0, 0, Kind.MHA, Pairing(seats((0, 0), (0, 1)), (), 1)),
        (shape(2, 2), shape(1), 0, 0, Kind.MLA, Pairing(seats((0, 0), (0, 1)), seats((1, 0), (1, 1)), 1)),
        (shape(2, cp=4), shape(2), 1, 0, Kind.MHA, Pairing(seats((1, 0)), (), 1)),
    ],
)  # fmt: skip
def test_who_hears_whom_is_as_with_stock(
    prefill: Shape, decode: Shape, tp: int, pp: int, kind: Kind, expected: Pairing
) -> None:
    found = pair(prefill, decode, tp, pp, kind)
    assert found == expected
    assert found.responses == len(expected.senders)


def test_another_dp_group_has_the_same_ranks_of_its_own() -> None:
    found = pair(shape(2, dp=3), shape(1), 0, 0, Kind.MLA).at(2)
    assert (found.senders, found.dummies) == ((Seat(2, 0, 0, 0),), (Seat(2, 0, 1, 0),))


@pytest.mark.parametrize(
    ("prefill", "decode", "said"),
    [
        (shape(page_size=16), shape(page_size=32), "page_size is 16 at the prefill and 32 at this decode"),
        (shape(kv_cache_dtype="auto"), shape(), "kv_cache_dtype is 'auto' at the prefill and 'bfloat16'"),
        (shape(kv_layout="hnd"), shape(), "kv_layout is 'hnd' at the prefill and None"),
        (shape(4), shape(3), "attn_tp_size is 4 at the prefill and 3 at this decode"),
        (shape(), shape(cp=2), "attn_cp_size is 1 at the prefill and 2 at this decode"),
        (shape(pp=4), shape(pp=2), "pp_size is 4 at the prefill and 2 at this decode"),
        (shape(2, enable_kv_cache_sharding=True), shape(), "attn_tp_size is 2 at the prefill and 1 at this decode: KV"),
    ],
)
def test_impossible_pairs_are_refused_with_both_values(prefill: Shape, decode: Shape, said: str) -> None:
    with pytest.raises(LayoutMismatch, match=said):
        check_shapes(prefill, decode, Kind.MLA)


@pytest.mark.parametrize(
    ("prefill", "said"),
    [
        (shape(cp=2), "attn_cp_size is 2 at the prefill and 1 at this decode: .*DCP size of 2"),
        (shape(2, enable_kv_cache_sharding=True), "enable_kv_cache_sharding is True"),
    ],
)
def test_a_decode_with_dcp_needs_whole_pages_in_one_place(prefill: Shape, said: str) -> None:
    with pytest.raises(LayoutMismatch, match=said):
        pair(prefill, shape(2), 0, 0, Kind.MLA, dcp_size=2)


def test_of_shared_pages_every_rank_sends_its_own_and_hears_every_decode_rank() -> None:
    found = pair(shape(2, enable_kv_cache_sharding=True), shape(2), 1, 0, Kind.MLA)
    assert found == Pairing((Seat(0, 0, 0, 0), Seat(0, 0, 1, 0)), (), 2)
    over_cp = shape(2, cp=2, enable_kv_cache_sharding=True)
    found = pair(over_cp, shape(1), 0, 0, Kind.MLA)
    assert found.senders == (Seat(0, 0, 0, 0), Seat(0, 1, 0, 0))
    assert found.dummies == (Seat(0, 0, 1, 0), Seat(0, 1, 1, 0))
    assert [pages_of(seat, over_cp, Kind.MLA) for seat in found.senders] == [Share(2, 0), Share(2, 1)]


def test_of_cp_ranks_that_share_the_layers_each_sends_its_own() -> None:
    found = pair(shape(cp=2, enable_dsa_cache_layer_split=True), shape(), 0, 0, Kind.MLA)
    assert found == Pairing((Seat(0, 0, 0, 0), Seat(0, 1, 0, 0)), (), 1)


def test_a_flag_that_says_nothing_to_mha_keeps_nobody_apart() -> None:
    check_shapes(replace(shape(), enable_kv_cache_sharding=True), shape(), Kind.MHA)


SHARING = shape(2, enable_kv_cache_sharding=True)


@pytest.mark.parametrize(
    ("layout", "given", "said"),
    [
        (KvLayout(page_size=16, heads=Heads(4, 2, 0)), shape(2), r"heads are \(0, 2\) and .* say \(1, 2\)"),
        (KvLayout(page_size=16, heads=Heads(4, 4, 1)), shape(2), r"heads are \(1, 4\)"),
        (KvLayout(heads=Heads(4, 2, 1)), shape(2), "page_size are 1 and .* say 16"),
        (KvLayout(Kind.MLA, tokens=Share(2, 0)), shape(2), "page_size are 1 and .* say 16"),
        (
            KvLayout(Kind.MLA),
            shape(2, enable_kv_cache_sharding=True),
            r"pages are Share\(size=1, rank=0\) and .*size=2",
        ),
    ],
)
def test_a_rank_whose_layout_contradicts_its_seat_does_not_open(layout: KvLayout, given: Shape, said: str) -> None:
    with pytest.raises(LayoutMismatch, match=said):
        check_rank(layout, Seat(0, 0, 1, 0), given, prefill=True)


def test_a_layout_that_says_little_contradicts_nothing() -> None:
    check_rank(KvLayout(), Seat(0, 0, 1, 0), shape(2), prefill=True)
    check_rank(
        KvLayout(Kind.MLA, 16, pages=Share(2, 1)),
        Seat(0, 0, 1, 0),
        shape(2, enable_kv_cache_sharding=True),
        prefill=True,
    )
    check_rank(KvLayout(Kind.MLA, 16, tokens=Share(2, 1)), Seat(0, 0, 1, 0), shape(2), prefill=False)


def test_rank_ids_differ_within_an_instance() -> None:
    whole = shape(2, 3, cp=4)
    ids = [rank_id(seat, whole) for seat in sorted(whole.seats())]
    assert sorted(ids) == list(range(24))
    assert rank_id(Seat(0, 1, 1, 2), whole) == 1 * (3 * 4) + 2 * 4 + 1


def test_a_room_says_its_dp_group_unless_only_the_registry_knows() -> None:
    assert dp_rank_of(shape(), 7) == 0
    assert dp_rank_of(shape(dp=4), 7) == 3
    assert dp_rank_of(shape(dp=4, follow_bootstrap_room=False), 7) is None


def test_planning_touches_no_array_of_the_caller() -> None:
    src = np.array([0, 1])
    page_plan(Pool((0,), (8,)), Pool((64,), (8,)), same_entries(1), src, src, "KV")
    assert src.tolist() == [0, 1]
