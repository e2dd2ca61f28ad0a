"""
A lane to each decode rank: who writes waits here for the turn that core/turns.py gives.

Knows no engine and no gate. A lane is there while somebody uses it; one that does not move holds up nobody else's.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Hashable
from contextlib import asynccontextmanager

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

    @asynccontextmanager
    async def turn(self, session: str, room: Hashable, nbytes: int, patience_s: float) -> AsyncIterator[None]:
        """Within, the turn is `room`'s. Raises LimitReached where it does not come within `patience_s`."""
        lane = self._lanes.setdefault(session, Turns(self._max_nbytes))
        turn, called = lane.ask(room, nbytes), asyncio.Event()
        self._waiting[turn] = called
        try:
            self._go_on(lane)
            if not called.is_set():
                await self._called(called, lane, session, patience_s)
            yield
        finally:
            self._waiting.pop(turn, None)
            lane.end(turn)
            self._go_on(lane)
            if lane.is_idle:
                self._lanes.pop(session, None)

    async def _called(self, called: asyncio.Event, lane: Turns, session: str, patience_s: float) -> None:
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
            self._waiting.pop(turn).set()
