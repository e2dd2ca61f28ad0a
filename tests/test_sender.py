"""A prefill rank's rooms, with decode ranks played by hand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import numpy as np
import pytest

from pdctl.core.address import Endpoint
from pdctl.core.allowance import EarlyLimits, SenderLimits
from pdctl.core.ejection import ProbePolicy
from pdctl.core.kinds import Depth, State
from pdctl.core.layout import Pool, RankPools, Region
from pdctl.core.sessions import SessionTable
from pdctl.core.transfer import Phase, RoomTimeouts
from pdctl.core.wire import (
    NOT_REGISTERED,
    Abort,
    AbortAck,
    Bootstrap,
    Metadata,
    RegisterBuffers,
    Status,
    parse_to_decode,
)
from pdctl.engine.base import PeerCard, Proof
from pdctl.errors import BadFrames, CallerError, Cause, IllegalEvent, RoomFailed, TransferFailed
from pdctl.metrics import Metrics
from pdctl.prober import Prober
from pdctl.sender import Sender
from pdctl.sending import SendingRoom
from tests.conftest import Clock
from tests.room_rig import N_PAGES, Memory, Post, Released, RigEngine, RigGate, let_others_run, memory

RANK = 3
HERE = Endpoint("10.0.0.7", 7001)
PATIENT = RoomTimeouts(bootstrap_s=30, waiting_s=30)


@dataclass
class Decode:
    """A decode rank played by hand."""

    sender: Sender
    memory: Memory = field(default_factory=memory)
    reply: Endpoint = HERE
    session: str = "10.0.0.7:15999"

    def register(self, **changes: object) -> None:
        values: dict = {
            "reply": self.reply,
            "session": self.session,
            "kv_pointers": self.memory.kv_pool.pointers,
            "aux_pointers": self.memory.aux_pool.pointers,
            "tp_rank": 0,
            "tp_size": 1,
            "kv_item_len": self.memory.kv_pool.item_lens[0],
            "kv_item_lens": self.memory.kv_pool.item_lens,
        }
        self.sender.handle(RegisterBuffers(**{**values, **changes}).to_frames())

    def name(self, room: int, pages: Sequence[int] = (), aux_row: int | None = 0, **more: object) -> None:
        named = Metadata(room, self.reply, self.session, np.array(pages, np.int32), aux_row, **more)  # type: ignore[arg-type]
        self.sender.handle(named.to_frames())

    def abort(self, room: int, generation: int | None = None, use: int | None = None) -> None:
        self.sender.handle(Abort(room, self.reply, generation, use=use).to_frames())


@dataclass
class Rig:
    sender: Sender
    engine: RigEngine
    gate: RigGate
    post: Post
    memory: Memory
    metrics: Metrics

    def decode(self, n: int = 7, **changes: object) -> Decode:
        return Decode(
            self.sender,
            reply=Endpoint(f"10.0.0.{n}", 7001),
            session=f"10.0.0.{n}:15999",
            **changes,  # type: ignore[arg-type]
        )

    async def told(self) -> tuple[Endpoint, Status | AbortAck]:
        to, frames = await self.post.next()
        message = parse_to_decode(frames)
        assert isinstance(message, Status | AbortAck)
        return to, message

    def assert_empty(self) -> None:
        assert self.sender.rooms == ()
        assert self.sender.early == ()
        assert self.sender.quarantine == ()
        assert self.engine.in_flight == 0


@asynccontextmanager
async def rig_of(
    clock: Clock, timeouts: RoomTimeouts = PATIENT, limits: SenderLimits | None = None
) -> AsyncIterator[Rig]:
    engine, gate, post, ours, metrics = RigEngine(), RigGate(), Post(), memory(seed=1), Metrics()
    async with Sender(engine, post.send, ours.pools, RANK, gate, timeouts, clock, metrics, limits) as sender:
        yield Rig(sender, engine, gate, post, ours, metrics)


@pytest.fixture
async def rig(clock: Clock) -> AsyncIterator[Rig]:
    async with rig_of(clock) as rig:
        yield rig


async def until_busy(rig: Rig) -> None:
    await asyncio.wait_for(rig.engine.busy.wait(), 60)


# --- the good way


@pytest.mark.parametrize("together", [False, True], ids=["apart", "last with the rows"])
@pytest.mark.parametrize("lens", [(64, 64, 64, 64), (96, 96)], ids=["mha", "mla"])
async def test_chunks_land_in_the_pages_that_decode_named(clock: Clock, lens: tuple[int, ...], together: bool) -> None:
    engine, post, ours, theirs = RigEngine(), Post(), memory(lens, seed=1), memory(lens)
    async with Sender(engine, post.send, ours.pools, RANK, RigGate(), PATIENT, clock, Metrics()) as sender:
        decode, given_back = Decode(sender, theirs), Released()
        decode.register()
        async with sender.open(5, release=given_back) as room:
            decode.name(5, [9, 2, 3, 11, 4], aux_row=3, prefix_len=32)
            await room.peers_ready()
            assert (room.prefix_len, room.n_pages) == (32, 5)
            await room.send([1, 0])
            await room.send([7])
            if not together:
                await room.send([8, 9])
            assert post.is_empty
            await room.finish(2, pages=[8, 9] if together else None)
        assert len(engine.written) == (3 if together else 4)
        for mine, landed in zip(ours.kv, theirs.kv, strict=True):
            assert (landed[[9, 2, 3, 11, 4]] == mine[[1, 0, 7, 8, 9]]).all()
            assert not landed[[0, 1, 5, 6, 7, 8, 10, 12, 13, 14, 15]].any()
        for mine, landed in zip(ours.aux, theirs.aux, strict=True):
            assert (landed[3] == mine[2]).all()
            assert not landed[:3].any()
        assert given_back.now == [[1, 0, 7, 8, 9]]
        assert await post.next() == (decode.reply, Status(5, Phase.SUCCESS, RANK).to_frames())
        assert (sender.rooms, sender.early, sender.quarantine) == ((), (), ())


async def test_a_chunk_may_be_sent_layer_by_layer_as_it_is_computed(clock: Clock) -> None:
    engine, post, ours, theirs = RigEngine(), Post(), memory((64,) * 4, seed=1), memory((64,) * 4)
    async with Sender(engine, post.send, ours.pools, RANK, RigGate(), PATIENT, clock, Metrics()) as sender:
        decode, given_back = Decode(sender, theirs), Released()
        decode.register()
        async with sender.open(5, release=given_back) as room:
            decode.name(5, [9, 2, 3])
            await room.peers_ready()
            await room.send([1, 0], layers=range(1))
            assert (theirs.kv[0][[9, 2]] == ours.kv[0][[1, 0]]).all()
            assert not theirs.kv[1].any()
            with pytest.raises(CallerError, match="layers 1 of the chunk before are not sent"):
                await room.finish(0)
            with pytest.raises(CallerError, match="layers"):
                await room.finish(0, pages=[7])
            await room.send([1, 0], layers=range(1, 2))
            await room.send([7])
            await room.finish(0)
        for mine, landed in zip(ours.kv, theirs.kv, strict=True):
            assert (landed[[9, 2, 3]] == mine[[1, 0, 7]]).all()
        assert given_back.now == [[1, 0, 7]]


async def test_rows_of_state_land_with_the_last_chunk(clock: Clock) -> None:
    engine, post, ours, theirs = RigEngine(), Post(), memory((64, 64, 32), seed=1), memory((64, 64, 32))
    pools = RankPools(Pool(*_entries(ours, 0)), ours.aux_pool, states=(Pool(*_entries(ours, 2)),))
    async with Sender(engine, post.send, pools, RANK, RigGate(), PATIENT, clock, Metrics()) as sender:
        decode = Decode(sender, theirs)
        pointers, lens, _ = _entries(theirs, 0)
        state, state_lens, _ = _entries(theirs, 2)
        decode.register(kv_pointers=pointers, kv_item_lens=lens, state_pointers=(state,), state_item_lens=(state_lens,))
        async with sender.open(5) as room:
            decode.name(5, [9], state_rows=((4, 6),))
            await room.peers_ready()
            await room.send([1])
            await room.finish(0, state_rows=[[2, 3]])
        assert (theirs.kv[2][[4, 6]] == ours.kv[2][[2, 3]]).all()
        assert (theirs.kv[0][9] == ours.kv[0][1]).all()


def _entries(memory: Memory, at: int) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """The pool of one entry."""
    pool = memory.kv_pool
    return pool.pointers[at : at + 1], pool.item_lens[at : at + 1], N_PAGES


async def test_metadata_may_come_before_the_engine_opens_the_room(rig: Rig) -> None:
    decode = rig.decode()
    decode.register()
    decode.name(5, [1])
    assert rig.sender.early == (5,)
    async with rig.sender.open(5) as room:
        await room.peers_ready()
        await room.send([0])
        await room.finish(0)
    rig.assert_empty()


async def test_the_room_waits_for_as_many_decode_ranks_as_it_must_hear_of(rig: Rig) -> None:
    first, second = rig.decode(7), rig.decode(8, memory=memory())
    for decode in (first, second):
        decode.register()
    async with rig.sender.open(5) as room:
        ready = asyncio.create_task(room.peers_ready())
        first.name(5, [1], required=2)
        first.name(5, [1], required=2)
        await asyncio.sleep(0)
        assert room.phase is Phase.BOOTSTRAPPING
        second.name(5, [2], required=2)
        await ready
        await room.send([0])
        await room.finish(0)
    assert (first.memory.kv[0][1] == rig.memory.kv[0][0]).all()
    assert (second.memory.kv[0][2] == rig.memory.kv[0][0]).all()
    assert {(await rig.told())[0] for _ in range(2)} == {first.reply, second.reply}


async def test_a_dummy_is_heard_of_and_gets_nothing(rig: Rig) -> None:
    real, dummy = rig.decode(7), rig.decode(8)
    real.register()
    async with rig.sender.open(5) as room:
        dummy.name(5, aux_row=None, required=2)
        real.name(5, [1], required=2)
        await room.peers_ready()
        await room.send([0])
        await room.finish(0)
    assert {session for session, _ in rig.engine.written} == {real.session}
    assert (await rig.told())[0] == real.reply
    assert rig.post.is_empty


async def test_a_dummy_hears_of_no_failure(rig: Rig) -> None:
    real, dummy = rig.decode(7), rig.decode(8)
    real.register()
    async with rig.sender.open(5):
        dummy.name(5, aux_row=None, required=2)
        real.name(5, [1], required=2)
    assert (await rig.told())[0] == real.reply
    await let_others_run()
    assert rig.post.is_empty


async def test_a_room_of_dummies_succeeds_without_a_byte(rig: Rig) -> None:
    dummy, given_back = rig.decode(), Released()
    async with rig.sender.open(5, release=given_back) as room:
        dummy.name(5, aux_row=None)
        await room.peers_ready()
        await room.send([0, 1])
        await room.finish(0)
        assert room.phase is Phase.SUCCESS
    assert rig.engine.written == []
    assert rig.post.is_empty
    assert given_back.now == [[0, 1]]


async def test_a_prefix_that_decode_has_leaves_only_the_aux_row(rig: Rig) -> None:
    decode = rig.decode()
    decode.register()
    async with rig.sender.open(5) as room:
        decode.name(5, [], aux_row=1, prefix_len=64)
        await room.peers_ready()
        await room.finish(2)
    assert rig.engine.written == [(decode.session, 48)]
    assert (decode.memory.aux[0][1] == rig.memory.aux[0][2]).all()


async def test_success_is_not_told_before_the_aux_row_has_landed(rig: Rig) -> None:
    decode = rig.decode()
    decode.register()
    async with rig.sender.open(5) as room:
        decode.name(5, [1])
        await room.peers_ready()
        await room.send([0])
        rig.engine.hold.clear()
        rig.engine.busy.clear()
        finishing = asyncio.create_task(room.finish(0))
        await until_busy(rig)
        assert rig.post.is_empty
        rig.engine.hold.set()
        await finishing
    assert (await rig.told())[1] == Status(5, Phase.SUCCESS, RANK)


async def test_finish_waits_for_chunks_under_way(rig: Rig) -> None:
    decode = rig.decode()
    decode.register()
    async with rig.sender.open(5) as room:
        decode.name(5, [1, 2])
        await room.peers_ready()
        rig.engine.hold.clear()
        sends = [asyncio.create_task(room.send([page])) for page in (4, 6)]
        await until_busy(rig)
        finishing = asyncio.create_task(room.finish(0))
        await let_others_run()
        assert (finishing.done(), rig.engine.in_flight) == (False, 2)
        rig.engine.hold.set()
        await asyncio.gather(*sends, finishing)
    assert (decode.memory.kv[0][[1, 2]] == rig.memory.kv[0][[4, 6]]).all()


# --- what decode ranks may do wrong


async def test_a_session_that_never_registered_fails_its_room_alone_and_by_name(rig: Rig) -> None:
    stranger, decode = rig.decode(66), rig.decode(7)
    decode.register()
    async with rig.sender.open(6) as good:
        async with rig.sender.open(5) as room:
            stranger.name(5, [1])
            with pytest.raises(RoomFailed, match=rf"{NOT_REGISTERED}: 10\.0\.0\.66:15999 must send"):
                await room.peers_ready()
        to, status = await rig.told()
        assert isinstance(status, Status)
        assert (to, status.phase) == (stranger.reply, Phase.FAILED)
        assert (status.reason or "").startswith(NOT_REGISTERED)
        decode.name(6, [1])
        await good.peers_ready()
        await good.send([0])
        await good.finish(0)
    rig.assert_empty()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kv_item_lens": (64, 64, 16)}, "KV entry 2: the sender has 32 bytes an item and the receiver 16"),
        (
            {"kv_pointers": (1, 2), "kv_item_lens": (64, 64)},
            "KV: 3 entries of mha from layer 0 on do not fit into the receiver's 2",
        ),
        ({"kv_item_lens": (64,)}, "3 pointers but 1 item lengths"),
        ({"aux_pointers": (1,)}, "aux: the sender has 2 buffers and the receiver 1"),
        ({"dcp_size": 2}, "is DCP rank 0 of 2 and this prefill rank, of mha, 0 of 1"),
    ],
)
async def test_memory_that_does_not_pair_fails_the_room_with_both_values(
    rig: Rig, changes: dict[str, object], said: str
) -> None:
    decode = rig.decode()
    decode.register(**changes)
    async with rig.sender.open(5) as room:
        decode.name(5, [1], use=3)
        with pytest.raises(RoomFailed, match=said) as failed:
            await room.peers_ready()
    assert rig.engine.written == []
    _, status = await rig.told()
    assert said in str(status)
    assert isinstance(status, Status)
    assert failed.value.is_permanent
    assert status.is_permanent


@pytest.mark.parametrize(("named", "sent"), [([1, 2], [0]), ([1], [0, 1])], ids=["too few", "too many"])
async def test_pages_sent_and_pages_named_must_be_as_many(rig: Rig, named: list[int], sent: list[int]) -> None:
    decode = rig.decode()
    decode.register()
    async with rig.sender.open(5) as room:
        decode.name(5, named)
        await room.peers_ready()
        with pytest.raises(RoomFailed, match=rf"named {len(named)} pages and") as failed:
            await send_all(room, sent)
    assert not failed.value.is_permanent, "other pages would do"
    assert isinstance((await rig.told())[1], Status)
    rig.assert_empty()


async def send_all(room: SendingRoom, pages: list[int]) -> None:
    await room.send(pages)
    await room.finish(0)


async def test_late_metadata_changes_nothing(rig: Rig) -> None:
    decode = rig.decode()
    decode.register()
    async with rig.sender.open(5) as room:
        decode.name(5, [1])
        await room.peers_ready()
        decode.name(5, [9])
        await room.send([0])
        await room.finish(0)
    assert (decode.memory.kv[0][1] == rig.memory.kv[0][0]).all()
    assert not decode.memory.kv[0][9].any()
    rig.assert_empty()


async def test_bytes_that_cannot_be_read_change_nothing(rig: Rig) -> None:
    with pytest.raises(BadFrames):
        rig.sender.handle([b"None", b"127.0.0.1"])
    rig.sender.handle([b"WATERMARK", b"?"])
    rig.sender.handle(Bootstrap(5, Endpoint("10.0.0.7", 1)).to_frames())
    assert rig.sender.sessions == ()
    rig.assert_empty()


async def test_a_registration_lifts_what_was_held_against_the_session(rig: Rig) -> None:
    rig.decode().register()
    assert rig.engine.forgotten == rig.gate.registrations == ["10.0.0.7:15999"]


async def test_other_memory_under_the_same_session_ends_its_rooms(rig: Rig) -> None:
    decode = rig.decode()
    decode.register()
    async with rig.sender.open(5) as room:
        decode.name(5, [1])
        await room.peers_ready()
        decode.register()
        await room.send([])  # the same again is no news
        decode.register(reply=Endpoint("10.0.0.7", 7002))
        with pytest.raises(RoomFailed, match="registered other memory in mid-room"):
            await room.send([0])


# --- early metadata


async def test_early_metadata_expires(rig: Rig, clock: Clock) -> None:
    rig.decode().name(5, [1])
    clock.forward(30)
    assert rig.sender.early == ()


@pytest.mark.parametrize("limits", [EarlyLimits(max_rooms=2), EarlyLimits(max_pages=8)])
async def test_early_metadata_is_bounded_and_the_oldest_goes(clock: Clock, limits: EarlyLimits) -> None:
    async with rig_of(clock, limits=SenderLimits(early=limits)) as rig:
        for room in (1, 2, 3):
            rig.decode().name(room, [1, 2, 3])
        assert rig.sender.early == (2, 3)


@pytest.mark.parametrize("limits", [EarlyLimits(max_rooms=4), EarlyLimits(max_pages=16)])
async def test_a_decode_rank_that_names_many_rooms_early_pushes_out_its_own(clock: Clock, limits: EarlyLimits) -> None:
    async with rig_of(clock, limits=SenderLimits(early=limits)) as rig:
        modest, greedy = rig.decode(7), rig.decode(8)
        modest.name(1, [1, 2, 3])
        for room in range(2, 40):
            greedy.name(room, [1, 2, 3])
        assert rig.sender.early == (1, 37, 38, 39)
        clock.forward(30)
        assert not rig.sender.early


async def test_the_peer_unused_for_longest_is_forgotten(clock: Clock) -> None:
    async with rig_of(clock, limits=SenderLimits(max_peers=2)) as rig:
        for n in (1, 2, 1, 3):
            rig.decode(n).register()
        assert set(rig.sender.sessions) == {"10.0.0.1:15999", "10.0.0.3:15999"}
        unused, newest = rig.engine.forgotten[-2:]
        assert (unused, newest) == ("10.0.0.2:15999", "10.0.0.3:15999"), "the engine lets go of what it held for it"


async def test_a_peer_that_is_forgotten_in_the_midst_of_a_room_keeps_its_way_there(clock: Clock) -> None:
    async with rig_of(clock, limits=SenderLimits(max_peers=1)) as rig:
        used, other = rig.decode(1), rig.decode(2)
        used.register()
        async with rig.sender.open(5) as room:
            used.name(5, [1])
            await room.peers_ready()
            other.register()
            assert rig.engine.forgotten == ["10.0.0.1:15999", "10.0.0.2:15999"], "as both have registered, and no more"
            await room.send(np.array([0]))
            await room.finish(0)
        assert rig.engine.written


async def test_a_room_aborted_before_it_was_opened_fails_at_once(rig: Rig) -> None:
    decode = rig.decode()
    decode.register()
    decode.name(5, [1])
    decode.abort(5, generation=9)
    assert await rig.told() == (decode.reply, AbortAck(5, RANK, 9))
    async with rig.sender.open(5) as room:
        with pytest.raises(RoomFailed, match="gave the room up before it was opened here"):
            await room.peers_ready()
    rig.assert_empty()


async def test_a_room_named_anew_after_an_abort_is_wanted_again(rig: Rig) -> None:
    decode, other = rig.decode(7), rig.decode(8)
    for each in (decode, other):
        each.register()
    decode.name(5, [1], required=2)
    decode.abort(5)
    other.name(5, [1], required=2)
    async with rig.sender.open(5) as room:
        with pytest.raises(RoomFailed, match=r"decode rank 10\.0\.0\.7:7001 gave the room up"):
            await room.peers_ready()
        for each in (decode, other):  # while the engine has not left the old room yet
            each.name(5, [1], required=2)
    async with rig.sender.open(5) as room:
        await room.peers_ready()
        await room.send([0])
        await room.finish(0)


async def test_rooms_that_were_given_up_unnamed_are_remembered_for_a_while_and_not_without_end(clock: Clock) -> None:
    async with rig_of(clock, limits=SenderLimits(early=EarlyLimits(max_rooms=2))) as rig:
        for use, room in enumerate((1, 2, 3)):
            rig.decode().abort(room, generation=room, use=use)
        assert rig.sender.early == (), "they wait for nobody"
        assert [await is_over(rig, room) for room in (1, 2)] == [False, True]
        clock.forward(30)
        assert not await is_over(rig, 3)


async def is_over(rig: Rig, number: int) -> bool:
    async with rig.sender.open(number, required=1) as room:
        return room.phase is Phase.FAILED


async def test_a_decode_rank_that_gave_up_unnamed_does_not_end_a_room_that_is_complete_without_it(rig: Rig) -> None:
    decode, other = rig.decode(7), rig.decode(8)
    decode.register()
    other.abort(5, generation=4, use=1)
    decode.name(5, [1])
    async with rig.sender.open(5) as room:
        await room.peers_ready()
        await room.finish(0, pages=[0])


async def test_a_decode_rank_that_gave_up_unnamed_ends_a_room_that_waits_for_it(rig: Rig) -> None:
    decode, other = rig.decode(7), rig.decode(8)
    decode.register()
    other.abort(5, generation=4, use=1)
    decode.name(5, [1], required=2)
    async with rig.sender.open(5) as room:
        with pytest.raises(RoomFailed, match=r"decode rank 10\.0\.0\.8:7001 gave the room up"):
            await room.peers_ready()


async def test_a_decode_rank_that_gave_up_and_names_pages_after_all_is_believed(rig: Rig) -> None:
    decode = rig.decode()
    decode.register()
    decode.abort(5, generation=4, use=1)
    decode.name(5, [1], required=2, use=2)
    assert not await is_over(rig, 5)


@pytest.mark.parametrize("use", [1, None])
async def test_an_abort_of_a_use_that_is_over_here_is_no_news(rig: Rig, use: int | None) -> None:
    decode = rig.decode()
    decode.register()
    decode.name(5, [1], use=1)
    async with rig.sender.open(5) as room:
        await room.peers_ready()
        await room.finish(0, pages=[0])
    decode.abort(5, generation=4, use=use)
    assert not await is_over(rig, 5)


async def test_a_late_abort_of_a_finished_room_does_not_reach_the_next_use_of_its_number(rig: Rig) -> None:
    decode = rig.decode()
    decode.register()
    decode.abort(5)
    async with rig.sender.open(5) as room:
        decode.name(5, [1])
        await room.peers_ready()
        await room.send([0])
        await room.finish(0)
    assert room.phase is Phase.SUCCESS


# --- aborts


async def test_an_abort_is_acknowledged_when_nothing_is_in_flight_any_more(rig: Rig) -> None:
    decode = rig.decode()
    decode.register()
    async with rig.sender.open(5) as room:
        decode.name(5, [1])
        await room.peers_ready()
        rig.engine.hold.clear()
        sending = asyncio.create_task(room.send([0]))
        await until_busy(rig)
        rig.engine.rest.clear()
        decode.abort(5, generation=4)
        await let_others_run()
        assert (room.phase, rig.engine.in_flight, sending.done()) == (Phase.FAILED, 1, False)
        assert rig.post.is_empty
        rig.engine.rest.set()
        with pytest.raises(RoomFailed, match=r"decode rank 10\.0\.0\.7:7001 has given the room up"):
            await sending
        assert rig.engine.in_flight == 0
    assert await rig.told() == (decode.reply, AbortAck(5, RANK, 4))
    assert rig.post.is_empty
    assert not decode.memory.kv[0].any()
    rig.assert_empty()


async def test_an_abort_of_one_decode_rank_is_told_to_the_others(rig: Rig) -> None:
    first, second = rig.decode(7), rig.decode(8)
    for decode in (first, second):
        decode.register()
    async with rig.sender.open(5):
        first.name(5, [1], required=2)
        second.name(5, [2], required=2)
        first.abort(5, generation=1)
    told = dict([await rig.told(), await rig.told()])
    assert told[first.reply] == AbortAck(5, RANK, 1)
    assert isinstance(told[second.reply], Status)
    assert rig.post.is_empty


async def test_a_decode_rank_that_came_too_late_for_a_room_does_not_end_it(rig: Rig) -> None:
    decode, late = rig.decode(7), rig.decode(8)
    for each in (decode, late):
        each.register()
    async with rig.sender.open(5) as room:
        decode.name(5, [1])
        await room.peers_ready()
        late.name(5, [2])
        late.abort(5, generation=4)
        assert await rig.told() == (late.reply, AbortAck(5, RANK, 4))
        await room.send([0])
        await room.finish(0)
    assert await rig.told() == (decode.reply, Status(5, Phase.SUCCESS, RANK))
    assert not late.memory.kv[0][2].any()
    rig.assert_empty()


async def test_a_decode_rank_that_is_awaited_can_give_the_room_up_before_it_names_pages(rig: Rig) -> None:
    async with rig.sender.open(5) as room:
        rig.decode().abort(5, generation=4)
        with pytest.raises(RoomFailed, match="has given the room up"):
            await room.peers_ready()


async def test_an_abort_of_an_unknown_room_is_acknowledged_at_once(rig: Rig) -> None:
    rig.decode().abort(77, generation=2)
    assert (await rig.told())[1] == AbortAck(77, RANK, 2)
    rig.decode().abort(78)
    rig.sender.handle(Abort(79).to_frames())
    await asyncio.sleep(0)
    assert rig.post.is_empty


async def test_an_abort_after_success_is_acknowledged(rig: Rig) -> None:
    decode = rig.decode()
    decode.register()
    async with rig.sender.open(5) as room:
        decode.name(5, [])
        await room.peers_ready()
        await room.finish(0)
        decode.abort(5, generation=3)
        assert room.phase is Phase.SUCCESS
    assert await rig.told() == (decode.reply, AbortAck(5, RANK, 3))
    await let_others_run()
    assert rig.post.is_empty, "a status after the acknowledgement would speak of the number's next use"


# --- the engine fails


@pytest.mark.parametrize("cause", Cause)
async def test_a_failed_transfer_ends_the_room_and_the_gate_hears_of_it_with_its_cause(rig: Rig, cause: Cause) -> None:
    decode, given_back = rig.decode(), Released()
    decode.register()
    rig.engine.failures[decode.session] = TransferFailed(cause, decode.session, "as the test wants")
    async with rig.sender.open(5, release=given_back) as room:
        decode.name(5, [1])
        await room.peers_ready()
        with pytest.raises(RoomFailed, match="as the test wants"):
            await room.send([0])
        with pytest.raises(RoomFailed, match="as the test wants"):
            await room.finish(0)
    assert (rig.gate.told, rig.gate.passed) == ([(decode.session, cause)], [])
    _, status = await rig.told()
    assert isinstance(status, Status)
    assert (status.phase, "as the test wants" in (status.reason or "")) == (Phase.FAILED, True)
    assert given_back.now == [[0]]
    rig.assert_empty()


async def test_a_blocked_session_fails_the_room_at_once_with_the_reason(rig: Rig) -> None:
    decode = rig.decode()
    decode.register()
    rig.gate.blocked[decode.session] = "it was stopped 3 s ago"
    async with rig.sender.open(5) as room:
        decode.name(5, [1])
        with pytest.raises(RoomFailed, match="is blocked: it was stopped 3 s ago"):
            await room.peers_ready()
    assert "it was stopped 3 s ago" in str((await rig.told())[1])


async def test_a_session_blocked_in_mid_room_is_not_written_to_again(rig: Rig) -> None:
    decode = rig.decode()
    decode.register()
    async with rig.sender.open(5) as room:
        decode.name(5, [1, 2])
        await room.peers_ready()
        await room.send([0])
        n_written = len(rig.engine.written)
        rig.gate.blocked[decode.session] = "another room failed"
        with pytest.raises(RoomFailed, match="another room failed"):
            await room.send([1])
        assert len(rig.engine.written) == n_written


async def test_the_gate_hears_of_every_write_that_landed(rig: Rig) -> None:
    decode = rig.decode()
    decode.register()
    async with rig.sender.open(5) as room:
        decode.name(5, [1])
        await room.peers_ready()
        await room.send([0])
        await room.finish(0)
    assert (rig.gate.told, rig.gate.passed) == ([], [decode.session, decode.session])


async def test_the_gate_hears_where_the_memory_is_that_a_decode_rank_registers(rig: Rig) -> None:
    decode = rig.decode()
    decode.register()
    pointers = (*decode.memory.kv_pool.pointers, *decode.memory.aux_pool.pointers)
    assert rig.gate.pointers == {decode.session: pointers}


# --- a session on trial, with the real gate


class Asked:
    """Every session answers as one and the same life, that has all of the memory there is."""

    held: tuple[str, ...] = ()

    async def prove(self, session: str, *, deadline_s: float) -> Proof:
        return Proof(await self.card(session, deadline_s=deadline_s), Depth.IDENTITY, "descriptor compared")

    async def card(self, session: str, *, deadline_s: float) -> PeerCard:
        return PeerCard(session, 4711, (Region(1, 1 << 62),))


@dataclass
class Trial:
    """Two rooms of one decode rank whose session is on trial, both about to send."""

    rig: Rig
    prober: Prober
    decode: Decode
    rooms: tuple[SendingRoom, SendingRoom]

    async def both_send(self) -> list[asyncio.Task[None]]:
        sends = [asyncio.create_task(room.send([0])) for room in self.rooms]
        await until_busy(self.rig)
        await let_others_run()
        return sends


@pytest.fixture
async def trial(clock: Clock) -> AsyncIterator[Trial]:
    engine, post, ours, metrics = RigEngine(), Post(), memory(seed=1), Metrics()
    table: SessionTable[PeerCard] = SessionTable(ProbePolicy(good_answers=1), lambda: 0.5)
    gate = Prober(table, Asked(), clock=clock, metrics=metrics)
    async with Sender(engine, post.send, ours.pools, RANK, gate, PATIENT, clock, metrics) as sender:
        rig = Rig(sender, engine, RigGate(), post, ours, metrics)
        decode = rig.decode()
        decode.register()
        async with sender.open(5) as one, sender.open(6) as other:
            for room in (one, other):
                decode.name(room.room, [room.room])
                await room.peers_ready()
            gate.failed(decode.session, Cause.TIMED_OUT, "it was stopped")
            assert (await gate.ask_now(decode.session)).standing.state is State.TRIAL
            engine.hold.clear()
            yield Trial(rig, gate, decode, (one, other))


async def test_on_trial_one_room_writes_and_the_others_follow_its_success(trial: Trial) -> None:
    sends = await trial.both_send()
    assert trial.rig.engine.in_flight == 1
    trial.rig.engine.hold.set()
    await asyncio.gather(*sends)
    assert trial.prober.standing(trial.decode.session).state is State.TRUSTED
    assert (trial.decode.memory.kv[0][[5, 6]] == trial.rig.memory.kv[0][0]).all()


async def test_on_trial_a_room_that_waits_fails_with_the_reason_when_the_first_write_fails(trial: Trial) -> None:
    trial.rig.engine.failures[trial.decode.session] = TransferFailed(Cause.PEER_GONE, trial.decode.session, "again")
    sends = await trial.both_send()
    trial.rig.engine.hold.set()
    first, second = await asyncio.gather(*sends, return_exceptions=True)
    assert isinstance(first, RoomFailed)
    assert "peer_gone" in str(first)
    assert isinstance(second, RoomFailed)
    assert "is blocked: peer gone (again)" in str(second)
    assert trial.rig.engine.written == []


async def test_on_trial_a_room_is_left_at_once_while_it_waits_for_its_turn(trial: Trial) -> None:
    sends = await trial.both_send()
    trial.decode.abort(6, generation=3)
    with pytest.raises(RoomFailed, match="has given the room up"):
        await asyncio.wait_for(sends[1], 60)
    await let_others_run()
    assert (await trial.rig.told())[1] == AbortAck(6, RANK, 3)
    trial.rig.engine.hold.set()
    await sends[0]


async def test_the_first_cause_wins(rig: Rig) -> None:
    decode = rig.decode()
    decode.register()
    rig.engine.failures[decode.session] = TransferFailed(Cause.PEER_GONE, decode.session, "the first")
    async with rig.sender.open(5) as room:
        decode.name(5, [1])
        await room.peers_ready()
        with pytest.raises(RoomFailed):
            await room.send([0])
        decode.abort(5)
        room.peer_replaced(decode.session)
        assert "the first" in str(room.reason)
    await rig.told()
    assert rig.post.is_empty


async def test_one_dead_decode_rank_stops_the_writes_to_the_others(rig: Rig) -> None:
    dead, alive = rig.decode(7), rig.decode(8)
    for decode in (dead, alive):
        decode.register()
    rig.engine.failures[dead.session] = TransferFailed(Cause.PEER_GONE, dead.session, "killed")
    async with rig.sender.open(5) as room:
        for decode in (dead, alive):
            decode.name(5, [1], required=2)
        await room.peers_ready()
        with pytest.raises(RoomFailed, match="killed"):
            await room.send([0])
        assert rig.engine.in_flight == 0
    assert {to for to, _ in (await rig.told(), await rig.told())} == {dead.reply, alive.reply}


async def test_pages_stay_in_quarantine_until_the_engine_is_at_rest(rig: Rig, clock: Clock) -> None:
    decode, given_back = rig.decode(), Released()
    decode.register()
    rig.engine.settling.clear()
    rig.engine.failures[decode.session] = TransferFailed(Cause.TIMED_OUT, decode.session, "stuck", settled=False)
    async with rig.sender.open(5, release=given_back) as room:
        decode.name(5, [1, 2])
        await room.peers_ready()
        with pytest.raises(RoomFailed, match="stuck"):
            await room.send([4, 5])
    await rig.told()
    decode.abort(5, generation=8)
    (held,) = rig.sender.quarantine
    assert (held.room, held.pages.tolist(), held.since) == (5, [4, 5], clock())
    assert held.waiting_for == (decode.session,)
    assert "stuck" in held.reason
    assert 'pdctl_room_pages_quarantined{side="sender"} 2.0' in rig.metrics.exposition()[0].decode()
    assert given_back.now == []
    assert rig.post.is_empty
    rig.engine.settling.set()
    assert await given_back.next() == [4, 5]
    assert await rig.told() == (decode.reply, AbortAck(5, RANK, 8))
    assert 'pdctl_room_pages_quarantined{side="sender"} 0.0' in rig.metrics.exposition()[0].decode()
    rig.assert_empty()


# --- leaving and time-outs


async def test_leaving_early_fails_the_room_and_tells_decode(rig: Rig) -> None:
    decode, given_back = rig.decode(), Released()
    decode.register()

    async def work() -> None:
        async with rig.sender.open(5, release=given_back) as room:
            decode.name(5, [1, 2])
            await room.peers_ready()
            await room.send([3])
            raise ZeroDivisionError("in the engine")

    with pytest.raises(ZeroDivisionError):
        await work()
    assert "left the room on ZeroDivisionError: in the engine" in str((await rig.told())[1])
    assert given_back.now == [[3]]
    rig.assert_empty()


async def one_page(rig: Rig, release: Released) -> None:
    decode = rig.decode()
    decode.register()
    async with rig.sender.open(5, release=release) as room:
        decode.name(5, [1])
        await room.peers_ready()
        await room.send([3])


async def test_cancelled_twice_the_room_is_left_and_its_pages_wait_for_the_engine(rig: Rig) -> None:
    given_back = Released()
    rig.engine.hold.clear()
    rig.engine.rest.clear()
    task = asyncio.create_task(one_page(rig, given_back))
    await until_busy(rig)
    for _ in range(3):
        task.cancel()
        await let_others_run()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert rig.sender.rooms == ()
    assert [held.pages.tolist() for held in rig.sender.quarantine] == [[3]]
    assert given_back.now == []
    rig.engine.rest.set()
    assert await given_back.next() == [3]
    rig.assert_empty()


async def test_a_cancelled_send_comes_to_rest_before_the_room_is_left(rig: Rig) -> None:
    given_back = Released()
    rig.engine.hold.clear()
    task = asyncio.create_task(one_page(rig, given_back))
    await until_busy(rig)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert given_back.now == [[3]]
    rig.assert_empty()
    assert isinstance((await rig.told())[1], Status)


async def test_decode_ranks_that_never_come_are_a_time_out_with_a_cause(clock: Clock) -> None:
    async with rig_of(clock, RoomTimeouts(bootstrap_s=0.05)) as rig:
        decode = rig.decode()
        decode.register()
        async with rig.sender.open(5) as room:
            decode.name(5, [1], required=2)
            with pytest.raises(RoomFailed, match=r"no destination pages from .* of room 5 \(heard of: 10"):
                await room.peers_ready()
            assert "raise bootstrap_s" in str(room.reason)
        assert isinstance((await rig.told())[1], Status)
        rig.assert_empty()


@pytest.mark.parametrize(("n_chunks", "said"), [(0, "no first chunk"), (1, "no further chunk")])
async def test_an_engine_that_computes_no_more_is_a_time_out_with_a_cause(
    clock: Clock, n_chunks: int, said: str
) -> None:
    async with rig_of(clock, RoomTimeouts(waiting_s=0.05)) as rig:
        decode = rig.decode()
        decode.register()
        async with rig.sender.open(5) as room:
            decode.name(5, [1, 2])
            await room.peers_ready()
            for _ in range(n_chunks):
                await room.send([0])
            _, status = await rig.told()  # decode hears it without the engine's help
            assert f"{said} from the prefill engine within 0.05 s" in str(status)
            with pytest.raises(RoomFailed, match=said):
                await room.send([1])


async def test_a_long_write_is_not_a_missing_chunk(clock: Clock) -> None:
    async with rig_of(clock, RoomTimeouts(waiting_s=0.05)) as rig:
        decode = rig.decode()
        decode.register()
        async with rig.sender.open(5) as room:
            decode.name(5, [1])
            await room.peers_ready()
            rig.engine.hold.clear()
            asyncio.get_running_loop().call_later(0.15, rig.engine.hold.set)
            await room.send([0])
            await room.finish(0)
        assert room.phase is Phase.SUCCESS


async def test_sending_before_the_peers_are_ready_is_the_callers_mistake(rig: Rig) -> None:
    async with rig.sender.open(5) as room:
        with pytest.raises(IllegalEvent, match="BOOTSTRAPPING knows no chunk_queued"):
            await room.send([0])
        assert room.phase is Phase.BOOTSTRAPPING
    rig.assert_empty()


async def test_a_room_is_open_once(rig: Rig) -> None:
    async with rig.sender.open(5):
        with pytest.raises(CallerError, match="room 5 is open already"):
            async with rig.sender.open(5):
                pass
        assert rig.sender.rooms == (5,)
    rig.assert_empty()


async def finished_unheard(rig: Rig) -> tuple[Decode, SendingRoom]:
    """A room that ends well at a decode rank that no message reaches."""
    decode = rig.decode()
    decode.register()
    rig.post.unreachable.add(decode.reply)
    async with rig.sender.open(5) as room:
        decode.name(5, [])
        await room.peers_ready()
        await room.finish(0)
    return decode, room


async def test_an_unreachable_decode_rank_does_not_hold_up_the_sender(rig: Rig) -> None:
    _, room = await finished_unheard(rig)
    assert room.phase is Phase.SUCCESS
    rig.assert_empty()


async def test_a_status_that_no_connection_takes_is_told_when_one_does(rig: Rig) -> None:
    decode, _ = await finished_unheard(rig)
    await let_others_run()
    rig.post.unreachable.clear()
    assert await rig.told() == (decode.reply, Status(5, Phase.SUCCESS, RANK))
    assert rig.post.is_empty


@pytest.mark.parametrize("news", ["gives it up", "names it anew"])
async def test_a_status_that_was_not_told_never_reaches_the_next_use_of_its_number(rig: Rig, news: str) -> None:
    decode = rig.decode()
    decode.register()
    rig.post.unreachable.add(decode.reply)
    async with rig.sender.open(5):
        decode.name(5, [1])
    await let_others_run()
    assert len(rig.sender.words.reports) == 1
    if news == "gives it up":
        decode.abort(5, generation=3)
    else:
        decode.name(5, [2])
    await let_others_run()
    assert len(rig.sender.words.reports) == 0
    rig.post.unreachable.clear()
    decode.abort(5, generation=4)
    assert await rig.told() == (decode.reply, AbortAck(5, RANK, 4))
    await let_others_run()
    assert rig.post.is_empty


async def test_what_was_decided_last_is_still_told_on_closing(clock: Clock) -> None:
    async with rig_of(clock) as rig:
        decode = rig.decode()
        decode.register()
        async with rig.sender.open(5):
            decode.name(5, [1])
    assert isinstance((await rig.told())[1], Status)


async def test_rooms_are_counted(rig: Rig) -> None:
    decode = rig.decode()
    decode.register()
    async with rig.sender.open(5) as room:
        assert 'pdctl_rooms_open{side="sender"} 1.0' in rig.metrics.exposition()[0].decode()
        decode.name(5, [1])
        await room.peers_ready()
        await room.send([0])
        await room.finish(0)
    shown = rig.metrics.exposition()[0].decode()
    assert 'pdctl_rooms_open{side="sender"} 0.0' in shown
    assert 'pdctl_rooms_ended_total{phase="success",side="sender"} 1.0' in shown
    assert "pdctl_room_sent_bytes_total 208.0" in shown
