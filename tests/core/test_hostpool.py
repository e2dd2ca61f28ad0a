"""
Host pools: the runs of a page against the obvious byte copy, and against what stock SGLang answers.

`stock_hostpool.json` is stock 0.5.23's own: its `get_page_buffer_meta`, `get_split_heads_page_buffer_meta` and the
Mooncake store's key builders, called on pools that have numbers and no memory.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdctl.core.hostpool import Axis, HostLayout, HostPool, Names, Plane, host_layout, mha_pool, mla_pool
from pdctl.core.hostpool import pieces_per_page as pieces
from pdctl.core.layout import Kind, Region
from pdctl.errors import BadField, LayoutMismatch

STOCK: list[dict[str, Any]] = json.loads((Path(__file__).parent / "stock_hostpool.json").read_text())
Bytes = npt.NDArray[np.uint8]

# --- the obvious copy: a buffer with the axes written out, and a page cut from it by its number


def shaped(layout: str, n: dict[str, int], width: int) -> tuple[int, ...]:
    """As SGLang's pools shape one of their buffers; `width`: bytes of a head."""
    pages, tokens, layers, heads = n["pages"], n["tokens"], n["layers"], n["heads"]
    return {
        "layer_first": (layers, pages * tokens, heads, width),
        "page_first": (pages * tokens, layers, heads, width),
        "page_first_direct": (pages, layers, tokens, heads, width),
        "page_head": (pages, heads, tokens, layers, width),
        "page_first_kv_split": (pages, layers, tokens, heads, width),
    }[layout]


def cut(layout: str, buffer: Bytes, page: int, tokens: int) -> Bytes:
    rows = slice(page * tokens, (page + 1) * tokens)
    if layout == "layer_first":
        return buffer[:, rows]
    return buffer[rows] if layout == "page_first" else buffer[page]


def gathered(memory: Bytes, base: int, pointers: npt.NDArray[np.int64], nbytes: npt.NDArray[np.int64]) -> bytes:
    return b"".join(memory[at - base : at - base + n].tobytes() for at, n in zip(pointers, nbytes, strict=True))


BASE = 1 << 20
few = st.integers(1, 4)
numbers = st.fixed_dictionaries(dict.fromkeys(("pages", "tokens", "layers", "heads"), few))


@settings(deadline=None, max_examples=60)
@given(
    layout=st.sampled_from([layout for layout in HostLayout if layout is not HostLayout.PAGE_FIRST_KV_SPLIT]),
    n=numbers,
    widths=st.tuples(few, few),
    data=st.data(),
)
def test_mha_runs_are_the_obvious_copy(
    layout: HostLayout, n: dict[str, int], widths: tuple[int, int], data: st.DataObject
) -> None:
    k, v = (random(shaped(layout, n, width)) for width in widths)
    memory = np.concatenate([k.ravel(), v.ravel()])
    pool = mha(layout, n, widths[0], v_head_nbytes=widths[1])
    pages = data.draw(st.lists(st.integers(0, n["pages"] - 1), max_size=5))
    pointers, nbytes = pool.runs(pages)
    expected = [cut(layout, part, page, n["tokens"]).tobytes() for page in pages for part in (k, v)]
    assert [gathered(memory, BASE, *row) for row in zip(pointers, nbytes, strict=True)] == expected
    assert pool.regions() == [Region(BASE, len(memory))]


@settings(deadline=None, max_examples=40)
@given(n=numbers, width=few, shards=few, data=st.data())
def test_head_shards_are_the_obvious_copy(n: dict[str, int], width: int, shards: int, data: st.DataObject) -> None:
    n["heads"] *= shards
    k, v = (random(shaped("page_head", n, width)) for _ in range(2))
    memory = np.concatenate([k.ravel(), v.ravel()])
    pool = mha(HostLayout.PAGE_HEAD, n, width, shards=shards)
    page = data.draw(st.integers(0, n["pages"] - 1))
    pointers, nbytes = pool.runs([page])
    each = n["heads"] // shards
    expected = [part[page, at * each : (at + 1) * each].tobytes() for at in range(shards) for part in (k, v)]
    assert [gathered(memory, BASE, *row) for row in zip(pointers, nbytes, strict=True)] == expected


@settings(deadline=None, max_examples=60)
@given(
    layout=st.sampled_from([layout for layout in HostLayout if layout is not HostLayout.PAGE_HEAD]),
    n=numbers,
    widths=st.lists(few, min_size=1, max_size=3),
    data=st.data(),
)
def test_mla_runs_are_the_obvious_copy(
    layout: HostLayout, n: dict[str, int], widths: list[int], data: st.DataObject
) -> None:
    n["heads"] = 1
    if layout is not HostLayout.PAGE_FIRST_KV_SPLIT:
        widths = widths[:1]
    parts = [random(shaped(layout, n, width)) for width in widths]
    memory = np.concatenate([part.ravel() for part in parts])
    starts = BASE + np.cumsum([0, *(part.size for part in parts)])[:-1]
    pool = mla_pool(layout, starts.tolist(), widths, n_pages=n["pages"], page_size=n["tokens"], layers=n["layers"])
    pages = data.draw(st.lists(st.integers(0, n["pages"] - 1), max_size=5))
    pointers, nbytes = pool.runs(pages)
    expected = [b"".join(cut(layout, part, page, n["tokens"]).tobytes() for part in parts) for page in pages]
    assert [gathered(memory, BASE, *row) for row in zip(pointers, nbytes, strict=True)] == expected
    assert pool.regions() == [Region(BASE, len(memory))]


@settings(deadline=None, max_examples=60)
@given(layout=st.sampled_from(HostLayout), n=numbers, width=few, data=st.data())
def test_a_head_of_a_layer_of_a_token_lies_at_its_strides(
    layout: HostLayout, n: dict[str, int], width: int, data: st.DataObject
) -> None:
    if layout is HostLayout.PAGE_FIRST_KV_SPLIT:
        n["heads"] = 1
        pool = mla_pool(layout, [BASE], [width], n_pages=n["pages"], page_size=n["tokens"], layers=n["layers"])
    else:
        pool = mha(layout, n, width)
    page, token, layer, head = (
        data.draw(st.integers(0, n[name] - 1)) for name in ("pages", "tokens", "layers", "heads")
    )
    where: dict[Axis, int] = {Axis.PAGE: page, Axis.TOKEN: token, Axis.LAYER: layer, Axis.HEAD: head}
    buffer = np.arange(np.prod(shaped(layout, n, width))).reshape(shaped(layout, n, width))
    row = page * n["tokens"] + token
    at = {
        "layer_first": (layer, row, head),
        "page_first": (row, layer, head),
        "page_head": (page, head, token, layer),
    }.get(layout, (page, layer, token, head))
    strides = pool.strides(pool.planes[0])
    assert sum(where[axis] * strides[axis] for axis in Axis) == buffer[at][0]


def mha(layout: HostLayout, n: dict[str, int], width: int, **other: int) -> HostPool:
    return mha_pool(
        layout,
        BASE,
        n_pages=n["pages"],
        page_size=n["tokens"],
        layers=n["layers"],
        heads=n["heads"],
        head_nbytes=width,
        **other,
    )


def random(shape: tuple[int, ...]) -> Bytes:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


# --- as stock


@pytest.mark.parametrize("case", STOCK, ids=lambda case: case["name"])
def test_runs_and_names_are_those_of_stock_sglang(case: dict[str, Any]) -> None:
    pool = stock_pool(case)
    pointers, nbytes = pool.runs(case["pages"])
    assert pointers.tolist() == case["pointers"]
    assert nbytes.tolist() == case["nbytes"]
    tag, model = {None: (None, ""), "m": (None, "m"), "tag_org-model": ("tag", "org/model")}[case["prefix"]]
    names = Names(pool.kind, case["tp_rank"], case["pp_rank"], case["pp_size"], pool.shards, model, tag)
    assert names.of(case["hashes"]) == case["keys"]


def stock_pool(case: dict[str, Any]) -> HostPool:
    layout = HostLayout(case["layout"])
    if case["kind"] == "mha":
        return mha_pool(
            layout,
            case["base"],
            n_pages=case["n_pages"],
            page_size=case["page_size"],
            layers=case["layers"],
            heads=case["heads"],
            head_nbytes=case["head_nbytes"],
            v_head_nbytes=case.get("v_head_nbytes"),
            v_pointer=case.get("v_base"),
            shards=case.get("shards", 1),
        )
    layers = case.get("plane_layers", [case["layers"]] * len(case["bases"]))
    planes = [Plane(at, n, 1, width) for at, n, width in zip(case["bases"], layers, case["widths"], strict=True)]
    return HostPool(layout, Kind.MLA, case["n_pages"], case["page_size"], tuple(planes))


def test_one_name_an_object_whatever_the_pool() -> None:
    pool = mha(HostLayout.PAGE_HEAD, {"pages": 2, "tokens": 2, "layers": 2, "heads": 4}, 8, shards=2)
    names = Names.for_pool(pool, tp_rank=3, model="a/b")
    assert names.of(["h"]) == ["a-b_h_6_k", "a-b_h_6_v", "a-b_h_7_k", "a-b_h_7_v"]
    assert len(names.of(["h", "i"])) == len(pool.runs([0, 1])[0]) == 2 * pool.objects_per_page


# --- what is refused


def test_an_unknown_layout_is_told_all_and_who_needs_which() -> None:
    with pytest.raises(BadField, match=r"layout: 'page_last' is not known") as refused:
        host_layout("page_last")
    for layout in HostLayout:
        assert f"{layout} (" in str(refused.value)
    assert "page_first_kv_split (Ascend" in str(refused.value)
    assert "page_first (CUDA" in str(refused.value)


def test_the_fields_other_spelling_is_understood_with_a_hint() -> None:
    layout, hint = host_layout("page_first_kv_spilt")
    assert layout is HostLayout.PAGE_FIRST_KV_SPLIT
    assert hint is not None
    assert "write it so" in hint
    assert host_layout("page_first_kv_split") == (HostLayout.PAGE_FIRST_KV_SPLIT, None)


def test_layouts_that_look_alike_in_names_differ_in_their_objects() -> None:
    n = {"pages": 2, "tokens": 2, "layers": 2, "heads": 2}
    orders = {layout: mha(layout, n, 4).object_order for layout in list(HostLayout)[:4]}
    assert orders[HostLayout.LAYER_FIRST] == orders[HostLayout.PAGE_FIRST_DIRECT]
    assert len(set(orders.values())) == 3


@pytest.mark.parametrize("page", [-1, 2])
def test_a_page_that_the_pool_has_not_is_refused(page: int) -> None:
    pool = mha(HostLayout.PAGE_FIRST, {"pages": 2, "tokens": 2, "layers": 2, "heads": 2}, 4)
    with pytest.raises(LayoutMismatch, match="of a pool of 2: give numbers below that"):
        pool.runs([0, page])


def test_what_no_engine_lays_out_so_is_refused() -> None:
    n = {"pages": 2, "tokens": 2, "layers": 2, "heads": 3}
    with pytest.raises(LayoutMismatch, match=r"page_first_kv_split is for mla .* use page_first_direct"):
        mha(HostLayout.PAGE_FIRST_KV_SPLIT, n, 4)
    with pytest.raises(LayoutMismatch, match="page_head is for mha"):
        mla_pool(HostLayout.PAGE_HEAD, [BASE], [4], n_pages=1, page_size=1, layers=1)
    with pytest.raises(LayoutMismatch, match="cut heads in page_head only"):
        mha(HostLayout.PAGE_FIRST, n, 4, shards=3)
    with pytest.raises(LayoutMismatch, match="3 heads do not divide into 2 shards"):
        mha(HostLayout.PAGE_HEAD, n, 4, shards=2)
    with pytest.raises(LayoutMismatch, match="only page_first_kv_split has its parts apart"):
        mla_pool(HostLayout.PAGE_FIRST, [BASE, 2 * BASE], [4, 4], n_pages=1, page_size=1, layers=1)
    with pytest.raises(LayoutMismatch, match="has K and V, not 1"):
        HostPool(HostLayout.PAGE_FIRST, Kind.MHA, 1, 1, (Plane(BASE, 1, 1, 1),))
    with pytest.raises(LayoutMismatch, match="number below 1"):
        Plane(0, 1, 1, 1)
    with pytest.raises(LayoutMismatch, match="at least 1 of each"):
        HostPool(HostLayout.PAGE_FIRST, Kind.MLA, 0, 1, (Plane(BASE, 1, 1, 1),))
    with pytest.raises(LayoutMismatch, match="ranks count from 0"):
        Names(Kind.MHA, pp_rank=1)


def test_a_page_in_many_runs_says_so() -> None:
    n = {"pages": 2, "tokens": 2, "layers": 7, "heads": 2}
    assert pieces(mha(HostLayout.LAYER_FIRST, n, 4)) == 14
    assert pieces(mha(HostLayout.PAGE_FIRST, n, 4)) == 2
