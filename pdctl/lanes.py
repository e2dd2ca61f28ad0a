"""
A lane to each decode rank: who writes waits here for the turn that core/turns.py gives.

Knows no engine and no gate. A lane is there while somebody uses it; one that does not move holds up nobody else's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Hashable

from pdctl.core.turns import Turn, Turns
from pdctl.errors import LimitReached


class Lanes:
    """`max_nbytes` under way on each."""

    def __init__(self, max_nbytes: int) -> None:
        self._max_nbytes = max_nbytes
        self._lanes: dict[str, Turns] = {}
        self._waiting: dict[Turn, asyncio.Event] = {}

    def __len__(self) -> int:
        return len(self._lanes)

    def turn(self, session: str, room: Hashable, nbytes: int, patience_s: float) -> _Taken:
        """`async with`: within, the turn is `room`'s; gives whether it was waited for. Raises LimitReached where it
        does not come within `patience_s`."""
        return _Taken(self, session, room, nbytes, patience_s)

    # --- for those that take turns

    def ask(self, session: str, room: Hashable, nbytes: int) -> Turn:
        lane = self._lanes.get(session)
        if lane is None:
            lane = self._lanes[session] = Turns(self._max_nbytes)
        turn = lane.ask(room, nbytes)
        self._go_on(lane)
        return turn

    def end(self, session: str, turn: Turn) -> None:
        lane = self._lanes[session]
        self._waiting.pop(turn, None)
        lane.end(turn)
        self._go_on(lane)
        if lane.is_idle:
            del self._lanes[session]

    async def called(self, session: str, turn: Turn, patience_s: float) -> None:
        lane, called = self._lanes[session], asyncio.Event()
        self._waiting[turn] = called
        try:
            async with asyncio.timeout(patience_s):
                await called.wait()
        except TimeoutError:
            raise LimitReached(
                f"no turn to write to {session} within {patience_s:g} s: {lane.nbytes} bytes are under way there, "
                f"max_nbytes_per_peer is {self._max_nbytes}, and {lane.rooms_waiting} rooms wait: see whether that "
                "decode rank is slow, send it fewer requests, or raise waiting_s"
            ) from None

    def _go_on(self, lane: Turns) -> None:
        for turn in lane.begin():
            if (called := self._waiting.pop(turn, None)) is not None:
                called.set()


class _Taken:
    """A class, since a generator's context costs three times as much, and each room has one."""

    __slots__ = ("_asked", "_lanes", "_patience_s", "_session", "_turn")

    def __init__(self, lanes: Lanes, session: str, room: Hashable, nbytes: int, patience_s: float) -> None:
        self._lanes, self._session, self._asked, self._patience_s = lanes, session, (room, nbytes), patience_s

    async def __aenter__(self) -> bool:
        self._turn = self._lanes.ask(self._session, *self._asked)
        if self._turn.is_under_way:
            return False
        try:
            await self._lanes.called(self._session, self._turn, self._patience_s)
        except BaseException:
            self._lanes.end(self._session, self._turn)
            raise
        return True

    async def __aexit__(self, *_: object) -> None:
        self._lanes.end(self._session, self._turn)
