"""Rooms between a prefill and a decode of ours in one process, whose bytes are checked: found, named, held back."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from pdctl.core.address import Endpoint
from pdctl.core.comparing import Checksum
from pdctl.core.layout import Pool, RankPools
from pdctl.core.pairing import Paired
from pdctl.core.plan import CopyPlan
from pdctl.core.sums import KV, Spans, Sums
from pdctl.core.transfer import Phase, RoomTimeouts
from pdctl.core.wire import SUMS, USE, Matched, RegisterBuffers, Status, parse_to_prefill
from pdctl.errors import BadFrames, CallerError, RoomFailed, Unreachable
from pdctl.metrics import Metrics
from pdctl.receiver import Receiver
from pdctl.sender import Sender
from tests.conftest import Clock
from tests.room_rig import Memory, Released, RigEngine, RigGate, memory

PREFILL, DECODE = Endpoint("10.0.0.1", 9001), Endpoint("10.0.0.7", 7001)
CHECKED = RoomTimeouts(bootstrap_s=30, waiting_s=30, drain_margin_s=0.01, checksum=Checksum.OFFERED)
PLAIN = RoomTimeouts(bootstrap_s=30, waiting_s=30, drain_margin_s=0.01)
REQUIRED = replace(CHECKED, checksum=Checksum.REQUIRED)


ADVICE = ". Look for who else writes that memory, and at the network and the memory of both hosts"


def nothing() -> None: ...


@dataclass
class Careless(RigEngine):
    """`damage` is done to the memory when a write has landed."""

    damage: Callable[[], None] = nothing

    async def write(self, session: str, plan: CopyPlan, *, deadline_s: float) -> None:
        await super().write(session, plan, deadline_s=deadline_s)
        self.damage()


@dataclass
class Rig:
    engine: Careless
    sender: Sender
    receiver: Receiver
    ours: Memory
    theirs: Memory
    metrics: Metrics
    to_prefill: list[list[bytes]] = field(default_factory=list)
    to_decode: list[list[bytes]] = field(default_factory=list)

    on_the_way: Callable[[Sequence[bytes]], None] = lambda frames: None
    sent_why: str = ""

    async def move(self, room: int, chunks: Sequence[Sequence[int]], pages: Sequence[int], release: Released) -> None:
        """Raises RoomFailed as the decode says it; what the prefill says is in `sent_why`, empty after success."""
        async with asyncio.timeout(60):
            sending = asyncio.create_task(self.send(room, chunks))
            try:
                await self.receive(room, pages, release)
            finally:
                await sending

    async def receive(self, room: int, pages: Sequence[int], release: Released) -> None:
        async with self.receiver.open(room, PREFILL, pages, 3, release=release) as arriving:
            await arriving.arrived()

    async def send(self, room: int, chunks: Sequence[Sequence[int]]) -> None:
        self.sent_why = "not over"
        try:
            async with self.sender.open(room) as r:
                await r.peers_ready()
                for chunk in chunks:
                    await r.send(chunk)
                await r.finish(2)
        except RoomFailed as error:
            self.sent_why = str(error)
        else:
            self.sent_why = ""

    def count(self, result: str) -> float:
        found = self.metrics.exposition()[0].decode()
        line = next(line for line in found.splitlines() if f'checksums_total{{result="{result}"}}' in line)
        return float(line.rpartition(" ")[2])


@asynccontextmanager
async def rig_of(
    clock: Clock,
    prefill: RoomTimeouts = CHECKED,
    decode: RoomTimeouts = CHECKED,
    lens: Sequence[int] = (64, 64, 32),
    pools: Callable[[Memory], RankPools] = lambda memory: memory.pools,
) -> AsyncIterator[Rig]:
    ours, theirs, engine, metrics = memory(lens, seed=1), memory(lens), Careless(), Metrics()

    async def to_prefill(_: Endpoint, frames: Sequence[bytes]) -> None:
        rig.on_the_way(frames)
        rig.to_prefill.append(list(frames))
        rig.sender.handle(frames)

    async def to_decode(_: Endpoint, frames: Sequence[bytes]) -> None:
        rig.to_decode.append(list(frames))
        rig.receiver.handle(frames)

    async with (
        Sender(engine, to_decode, pools(ours), 0, RigGate(), prefill, clock, Metrics()) as sender,
        Receiver("10.0.0.7:15999", to_prefill, DECODE, pools(theirs), 0, 1, decode, clock, metrics) as receiver,
    ):
        rig = Rig(engine, sender, receiver, ours, theirs, metrics)
        yield rig


@pytest.mark.parametrize("lens", [(64, 64, 32), (40_000,) * 4], ids=["on the loop", "in the thread"])
async def test_a_room_that_arrived_as_it_was_sent_succeeds(clock: Clock, lens: tuple[int, ...]) -> None:
    async with rig_of(clock, lens=lens) as rig:
        given_back = Released()
        await rig.move(5, [[1, 0], [7], [8, 9]], [9, 2, 3, 11, 4], given_back)
        assert (rig.theirs.kv[0][[9, 2, 3, 11, 4]] == rig.ours.kv[0][[1, 0, 7, 8, 9]]).all()
        assert given_back.now == [[9, 2, 3, 11, 4]]
        assert (rig.count("matched"), rig.count("differed"), rig.count("absent")) == (1, 0, 0)
        assert rig.receiver.rooms == rig.sender.rooms == ()


@pytest.mark.parametrize("lens", [(64, 64, 32), (40_000,) * 3], ids=["on the loop", "in the thread"])
async def test_pages_that_differ_fail_the_room_by_name_and_are_held_back(clock: Clock, lens: tuple[int, ...]) -> None:
    async with rig_of(clock, lens=lens) as rig:
        given_back = Released()

        def damage() -> None:
            rig.theirs.kv[1][2, 17] = rig.ours.kv[1][0, 17] ^ 1
            rig.theirs.kv[2][11, 31] = rig.ours.kv[2][8, 31] ^ 0x80

        rig.engine.damage = damage
        why = "pages 2, 11 (0, 8 at the prefill): not what prefill rank 0 sent, by checksum"
        with pytest.raises(RoomFailed, match=re.escape(f"room 5 failed: {why}")):
            await rig.move(5, [[1, 0, 7, 8, 9]], [9, 2, 3, 11, 4], given_back)
        assert rig.sent_why == f"room 5 failed: decode rank {DECODE} has given the room up: {why}{ADVICE}"
        assert given_back.now == []
        assert [held.room for held in rig.receiver.quarantine] == [5]
        assert await given_back.next() == [9, 2, 3, 11, 4], "when the prefill has confirmed that it writes no more"
        assert (rig.count("matched"), rig.count("differed")) == (0, 1)
        assert rig.receiver.quarantine == ()


async def test_a_damaged_aux_row_fails_the_room(clock: Clock) -> None:
    async with rig_of(clock) as rig:
        rig.engine.damage = lambda: rig.theirs.aux[1].__setitem__((3, 5), rig.theirs.aux[1][3, 5] ^ 4)
        with pytest.raises(RoomFailed, match=r"room 5 failed: aux row 3 \(2 at the prefill\): not what"):
            await rig.move(5, [[1]], [9], Released())


def with_state(memory: Memory) -> RankPools:
    kv = memory.kv_pool
    pages, state = (Pool(kv.pointers[part], kv.item_lens[part], kv.n_items) for part in (slice(2), slice(2, 3)))
    return RankPools(pages, memory.aux_pool, states=(state,))


async def test_a_damaged_row_of_state_fails_the_room(clock: Clock) -> None:
    async with rig_of(clock, pools=with_state) as rig:
        rig.engine.damage = lambda: rig.theirs.kv[2].__setitem__((6, 1), rig.ours.kv[2][3, 1] ^ 1)
        async with asyncio.timeout(60), rig.receiver.open(5, PREFILL, [9], 3, state_rows=[[4, 6]]) as arriving:
            with pytest.raises(RoomFailed, match="row of state 0 6"):
                await one_page(rig.sender, 5, state_rows=[[2, 3]])
            with pytest.raises(RoomFailed, match=r"failed: row of state 0 6 \(3 at the prefill\): not what"):
                await arriving.arrived()


async def one_page(sender: Sender, room: int, state_rows: Sequence[Sequence[int]] = ()) -> None:
    async with sender.open(room) as r:
        await r.peers_ready()
        await r.finish(2, state_rows, [1])


async def test_layers_that_are_sent_in_groups_are_summed_in_groups(clock: Clock) -> None:
    async with rig_of(clock, lens=(64,) * 4) as rig:
        async with asyncio.timeout(60), rig.receiver.open(5, PREFILL, [9, 2, 3], 3) as arriving:
            async with rig.sender.open(5) as r:
                await r.peers_ready()
                await r.send([1, 0], layers=range(1, 2))
                await r.send([1, 0], layers=range(1))
                await r.send([7])
                await r.finish(2)
            await arriving.arrived()
        assert rig.count("matched") == 1


@pytest.mark.parametrize(
    ("prefill", "decode"), [(PLAIN, PLAIN), (CHECKED, PLAIN), (PLAIN, CHECKED)], ids=["neither", "prefill", "decode"]
)
async def test_where_one_side_does_not_check_the_room_goes_as_without(
    clock: Clock, prefill: RoomTimeouts, decode: RoomTimeouts
) -> None:
    async with rig_of(clock, prefill, decode) as rig:
        await rig.move(5, [[1]], [9], Released())
        assert len(rig.to_prefill[0]) == (21 if decode.checksum.is_on else 20)
        (status,) = rig.to_decode
        assert status[:5] == [b"5", b"4", b"0", b"", USE], "no sums"
        assert rig.count("matched") == 0
        assert rig.count("absent") == float(decode.checksum.is_on)


async def test_a_success_that_is_said_twice_does_not_end_the_check(clock: Clock) -> None:
    """The second comes without sums while the first is looked at in the thread."""
    async with rig_of(clock, lens=(40_000,) * 4) as rig:
        rig.engine.damage = lambda: rig.theirs.kv[1].__setitem__((9, 5), 255 - rig.ours.kv[1][1, 5])
        handle = rig.receiver.handle

        def twice(frames: Sequence[bytes]) -> None:
            handle(frames)
            handle(frames[:3])

        rig.receiver.handle = twice  # type: ignore[method-assign]
        with pytest.raises(RoomFailed, match=r"page 9 \(1 at the prefill\): not what"):
            await rig.move(5, [[1]], [9], Released())


def sums_of(pool: int, start: int, entry: int, n: int) -> Sums:
    spans = Spans(np.array([entry]), np.array([0]), np.array([8]))
    return Sums(pool, spans, np.arange(start, start + n), np.arange(n), np.zeros(n, np.uint32))


@pytest.mark.parametrize(
    ("sums", "said"),
    [
        (sums_of(9, 0, 0, 1), "a pool that is not here"),
        (sums_of(KV, 0, 3, 1), r"entries \[3\]"),
        (sums_of(KV, 1, 0, 2), "page 3, 2 were named"),
        (sums_of(KV, 1, 0, 1), r"page 4 \(0 at the prefill\): not what"),
    ],
    ids=["pool", "entry", "page", "other bytes"],
)
async def test_sums_that_cannot_be_compared_fail_the_room_and_say_why(clock: Clock, sums: Sums, said: str) -> None:
    async with rig_of(clock) as rig, rig.receiver.open(5, PREFILL, [9, 4], 3) as room:
        rig.receiver.handle(Status(5, Phase.SUCCESS, 0, sums=(sums,)).to_frames())
        with pytest.raises(RoomFailed, match=said):
            await asyncio.wait_for(room.arrived(), 60)


async def test_sums_that_cannot_be_read_are_refused_by_frame(clock: Clock) -> None:
    async with rig_of(clock) as rig:
        with pytest.raises(BadFrames, match=r"status frame 5 \(sums\): the sums break off"):
            rig.receiver.handle([b"5", b"4", b"0", b"", SUMS, b"\1\0\0\0"])


async def test_a_room_left_while_it_is_checked_leaves_nothing(clock: Clock) -> None:
    async with rig_of(clock, lens=(1 << 20,) * 4) as rig:
        given_back, checking = Released(), asyncio.Event()
        of = rig.receiver.checksums.of

        async def slow(pool: Pool, items: np.ndarray, spans: Spans) -> np.ndarray:
            checking.set()
            await asyncio.Event().wait()
            return await of(pool, items, spans)

        rig.receiver.checksums.of = slow  # type: ignore[method-assign]
        moving = asyncio.create_task(rig.move(5, [[1]], [9], given_back))
        await asyncio.wait_for(checking.wait(), 60)
        moving.cancel()
        await asyncio.wait([moving])
        assert await given_back.next() == [9]
        assert (rig.receiver.rooms, rig.receiver.quarantine) == ((), ())
        assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("check of")]


def test_a_later_stock_release_may_have_frames_of_its_own_before_ours() -> None:
    said = RegisterBuffers(DECODE, "10.0.0.7:15999", (), (), 0, 1, 64, wants_sums=True)
    frames = said.to_frames()
    assert parse_to_prefill([*frames[:-1], b"something new", frames[-1]]) == said
    assert parse_to_prefill(frames[:-1]) != said


# --- required


async def test_a_room_that_has_to_be_checked_succeeds_on_both_sides_when_it_was(clock: Clock) -> None:
    async with rig_of(clock, REQUIRED, REQUIRED) as rig:
        for room in (5, 6):
            await rig.move(room, [[1, 0], [7]], [9, 2, 3], Released())
            assert rig.sent_why == ""
        questions = [frames for frames in rig.to_prefill if frames[0] == b"ABORT"]
        assert len(questions) == 1, "a prefill rank is asked once"
        assert rig.to_prefill.index(questions[0]) == 0, "before it is told of any memory"
        assert rig.sender.early == ()
        assert rig.count("matched") == 2


async def test_a_prefill_that_has_to_check_fails_the_room_of_a_decode_that_asks_for_no_sums(clock: Clock) -> None:
    async with rig_of(clock, REQUIRED, PLAIN) as rig:
        with pytest.raises(
            RoomFailed, match=r"10\.0\.0\.7:15999 asks for no checksums, and room\.checksum is required here"
        ) as failed:
            await rig.move(5, [[1]], [9], Released())
        assert "asks for no checksums" in rig.sent_why
        assert failed.value.is_permanent
        assert rig.engine.written == [], "not a byte has moved"


async def test_a_decode_that_has_to_check_tells_a_prefill_that_gives_no_sums_of_no_page(clock: Clock) -> None:
    async with rig_of(clock, PLAIN, REQUIRED) as rig:
        given_back = Released()
        with pytest.raises(
            RoomFailed, match=r"10\.0\.0\.1:9001 gives no checksums, and room\.checksum is required here"
        ) as failed:
            await rig.receive(5, [9], given_back)
        assert failed.value.is_permanent
        assert len(rig.to_prefill) == 1
        assert rig.sender.sessions == (), "it knows nothing of our memory"
        assert given_back.now == [[9]]
        assert (rig.receiver.rooms, rig.receiver.quarantine) == ((), ())


async def test_a_decode_that_has_to_check_says_who_does_not_answer(clock: Clock) -> None:
    async with rig_of(clock, REQUIRED, replace(REQUIRED, transfer_s=0.05)) as rig:
        rig.sender.handle = lambda frames: None  # type: ignore[method-assign]
        with pytest.raises(RoomFailed, match=r"has not said within 0\.05 s whether it gives checksums"):
            await asyncio.wait_for(rig.receive(5, [9], Released()), 60)


async def test_pages_that_come_without_sums_are_not_used_where_they_are_required(clock: Clock) -> None:
    async with rig_of(clock, REQUIRED, REQUIRED) as rig, rig.receiver.open(5, PREFILL, [9, 4], 3) as room:
        rig.receiver.handle(Status(5, Phase.SUCCESS, 0).to_frames())
        with pytest.raises(RoomFailed, match=r"rank 0 gives no checksums, and room\.checksum is required") as failed:
            await asyncio.wait_for(room.arrived(), 60)
        assert failed.value.is_permanent
        assert rig.count("absent") == 1


@pytest.mark.parametrize("timeouts", [CHECKED, REQUIRED], ids=["offered", "required"])
async def test_pages_that_no_rank_speaks_of_are_not_used_where_each_gives_sums(
    clock: Clock, timeouts: RoomTimeouts
) -> None:
    async with rig_of(clock, timeouts, timeouts) as rig, rig.receiver.open(5, PREFILL, [9, 4], 3) as room:
        rig.receiver.handle(Status(5, Phase.SUCCESS, 0, sums=()).to_frames())
        with pytest.raises(RoomFailed, match=r"no prefill rank gives a checksum of pages \[9, 4\]"):
            await asyncio.wait_for(room.arrived(), 60)


async def test_a_prefill_that_hears_no_word_of_the_comparison_fails_its_room_in_time(clock: Clock) -> None:
    async with rig_of(clock, replace(CHECKED, transfer_s=0.1)) as rig:
        rig.receiver.contacts.matched = lambda prefill, match, rank: None  # type: ignore[method-assign]
        await rig.move(5, [[1]], [9], Released())
        assert f"no word from decode session {rig.receiver.session} within 0.1 s whether what arrived" in rig.sent_why
        assert rig.sender.rooms == ()


async def test_a_word_of_a_match_that_no_connection_takes_is_said_when_one_does(clock: Clock) -> None:
    async with rig_of(clock) as rig:
        cut = [b"PDCTL_MATCHED"]

        def lose(frames: Sequence[bytes]) -> None:
            if frames[0] in cut:
                cut.clear()
                raise Unreachable("the way is cut for a moment")

        rig.on_the_way = lose
        await rig.move(5, [[1]], [9], Released())
        assert rig.sent_why == ""
        assert not cut


async def test_a_word_of_a_match_before_there_were_sums_is_none(clock: Clock) -> None:
    async with rig_of(clock, replace(CHECKED, transfer_s=0.1)) as rig:
        rig.receiver.contacts.matched = lambda prefill, match, rank: None  # type: ignore[method-assign]
        async with rig.receiver.open(5, PREFILL, [9], 3), rig.sender.open(5) as r:
            await r.peers_ready()
            rig.sender.handle(Matched(5, rig.receiver.session).to_frames())
            await r.send([1])
            with pytest.raises(RoomFailed, match="no word from decode session"):
                await r.finish(2)


async def test_several_prefill_ranks_have_to_be_told_apart_where_sums_are_compared(clock: Clock) -> None:
    async with rig_of(clock) as rig:
        with pytest.raises(CallerError, match=r"several prefill ranks are given without their ids"):
            rig.receiver.open(5, Paired((PREFILL, DECODE), responses=2), [9], 3)
