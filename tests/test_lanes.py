"""Rooms that are written to decode ranks: in turn, bounded, and no rank's or room's trouble is another's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

import pytest

from pdctl.core.allowance import SenderLimits
from pdctl.core.plan import CopyPlan
from pdctl.core.transfer import RoomTimeouts
from pdctl.errors import Cause, ConfigError, RoomFailed, TransferFailed
from pdctl.lanes import Lanes
from pdctl.metrics import Metrics
from pdctl.sender import Sender
from pdctl.sending import SendingRoom
from tests.conftest import Clock
from tests.room_rig import Memory, Post, RigEngine, RigGate, let_others_run, memory
from tests.test_sender import PATIENT, RANK, Decode, Rig

PAGE = 1 << 10
LENS = (PAGE,)
TIGHT = SenderLimits(max_nbytes_per_peer=2 * PAGE, turn_nbytes=PAGE)


@dataclass
class Stepped(RigEngine):
    """A write goes when a test lets it: `waiting` in the order in which they came, as (session, first page of ours)."""

    memory: Memory = field(default_factory=memory)
    waiting: list[tuple[tuple[str, int], asyncio.Event]] = field(default_factory=list)

    async def write(self, session: str, plan: CopyPlan, *, deadline_s: float) -> None:
        page = (int(plan.src[0]) - self.memory.kv_pool.pointers[0]) // PAGE
        here = ((session, page), asyncio.Event())
        self.waiting.append(here)
        try:
            await here[1].wait()
        finally:
            self.waiting.remove(here)
        await super().write(session, plan, deadline_s=deadline_s)

    @property
    def now(self) -> list[int]:
        return [page for (_, page), _ in self.waiting]

    async def step(self, session: str | None = None) -> tuple[str, int]:
        """Let the first write (to `session`) land."""
        what, go = next(each for each in self.waiting if session in (None, each[0][0]))
        go.set()
        await let_others_run()
        return what


@asynccontextmanager
async def rig_of(
    clock: Clock, limits: SenderLimits = TIGHT, timeouts: RoomTimeouts = PATIENT
) -> AsyncIterator[tuple[Rig, Stepped]]:
    ours, gate, post, metrics = memory(LENS, seed=1), RigGate(), Post(), Metrics()
    engine = Stepped(memory=ours)
    async with Sender(engine, post.send, ours.pools, RANK, gate, timeouts, clock, metrics, limits) as sender:
        yield Rig(sender, engine, gate, post, ours, metrics), engine


class Rooms(AsyncExitStack):
    """Rooms that send their pages, each as a task."""

    def __init__(self, rig: Rig) -> None:
        super().__init__()
        self.rig = rig

    async def send(self, decode: Decode, room: int, pages: list[int]) -> asyncio.Task[None]:
        opened = await self.enter_async_context(self.rig.sender.open(room))
        decode.name(room, pages)
        await opened.peers_ready()
        task = asyncio.create_task(sent(opened, pages))
        await let_others_run()
        return task


async def sent(room: SendingRoom, pages: list[int]) -> None:
    await room.send(pages)


async def within(awaitable: Awaitable[None]) -> None:
    await asyncio.wait_for(awaitable, 60)


def decode_of(rig: Rig, n: int = 7) -> Decode:
    decode = rig.decode(n, memory=memory(LENS))
    decode.register()
    return decode


async def test_a_large_room_does_not_starve_a_small_one_of_the_same_decode_rank(clock: Clock) -> None:
    async with rig_of(clock) as (rig, engine), Rooms(rig) as rooms:
        decode = decode_of(rig)
        large = await rooms.send(decode, 1, [2, 4, 6, 8, 10, 12])
        small = await rooms.send(decode, 2, [15])
        landed = []
        while not small.done():
            landed.append((await engine.step())[1])
        assert landed == [2, 4, 15], "behind what was under way, before the rest of the large one"
        while not large.done():
            await engine.step()
        assert (decode.memory.kv[0][[2, 12, 15]] == rig.memory.kv[0][[2, 12, 15]]).all()
    assert len(rig.sender.lanes) == 0


async def test_no_more_than_the_limit_is_given_to_the_engine_for_one_decode_rank(clock: Clock) -> None:
    async with rig_of(clock) as (rig, engine), Rooms(rig) as rooms:
        decode = decode_of(rig)
        tasks = [await rooms.send(decode, room, [3 * room]) for room in range(5)]
        assert engine.now == [0, 3]
        await engine.step()
        assert engine.now == [3, 6]
        while engine.waiting:
            await engine.step()
        await within(asyncio.gather(*tasks))  # type: ignore[arg-type]


async def test_a_decode_rank_that_does_not_move_holds_up_no_other(clock: Clock) -> None:
    async with rig_of(clock) as (rig, engine), Rooms(rig) as rooms:
        stopped, well = decode_of(rig, 7), decode_of(rig, 8)
        stuck = [await rooms.send(stopped, room, [room]) for room in range(6)]
        for room in range(10, 14):
            task = await rooms.send(well, room, [room])
            await engine.step(well.session)
            assert task.done()
        assert not any(task.done() for task in stuck)
        for task in stuck:
            task.cancel()
        await asyncio.wait(stuck)
    assert len(rig.sender.lanes) == 0


async def test_what_waits_for_a_decode_rank_that_failed_fails_without_a_byte(clock: Clock) -> None:
    async with rig_of(clock) as (rig, engine), Rooms(rig) as rooms:
        decode = decode_of(rig)
        first = await rooms.send(decode, 1, [2, 4, 6])
        second = await rooms.send(decode, 2, [15])
        engine.failures[decode.session] = TransferFailed(Cause.TIMED_OUT, decode.session, "it hangs")
        rig.gate.blocked[decode.session] = "it hangs"
        await engine.step()
        for task, why in ((first, "it hangs"), (second, "is blocked: it hangs")):
            with pytest.raises(RoomFailed, match=why):
                await within(task)
        assert engine.written == []
    assert len(rig.sender.lanes) == 0


async def test_a_room_that_fails_leaves_its_place_to_its_neighbours(clock: Clock) -> None:
    async with rig_of(clock) as (rig, engine), Rooms(rig) as rooms:
        decode = decode_of(rig)
        large = await rooms.send(decode, 1, [2, 4, 6, 8, 10, 12])
        small = await rooms.send(decode, 2, [15])
        decode.abort(1)
        await let_others_run()
        assert engine.now == [15]
        await engine.step()
        await within(small)
        with pytest.raises(RoomFailed, match="given the room up"):
            await within(large)


async def test_a_turn_that_does_not_come_fails_the_room_and_names_the_limit(clock: Clock) -> None:
    timeouts = RoomTimeouts(bootstrap_s=30, waiting_s=0.05)
    async with rig_of(clock, timeouts=timeouts) as (rig, engine), Rooms(rig) as rooms:
        decode = decode_of(rig)
        large = await rooms.send(decode, 1, [2, 4])
        small = await rooms.send(decode, 2, [15])
        with pytest.raises(
            RoomFailed, match=r"no turn to write to .* within 0.05 s: 2048 bytes .* max_nbytes_per_peer is 2048"
        ):
            await within(small)
        while engine.waiting:
            await engine.step()
        await within(large)


async def test_a_decode_rank_may_have_so_many_rooms_and_others_theirs(clock: Clock) -> None:
    limits = SenderLimits(max_rooms_per_peer=2)
    async with rig_of(clock, limits) as (rig, engine):
        greedy, modest = decode_of(rig, 7), decode_of(rig, 8)
        async with (
            rig.sender.open(1),
            rig.sender.open(2) as second,
            rig.sender.open(3) as third,
            rig.sender.open(4) as other,
        ):
            for room in (1, 2, 2, 3):
                greedy.name(room, [1])
            modest.name(4, [1])
            with pytest.raises(
                RoomFailed, match=r"15999 has pages in 2 open rooms here, as many as max_rooms_per_peer"
            ):
                await third.peers_ready()
            await within(second.peers_ready())
            await within(other.peers_ready())
        async with rig.sender.open(5) as again:
            greedy.name(5, [1])
            await within(again.peers_ready())
        assert engine.waiting == []


async def test_a_lane_is_forgotten_when_nobody_uses_it() -> None:
    lanes = Lanes(10)
    async with lanes.turn("a", 1, 5, 1.0), lanes.turn("a", 2, 5, 1.0), lanes.turn("b", 2, 5, 1.0):
        assert len(lanes) == 2
    assert len(lanes) == 0


@pytest.mark.parametrize("name", ["max_peers", "max_rooms_per_peer", "max_nbytes_per_peer", "turn_nbytes"])
def test_limits_are_checked_when_they_are_given(name: str) -> None:
    with pytest.raises(ConfigError, match=f"sender {name} is 0"):
        SenderLimits(**{name: 0})  # type: ignore[arg-type]
