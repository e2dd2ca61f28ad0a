"""Rooms with stock ranks on one side that do not end as planned, and peers that say more or less than we know."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest

from pdctl.core.transfer import RoomTimeouts
from pdctl.errors import RoomFailed
from pdctl.sender import Sender
from tests.e2e.instance import Decode, Prefill
from tests.e2e.model import Model, Split
from tests.wire.stock.across import NAMED, SEED, StockInstance, both, into_ours, into_stock, opened

MHA = Model()
MLA = Model("mla", layers=4, heads=1, lens=(24,))
ROOM = 40
WITHIN_S = 60.0


@asynccontextmanager
async def stock_prefills(
    stock: StockInstance, registry: str, model: Model, prefill: Split, ours: Decode, **timeouts: float
) -> AsyncIterator[None]:
    address = registry.removeprefix("http://")
    room = RoomTimeouts(drain_margin_s=0.05, **timeouts)  # type: ignore[arg-type]
    async with stock.seated("prefill", address, model, prefill, seed=SEED), opened(ours, registry, Split(), room):
        yield


@asynccontextmanager
async def we_prefill(
    stock: StockInstance, registry: str, model: Model, prefill: Split, decode: Split, **more: str
) -> AsyncIterator[Prefill]:
    async with opened(Prefill(model, SEED), registry, prefill) as ours:
        await ours.registered()
        async with stock.seated("decode", registry.removeprefix("http://"), model, decode, **more):
            yield ours


async def until_empty(ours: Prefill | Decode) -> None:
    async with asyncio.timeout(WITHIN_S):
        while await ours.idle() != {"left": []}:  # noqa: ASYNC110 - nothing tells that a table has become empty
            await asyncio.sleep(0.02)


@pytest.mark.parametrize(
    ("model", "split"),
    [
        pytest.param(MHA, Split(tp=2, pp=2), id="MHA, four that write"),
        pytest.param(MLA, Split(tp=2), id="MLA, one that writes and one that only hears"),
    ],
)
async def test_every_stock_prefill_rank_confirms_our_abort(
    stock_instance: StockInstance, registry_url: str, model: Model, split: Split
) -> None:
    ours = Decode(model, SEED)
    async with stock_prefills(stock_instance, registry_url, model, split, ours):
        (_, node), released = ours.nodes[0], asyncio.Event()
        expecting = asyncio.create_task(stock_instance.does("expect", room=ROOM))
        paired = await node.pair(registry_url, ROOM)
        async with node.receiver.open(ROOM, paired, NAMED, 3, release=lambda _: released.set()):
            await expecting
        (held,) = node.receiver.quarantine
        assert len(held.waiting_for) == len(paired.senders) + len(paired.dummies)
        await asyncio.wait_for(released.wait(), WITHIN_S)
        assert len((await stock_instance.does("outcome", room=ROOM))["reasons"]) == split.tp * split.pp
        await until_empty(ours)


async def test_a_stock_decode_gives_up_in_mid_room_and_every_rank_of_ours_confirms(
    stock_instance: StockInstance, registry_url: str
) -> None:
    async with we_prefill(stock_instance, registry_url, MHA, Split(tp=2), Split()) as ours:
        await stock_instance.does("find", room=ROOM)
        await stock_instance.does("name", room=ROOM, pages=NAMED, row=3)
        senders = [node.sender for _, node in ours.nodes]
        async with asyncio.timeout(WITHIN_S), senders[0].open(ROOM) as first, senders[1].open(ROOM) as second:
            for each in (first, second):
                await each.peers_ready()
                await each.send([5, 6, 7])
            await stock_instance.does("abort", room=ROOM)
            assert await stock_instance.does("released", room=ROOM, acks=2)
            for each in (first, second):
                with pytest.raises(RoomFailed, match="given the room up"):
                    await each.send([20])
        await until_empty(ours)


async def test_a_stock_decode_that_gives_up_before_it_has_pages_ends_our_room(
    stock_instance: StockInstance, registry_url: str
) -> None:
    async with we_prefill(stock_instance, registry_url, MHA, Split(), Split()) as ours:
        await stock_instance.does("find", room=ROOM)
        async with asyncio.timeout(WITHIN_S), ours.nodes[0][1].sender.open(ROOM) as room:
            await stock_instance.does("abort", room=ROOM)
            with pytest.raises(RoomFailed, match="given the room up"):
                await room.peers_ready()
        await until_empty(ours)


async def fall_over(sender: Sender) -> None:
    async with sender.open(ROOM) as room:
        await room.peers_ready()
        raise ValueError("the model fell over")


async def test_one_rank_of_ours_fails_and_all_sides_know_why(stock_instance: StockInstance, registry_url: str) -> None:
    async with we_prefill(stock_instance, registry_url, MHA, Split(tp=2), Split()) as ours:
        await stock_instance.does("find", room=ROOM)
        await stock_instance.does("name", room=ROOM, pages=NAMED, row=3)
        good, bad = (node.sender for _, node in ours.nodes)
        async with asyncio.timeout(WITHIN_S), good.open(ROOM) as room:
            await room.peers_ready()
            with pytest.raises(ValueError, match="fell over"):
                await fall_over(bad)
            (reason,) = (await stock_instance.does("outcome", room=ROOM))["reasons"]
            assert "the model fell over" in reason
            await stock_instance.does("abort", room=ROOM)  # as stock's scheduler does with what has failed
            assert await stock_instance.does("released", room=ROOM, acks=2)
            with pytest.raises(RoomFailed, match="given the room up"):
                await room.finish(1)
        await until_empty(ours)


async def test_a_stock_prefill_that_refuses_our_state_fails_our_room_at_once(
    stock_instance: StockInstance, registry_url: str
) -> None:
    ours = Decode(Model(state=16), SEED)
    async with stock_prefills(stock_instance, registry_url, Model(state=12), Split(), ours):
        sending = stock_instance.does("send", room=ROOM, dp=0, chunks=[[1]], row=1)
        told, heard = await both(sending, why(ours.receive(ROOM, [4], [1])))
        assert "prefill rank 0 says: it gave no reason, see its log for this room" in heard
        (reason,) = told["reasons"]
        assert "item length mismatch" in reason
        await until_empty(ours)


async def why(receiving: Coroutine[Any, Any, Any]) -> str:
    with pytest.raises(RoomFailed) as failed:
        await receiving
    return str(failed.value)


async def test_a_stock_prefill_that_gives_up_without_a_word_costs_us_a_wait_and_no_pages(
    stock_instance: StockInstance, registry_url: str
) -> None:
    """Its scheduler leaves it to the router to abort the decode too: stock's decode would wait out its own limit."""
    ours = Decode(MHA, SEED)
    async with stock_prefills(stock_instance, registry_url, MHA, Split(), ours, waiting_s=1.0):
        expecting = asyncio.create_task(stock_instance.does("expect", room=ROOM))
        receiving = asyncio.create_task(why(ours.receive(ROOM, [4], [1])))
        await expecting
        await stock_instance.does("abort", room=ROOM)
        assert "no final status from prefill at" in await receiving
        await until_empty(ours)


async def test_state_that_we_have_not_is_refused_by_name_and_stock_hears_it(
    stock_instance: StockInstance, registry_url: str
) -> None:
    async with opened(Prefill(MHA, SEED), registry_url, Split()) as ours:
        await ours.registered()
        async with stock_instance.seated("decode", registry_url.removeprefix("http://"), Model(state=12), Split()):
            await stock_instance.does("find", room=ROOM)
            await stock_instance.does("name", room=ROOM, pages=[4], row=3)
            async with ours.nodes[0][1].sender.open(ROOM) as room:
                assert "wants state beside KV" in await why(room.peers_ready())
            (reason,) = (await stock_instance.does("outcome", room=ROOM))["reasons"]
            assert "wants state beside KV" in reason
        await until_empty(ours)


async def test_a_prefix_that_is_all_moves_aux_alone(stock_instance: StockInstance, registry_url: str) -> None:
    ours = Decode(MHA, SEED)
    async with stock_prefills(stock_instance, registry_url, MHA, Split(), ours):
        await into_ours(stock_instance, ours, ROOM, prefix=len(NAMED))


async def test_a_prefix_that_stock_has_whole_moves_aux_alone(stock_instance: StockInstance, registry_url: str) -> None:
    async with we_prefill(stock_instance, registry_url, MHA, Split(), Split()) as ours:
        await into_stock(stock_instance, ours, ROOM, prefix=len(NAMED))


async def test_aux_rows_that_stock_sends_by_the_control_link_arrive(
    stock_instance: StockInstance, registry_url: str
) -> None:
    ours = Decode(MHA, SEED)
    async with stock_prefills(stock_instance, registry_url, MHA, Split(), ours):
        await stock_instance.does("aux_by_link", on=True)
        try:
            await into_ours(stock_instance, ours, ROOM)
        finally:
            await stock_instance.does("aux_by_link", on=False)


# Frames

STRANGERS = [
    ["WATERMARK", "0", "0", "127.0.0.1:1"],
    ["STAGING_RSP", "40", "0", "0", "0", "0", "127.0.0.1:1"],
    ["BOOTSTRAP", "40", "127.0.0.1", "9"],
    ["SOMETHING_LATER", "40", "more"],
]


async def test_messages_of_stock_that_we_have_no_use_for_harm_nothing(
    stock_instance: StockInstance, registry_url: str
) -> None:
    async with we_prefill(stock_instance, registry_url, MHA, Split(), Split()) as ours:
        (_, node), *_ = ours.nodes
        at = await node.client.rank(ours.nodes[0][0].seat)
        for frames in STRANGERS:
            await stock_instance.does("speak", frames=frames, to=str(at))
        await into_stock(stock_instance, ours, ROOM)


async def test_messages_of_a_stock_prefill_that_we_have_no_use_for_harm_nothing(
    stock_instance: StockInstance, registry_url: str
) -> None:
    ours = Decode(MHA, SEED)
    async with stock_prefills(stock_instance, registry_url, MHA, Split(), ours):
        at = str(ours.nodes[0][1].receiver.reply)
        for frames in (
            ["STAGING_REQ", "40", "0", "4", "127.0.0.1:1"],
            ["CHUNK_READY", "40", "0", "0", "4", "x:1", "0"],
        ):
            await stock_instance.does("speak", frames=frames, to=at)
        await stock_instance.does("speak", frames=[str(ROOM), "2", "0"], to=at)  # computed, with prefill_complete
        await into_ours(stock_instance, ours, ROOM)


async def test_a_registration_with_frames_of_a_later_release_is_taken(
    stock_instance: StockInstance, registry_url: str
) -> None:
    async with we_prefill(stock_instance, registry_url, MHA, Split(tp=2), Split()) as ours:
        await stock_instance.does("register_as", n_frames=20, more=["new", "frames"])
        await into_stock(stock_instance, ours, ROOM)


async def test_a_registration_of_an_older_release_is_taken(stock_instance: StockInstance, registry_url: str) -> None:
    """Frames from 10 on came later; one length a page must do for all entries then."""
    async with we_prefill(stock_instance, registry_url, MHA, Split(tp=2), Split()) as ours:
        await stock_instance.does("register_as", n_frames=10)
        await into_stock(stock_instance, ours, ROOM)


async def test_a_registration_without_what_we_need_is_an_error_that_stock_hears(
    stock_instance: StockInstance, registry_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    async with we_prefill(stock_instance, registry_url, MHA, Split(), Split()) as ours:
        await stock_instance.does("register_as", n_frames=9)
        await stock_instance.does("find", room=ROOM)
        await stock_instance.does("name", room=ROOM, pages=[4], row=3)
        async with ours.nodes[0][1].sender.open(ROOM) as room:
            assert "is not registered here" in await why(room.peers_ready())
        (reason,) = (await stock_instance.does("outcome", room=ROOM))["reasons"]
        assert "must send its buffer registration before metadata" in reason
        await until_empty(ours)
    assert "buffer registration: 9 frames, needs 10" in capsys.readouterr().out


async def test_ids_that_only_one_side_gives_are_an_error_with_a_name(
    stock_instance: StockInstance, registry_url: str
) -> None:
    """A registration without frame 12, from a decode that has the layers of both stages."""
    async with we_prefill(stock_instance, registry_url, Model(ids=True), Split(pp=2), Split()) as ours:
        await stock_instance.does("register_as", n_frames=10)
        await stock_instance.does("find", room=ROOM)
        await stock_instance.does("name", room=ROOM, pages=[4], row=3)
        async with ours.nodes[0][1].sender.open(ROOM) as room:
            assert "the receiver gives no layer ids" in await why(room.peers_ready())
        (reason,) = (await stock_instance.does("outcome", room=ROOM))["reasons"]
        assert "the receiver gives no layer ids" in reason
