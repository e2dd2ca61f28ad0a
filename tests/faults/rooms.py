"""
What becomes of a room: at each moment of its life, at both ends, by each fault. `python -m tests.faults.rooms N` plays
the whole matrix N times.

One fault is played at once on rooms that are held at every moment, each with a decode rank of its own, so that none
disturbs another. Then: each end in SUCCESS or FAILED by its first cause and within its bound, every table empty, no
byte where none may be, and a room that is well on every rank that has survived.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from pdctl.core.address import Endpoint
from pdctl.core.transfer import Phase
from tests.engine.cable import Cable
from tests.engine.processes import Child
from tests.faults.room_rank import STALL_S, Moment, timeouts
from tests.faults.wire import Wire
from tests.service import service

MOMENTS = tuple(Moment)
# A host that has nothing else to do starts `pdctl serve` in so long. What it may add to any bound that is promised.
_STARTS_IN_S, _QUICKEST, _SLOWEST = 1.2, 3, 6  # it may stand still for a second or two later on
SLACK_S = 8.0


@dataclass(frozen=True)
class Bounds:
    """Until when an end must have come, and every table be empty, by what is configured."""

    end_s: float
    empty_s: float

    @classmethod
    def at(cls, pace: int) -> Bounds:
        times = timeouts(pace)
        end_s = times.bootstrap_s + times.waiting_s
        empty_s = max(times.bootstrap_s, times.waiting_s) + times.release_s + times.drain_margin_s + STALL_S * pace
        return cls(end_s + SLACK_S * pace, empty_s + SLACK_S * pace)


class Fault(StrEnum):
    """What happens to all rooms at once."""

    DECODE_KILLED = "decode killed"
    DECODE_STOPPED = "decode stopped"
    PREFILL_KILLED = "prefill killed"
    PREFILL_STOPPED = "prefill stopped"
    CUT = "link cut"  # control link and data port, every connection broken
    LOST = "messages lost"  # the control link takes what is said, breaks, and is there again
    SILENCED = "link silenced"  # both take bytes, and none goes on
    DATA_CUT = "data port cut"
    PREFILL_ABORTS = "aborted by prefill"
    DECODE_ABORTS = "aborted by decode"


BY_CABLE = (Fault.CUT, Fault.LOST, Fault.SILENCED, Fault.DATA_CUT, Fault.PREFILL_ABORTS, Fault.DECODE_ABORTS)

# As each end sees the faults that issue 5 names.
SEEN_BY_SENDER = {
    "peer killed": Fault.DECODE_KILLED,
    "peer stopped": Fault.DECODE_STOPPED,
    "link cut": Fault.CUT,
    "aborted here": Fault.PREFILL_ABORTS,
    "aborted there": Fault.DECODE_ABORTS,
}
SEEN_BY_RECEIVER = {
    "peer killed": Fault.PREFILL_KILLED,
    "peer stopped": Fault.PREFILL_STOPPED,
    "link cut": Fault.CUT,
    "aborted here": Fault.DECODE_ABORTS,
    "aborted there": Fault.PREFILL_ABORTS,
}


@dataclass(frozen=True)
class Held:
    """In which phase either end is at a moment; None where it has no such room."""

    sender: Phase | None
    receiver: Phase


HELD = {
    Moment.TELLING: Held(Phase.BOOTSTRAPPING, Phase.BOOTSTRAPPING),
    Moment.NAMING: Held(Phase.BOOTSTRAPPING, Phase.WAITING_FOR_INPUT),
    Moment.EARLY: Held(None, Phase.TRANSFERRING),
    Moment.HALF_NAMED: Held(Phase.BOOTSTRAPPING, Phase.TRANSFERRING),
    Moment.NAMED: Held(Phase.WAITING_FOR_INPUT, Phase.TRANSFERRING),
    Moment.BETWEEN: Held(Phase.TRANSFERRING, Phase.TRANSFERRING),
    Moment.MOVING: Held(Phase.TRANSFERRING, Phase.TRANSFERRING),
    Moment.FINISHING: Held(Phase.TRANSFERRING, Phase.TRANSFERRING),
    Moment.TOLD: Held(Phase.SUCCESS, Phase.TRANSFERRING),
    Moment.ARRIVED: Held(Phase.SUCCESS, Phase.SUCCESS),
}

DIED = None  # that end is no more
ABSENT = "(never opened)"
WELL = ""
OR_WELL = "(?#or well)"  # where two things race that nobody has promised an order

_NOBODY = "^no destination pages from the decode ranks of room"
_HALF = r"^no destination pages from the decode ranks of room \d+ \(heard of: [\d.]+:\d+\)"
_GONE = r"^transfer with [\d.:]+ failed \((peer_gone|refused)\)"
_STALLED = r"^transfer with [\d.:]+ failed \(timed_out\): one of \d+ blocks did not move"
_SILENT = r"^transfer with [\d.:]+ failed \((timed_out|no_data)\)"
_SEVERED = r"^transfer with [\d.:]+ failed \((peer_gone|refused|no_data)\)"
_LEFT = "^the prefill engine left the room on CancelledError"
_CANCELLED = "^the prefill engine cancelled the send"
_GIVEN_UP = r"^decode rank [\d.:]+ has given the room up"
_GIVEN_UP_EARLY = r"^decode rank [\d.:]+ gave the room up before it was opened here"
_NO_CONNECTION = "^no connection for the"
_UNREACHABLE = rf"^peer [\d.:]+ is not reachable|{_NO_CONNECTION}"  # which of the two comes first, the machine says
_NO_STATUS = r"^no final status from prefill at [\d.:]+"
_DEAD_THERE = r"^prefill rank at [\d.:]+ is gone: its host says that nobody listens there any more"
_LOST = f"{_UNREACHABLE}|{_NO_STATUS}"  # the connection may take a message before it is known to be broken
_LEFT_BY_DECODE = "^the decode engine left the room on CancelledError"


_TOLD_LATER = (Moment.EARLY, Moment.NAMED, Moment.BETWEEN, Moment.MOVING, Moment.FINISHING, Moment.TOLD)


def _says(reason: str) -> str:
    return f"^prefill rank 0 says: {reason.removeprefix('^')}"


_LATE = f"{_says(_LEFT)}|{_says(_NOBODY)}|{_NO_STATUS}"  # it is told so when it says again what came too late


@dataclass(frozen=True)
class Ends:
    """The first cause at either end, as an expression; WELL for SUCCESS."""

    sender: str | None
    receiver: str | None


def _ends(sender: dict[Moment, str | None], receiver: dict[Moment, str | None]) -> dict[Moment, Ends]:
    return {moment: Ends(sender[moment], receiver[moment]) for moment in MOMENTS}


def _all(*values: str | None) -> dict[Moment, str | None]:
    """In the order of the moments."""
    return dict(zip(MOMENTS, values, strict=True))


_DEAD = dict.fromkeys(MOMENTS, DIED)

#                     telling       naming        early         half named      named         between
#                     moving        finishing     told          arrived
MATRIX: dict[Fault, dict[Moment, Ends]] = {
    Fault.DECODE_KILLED: _ends(
        _all(_NOBODY, _NOBODY, _GONE, _HALF, _GONE, _GONE, _GONE, _GONE, WELL, WELL),
        _DEAD,
    ),
    Fault.PREFILL_KILLED: _ends(
        _DEAD,
        _all(*[f"{_UNREACHABLE}|{_DEAD_THERE}"] * 2, *[_DEAD_THERE] * 7, WELL),
    ),
    Fault.DECODE_STOPPED: _ends(
        _all(_NOBODY, _NOBODY, _SILENT, _HALF, _SILENT, _STALLED, _STALLED, _STALLED, WELL, WELL),
        _all(
            *[f"{_NO_CONNECTION}|{_LATE}"] * 2,
            _says(_SILENT),
            _says(_HALF),
            _says(_SILENT),
            *[_says(_STALLED)] * 3,
            WELL,
            WELL,
        ),
    ),
    Fault.PREFILL_STOPPED: _ends(
        _all(
            f"{_NOBODY}|{_GIVEN_UP}",
            f"{_NOBODY}|{_GIVEN_UP}",
            f"{_GIVEN_UP}|{_GIVEN_UP_EARLY}|{_NOBODY}",
            f"{_HALF}|{_GIVEN_UP}",
            f"{_GIVEN_UP}|^no first chunk from the prefill engine",
            f"{_GIVEN_UP}|^no further chunk from the prefill engine",
            f"{_STALLED}|{_GIVEN_UP}",
            f"{OR_WELL}{_STALLED}|{_GIVEN_UP}",
            WELL,
            WELL,
        ),
        _all(f"{_UNREACHABLE}|{_NO_STATUS}", *[_NO_STATUS] * 8, WELL),
    ),
    Fault.CUT: _ends(
        _all(_NOBODY, _NOBODY, _SEVERED, _HALF, *[_SEVERED] * 4, WELL, WELL),
        _all(_LOST, _LOST, *[_NO_STATUS] * 7, WELL),
    ),
    # What the link had taken is said again.
    Fault.LOST: _ends(
        _all(*[WELL] * 3, _HALF, *[WELL] * 6),
        _all(*[WELL] * 3, _says(_HALF), *[WELL] * 6),
    ),
    Fault.SILENCED: _ends(
        _all(_NOBODY, _NOBODY, _SILENT, _HALF, _SILENT, *[_STALLED] * 3, WELL, WELL),
        _all(_UNREACHABLE, _LATE, _says(_SILENT), _says(_HALF), _says(_SILENT), *[_says(_STALLED)] * 3, WELL, WELL),
    ),
    Fault.DATA_CUT: _ends(
        _all(_SEVERED, _SEVERED, _SEVERED, _HALF, *[_SEVERED] * 4, WELL, WELL),
        _all(*[_says(_SEVERED)] * 3, _says(_HALF), *[_says(_SEVERED)] * 4, WELL, WELL),
    ),
    Fault.PREFILL_ABORTS: _ends(
        _all(_LEFT, _LEFT, ABSENT, _LEFT, _LEFT, _LEFT, _CANCELLED, _CANCELLED, WELL, WELL),
        _all(
            *[_LATE] * 2,
            _NO_STATUS,
            *[_says(_LEFT)] * 3,
            _says(_CANCELLED),
            _says(_CANCELLED),
            WELL,
            WELL,
        ),
    ),
    Fault.DECODE_ABORTS: _ends(
        _all(_GIVEN_UP, _GIVEN_UP, f"{_GIVEN_UP}|{_GIVEN_UP_EARLY}", *[_GIVEN_UP] * 5, WELL, WELL),
        _all(*[_LEFT_BY_DECODE] * 9, WELL),
    ),
}


class Ways:
    """How the two processes reach each other: straight, or by cables and wires that this process holds."""

    def __init__(self, prefill: Child, decode: Child) -> None:
        self.straight = list(map(list, zip(decode.hello["sessions"], decode.hello["links"], strict=True)))
        self.cables: list[Cable] = []
        self.wires: list[Wire] = []
        self.to_prefill: Wire | None = None
        self._prefill = prefill

    @classmethod
    @asynccontextmanager
    async def by_cable(cls, prefill: Child, decode: Child) -> AsyncIterator[Ways]:
        it = cls(prefill, decode)
        async with AsyncExitStack() as stack:
            for session, link in it.straight:
                it.cables.append(await stack.enter_async_context(Cable.to(session)))
                it.wires.append(await stack.enter_async_context(Wire.to(Endpoint.parse(link))))
            link = Endpoint.parse(prefill.hello["link"])
            it.to_prefill = await stack.enter_async_context(Wire.to(link))
            it.wires.append(it.to_prefill)
            yield it

    @property
    def of_ranks(self) -> list[list[str]]:
        if not self.cables:
            return self.straight
        return [[cable.session, str(wire.here)] for cable, wire in zip(self.cables, self.wires, strict=False)]

    @property
    def prefill(self) -> str | None:
        return None if self.to_prefill is None else str(self.to_prefill.here)

    def hold(self, moment: Moment) -> None:
        self.cables[MOMENTS.index(moment)].hold()

    async def cut(self, *, control: bool) -> None:
        for cable in self.cables:
            await cable.cut()
        for wire in self.wires if control else ():
            wire.cut()

    def silence(self) -> None:
        for each in self.cables:
            each.hold()
        for wire in self.wires:
            wire.silence()

    async def mend(self) -> None:
        for cable in self.cables:
            cable.release()
            if cable.is_cut:
                await cable.mend()
        for wire in self.wires:
            wire.mend()


@dataclass
class Tally:
    """Of rooms' ends: how many there were, and the longest that one took."""

    ends: int = 0
    longest_s: float = 0.0
    by_fault: dict[Fault, float] = field(default_factory=dict)

    def took(self, fault: Fault, seconds: float) -> None:
        self.ends += 1
        self.longest_s = max(self.longest_s, seconds)
        self.by_fault[fault] = max(self.by_fault.get(fault, 0.0), seconds)


class Cast:
    """The processes of one registry, for one fault after another: those that a fault has killed are replaced."""

    def __init__(self, registry: str, pace: int) -> None:
        self._registry, self._pace = registry, pace
        self.bounds = Bounds.at(pace)
        self._idle: dict[str, Child] = {}
        self._count = itertools.count(1)
        self.tally = Tally()

    @classmethod
    @contextmanager
    def in_wait(cls, folder: Path) -> Iterator[Cast]:
        began = time.monotonic()
        with service(folder / "registry.log", "--journal", "memory:") as registry:
            slower = (time.monotonic() - began) / _STARTS_IN_S
            it = cls(registry.url, min(_SLOWEST, max(_QUICKEST, math.ceil(slower))))
            try:
                yield it
            finally:
                it.end()

    @asynccontextmanager
    async def pair(self) -> AsyncIterator[tuple[Child, Child]]:
        """A prefill and a decode process. What has failed here is not for anybody else."""
        for role in ("prefill", "decode"):
            if role not in self._idle or not self._idle[role].is_alive:
                told = json.dumps({"role": role, "registry": self._registry, "pace": self._pace})
                # Not in another thread: it would die with that thread, which ends with this test's loop.
                self._idle[role] = Child("tests.faults.room_rank", told)
        try:
            yield self._idle["prefill"], self._idle["decode"]
        except BaseException:
            self.end()
            raise

    def end(self) -> None:
        for child in self._idle.values():
            child.kill()

    def number(self) -> int:
        """For rooms whose numbers nobody else has."""
        return next(self._count)

    async def play(self, fault: Fault) -> None:
        """One fault on rooms at every moment, and everything that must hold then."""
        async with AsyncExitStack() as stack:
            prefill, decode = await stack.enter_async_context(self.pair())
            ways = Ways(prefill, decode)
            if fault in BY_CABLE:
                ways = await stack.enter_async_context(Ways.by_cable(prefill, decode))
            await Scene(fault, prefill, decode, ways, self).play()


class Scene:
    """One fault, on as many rooms as there are moments: room k has the k-th decode rank to itself."""

    def __init__(self, fault: Fault, prefill: Child, decode: Child, ways: Ways, cast: Cast) -> None:
        self.fault, self.prefill, self.decode, self.ways = fault, prefill, decode, ways
        self.tally, self.bounds, number = cast.tally, cast.bounds, cast.number()
        self.rooms = {moment: number * 1000 + at for at, moment in enumerate(MOMENTS)}
        self.ends = MATRIX[fault]

    async def play(self) -> None:
        await self.set_up()
        await getattr(self, self.fault.name.lower())()
        await assert_clean(self.prefill, self.decode, self.bounds, self.fault)
        released = await ask(self.decode, "scribbled") if self.decode.is_alive else None
        assert released is None or released["released"] == len(MOMENTS), f"not all pages were given back: {self.fault}"
        if self.prefill.is_alive and self.decode.is_alive:
            await self.every_rank_is_well()
            await assert_clean(self.prefill, self.decode, self.bounds, self.fault)
        if self.prefill.is_alive:
            await ask(self.prefill, "restore")

    # --- setting up: the moments that wait for something with a bound come last

    async def set_up(self) -> None:
        await ask(self.decode, "wire", ways=self.ways.of_ranks)
        if self.fault is Fault.LOST:  # a connection that is there takes what is said, a new one first waits for a word
            await ask(self.decode, "acquaint", prefill=self.ways.prefill)
        await ask(self.prefill, "keep_statuses", rooms=[self.rooms[Moment.TOLD]])
        for moment in reversed(MOMENTS):
            await self.hold(moment)
        for moment in MOMENTS:
            await self.is_held(moment)

    async def hold(self, moment: Moment) -> None:
        at, room = MOMENTS.index(moment), self.rooms[moment]
        await ask(self.prefill, "send", room=room, moment=moment, at=at)
        await ask(self.decode, "receive", at=at, room=room, moment=moment, prefill=self.ways.prefill)
        if moment is Moment.EARLY:
            assert await ask(self.prefill, "early", room=room) == {"early": True}
        elif moment in (Moment.TELLING, Moment.NAMING):
            assert await ask(self.decode, "kept", at=at) == {"kept": 1}

    async def is_held(self, moment: Moment) -> None:
        """Both ends are where this moment says; so a fault finds each phase that there is."""
        held, at = HELD[moment], MOMENTS.index(moment)
        point = moment if moment not in (Moment.TELLING, Moment.NAMING, Moment.HALF_NAMED) else Moment.EARLY
        sender = await ask(
            self.prefill,
            "at",
            key=self.key(moment, "prefill"),
            phase=held.sender.name if held.sender else "",
            point=point,
        )
        assert (sender["phase"], sender["at"]) == (held.sender.name if held.sender else "", point), (moment, sender)
        receiver = await ask(self.decode, "at", key=f"{at}/{self.rooms[moment]}", phase=held.receiver.name)
        assert receiver["phase"] == held.receiver.name, (moment, receiver)

    def key(self, moment: Moment, side: str) -> str:
        room = self.rooms[moment]
        return str(room) if side == "prefill" else f"{MOMENTS.index(moment)}/{room}"

    async def blocks_are_under_way(self) -> None:
        """Those of MOVING and FINISHING, which cannot arrive: their decode ranks are stopped, or their cables held."""
        keys = [self.key(moment, "prefill") for moment in (Moment.MOVING, Moment.FINISHING)]
        await ask(self.prefill, "go", keys=keys)
        sessions = [self.ways.of_ranks[MOMENTS.index(moment)][0] for moment in (Moment.MOVING, Moment.FINISHING)]
        found = await ask(self.prefill, "in_flight", sessions=sessions)
        assert all(found.values()), found

    # --- the faults

    async def decode_killed(self) -> None:
        self.decode.stop()
        await self.blocks_are_under_way()
        self.decode.kill()
        await self.go_on("prefill")
        await self.all_end("prefill")

    async def decode_stopped(self) -> None:
        self.decode.stop()
        await self.blocks_are_under_way()
        await self.go_on("prefill")
        await self.all_end("prefill")
        self.decode.resume()
        await self.go_on("decode")
        await self.all_end("decode")

    async def prefill_killed(self) -> None:
        self.decode.stop()
        await self.blocks_are_under_way()
        self.prefill.kill()
        self.decode.resume()
        await self.go_on("decode")
        await self.all_end("decode")

    async def prefill_stopped(self) -> None:
        self.decode.stop()
        await self.blocks_are_under_way()
        self.prefill.stop()
        self.decode.resume()
        await self.go_on("decode")
        await self.all_end("decode")
        told = {self.rooms[moment] for moment in MOMENTS if moment not in (Moment.TELLING, Moment.ARRIVED)}
        kept = set((await ask(self.decode, "quarantine"))["rooms"])
        assert told <= kept, f"no word from prefill, so nothing is free: {kept}"
        self.prefill.resume()
        await self.go_on("prefill")
        await self.all_end("prefill")

    async def cut(self) -> None:
        await self.by_cable(self.ways.cut(control=True))

    async def data_cut(self) -> None:
        await self.by_cable(self.ways.cut(control=False))

    async def lost(self) -> None:
        """First what decode says, and then what prefill answers."""
        before, to_prefill = await ask(self.prefill, "words_lost"), self.ways.to_prefill
        assert to_prefill is not None
        await self.swallow([to_prefill], "decode", lambda: len(to_prefill.swallowing) >= 2)  # of telling and naming
        wires = [wire for moment, wire in zip(MOMENTS, self.ways.wires, strict=False) if moment in _TOLD_LATER]
        await self.swallow(wires, "prefill", lambda: all(wire.swallowing for wire in wires))
        await self.all_end("prefill")
        await self.all_end("decode")
        after = await ask(self.prefill, "words_lost")
        assert all(after[word] > before[word] for word in ("registration", "pages", "status")), (
            f"nothing was lost: {before}, {after}"
        )

    async def swallow(self, wires: Sequence[Wire], side: str, enough: Callable[[], bool]) -> None:
        for wire in wires:
            wire.silence()
        await self.go_on(side)
        async with asyncio.timeout(self.bounds.end_s):
            while not enough():  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        for wire in wires:
            wire.cut()
            wire.mend()

    async def silenced(self) -> None:
        self.ways.silence()
        await self.blocks_are_under_way()
        await self.go_on("prefill")
        await self.go_on("decode")
        await self.all_end("prefill")
        await self.ways.mend()
        await self.all_end("decode")

    async def prefill_aborts(self) -> None:
        await self.held_by_cable()
        await ask(self.prefill, "abort", keys=[self.key(moment, "prefill") for moment in MOMENTS])
        await self.ways.mend()
        await self.go_on("prefill")
        await self.go_on("decode")
        await self.all_end("prefill")
        await self.all_end("decode")

    async def decode_aborts(self) -> None:
        await self.held_by_cable()
        await ask(self.decode, "abort", keys=[self.key(moment, "decode") for moment in MOMENTS])
        await self.all_end("decode")
        await self.ways.mend()
        await self.go_on("prefill")
        await self.go_on("decode")
        await self.all_end("prefill")

    async def by_cable(self, fault: object) -> None:
        await self.held_by_cable()
        await fault  # type: ignore[misc]
        await self.go_on("prefill")
        await self.go_on("decode")
        await self.all_end("prefill")
        await self.all_end("decode")
        await self.ways.mend()

    async def held_by_cable(self) -> None:
        for moment in (Moment.MOVING, Moment.FINISHING):
            self.ways.hold(moment)
        await self.blocks_are_under_way()

    async def go_on(self, side: str) -> None:
        """What was held back goes on; the engines too, if they can."""
        child = getattr(self, side)
        await ask(child, "go")
        await ask(child, "let_out")

    # --- what must hold

    async def all_end(self, side: str) -> None:
        began, child = time.monotonic(), getattr(self, side)
        for moment in MOMENTS:
            expected = getattr(self.ends[moment], side_of(side))
            found = await end(child, self.key(moment, side), began + self.bounds.end_s - time.monotonic())
            cell = f"{self.fault}, {moment}, {side}: {found}"
            assert found["over"], f"not over within its bound of {self.bounds.end_s} s: {cell}"
            assert (found["defect"], found["wrong"]) == ("", []), cell
            assert found["phase"] in phases_of(expected), cell
            first_cause = expected if found["phase"] == Phase.FAILED.name else "^$"
            assert re.search(first_cause or "", found["why"]), cell
            self.tally.took(self.fault, time.monotonic() - began)

    async def every_rank_is_well(self) -> None:
        """What is over has spoiled nothing: each rank takes a room of its own, by the same ways."""
        for at, (session, _) in enumerate(self.ways.of_ranks):
            served = await until(
                self.prefill, "served", lambda found: not found["blocked"], self.bounds.end_s, session=session
            )
            assert not served["blocked"], (self.fault, served)
            await self.one_more(at, self.rooms[MOMENTS[at]] + 500, 1)
        for at in range(len(MOMENTS)):
            room = self.rooms[MOMENTS[at]] + 500
            if await self.has_stalled(room):  # by nobody's fault but this machine's: once more
                await self.one_more(at, room := room + 100, 2)
            for child, key in ((self.prefill, str(room)), (self.decode, f"{at}/{room}")):
                found = await end(child, key, self.bounds.end_s)
                assert (found["phase"], found["wrong"]) == (Phase.SUCCESS.name, []), (self.fault, MOMENTS[at], found)

    async def one_more(self, at: int, room: int, number: int) -> None:
        where = {"at": at, "room": room, "moment": Moment.TELLING, "number": number}
        session, _ = self.ways.of_ranks[at]
        await until(self.prefill, "served", lambda found: not found["blocked"], self.bounds.end_s, session=session)
        await ask(self.prefill, "send", room=room, moment=Moment.TELLING, at=at, number=number)
        await ask(self.decode, "receive", prefill=self.ways.prefill, **where)

    async def has_stalled(self, room: int) -> bool:
        found = await end(self.prefill, str(room), self.bounds.end_s)
        return found["phase"] == Phase.FAILED.name and "did not move" in found["why"]


async def assert_clean(prefill: Child, decode: Child, bounds: Bounds, after: str) -> None:
    """The one judge of leaks, after every scenario, in every process that lives; and of bytes where none may be."""
    for child in (prefill, decode):
        if child.is_alive:
            left = (await until(child, "left", lambda found: not found["left"], bounds.empty_s))["left"]
            assert left == [], f"after {after}, at the {'prefill' if child is prefill else 'decode'}: {left}"
    if decode.is_alive:
        scribbled = (await ask(decode, "scribbled"))["scribbled"]
        assert scribbled == [], f"after {after}: {scribbled}"


def phases_of(expected: str) -> set[str]:
    if expected in (ABSENT, WELL):
        return {"" if expected == ABSENT else Phase.SUCCESS.name}
    return {Phase.FAILED.name} | ({Phase.SUCCESS.name} if expected.startswith(OR_WELL) else set())


def side_of(side: str) -> str:
    return {"prefill": "sender", "decode": "receiver"}[side]


async def ask(child: Child, do: str, **arguments: object) -> dict:
    told = await child.ask(do, **arguments)
    assert "error" not in told, f"{do}: {told}"
    return told


async def end(child: Child, key: str, within_s: float) -> dict:
    """How the room has ended there, as soon as it has."""
    return await until(child, "end", lambda found: bool(found["over"]), within_s, key=key)


async def until(child: Child, do: str, well: Callable[[dict], bool], within_s: float, **arguments: object) -> dict:
    """The first answer that is well, or the last before the time is over. A child is given up that says nothing for
    longer than it is asked to wait here at a time."""
    by = time.monotonic() + within_s
    while True:
        found = await ask(child, do, within_s=max(0.0, min(10.0, by - time.monotonic())), **arguments)
        if well(found) or time.monotonic() >= by:
            return found


async def soak(rounds: int, folder: Path) -> Tally:
    with Cast.in_wait(folder) as cast:
        for number in range(rounds):
            for fault in Fault:
                began = time.monotonic()
                await cast.play(fault)
                print(
                    f"round {number + 1}, {fault}: {len(MOMENTS)} rooms, {time.monotonic() - began:.1f} s", flush=True
                )
        return cast.tally


def main(rounds: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        tally = asyncio.run(soak(rounds, Path(folder)))
    slowest = ", ".join(f"{fault} {seconds:.1f} s" for fault, seconds in tally.by_fault.items())
    print(f"{tally.ends} ends of rooms, each as the matrix says, nothing left over; the last end of each: {slowest}")


if __name__ == "__main__":
    main(int(sys.argv[1]))
    os._exit(0)
