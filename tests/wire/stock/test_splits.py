"""Every split that stock SGLang does, stock ranks on one side and ours on the other: each byte where it belongs."""

from __future__ import annotations

import pytest

from tests.e2e.instance import Decode, Prefill
from tests.e2e.model import Model, Split
from tests.wire.stock.across import SEED, StockInstance, into_ours, into_stock, opened

MHA = Model()
MLA = Model("mla", layers=4, heads=1, lens=(24,))
SPLITS = [
    pytest.param(Model(page_size=1, lens=(8, 24)), Split(), Split(), id="pages of one token, V longer than K"),
    pytest.param(Model(page_size=16), Split(tp=2), Split(tp=2), id="TP 2 to 2"),
    pytest.param(Model(page_size=128), Split(), Split(tp=2), id="TP 1 to 2, pages of 128 tokens"),
    pytest.param(Model(heads=4), Split(tp=4), Split(tp=2), id="TP 4 to 2"),
    pytest.param(Model(page_size=1), Split(tp=2), Split(), id="TP 2 to 1, pages of one token"),
    pytest.param(Model(heads=2), Split(tp=4), Split(), id="TP 4 to 1 with replicated heads"),
    pytest.param(Model(heads=1), Split(), Split(tp=2), id="TP 1 to 2 with one head"),
    pytest.param(MLA, Split(tp=2), Split(tp=2), id="MLA, TP 2 to 2"),
    pytest.param(MLA, Split(tp=2), Split(), id="MLA, TP 2 to 1 with a dummy"),
    pytest.param(MLA, Split(), Split(tp=2), id="MLA, TP 1 to 2"),
    pytest.param(MHA, Split(pp=2), Split(pp=2), id="PP 2 to 2"),
    pytest.param(MLA, Split(tp=2, pp=2), Split(), id="MLA, PP 2 and TP 2 to 1"),
    pytest.param(Model(ids=True, heads=2), Split(pp=2, tp=2), Split(), id="PP 2 and TP 2 to 1 by layer ids"),
    pytest.param(MHA, Split(dp=2), Split(), id="DP 2, the room says which"),
    pytest.param(MHA, Split(dp=2, follow=False), Split(), id="DP 2, the registry says which"),
    pytest.param(MHA, Split(cp=2), Split(), id="CP 2, of which rank 0 sends"),
    pytest.param(Model(state=32), Split(pp=2), Split(), id="PP 2 to 1, state beside KV"),
    pytest.param(MLA, Split(), Split(tp=2, dcp=2), id="MLA, TP 1 to 2 with DCP 2"),
    pytest.param(MLA, Split(tp=2, pp=2), Split(tp=2, dcp=2), id="MLA, PP 2 to 1 with DCP 2"),
    pytest.param(MLA, Split(tp=2, sharded=True), Split(tp=2), id="MLA, pages over TP 2"),
    pytest.param(MHA, Split(cp=2, sharded=True), Split(tp=2), id="pages over CP 2, TP 1 to 2"),
    pytest.param(MLA, Split(cp=2, layered=True), Split(), id="MLA, layers over CP 2"),
]

MAMBA = Model(state=12, state_units=4)
GDN = Model(state=6, state_units=8, state_parts=(2, 2, 4), state_rows=3)
WINDOW = Model(state=12, state_units=2, state_rows=4, state_ids=False)
STATES = [
    pytest.param(MAMBA, Split(pp=2), Split(), "mamba", id="PP 2 to 1"),
    pytest.param(MAMBA, Split(tp=2), Split(), "mamba", id="channels, TP 2 to 1"),
    pytest.param(MAMBA, Split(), Split(tp=2), "mamba", id="channels, TP 1 to 2"),
    pytest.param(GDN, Split(tp=2), Split(), "mamba", id="parts of channels, TP 2 to 1"),
    pytest.param(GDN, Split(), Split(tp=2), "mamba", id="parts of channels, TP 1 to 2"),
    pytest.param(Model(state=12), Split(tp=2), Split(), "mamba", id="the same on all, TP 2 to 1"),
    pytest.param(
        Model(state=12, state_units=2, state_rows=4, state_ids=False),
        Split(tp=2),
        Split(),
        "swa",
        id="heads, TP 2 to 1",
    ),
    pytest.param(
        Model(state=12, state_units=2, state_rows=4, state_ids=False),
        Split(),
        Split(tp=2),
        "swa",
        id="heads, TP 1 to 2",
    ),
]


@pytest.mark.parametrize(("model", "prefill", "decode"), SPLITS)
async def test_what_stock_prefills_arrives_in_our_pages(
    stock_instance: StockInstance, registry_url: str, model: Model, prefill: Split, decode: Split
) -> None:
    address = registry_url.removeprefix("http://")
    async with (
        stock_instance.seated("prefill", address, model, prefill, seed=SEED),
        opened(Decode(model, SEED), registry_url, decode) as ours,
    ):
        for room in range(40, 40 + prefill.dp):
            await into_ours(stock_instance, ours, room, dp=room % prefill.dp)
        await into_ours(stock_instance, ours, 44, prefix=2)
        assert await ours.idle() == {"left": []}


@pytest.mark.parametrize(("model", "prefill", "decode"), SPLITS)
async def test_what_we_prefill_arrives_in_stock_pages(
    stock_instance: StockInstance, registry_url: str, model: Model, prefill: Split, decode: Split
) -> None:
    address = registry_url.removeprefix("http://")
    async with opened(Prefill(model, SEED), registry_url, prefill) as ours:
        await ours.registered()
        async with stock_instance.seated("decode", address, model, decode):
            for room in range(40, 40 + prefill.dp):
                await into_stock(stock_instance, ours, room, dp=room % prefill.dp, dcp=decode.dcp)
            await into_stock(stock_instance, ours, 44, prefix=2, dcp=decode.dcp)
            assert await ours.idle() == {"left": []}


@pytest.mark.parametrize(("model", "prefill", "decode", "state_type"), STATES)
async def test_state_is_split_over_tp_as_stock_does(
    stock_instance: StockInstance, registry_url: str, model: Model, prefill: Split, decode: Split, state_type: str
) -> None:
    address = registry_url.removeprefix("http://")
    async with (
        stock_instance.seated("prefill", address, model, prefill, seed=SEED, state_type=state_type),
        opened(Decode(model, SEED), registry_url, decode) as ours,
    ):
        await into_ours(stock_instance, ours, 40)


@pytest.mark.parametrize(("model", "prefill", "decode", "state_type"), STATES)
async def test_we_split_state_over_tp_as_stock_does(
    stock_instance: StockInstance, registry_url: str, model: Model, prefill: Split, decode: Split, state_type: str
) -> None:
    address = registry_url.removeprefix("http://")
    async with opened(Prefill(model, SEED), registry_url, prefill) as ours:
        await ours.registered()
        async with stock_instance.seated("decode", address, model, decode, state_type=state_type):
            await into_stock(stock_instance, ours, 40)
