"""
Brings a plan to one decode rank: turn after turn with the rooms that share it, each by the engine, none past the gate.

What is done when a write fails, its room knows. Nothing is retried.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from pdctl.core.gate import Gate
from pdctl.core.plan import CopyPlan
from pdctl.core.turns import cut, split
from pdctl.engine.base import Engine
from pdctl.errors import SessionBlocked, TransferFailed
from pdctl.lanes import Lanes
from pdctl.pace import Pace

_AHEAD = 2  # turns of one room at one peer at once: the second fills the gap between the first and the one after


class Written(Protocol):
    """A room that is written."""

    @property
    def room(self) -> int: ...

    def landed(self, nbytes: int) -> None: ...

    def left_unsettled(self, session: str) -> None:
        """The engine may still read its pages for that session."""


class Writer:
    """Of all rooms of one rank. `sent` hears of each turn: bytes and seconds."""

    def __init__(
        self,
        engine: Engine,
        gate: Gate,
        lanes: Lanes,
        pace: Pace,
        clock: Callable[[], float],
        sent: Callable[[int, float], None],
        *,
        turn_nbytes: int,
        waiting_s: float,
        transfer_s: float,
    ) -> None:
        self._engine, self._gate, self._lanes, self._pace = engine, gate, lanes, pace
        self._clock, self._sent = clock, sent
        self._turn_nbytes, self._waiting_s, self._transfer_s = turn_nbytes, waiting_s, transfer_s

    async def write(self, room: Written, session: str, plan: CopyPlan, *, in_step: bool) -> None:
        """Return when all of it has landed. Raises SessionBlocked, TransferFailed or LimitReached. On trial, a
        session's writes wait for their turn: the trial's own end bounds that.

        `in_step`: the caller has just had its step of the loop, and no other write begins by it.
        """
        async with self._gate.passing(session):
            total = plan.total
            if total <= self._turn_nbytes:
                await self._turn(room, session, plan, total, in_step=in_step)
            else:
                await self._turns(room, session, plan)

    async def _turns(self, room: Written, session: str, plan: CopyPlan) -> None:
        turns = iter(cut(split(plan, self._turn_nbytes), self._turn_nbytes))

        async def take() -> None:
            for turn in turns:
                await self._turn(room, session, turn, turn.total, in_step=False)

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(_AHEAD):
                    group.create_task(take(), name=f"turns of room {room.room}")
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def _turn(self, room: Written, session: str, plan: CopyPlan, nbytes: int, *, in_step: bool) -> None:
        async with self._lanes.turn(session, room.room, nbytes, self._waiting_s) as waited:
            if waited or not in_step:
                await self._pace.step()
            if (blocked := self._gate.reason_blocked(session)) is not None:  # since the chunk was begun
                raise SessionBlocked(session, blocked)
            began = self._clock()
            try:
                await self._engine.write(session, plan, deadline_s=self._transfer_s)
            except TransferFailed as error:
                if not error.settled:
                    room.left_unsettled(session)
                raise
            self._sent(nbytes, self._clock() - began)
        room.landed(nbytes)
