"""Sums of both sides agree on the bytes that a plan copies, on no others, and survive the trip."""

from __future__ import annotations

import contextlib
import ctypes
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdctl.core.entries import same_entries
from pdctl.core.layout import Heads, Pool
from pdctl.core.plan import CopyPlan, head_plan, page_plan
from pdctl.core.sums import AUX, KV, Spans, Sums, head_spans, item_spans, pack, spoken, unpack
from pdctl.engine.checksums import sums

N_PAGES, HEAD = 6, 4
SPLITS = [(total, mine, far) for total in (1, 2, 4) for mine in (1, 2, 4) for far in (1, 2, 4)]


def arrays(n: int, nbytes: int, seed: int | None) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    shape = (n, N_PAGES, nbytes)
    return list(np.zeros(shape, np.uint8) if seed is None else rng.integers(0, 256, shape, np.uint8))


def pool_of(entries: list[np.ndarray]) -> Pool:
    return Pool(tuple(e.ctypes.data for e in entries), tuple(e.shape[1] for e in entries), N_PAGES)


def perform(plan: CopyPlan) -> None:
    for src, dst, nbytes in zip(plan.src.tolist(), plan.dst.tolist(), plan.nbytes.tolist(), strict=True):
        ctypes.memmove(dst, src, nbytes)


@pytest.mark.parametrize(("total", "ours", "theirs"), SPLITS)
def test_what_every_prefill_rank_sums_is_what_it_wrote_of_each_page(total: int, ours: int, theirs: int) -> None:
    page_size, pages, named = 2, np.array([4, 0, 1]), np.array([2, 5, 3])
    for far_rank in range(theirs):
        far_heads = Heads(total, theirs, far_rank)
        far = arrays(2, page_size * len(far_heads.held) * HEAD, None)
        covered = np.zeros_like(np.array(far))
        for rank in range(ours):
            heads = Heads(total, ours, rank)
            if ours >= theirs and rank // (ours // theirs) != far_rank:
                continue
            if ours < theirs and far_rank // (theirs // ours) != rank:
                continue
            near = arrays(2, page_size * len(heads.held) * HEAD, seed=rank)
            args = (pool_of(near), pool_of(far), same_entries(2))
            how = {"page_size": page_size, "ours": heads, "theirs": far_heads}
            before = np.array(far)
            perform(head_plan(*args, pages, named, what="KV", **how))  # type: ignore[arg-type]
            spans = head_spans(*args, **how)  # type: ignore[arg-type]
            if spans is None:
                assert (np.array(far) == before).all()
                continue
            assert sums(args[0], pages, spans[0]).tolist() == sums(args[1], named, spans[1]).tolist()
            mark(covered, named, spans[1])
        assert (covered[:, named] == 1).all(), "each byte of a named page is summed by exactly one rank"
        assert not np.delete(covered, named, axis=1).any()


def mark(covered: np.ndarray, named: np.ndarray, spans: Spans) -> None:
    for entry, offset, width in zip(spans.entries, spans.offsets, spans.widths, strict=True):
        parts = covered[entry].reshape(N_PAGES, spans.parts, -1)
        parts[named, :, offset : offset + width] += 1


@given(st.permutations(range(N_PAGES)), st.integers(1, N_PAGES), st.integers(0, 3 * 40 - 1), st.data())
@settings(deadline=None, max_examples=60)
def test_one_byte_that_differs_is_found_and_its_page_named(
    order: list[int], n: int, at: int, data: st.DataObject
) -> None:
    near, far = arrays(3, 40, seed=1), arrays(3, 40, None)
    pages, named = np.array(order[:n]), np.array(order[::-1][:n])
    perform(page_plan(pool_of(near), pool_of(far), same_entries(3), pages, named, "KV"))
    ours, theirs = item_spans(pool_of(near), same_entries(3))
    said = Sums(KV, theirs, np.arange(n), pages, sums(pool_of(near), pages, ours))
    assert said.differ(sums(pool_of(far), named, theirs), named) is None
    victim = data.draw(st.sampled_from(named.tolist()))
    far[at // 40][victim, at % 40] ^= 0x10
    source = pages[named == victim][0]
    assert said.differ(sums(pool_of(far), named, theirs), named) == f"page {victim} ({source} at the prefill)"


@pytest.mark.parametrize("nbytes", [64, 40_000], ids=["gathered", "where they lie"])
def test_a_sum_is_the_crc_of_the_pages_entries_one_after_another(nbytes: int) -> None:
    far, items = arrays(3, nbytes, seed=2), np.array([5, 0, 3])
    ours, _ = item_spans(pool_of(far), same_entries(3))
    expected = [zlib.crc32(b"".join(entry[item].tobytes() for entry in far)) for item in items]
    assert sums(pool_of(far), items, ours).tolist() == expected


def test_sums_survive_the_trip() -> None:
    spans = Spans(np.array([0, 3]), np.array([0, 8]), np.array([16, 2**32 - 1]), 16)
    none = np.array([], np.int64)
    sent = [
        Sums(KV, spans, np.array([7, 2**31 - 1]), np.array([2**31 - 1, 4]), np.array([1, 2**32 - 1], np.uint32), 16),
        Sums(1, spans, none, none, none.astype(np.uint32)),
    ]
    back = list(unpack(pack(sent)))
    assert [(s.pool, s.per, s.spans.parts) for s in back] == [(0, 16, 16), (1, 1, 16)]
    assert [(s.numbers.tolist(), s.sources.tolist(), s.crcs.tolist()) for s in back] == [
        ([7, 2**31 - 1], [2**31 - 1, 4], [1, 2**32 - 1]),
        ([], [], []),
    ]
    assert [s.spans.widths.tolist() for s in back] == [[16, 2**32 - 1]] * 2
    assert [s.spans.offsets.tolist() for s in back] == [[0, 8]] * 2
    assert [s.spans.entries.tolist() for s in back] == [[0, 3]] * 2


@given(st.binary(max_size=200))
def test_strangers_bytes_raise_value_error_or_are_sums(raw: bytes) -> None:
    with contextlib.suppress(ValueError):
        list(unpack(raw))


def test_every_way_of_breaking_off_is_found() -> None:
    spans = Spans(np.array([0]), np.array([0]), np.array([16]))
    whole = pack([Sums(KV, spans, np.array([0, 1]), np.array([3, 4]), np.array([1, 2], np.uint32))])
    for end in range(1, len(whole)):
        with pytest.raises(ValueError, match=r"break off|whole number"):
            list(unpack(whole[:end]))


@pytest.mark.parametrize(
    ("entries", "offsets", "widths", "parts"),
    [
        ([2], [0], [8], 1),
        ([0], [0], [41], 1),
        ([0], [5], [36], 1),
        ([0], [0], [8], 3),
        ([0], [6], [5], 4),
        ([0], [0], [8], 0),
    ],
    ids=["entry", "too wide", "past the end", "no whole parts", "past a part", "no part"],
)
def test_spans_outside_our_own_pool_are_never_read(
    entries: list[int], offsets: list[int], widths: list[int], parts: int
) -> None:
    pool = pool_of(arrays(2, 40, None))
    assert Spans(np.array(entries), np.array(offsets), np.array(widths), parts).problem(pool) is not None


def test_pages_are_spoken_of_where_a_sum_is_given() -> None:
    spans = Spans(np.array([0]), np.array([0]), np.array([16]))
    said = [
        Sums(pool, spans, np.array(numbers), np.array(numbers), np.zeros(len(numbers), np.uint32), per)
        for pool, numbers, per in ((KV, [1, 0], 1), (KV, [8, 9], 2), (AUX, [2], 1))
    ]
    assert np.flatnonzero(spoken(said, 6)).tolist() == [0, 1, 4]
    assert sums(pool_of(arrays(1, 16, None)), np.array([], np.int64), spans).tolist() == []
    assert not spoken([], 6).any(), "a rank that writes no heads of these pages"
    assert spoken(said, 2).all()
