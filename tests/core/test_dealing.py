"""Pages and tokens that are dealt out over ranks: each goes to the rank that it belongs to, once, where it looks."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdctl.core.address import Endpoint
from pdctl.core.dealing import by_token
from pdctl.core.destination import Destination
from pdctl.core.layout import Heads, Kind, KvLayout, Pool, RankPools, Share, Slices
from pdctl.core.sums import Sums, pack, unpack
from pdctl.core.wire import Metadata, RegisterBuffers
from pdctl.engine.checksums import sums
from pdctl.errors import LayoutMismatch

REPLY, AUX = Endpoint("10.0.0.1", 40000), Pool((500,), (8,), 4)
TOKEN_NBYTES, N_PAGES = 6, 12
HERE, THERE = 10_000, 900_000


def registered(item_len: int, **more: Any) -> RegisterBuffers:
    plain: dict[str, Any] = {"reply": REPLY, "session": "a:1", "kv_pointers": (THERE,), "aux_pointers": (700,)}
    return RegisterBuffers(**plain | {"tp_rank": 0, "tp_size": 1, "kv_item_len": item_len} | more)


def named(pages: list[int], prefix_len: int = 0, **more: Any) -> Metadata:
    return Metadata(7, REPLY, "a:1", np.array(pages, np.int32), 1, prefix_len=prefix_len, **more)


def mla(page_size: int, pages: Share | None = None) -> RankPools:
    kv = Pool((HERE,), (page_size * TOKEN_NBYTES,), N_PAGES)
    return RankPools(kv, AUX, KvLayout(Kind.MLA, page_size, pages=pages or Share()))


def written(to: Destination, chunks: list[list[int]]) -> dict[int, int]:
    """By the byte that is written, the byte that goes there."""
    found: dict[int, int] = {}
    start = 0
    for chunk in chunks:
        plan = to.chunk(np.array(chunk, np.int64), start)
        start += len(chunk)
        for src, dst, nbytes in zip(plan.src.tolist(), plan.dst.tolist(), plan.nbytes.tolist(), strict=True):
            for byte in range(nbytes):
                assert dst + byte not in found, "a byte is written twice"
                found[dst + byte] = src + byte
    return found


def cut_up(pages: list[int], cut: int) -> list[list[int]]:
    return [pages[: cut % (len(pages) + 1)], pages[cut % (len(pages) + 1) :]]


requests = st.integers(1, N_PAGES).flatmap(lambda n: st.permutations(range(N_PAGES)).map(lambda p: p[:n]))


@settings(max_examples=30)
@given(requests, st.permutations(range(N_PAGES)), st.integers(1, 4), st.integers(2, 4), st.integers(0, 12))
def test_every_token_comes_to_the_dcp_rank_whose_turn_it_is(
    source: list[int], theirs: list[int], page_size: int, size: int, cut: int
) -> None:
    pages, tokens = theirs[: -(-len(source) // size)], [(p, t) for p in source for t in range(page_size)]
    for rank in range(size):
        wanted: dict[int, int] = {}
        for slot, (page, token) in enumerate(tokens[rank::size]):
            at = THERE + (pages[slot // page_size] * page_size + slot % page_size) * TOKEN_NBYTES
            wanted |= {at + b: HERE + (page * page_size + token) * TOKEN_NBYTES + b for b in range(TOKEN_NBYTES)}
        said = registered(page_size * TOKEN_NBYTES, dcp_size=size, dcp_rank=rank)
        to = Destination.of(said, named(pages, prefix_len=page_size * size), mla(page_size))
        assert written(to, cut_up(source, cut)) == wanted
        assert len(to.last(len(source), 0)) == 1


@settings(max_examples=30)
@given(requests, st.permutations(range(N_PAGES)), st.integers(2, 4), st.integers(0, 12))
def test_ranks_that_share_pages_write_each_once(source: list[int], theirs: list[int], size: int, cut: int) -> None:
    nbytes, pages = 2 * TOKEN_NBYTES, theirs[: len(source)]
    came: dict[int, tuple[int, int]] = {}
    for rank in range(size):
        to = Destination.of(registered(nbytes), named(pages), mla(2, Share(size, rank)))
        for dst, src in written(to, cut_up(source, cut)).items():
            assert dst not in came
            came[dst] = (rank, src)
    assert came == {
        THERE + there * nbytes + b: (here % size, HERE + here // size * nbytes + b)
        for here, there in zip(source, pages, strict=True)
        for b in range(nbytes)
    }


def test_a_prefill_with_the_same_dcp_sends_whole_pages() -> None:
    layout = KvLayout(Kind.MLA, 2, tokens=Share(2, 1))
    ours = RankPools(Pool((HERE,), (12,), N_PAGES), AUX, layout)
    plan = Destination.of(registered(12, dcp_size=2, dcp_rank=1), named([4, 5]), ours).chunk(np.array([1, 2]), 0)
    assert (plan.src.tolist(), plan.dst.tolist(), plan.nbytes.tolist()) == ([HERE + 12], [THERE + 48], [24])
    with pytest.raises(LayoutMismatch, match="DCP rank 0 of 2 and this prefill rank, of mla, 1 of 2"):
        Destination.of(registered(12, dcp_size=2, dcp_rank=0), named([4, 5]), ours)


def test_what_dcp_cannot_be_dealt_from_is_refused_with_both_values() -> None:
    with pytest.raises(LayoutMismatch, match="its pages shared by 2"):
        Destination.of(registered(12, dcp_size=2), named([0]), mla(2, Share(2, 0)))
    with pytest.raises(LayoutMismatch, match="with a DCP size of 2 and pages of 2 it must be a multiple of 4"):
        Destination.of(registered(12, dcp_size=2), named([0], prefix_len=6), mla(2))
    with pytest.raises(LayoutMismatch, match="6 bytes an item and the receiver 7"):
        Destination.of(registered(14, dcp_size=2), named([0]), mla(2))
    with pytest.raises(LayoutMismatch, match="named 1 pages and page 3 is being sent"):
        Destination.of(registered(12, dcp_size=2), named([0]), mla(2)).chunk(np.array([0, 1, 2]), 0)
    with pytest.raises(LayoutMismatch, match="13 bytes a page are no 2 tokens"):
        by_token(Pool((1,), (13,)), 2, "KV")


def test_shares_that_cannot_be_are_refused() -> None:
    with pytest.raises(LayoutMismatch, match="rank 2 of 2"):
        Share(2, 2)
    with pytest.raises(LayoutMismatch, match="only MLA"):
        KvLayout(Kind.MHA, tokens=Share(2, 0))


@settings(max_examples=40)
@given(requests, st.permutations(range(N_PAGES)), st.integers(1, 4), st.integers(2, 3), st.integers(0, 12), st.data())
def test_what_is_dealt_out_is_summed_where_it_went_and_each_byte_of_it(
    source: list[int], theirs: list[int], page_size: int, size: int, cut: int, data: st.DataObject
) -> None:
    nbytes, dcp, rank = page_size * TOKEN_NBYTES, data.draw(st.booleans()), data.draw(st.integers(0, size - 1))
    rng = np.random.default_rng(cut)
    near, far = (rng.integers(0, 256, (N_PAGES, nbytes), np.uint8) for _ in range(2))
    pages = theirs[: -(-len(source) // size)] if dcp else theirs[: len(source)]
    layout = KvLayout(Kind.MLA, page_size, pages=Share() if dcp else Share(size, rank))
    ours = RankPools(Pool((near.ctypes.data,), (nbytes,), N_PAGES), AUX, layout)
    share = {"dcp_size": size, "dcp_rank": rank} if dcp else {}
    said = registered(nbytes, kv_pointers=(far.ctypes.data,), wants_sums=True, **share)
    to, start, given_sums = Destination.of(said, named(pages), ours), 0, []
    before = far.copy()
    for chunk in cut_up(source, cut):
        plan, numbers = to.chunk(np.array(chunk, np.int64), start), np.array(chunk, np.int64)
        for src, dst, n in zip(plan.src.tolist(), plan.dst.tolist(), plan.nbytes.tolist(), strict=True):
            ctypes.memmove(dst, src, n)
        summands = to.chunk_summands(numbers, start)
        assert sum(len(each.items) * each.ours.nbytes for each in summands) == plan.total
        given_sums += [each.to(sums(each.source, each.items, each.ours)) for each in summands]
        start += len(chunk)
    there = RankPools(Pool((far.ctypes.data,), (nbytes,), N_PAGES), AUX)
    assert to.wants_sums
    assert compared(given_sums, there, pages) == []
    touched = np.flatnonzero((far != before).ravel())
    if len(touched):
        at = int(data.draw(st.sampled_from(touched.tolist())))
        far.ravel()[at] ^= 1
        (wrong,) = compared(given_sums, there, pages)
        assert wrong.startswith(f"page {at // nbytes} (")


def compared(said: list[Sums], there: RankPools, pages: list[int]) -> list[str]:
    found = []
    for each in list(unpack(pack(said))):
        pool, items = each.pool_of(there), each.items(np.array(pages, np.int64))
        assert pool is not None
        assert each.spans.problem(pool) is None
        assert each.end <= len(pages)
        found.append(each.differ(sums(pool, items, each.spans), items))
    return [each for each in found if each is not None]


# State over TP ranks


def with_state(tp_size: int, tp_rank: int) -> RankPools:
    """An entry that is split (2 rows of 8 units of 3 bytes in all) and one that is the same on all ranks."""
    slices = (Slices(Heads(8, tp_size, tp_rank), rows=2), Slices(Heads(1, tp_size, tp_rank)))
    state = Pool((20_000, 30_000), (48 // tp_size, 8), 4)
    return RankPools(mla(2).kv, AUX, KvLayout(Kind.MLA, 2), (state,), state_slices=(slices,))


def told_of_state(tp_size: int, tp_rank: int, lens: tuple[int, int]) -> RegisterBuffers:
    state = {"state_pointers": ((60_000, 70_000),), "state_item_lens": (lens,)}
    return registered(12, tp_size=tp_size, tp_rank=tp_rank, **state)


def state_copies(to: Destination) -> list[tuple[int, int, int]]:
    plan = to.last(1, None, [[1]])
    return sorted(zip(plan.src.tolist(), plan.dst.tolist(), plan.nbytes.tolist(), strict=True))


def test_each_rank_writes_its_channels_and_the_first_what_all_have() -> None:
    said, request = told_of_state(1, 0, (48, 8)), named([0], state_rows=((2,),))
    first, second = (Destination.of(said, request, with_state(2, rank)) for rank in range(2))
    # a row here is 4 units of 3 bytes, there 8; item 1 here goes to item 2 there
    assert state_copies(first) == [(20_024, 60_096, 12), (20_036, 60_120, 12), (30_008, 70_016, 8)]
    assert state_copies(second) == [(20_024, 60_108, 12), (20_036, 60_132, 12)]


def test_each_decode_rank_gets_its_channels() -> None:
    said, request = told_of_state(2, 1, (24, 8)), named([0], state_rows=((2,),))
    to = Destination.of(said, request, with_state(1, 0))
    assert state_copies(to) == [(20_060, 60_048, 12), (20_084, 60_060, 12), (30_008, 70_016, 8)]


def test_state_of_other_channels_is_refused_before_it_moves() -> None:
    with pytest.raises(LayoutMismatch, match="state 0 entry 0: a head of a token has 3 bytes at the sender and 2"):
        Destination.of(told_of_state(1, 0, (32, 8)), named([0], state_rows=((2,),)), with_state(2, 0))
    with pytest.raises(LayoutMismatch, match="2 entries of state has 1 slices: give each one"):
        RankPools(mla(2).kv, AUX, states=(Pool((1, 2), (8, 8)),), state_slices=((Slices(Heads(1, 1, 0)),),))


@settings(max_examples=30)
@given(
    st.lists(st.integers(1, 2), min_size=2, max_size=3), st.integers(1, 3), st.sampled_from([(1, 2), (2, 1), (4, 2)])
)
def test_parts_are_split_each_by_itself(sizes: list[int], rows: int, tps: tuple[int, int]) -> None:
    parts, unit, item = tuple(4 * n for n in sizes), 3, 2
    came: list[dict[int, tuple[int, int, int]]] = [{} for _ in range(tps[1])]

    def meaning(tp_size: int, rank: int, base: int) -> dict[int, tuple[int, int, int]]:
        """Row, unit of the whole row and byte of it, by address."""
        held = [
            sum(parts[:n]) + each
            for n, size in enumerate(parts)
            for each in range(size // tp_size * rank, size // tp_size * (rank + 1))
        ]
        places = [(row, number, byte) for row in range(rows) for number in held for byte in range(unit)]
        return {base + item * len(places) + at: place for at, place in enumerate(places)}

    for here in range(tps[0]):
        slices = Slices(Heads(sum(parts), tps[0], here), rows, parts)
        nbytes = rows * sum(parts) * unit // tps[0]
        ours = RankPools(mla(2).kv, AUX, KvLayout(Kind.MLA, 2), (Pool((20_000,), (nbytes,), 4),), (), ((slices,),))
        for there in range(tps[1]):
            if here * tps[1] // tps[0] != there and there * tps[0] // tps[1] != here:
                continue  # not paired
            state = {"state_pointers": ((60_000,),), "state_item_lens": ((rows * sum(parts) * unit // tps[1],),)}
            said = registered(12, tp_size=tps[1], tp_rank=there, **state)
            to = Destination.of(said, named([0], state_rows=((item,),)), ours)
            plan, means = to.last(1, None, [[item]]), meaning(tps[0], here, 20_000)
            for src, dst, n in zip(plan.src.tolist(), plan.dst.tolist(), plan.nbytes.tolist(), strict=True):
                for byte in range(n):
                    assert dst + byte not in came[there]
                    came[there][dst + byte] = means[src + byte]
            (summand,) = to.last_summands(None, [[item]])
            assert summand.ours.nbytes == summand.theirs.nbytes == plan.total
            assert summand.theirs.problem(Pool((60_000,), state["state_item_lens"][0])) is None
    assert came == [meaning(tps[1], there, 60_000) for there in range(tps[1])]


def test_parts_that_do_not_divide_are_refused() -> None:
    with pytest.raises(LayoutMismatch, match="parts of"):
        Slices(Heads(8, 2, 0), parts=(3, 5))
    with pytest.raises(LayoutMismatch, match="not the 8 of a row"):
        Slices(Heads(8, 2, 0), parts=(2, 4))


def test_dims_are_announced_as_stock_does() -> None:
    assert with_state(2, 1).state_dims == ((4, 0),)
