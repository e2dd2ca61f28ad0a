"""Rooms that are ready together take turns of the loop, and everything else comes in between."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise

import pytest

from pdctl.core.wire import AbortAck
from pdctl.errors import RoomFailed
from pdctl.pace import Pace
from pdctl.sending import SendingRoom
from tests.conftest import Clock
from tests.test_sender import RANK, Decode, Rig, rig_of


async def test_between_two_steps_whatever_else_is_ready_has_its_turn() -> None:
    pace, order = Pace(), list[str]()

    async def room(name: str) -> None:
        await pace.step()
        order.append(name)

    def others() -> None:
        order.append(".")
        if len(order) < 20:
            asyncio.get_running_loop().call_soon(others)

    asyncio.get_running_loop().call_soon(others)
    await asyncio.gather(*(room(name) for name in "abcd"))
    said = "".join(order)
    assert [each for each in said if each != "."] == list("abcd")
    assert all(not (one.isalpha() and other.isalpha()) for one, other in pairwise(said)), said


async def test_who_is_alone_does_not_wait() -> None:
    pace = Pace()
    step = asyncio.ensure_future(pace.step())
    await asyncio.sleep(0)
    assert step.done()
    await asyncio.sleep(0)
    await pace.step()


async def test_who_gives_up_in_the_line_holds_up_nobody() -> None:
    pace = Pace()
    steps = [asyncio.ensure_future(pace.step()) for _ in range(4)]
    await asyncio.sleep(0)
    steps[1].cancel()
    steps[2].cancel()
    async with asyncio.timeout(60):
        await steps[3]


@asynccontextmanager
async def two_in_the_line(clock: Clock) -> AsyncIterator[tuple[Rig, Decode, SendingRoom, list[asyncio.Task[None]]]]:
    """Rooms 5 and 6 send a page each at once: the second room, and both sends."""
    async with rig_of(clock) as rig:
        decode = rig.decode()
        decode.register()
        async with rig.sender.open(5) as first, rig.sender.open(6) as second:
            for room, page in ((5, 1), (6, 2)):
                decode.name(room, [page])
            await asyncio.gather(first.peers_ready(), second.peers_ready())
            sends = [asyncio.create_task(room.send([0])) for room in (first, second)]
            await asyncio.sleep(0)
            yield rig, decode, second, sends


async def test_a_room_that_is_given_up_in_the_line_is_not_written_any_more(clock: Clock) -> None:
    async with two_in_the_line(clock) as (rig, decode, _, sends):
        decode.abort(6, generation=4)
        assert await rig.told() == (decode.reply, AbortAck(6, RANK, 4))
        async with asyncio.timeout(60):
            await sends[0]
            with pytest.raises(RoomFailed, match="has given the room up"):
                await sends[1]
    assert decode.memory.kv[0][1].any()
    assert not decode.memory.kv[0][2].any(), "its pages may be another room's by now"


async def test_a_send_that_is_cancelled_in_the_line_fails_its_room(clock: Clock) -> None:
    async with two_in_the_line(clock) as (_, _, second, sends):
        sends[1].cancel()
        with pytest.raises(asyncio.CancelledError):
            await sends[1]
        with pytest.raises(RoomFailed, match="cancelled the send"):
            await second.finish(0)
        await sends[0]
