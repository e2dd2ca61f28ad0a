"""A decode rank's rooms, with prefill ranks played by hand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import numpy as np
import pytest
from structlog.testing import capture_logs

from pdctl.arriving import ArrivingRoom
from pdctl.core.address import Endpoint
from pdctl.core.pairing import Paired
from pdctl.core.transfer import Phase, RoomTimeouts
from pdctl.core.wire import (
    NOT_REGISTERED,
    Abort,
    AbortAck,
    AuxData,
    Metadata,
    RegisterBuffers,
    Status,
    parse_to_prefill,
)
from pdctl.errors import BadFrames, CallerError, RoomFailed
from pdctl.metrics import Metrics
from pdctl.receiver import Receiver, never_gone
from tests.conftest import Clock
from tests.room_rig import N_PAGES, Memory, Post, Released, let_others_run, memory

SESSION = "10.0.0.7:15999"
REPLY = Endpoint("10.0.0.7", 7001)
PREFILL, SECOND = Endpoint("10.0.0.1", 9001), Endpoint("10.0.0.2", 9001)
PATIENT = RoomTimeouts(bootstrap_s=30, waiting_s=30, drain_margin_s=0.01)

Said = RegisterBuffers | Metadata | Abort


@dataclass
class Rig:
    receiver: Receiver
    post: Post
    memory: Memory
    metrics: Metrics

    async def told(self) -> tuple[Endpoint, Said]:
        to, frames = await self.post.next()
        message = parse_to_prefill(frames)
        assert isinstance(message, RegisterBuffers | Metadata | Abort)
        return to, message

    async def told_of_room(self) -> None:
        """The registration and the metadata of the first room with a prefill."""
        assert isinstance((await self.told())[1], RegisterBuffers)
        assert isinstance((await self.told())[1], Metadata)

    async def told_abort(self) -> tuple[Endpoint, Abort]:
        to, abort = await self.told()
        assert isinstance(abort, Abort)
        return to, abort

    def say(self, message: Status | AbortAck | AuxData) -> None:
        self.receiver.handle(message.to_frames())

    def succeed(self, room: int, rank: int = 0) -> None:
        self.say(Status(room, Phase.SUCCESS, rank))

    def fail(self, room: int, rank: int = 0, reason: str | None = None) -> None:
        self.say(Status(room, Phase.FAILED, rank, reason))

    def ack(self, abort: Abort, rank: int = 0) -> None:
        self.say(AbortAck(abort.room, rank, abort.generation))

    def assert_empty(self) -> None:
        assert self.receiver.rooms == ()
        assert self.receiver.quarantine == ()


@asynccontextmanager
async def rig_of(
    clock: Clock,
    timeouts: RoomTimeouts = PATIENT,
    is_gone: Callable[[Endpoint], Awaitable[bool]] = never_gone,
) -> AsyncIterator[Rig]:
    post, ours, metrics = Post(), memory(), Metrics()
    async with Receiver(SESSION, post.send, REPLY, ours.pools, 1, 2, timeouts, clock, metrics, is_gone) as receiver:
        yield Rig(receiver, post, ours, metrics)


@pytest.fixture
async def rig(clock: Clock) -> AsyncIterator[Rig]:
    async with rig_of(clock) as rig:
        yield rig


# --- the good way


async def test_prefill_hears_of_our_memory_then_of_the_pages(rig: Rig) -> None:
    given_back = Released()
    async with rig.receiver.open(5, PREFILL, [4, 2], 3, prefix_len=32, release=given_back) as room:
        to, said = await rig.told()
        assert isinstance(said, RegisterBuffers)
        assert (to, said.session, said.reply) == (PREFILL, SESSION, REPLY)
        assert (said.tp_rank, said.tp_size, said.kv_item_len) == (1, 2, 64)
        assert said.kv_pool().pointers == rig.memory.kv_pool.pointers
        assert said.aux_pointers == rig.memory.aux_pool.pointers
        to, named = await rig.told()
        assert isinstance(named, Metadata)
        assert (to, named.room, named.session, named.reply) == (PREFILL, 5, SESSION, REPLY)
        assert (named.pages.tolist(), named.aux_row, named.prefix_len, named.required) == ([4, 2], 3, 32, 1)
        assert room.phase is Phase.TRANSFERRING
        rig.succeed(5)
        await room.arrived()
        assert given_back.now == []
    assert given_back.now == [[4, 2]]
    assert rig.post.is_empty
    rig.assert_empty()


async def test_memory_is_registered_once_for_each_prefill_rank(rig: Rig) -> None:
    async def one(room: int, prefill: Endpoint) -> None:
        async with rig.receiver.open(room, prefill, [room], 0) as r:
            rig.succeed(room)
            await r.arrived()

    await asyncio.gather(one(1, PREFILL), one(2, PREFILL), one(3, SECOND))
    await one(4, PREFILL)
    said = [await rig.told() for _ in range(6)]
    assert [to for to, m in said if isinstance(m, RegisterBuffers)] == [PREFILL, SECOND]
    for prefill in (PREFILL, SECOND):
        assert isinstance(next(m for to, m in said if to == prefill), RegisterBuffers)
    assert rig.post.is_empty


async def test_every_prefill_rank_that_has_to_must_report(rig: Rig) -> None:
    async with rig.receiver.open(5, Paired((PREFILL, SECOND), responses=2), [1], 0) as room:
        arriving = asyncio.create_task(room.arrived())
        rig.succeed(5, rank=0)
        rig.succeed(5, rank=0)
        rig.succeed(5, rank=0)
        await asyncio.sleep(0)
        assert not arriving.done()
        rig.succeed(5, rank=1)
        await arriving


async def test_a_dummy_prefill_rank_hears_of_no_pages(rig: Rig) -> None:
    async with rig.receiver.open(5, Paired((PREFILL,), (SECOND,), required=2), [1], 2) as room:
        said = [await rig.told() for _ in range(4)]
        named = {to: m for to, m in said if isinstance(m, Metadata)}
        assert (named[PREFILL].is_dummy, named[SECOND].is_dummy) == (False, True)
        assert named[SECOND].required == 2
        rig.succeed(5)
        await room.arrived()


async def test_ranks_that_nobody_expects_do_not_count(rig: Rig) -> None:
    async with rig.receiver.open(5, Paired((PREFILL,), ranks=(4,)), [1], 0) as room:
        rig.succeed(5, rank=3)
        rig.fail(5, rank=3)
        assert room.phase is Phase.TRANSFERRING
        rig.succeed(5, rank=4)
        await room.arrived()


async def test_statuses_of_unknown_rooms_and_other_phases_are_ignored(rig: Rig) -> None:
    rig.succeed(77)
    rig.fail(78)
    async with rig.receiver.open(5, PREFILL, [1], 0) as room:
        rig.say(Status(5, Phase.WAITING_FOR_INPUT, 0))
        rig.receiver.handle([b"STAGING_REQ", b"5"])
        assert room.phase is Phase.TRANSFERRING
        rig.succeed(5)
        rig.fail(5, reason="too late")
        await room.arrived()
    rig.assert_empty()


async def test_a_status_from_before_our_pages_were_named_speaks_of_another_room(rig: Rig) -> None:
    room = rig.receiver.open(5, PREFILL, [1], 0)
    rig.receiver.enter(room)
    rig.fail(5, reason="an earlier room of that number")
    assert room.phase is Phase.BOOTSTRAPPING


# --- failures and quarantine


async def enter_and_fail(rig: Rig, room: ArrivingRoom, reason: str | None = "its engine stopped") -> None:
    async with room:
        rig.fail(room.room, rank=2, reason=reason)
        with pytest.raises(RoomFailed, match=reason or "it gave no reason"):
            await room.arrived()


@pytest.mark.parametrize("is_permanent", [False, True])
async def test_a_failure_says_whether_another_room_with_that_prefill_could_go_better(
    rig: Rig, is_permanent: bool
) -> None:
    async with rig.receiver.open(5, PREFILL, [1], 0) as room:
        rig.say(Status(5, Phase.FAILED, 2, "no fit", use=room.use, is_permanent=is_permanent))
        with pytest.raises(RoomFailed, match="prefill rank 2 says: no fit") as failed:
            await room.arrived()
    assert failed.value.is_permanent == is_permanent


@pytest.mark.parametrize("reason", ["its engine stopped", None])
async def test_a_failure_carries_the_prefills_reason(rig: Rig, reason: str | None) -> None:
    await enter_and_fail(rig, rig.receiver.open(5, PREFILL, [1], 0), reason)


async def test_pages_of_a_failed_room_wait_for_the_ack_and_the_margin(clock: Clock) -> None:
    async with rig_of(clock, RoomTimeouts(drain_margin_s=0.05)) as rig:
        given_back = Released()
        await enter_and_fail(rig, rig.receiver.open(5, PREFILL, [1, 2], 0, release=given_back))
        await rig.told_of_room()
        to, abort = await rig.told_abort()
        assert (to, abort.room, abort.reply) == (PREFILL, 5, REPLY)
        (held,) = rig.receiver.quarantine
        assert (held.room, held.pages.tolist(), held.waiting_for) == (5, [1, 2], (str(PREFILL),))
        assert "its engine stopped" in held.reason
        assert 'pdctl_room_pages_quarantined{side="receiver"} 2.0' in rig.metrics.exposition()[0].decode()
        acked_at = asyncio.get_running_loop().time()
        rig.ack(abort)
        assert given_back.now == []
        assert await given_back.next() == [1, 2]
        assert asyncio.get_running_loop().time() - acked_at >= 0.049
        rig.ack(abort)
        assert given_back.now == []
        assert 'pdctl_room_pages_quarantined{side="receiver"} 0.0' in rig.metrics.exposition()[0].decode()
        rig.assert_empty()


@pytest.mark.parametrize(
    "wrong",
    [
        lambda abort: AbortAck(abort.room),
        lambda abort: AbortAck(abort.room, 0),
        lambda abort: AbortAck(abort.room, 0, abort.generation + 1),
        lambda abort: AbortAck(abort.room + 1, 0, abort.generation),
    ],
    ids=["no rank", "no generation", "another generation", "another room"],
)
async def test_only_the_ack_of_this_very_abort_frees_pages(clock: Clock, wrong: Callable[[Abort], AbortAck]) -> None:
    async with rig_of(clock, RoomTimeouts(drain_margin_s=0)) as rig:
        given_back = Released()
        await enter_and_fail(rig, rig.receiver.open(5, PREFILL, [1], 0, release=given_back))
        await rig.told_of_room()
        _, abort = await rig.told_abort()
        rig.say(wrong(abort))
        await let_others_run()
        (held,) = rig.receiver.quarantine
        assert held.waiting_for == (str(PREFILL),)
        assert given_back.now == []
        rig.ack(abort)
        assert await given_back.next() == [1]


async def test_every_prefill_rank_that_was_told_must_ack(clock: Clock) -> None:
    async with rig_of(clock, RoomTimeouts(drain_margin_s=0)) as rig:
        given_back = Released()
        both = Paired((PREFILL, SECOND), responses=2)
        await enter_and_fail(rig, rig.receiver.open(5, both, [1], 0, release=given_back))
        for _ in range(4):
            await rig.told()
        aborts = dict([await rig.told_abort(), await rig.told_abort()])
        rig.ack(aborts[SECOND])
        rig.ack(aborts[SECOND], rank=1)
        await let_others_run()
        (held,) = rig.receiver.quarantine
        assert held.waiting_for == (str(PREFILL),)
        assert given_back.now == []
        rig.ack(aborts[PREFILL])
        assert await given_back.next() == [1]


async def test_time_alone_frees_nothing_but_asks_again(clock: Clock) -> None:
    async with rig_of(clock, RoomTimeouts(release_s=0.02, drain_margin_s=0)) as rig:
        given_back = Released()
        with capture_logs() as lines:
            await enter_and_fail(rig, rig.receiver.open(5, PREFILL, [1], 0, release=given_back))
            await rig.told_of_room()
            _, first = await rig.told_abort()
            clock.forward(31)
            again = [(await rig.told_abort())[1] for _ in range(3)]
        assert again == [first] * 3
        assert given_back.now == []
        assert len(rig.receiver.quarantine) == 1
        warned = [line for line in lines if line["event"].startswith("pages stay in quarantine")]
        assert (warned[-1]["for_s"], warned[-1]["waiting_for"]) == (31.0, [str(PREFILL)])
        rig.ack(first)
        assert await given_back.next() == [1]


async def test_leaving_early_aborts_and_holds_the_pages(rig: Rig) -> None:
    given_back = Released()

    async def work() -> None:
        async with rig.receiver.open(5, PREFILL, [1], 0, release=given_back):
            raise ZeroDivisionError("client went away")

    with pytest.raises(ZeroDivisionError):
        await work()
    await rig.told_of_room()
    _, abort = await rig.told_abort()
    (held,) = rig.receiver.quarantine
    assert "left the room on ZeroDivisionError: client went away" in held.reason
    rig.ack(abort)
    assert await given_back.next() == [1]
    rig.assert_empty()


async def test_a_prefill_that_never_answers_is_a_time_out_with_a_cause(clock: Clock) -> None:
    async with rig_of(clock, RoomTimeouts(waiting_s=0.05, drain_margin_s=0)) as rig:
        given_back = Released()
        async with rig.receiver.open(5, PREFILL, [1], 0, release=given_back) as room:
            with pytest.raises(RoomFailed, match=r"no final status from prefill at 10\S+:9001 within 0\.05 s: see"):
                await room.arrived()
        await rig.told_of_room()
        assert rig.receiver.contacts.told == ()  # another process may be there: it must hear of our memory again
        rig.ack((await rig.told_abort())[1])
        assert await given_back.next() == [1]


async def test_the_answers_of_others_do_not_lengthen_the_wait(clock: Clock) -> None:
    loop = asyncio.get_running_loop()
    async with (
        rig_of(clock, RoomTimeouts(waiting_s=0.1)) as rig,
        rig.receiver.open(5, Paired((PREFILL,), responses=50), [1], 0) as room,
    ):
        started = loop.time()
        for n in range(40):
            loop.call_later(0.01 * n, rig.succeed, 5, n)
        with pytest.raises(RoomFailed, match="no final status"):
            await room.arrived()
        assert loop.time() - started < 0.3


# --- prefill ranks that cannot be told


async def test_an_unreachable_prefill_fails_the_room_and_frees_the_pages_at_once(rig: Rig) -> None:
    given_back = Released()
    rig.post.unreachable.add(PREFILL)
    with pytest.raises(RoomFailed, match="it is away"):
        await rig.receiver.open(5, PREFILL, [1], 0, release=given_back).__aenter__()
    assert given_back.now == [[1]]
    rig.post.unreachable.clear()
    await let_others_run()
    assert rig.post.is_empty, "who cannot be reached is not told of the end either"
    rig.assert_empty()


async def test_when_the_second_prefill_is_unreachable_the_first_is_asked_to_stop(rig: Rig) -> None:
    given_back = Released()
    async with rig.receiver.open(4, SECOND, [2], 0):
        rig.succeed(4)
    await rig.told_of_room()
    rig.post.unreachable.add(SECOND)
    with pytest.raises(RoomFailed, match="it is away"):
        await rig.receiver.open(5, Paired((PREFILL, SECOND)), [1], 0, release=given_back).__aenter__()
    await rig.told_of_room()
    to, abort = await rig.told_abort()
    assert to == PREFILL
    assert given_back.now == []
    rig.ack(abort)
    assert await given_back.next() == [1]
    assert rig.post.is_empty


async def test_when_the_first_prefill_is_unreachable_the_second_does_not_wait_for_pages(rig: Rig) -> None:
    given_back = Released()
    rig.post.unreachable.add(PREFILL)
    with pytest.raises(RoomFailed, match="it is away"):
        await rig.receiver.open(5, Paired((PREFILL,), (SECOND,)), [1], 0, release=given_back).__aenter__()
    to, abort = await rig.told_abort()
    assert (to, abort.room) == (SECOND, 5)
    assert "it is away" in (abort.reason or "")
    assert (given_back.now, rig.receiver.quarantine) == ([[1]], ()), "nobody has heard of them"
    rig.ack(abort)


async def test_cancelled_while_telling_it_holds_what_may_have_been_told(clock: Clock) -> None:
    post, given_back, telling = Post(), Released(), asyncio.Event()

    async def slow(to: Endpoint, frames: object) -> None:
        if isinstance(parse_to_prefill(list(frames)), Metadata):  # type: ignore[call-overload]
            telling.set()
            await asyncio.Event().wait()
        await post.send(to, list(frames))  # type: ignore[call-overload]

    ours = memory()
    async with Receiver(SESSION, slow, REPLY, ours.pools, 0, 1, PATIENT, clock, Metrics()) as receiver:
        entering = asyncio.create_task(receiver.open(5, PREFILL, [1], 0, release=given_back).__aenter__())
        await telling.wait()
        entering.cancel()
        with pytest.raises(asyncio.CancelledError):
            await entering
        assert [held.pages.tolist() for held in receiver.quarantine] == [[1]]
        assert given_back.now == []
        assert receiver.rooms == ()


async def test_a_prefill_that_forgot_us_hears_of_our_memory_again(rig: Rig) -> None:
    await enter_and_fail(rig, rig.receiver.open(5, PREFILL, [1], 0), f"{NOT_REGISTERED}: {SESSION}")
    await rig.told_of_room()
    await rig.told_abort()
    async with rig.receiver.open(6, PREFILL, [2], 0):
        await rig.told_of_room()
        rig.succeed(6)


async def test_an_ordinary_failure_does_not_register_again(rig: Rig) -> None:
    """It would lift, at the prefill, the block that the failure has put on our session."""
    await enter_and_fail(rig, rig.receiver.open(5, PREFILL, [1], 0))
    assert rig.receiver.contacts.told == (PREFILL,)


async def test_a_prefill_proven_gone_needs_no_ack(clock: Clock) -> None:
    async def gone(_: Endpoint) -> bool:
        return True

    async with rig_of(clock, is_gone=gone) as rig:
        given_back, other = Released(), Released()
        async with rig.receiver.open(6, PREFILL, [7], 0, release=other) as bystander:
            async with rig.receiver.open(5, PREFILL, [1], 0, release=given_back):
                rig.post.unreachable.add(PREFILL)
            assert await given_back.next() == [1]
            with pytest.raises(RoomFailed, match=r"prefill rank at 10\.0\.0\.1:9001 is gone: its host says"):
                await bystander.arrived()
        assert await other.next() == [7]
        rig.assert_empty()


async def test_a_silent_prefill_is_not_gone(rig: Rig) -> None:
    async with rig.receiver.open(5, PREFILL, [1], 0):
        rig.post.unreachable.add(PREFILL)
    await asyncio.sleep(0)
    assert len(rig.receiver.quarantine) == 1


async def test_closing_tells_prefill_and_never_gives_held_pages_away(clock: Clock) -> None:
    given_back = Released()
    async with rig_of(clock) as rig, rig.receiver.open(5, PREFILL, [1], 0, release=given_back):
        pass
    await rig.told_of_room()
    assert (await rig.told_abort())[1].room == 5
    assert given_back.now == []


# --- aux data over the link


async def test_aux_data_lands_in_the_rooms_own_row(rig: Rig) -> None:
    async with rig.receiver.open(5, PREFILL, [1], 3):
        rig.say(AuxData(5, 1, 3, bytes(range(40))))
        assert rig.memory.aux[1][3].tolist() == list(range(40))
        assert not rig.memory.aux[1][:3].any()
        assert not rig.memory.aux[0].any()
        rig.succeed(5)


@pytest.mark.parametrize(
    ("aux", "said"),
    [
        (AuxData(6, 0, 3, bytes(8)), "waits for none"),
        (AuxData(5, 0, 2, b"x" * 8), r"frame 3 \(row\): 2 is not the row of room 5"),
        (AuxData(5, 0, 2**40, b"x" * 8), r"frame 3 \(row\)"),
        (AuxData(5, 2, 3, b"x" * 8), r"frame 2 \(buffer\): 2, there are 2"),
        (AuxData(5, 0, 3, b"x" * 9), r"frame 5 \(data\): 9 bytes, a row of the buffer has 8"),
        (AuxData(5, 0, 3, b"x" * 7), r"frame 5 \(data\): 7 bytes"),
    ],
)
async def test_aux_data_is_written_nowhere_else(rig: Rig, aux: AuxData, said: str) -> None:
    async with rig.receiver.open(5, PREFILL, [1], 3):
        with pytest.raises(BadFrames, match=said):
            rig.say(aux)
        assert not any(buffer.any() for buffer in rig.memory.aux)
        rig.succeed(5)


async def test_aux_data_after_the_end_is_refused(rig: Rig) -> None:
    async with rig.receiver.open(5, PREFILL, [1], 3):
        rig.succeed(5)
        with pytest.raises(BadFrames, match="waits for none"):
            rig.say(AuxData(5, 0, 3, bytes(8)))


# --- our own mistakes


@pytest.mark.parametrize(
    ("pages", "aux_row", "said"),
    [
        ([N_PAGES], 0, "page 16 is outside the pool, which has 16"),
        ([-1], 0, "page -1 is outside"),
        ([0], 4, "aux row 4 is outside the pool, which has 4"),
        ([1, 2, 1], 0, "a page is named twice"),
    ],
)
async def test_pages_that_are_not_ours_are_never_named(rig: Rig, pages: list[int], aux_row: int, said: str) -> None:
    with pytest.raises(CallerError, match=said):
        rig.receiver.open(5, PREFILL, np.array(pages), aux_row)
    assert rig.post.is_empty


async def test_a_room_needs_a_prefill(rig: Rig) -> None:
    with pytest.raises(CallerError, match="no prefill rank given"):
        rig.receiver.open(5, Paired(()), [1], 0)


async def test_a_room_is_open_once(rig: Rig) -> None:
    async with rig.receiver.open(5, PREFILL, [1], 0):
        with pytest.raises(CallerError, match="room 5 is open already"):
            await rig.receiver.open(5, PREFILL, [2], 0).__aenter__()
        assert rig.receiver.rooms == (5,)
        rig.succeed(5)
    rig.assert_empty()


async def test_a_number_is_not_used_again_before_its_last_use_is_over_at_the_prefill(rig: Rig) -> None:
    """A status of the last use, which that prefill may still send, would end the next one before its pages are here."""
    await enter_and_fail(rig, rig.receiver.open(5, PREFILL, [1], 0))
    await rig.told_of_room()
    _, abort = await rig.told_abort()
    with pytest.raises(CallerError, match=r"room 5 is not over at prefill 10\.0\.0\.1:9001"):
        await rig.receiver.open(5, SECOND, [2], 0).__aenter__()
    assert rig.receiver.rooms == ()
    rig.ack(abort)
    async with rig.receiver.open(5, SECOND, [2], 0) as room:
        rig.succeed(5)
        await room.arrived()


async def test_rooms_are_counted(rig: Rig) -> None:
    async with rig.receiver.open(5, PREFILL, [1], 0):
        assert 'pdctl_rooms_open{side="receiver"} 1.0' in rig.metrics.exposition()[0].decode()
        rig.fail(5)
    shown = rig.metrics.exposition()[0].decode()
    assert 'pdctl_rooms_open{side="receiver"} 0.0' in shown
    assert 'pdctl_rooms_ended_total{phase="failed",side="receiver"} 1.0' in shown
