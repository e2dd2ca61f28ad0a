"""Every split of an instance on either side, between real processes over real Mooncake: each byte where it belongs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from pdctl.core.comparing import Checksum
from tests.e2e.instance import arguments
from tests.e2e.model import Model, Split
from tests.engine.processes import Child
from tests.service import service

MHA = Model()
MLA = Model("mla", layers=4, heads=1, lens=(24,))
SENT, NAMED = [[5, 6, 7], [20], [12, 11]], [9, 10, 11, 3, 23, 0]

# each dimension in both ways: as it is by default, and with every byte summed on both sides
PLAIN, SUMMED = Checksum.OFF, Checksum.REQUIRED
SPLITS = [
    pytest.param(MHA, Split(), Split(), PLAIN, id="plain"),
    pytest.param(Model(page_size=1, lens=(8, 24)), Split(), Split(), SUMMED, id="pages of one token, V longer than K"),
    pytest.param(Model(page_size=128), Split(), Split(), PLAIN, id="pages of 128 tokens"),
    pytest.param(MHA, Split(tp=2), Split(tp=2), SUMMED, id="TP 2 to 2"),
    pytest.param(Model(heads=4), Split(tp=4), Split(tp=2), SUMMED, id="TP 4 to 2"),
    pytest.param(MHA, Split(tp=1), Split(tp=2), PLAIN, id="TP 1 to 2"),
    pytest.param(Model(heads=2), Split(tp=4), Split(tp=1), PLAIN, id="TP 4 to 1 with replicated heads"),
    pytest.param(Model(heads=1), Split(tp=1), Split(tp=2), SUMMED, id="TP 1 to 2 with one head"),
    pytest.param(MLA, Split(tp=2), Split(tp=1), SUMMED, id="MLA, TP 2 to 1 with a dummy"),
    pytest.param(MLA, Split(tp=1), Split(tp=2), PLAIN, id="MLA, TP 1 to 2"),
    pytest.param(MHA, Split(pp=2), Split(pp=2), PLAIN, id="PP 2 to 2"),
    pytest.param(MHA, Split(pp=2), Split(), SUMMED, id="PP 2 to 1"),
    pytest.param(MLA, Split(tp=2, pp=2), Split(tp=1), PLAIN, id="MLA, PP 2 and TP 2 to 1"),
    pytest.param(Model(ids=True), Split(pp=2), Split(pp=2), SUMMED, id="PP 2 to 2 by layer ids"),
    pytest.param(Model(ids=True), Split(pp=2), Split(), PLAIN, id="PP 2 to 1 by layer ids"),
    pytest.param(MHA, Split(dp=2), Split(), PLAIN, id="DP 2, the room says which"),
    pytest.param(MHA, Split(dp=2, follow=False), Split(), SUMMED, id="DP 2, the registry says which"),
    pytest.param(MHA, Split(cp=2), Split(), PLAIN, id="CP 2, of which rank 0 sends"),
    pytest.param(MHA, Split(cp=2, tp=2), Split(), SUMMED, id="CP 2 and TP 2 to 1"),
    pytest.param(MLA, Split(tp=2, sharded=True), Split(tp=2), SUMMED, id="MLA, pages shared over TP 2"),
    pytest.param(MLA, Split(), Split(tp=2, dcp=2), SUMMED, id="MLA, tokens dealt out to DCP 2"),
    pytest.param(Model(state=32), Split(), Split(), SUMMED, id="state beside KV"),
    pytest.param(Model(state=32), Split(pp=2), Split(), PLAIN, id="state beside KV, PP 2 to 1"),
]


@asynccontextmanager
async def pair(
    tmp_path: Path, model: Model, prefill: Split, decode: Split, sums: Checksum
) -> AsyncIterator[tuple[Child, Child]]:
    with (
        service(tmp_path / "log", "--journal", "memory:") as registry,
        Child("tests.e2e.instance", arguments("prefill", model, prefill, registry.url, checksum=sums)) as sending,
        Child("tests.e2e.instance", arguments("decode", model, decode, registry.url, checksum=sums)) as receiving,
    ):
        assert await sending.ask("registered") == {}
        yield sending, receiving


async def move(
    sending: Child, receiving: Child, room: int, dp: int = 0, groups: int = 1, prefix: int = 0, dcp: int = 1
) -> None:
    """One room, and every byte of it compared."""
    sent = [page for chunk in SENT for page in chunk]
    named = NAMED[: -(-len(sent) // dcp)]
    told, found = await asyncio.gather(
        sending.ask("send", room=room, dp=dp, chunks=SENT, groups=groups),
        receiving.ask("receive", room=room, pages=named, sent=sent, prefix=prefix),
    )
    assert (told, found) == ({}, {"wrong": []})


@pytest.mark.parametrize(("model", "prefill", "decode", "sums"), SPLITS)
async def test_each_byte_arrives_where_it_belongs(
    tmp_path: Path, model: Model, prefill: Split, decode: Split, sums: Checksum
) -> None:
    async with pair(tmp_path, model, prefill, decode, sums) as (sending, receiving):
        for room in range(prefill.dp):
            await move(sending, receiving, 40 + room, dp=(40 + room) % prefill.dp, dcp=decode.dcp)
        assert await sending.ask("idle") == await receiving.ask("idle") == {"left": []}


@pytest.mark.parametrize("sums", [PLAIN, SUMMED])
async def test_groups_of_layers_and_a_prefix_that_decode_has(tmp_path: Path, sums: Checksum) -> None:
    async with pair(tmp_path, Model(layers=4), Split(), Split(tp=2), sums) as (sending, receiving):
        await move(sending, receiving, 1, groups=3)
        await move(sending, receiving, 2, groups=2, prefix=4)
        await move(sending, receiving, 3, prefix=6)
        assert await sending.ask("idle") == await receiving.ask("idle") == {"left": []}
