"""
What becomes of rooms, whatever happens to whom and when: real processes, real engines, a real registry (rooms.py).

After every scenario the same judge looks through every table of every process that lives (`everything_is_empty`), and
through all memory that was given back.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
import zmq

from pdctl.core.address import Endpoint
from pdctl.core.transfer import RECEIVER, SENDER, Phase, Table
from pdctl.core.wire import Abort, AbortAck, AuxData, Metadata, Status
from tests.engine.processes import Child
from tests.faults.room_rank import ROW_NBYTES, Moment
from tests.faults.rooms import (
    DIED,
    HELD,
    MATRIX,
    SEEN_BY_RECEIVER,
    SEEN_BY_SENDER,
    Cast,
    Fault,
    Ways,
    ask,
    assert_clean,
    end,
    until,
)
from tests.service import service

ISSUE = {"peer killed", "peer stopped", "link cut", "aborted here", "aborted there"}


@pytest.fixture(scope="module")
def cast(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cast]:
    with Cast.in_wait(tmp_path_factory.mktemp("cast")) as cast:
        yield cast


# --- the matrix


@pytest.mark.parametrize("fault", Fault)
async def test_rooms_at_every_moment_end_by_their_first_cause_and_leave_nothing(cast: Cast, fault: Fault) -> None:
    await cast.play(fault)


def unheld(table: Table, held: set[Phase | None]) -> set[Phase]:
    """Phases in which no room is held when a fault comes. FAILED is where faults lead."""
    return set(table) - held - {Phase.FAILED}


def test_every_phase_of_either_end_meets_every_fault() -> None:
    assert set(HELD) == set(Moment)
    assert unheld(SENDER, {held.sender for held in HELD.values()}) == set()
    assert unheld(RECEIVER, {held.receiver for held in HELD.values()}) == set()
    assert set(MATRIX) == set(Fault)
    assert all(set(ends) == set(Moment) for ends in MATRIX.values())
    for seen, side in ((SEEN_BY_SENDER, "sender"), (SEEN_BY_RECEIVER, "receiver")):
        assert set(seen) == ISSUE
        assert all(getattr(MATRIX[fault][moment], side) is not DIED for fault in seen.values() for moment in Moment)


def test_a_phase_without_a_scenario_is_found() -> None:
    without = {held.sender for moment, held in HELD.items() if moment is not Moment.NAMED}
    assert unheld(SENDER, without) == {Phase.WAITING_FOR_INPUT}


# --- beside the matrix: one pair of processes, rooms that do not disturb each other


class Rooms:
    """The k-th decode rank's rooms, two at most."""

    def __init__(self, prefill: Child, decode: Child, base: int, bound_s: float) -> None:
        self.prefill, self.decode, self._base, self.bound_s = prefill, decode, base, bound_s
        self.sessions = decode.hello["sessions"]

    def number(self, at: int, number: int = 0) -> int:
        return self._base + 10 * at + number

    async def hold(self, at: int, moment: Moment) -> int:
        """A room that stands there; its number."""
        room = self.number(at)
        if moment is Moment.TOLD:
            await ask(self.prefill, "keep_statuses", rooms=[room])
        await ask(self.prefill, "send", room=room, moment=moment, at=at)
        await ask(self.decode, "receive", at=at, room=room, moment=moment)
        held = HELD[moment]
        assert held.sender
        found = await ask(self.prefill, "at", key=str(room), phase=held.sender.name, point=moment)
        assert (found["phase"], found["at"]) == (held.sender.name, moment), found
        return room

    async def go(self) -> None:
        await ask(self.prefill, "go")
        await ask(self.decode, "go")
        await ask(self.prefill, "let_out")
        await ask(self.decode, "let_out")

    async def ends(self, room: int, at: int) -> tuple[str, str]:
        """The cause at either end, empty for SUCCESS with every byte in its place."""
        told = []
        for child, key in ((self.prefill, str(room)), (self.decode, f"{at}/{room}")):
            found = await end(child, key, self.bound_s)
            assert (found["over"], found["defect"], found["wrong"]) == (True, "", []), found
            assert found["phase"] in (Phase.SUCCESS.name, Phase.FAILED.name), found
            assert (found["phase"] == Phase.SUCCESS.name) == (not found["why"])
            told.append(found["why"])
        return told[0], told[1]

    async def defect(self, child: Child, key: str) -> str:
        return str((await end(child, key, self.bound_s))["defect"])

    async def is_well(self, at: int) -> None:
        """The rank takes another room, and its session was never put out."""
        assert await ask(self.prefill, "served", session=self.sessions[at], within_s=0.0) == {"blocked": None}
        room = self.number(at, 1)
        await ask(self.prefill, "send", room=room, moment=Moment.TELLING, at=at, number=1)
        await ask(self.decode, "receive", at=at, room=room, moment=Moment.TELLING, number=1)
        assert await self.ends(room, at) == ("", "")


@asynccontextmanager
async def rooms_of(cast: Cast) -> AsyncIterator[Rooms]:
    async with cast.pair() as (prefill, decode):
        await ask(decode, "wire", ways=Ways(prefill, decode).of_ranks)
        await ask(prefill, "keep_statuses", rooms=[])
        await ask(prefill, "let_out")
        yield Rooms(prefill, decode, cast.number() * 1000, cast.bounds.end_s)
        await assert_clean(prefill, decode, cast.bounds, "the rooms")
        await ask(prefill, "restore")


def say(to: str, *messages: Any) -> None:
    """Frames of nobody in particular: the control link has no credentials."""
    with zmq.Context() as context, context.socket(zmq.PUSH) as push:
        push.set(zmq.LINGER, 2000)
        push.connect(Endpoint.parse(to).tcp)
        for message in messages:
            push.send_multipart(message.to_frames())


async def test_a_number_that_is_used_twice_costs_only_the_second_use(cast: Cast) -> None:
    async with rooms_of(cast) as it:
        room = await it.hold(0, Moment.BETWEEN)
        await ask(it.prefill, "send", room=room, moment=Moment.TELLING, at=0, key="again")
        await ask(it.decode, "receive", at=0, room=room, moment=Moment.TELLING, number=1, key="again")
        for child in (it.prefill, it.decode):
            assert f"room {room} is open already" in await it.defect(child, "again")
        # another decode rank, which does not know better
        await ask(it.decode, "receive", at=1, room=room, moment=Moment.NAMED)
        await ask(it.decode, "at", key=f"1/{room}", phase=Phase.TRANSFERRING.name)
        await ask(it.decode, "abort", keys=[f"1/{room}"])
        late = await end(it.decode, f"1/{room}", it.bound_s)
        assert (late["phase"], late["why"][:28]) == (Phase.FAILED.name, "the decode engine left the r")
        await it.go()
        assert await it.ends(room, 0) == ("", "")


async def test_a_number_is_refused_until_its_last_use_is_over_and_then_means_the_new_one(cast: Cast) -> None:
    async with rooms_of(cast) as it:
        room = await it.hold(0, Moment.TOLD)
        it.prefill.stop()
        await ask(it.decode, "abort", keys=[f"0/{room}"])
        assert (await end(it.decode, f"0/{room}", it.bound_s))["phase"] == Phase.FAILED.name
        await ask(it.decode, "receive", at=0, room=room, moment=Moment.TELLING, number=1, prefill=None, key="soon")
        assert f"room {room} is not over at prefill" in await it.defect(it.decode, "soon")
        it.prefill.resume()
        await it.go()
        assert (await end(it.prefill, str(room), it.bound_s))["phase"] == Phase.SUCCESS.name
        assert (await until(it.decode, "left", lambda found: not found["left"], it.bound_s))["left"] == []
        await ask(it.prefill, "send", room=room, moment=Moment.BETWEEN, at=0, number=1)
        await ask(it.decode, "receive", at=0, room=room, moment=Moment.TELLING, number=1)
        await ask(it.prefill, "at", key=str(room), phase=Phase.TRANSFERRING.name, point=Moment.BETWEEN)
        found = await ask(it.decode, "at", key=f"0/{room}", phase=Phase.TRANSFERRING.name)
        assert found["phase"] == Phase.TRANSFERRING.name, "the status of the last use speaks of the last use"
        await it.go()
        assert await it.ends(room, 0) == ("", "")


async def test_frames_that_come_late_or_from_elsewhere_move_nothing_and_free_nothing(cast: Cast) -> None:
    async with rooms_of(cast) as it:
        room, given_up = await it.hold(0, Moment.BETWEEN), await it.hold(1, Moment.BETWEEN)
        it.prefill.stop()
        await ask(it.decode, "abort", keys=[f"1/{given_up}"])
        for at, number in ((0, room), (1, given_up)):
            older = [AbortAck(number, 0, generation) for generation in (0, 7_000)]
            others = [
                Status(number, Phase.SUCCESS, 1),
                Status(number, Phase.FAILED, 1, "x"),
                Status(7, Phase.SUCCESS, 0),
            ]
            row = AuxData(number, 0, 5, b"x" * ROW_NBYTES)  # not of the room
            say(it.decode.hello["links"][at], *older, AbortAck(number), *others, row)
        elsewhere, others_pages = Endpoint("127.0.0.1", 9), np.arange(32, 60, dtype=np.int32)
        named = Metadata(room, elsewhere, it.sessions[0], others_pages, 1)
        say(it.prefill.hello["link"], named, Abort(room, elsewhere, 7_000), Abort(7, elsewhere, 7_000))
        await asyncio.sleep(0.5)  # several times the margin after which pages are free
        assert (await ask(it.decode, "quarantine"))["rooms"] == [given_up]
        assert (await ask(it.decode, "at", key=f"0/{room}", phase="TRANSFERRING"))["phase"] == "TRANSFERRING"
        it.prefill.resume()
        await it.go()
        assert await it.ends(room, 0) == ("", "")
        assert "has given the room up" in (await it.ends(given_up, 1))[0]


async def test_a_registry_that_is_down_ends_no_room_and_begins_none(cast: Cast, tmp_path: Any) -> None:
    async with rooms_of(cast) as it:
        with service(tmp_path / "log", "--journal", "memory:") as down:
            down.kill()
            room = await it.hold(0, Moment.BETWEEN)
            await ask(it.decode, "receive", at=1, room=room + 1, moment=Moment.TELLING, registry=down.url, key="down")
            await it.go()
            assert await it.ends(room, 0) == ("", "")
            assert f"registry {down.url}" in await it.defect(it.decode, "down")


OWN: Mapping[str, tuple[str, str, dict[str, int], str]] = {
    "memory that decode took back": ("decode", "forget_memory", {"at": 0}, r"\(rejected_address\): .* in none of the"),
    "memory that we took back": ("prefill", "forget_memory", {}, r"\(local\): .* lies in no region registered here"),
    "memory of ours that is gone": ("prefill", "hide_memory", {}, r"\(local\): .* is not there any more"),
}


@pytest.mark.parametrize("fault", OWN)
async def test_a_write_that_fails_by_its_own_fault_puts_no_session_out(cast: Cast, fault: str) -> None:
    side, do, where, cause = OWN[fault]
    async with rooms_of(cast) as it:
        child = getattr(it, side)
        room = await it.hold(0, Moment.BETWEEN)
        await ask(child, do, gone=True, **where)
        await it.go()
        found = await ask(it.prefill, "at", key=str(room), phase=Phase.FAILED.name, within_s=20.0)
        await ask(child, do, gone=False, **where)
        assert found["phase"] == Phase.FAILED.name
        sender, receiver = await it.ends(room, 0)
        assert re.match(r"transfer with [\d.:]+ failed " + cause, sender), sender
        assert receiver == f"prefill rank 0 says: {sender}"
        await it.is_well(0)
