"""
What a prefill rank says to decode ranks at a room's end: how it ended, again until it is heard; and, once, that nothing
of it is in flight any more.

Knows no rooms: which of them have ended, and what of, the sender says.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

import structlog

from pdctl.core.address import Endpoint
from pdctl.core.sums import Sums
from pdctl.core.transfer import Phase, RoomTimeouts
from pdctl.core.wire import FIRST_QUESTION, AbortAck, Status
from pdctl.errands import Errands
from pdctl.errors import Unreachable
from pdctl.retry import RetryPolicy, retrying

log = structlog.get_logger(__name__)

Send = Callable[[Endpoint, Sequence[bytes]], Awaitable[None]]

_FLUSH_S = 1.0  # what a peer is allowed for taking a last status
# A decode that does not hear how a room ended waits for all of its waiting_s, and loses a room that has succeeded. A
# way that was cut for a moment is found again so; who is gone for longer has lost more than a status.
_AGAIN = RetryPolicy(first_wait_s=0.2, max_wait_s=2.0, give_up_after_s=30.0)


class LastWords:
    """Of prefill rank `rank`, by `send`. What is said beside goes on until `aclose`."""

    def __init__(self, send: Send, rank: int, timeouts: RoomTimeouts) -> None:
        self._send, self._rank, self._timeouts = send, rank, timeouts
        self._policy = replace(_AGAIN, give_up_after_s=min(_AGAIN.give_up_after_s or 0.0, timeouts.waiting_s))
        self._untold: dict[tuple[int, Endpoint], asyncio.Task[None]] = {}
        self._errands = Errands()
        self.reports = Errands()  # apart: what cannot be delivered stays long, and may not crowd out an abort's answer

    async def aclose(self) -> None:
        await asyncio.gather(self.reports.aclose(_FLUSH_S), self._errands.aclose(_FLUSH_S))

    def report(
        self,
        to: Endpoint,
        room: int,
        phase: Phase,
        reason: str | None = None,
        sums: Sequence[Sums] | None = None,
    ) -> None:
        """How the room has ended; said again until a connection takes it, or nobody there wants to know any more."""
        frames = Status(room, phase, self._rank, reason, None if sums is None else tuple(sums)).to_frames()

        async def deliver() -> None:
            with contextlib.suppress(Unreachable):
                await self._send(to, frames)  # most of the time it is this; what may be repeated costs 0.1 ms more
                return
            try:
                await retrying(self._policy, lambda: self._send(to, frames), is_permanent=_is_defect)
            except Unreachable as error:
                log.warning("decode rank not told", what="status", to=str(to), why=str(error))

        self.hush(room, to)
        task = self.reports.spawn(f"status to {to}", deliver())
        if task is not None:
            self._untold[room, to] = task
            task.add_done_callback(lambda told: self._told(room, to, told))

    def _told(self, room: int, to: Endpoint, task: asyncio.Task[None]) -> None:
        if self._untold.get((room, to)) is task:
            del self._untold[room, to]

    def hush(self, room: int, to: Endpoint) -> None:
        """That end of the room's life is over: a status that came later would speak of the number's next use."""
        task = self._untold.pop((room, to), None)
        if task is not None:
            task.cancel()

    def acknowledge(self, room: int, to: Endpoint, generation: int) -> None:
        """And answer the question that it may be."""
        sums = room >= FIRST_QUESTION and self._timeouts.checksum.is_on
        self._post(to, AbortAck(room, self._rank, generation, sums).to_frames(), "abort ack")

    def _post(self, to: Endpoint, frames: Sequence[bytes], what: str) -> None:
        async def deliver() -> None:
            try:
                await self._send(to, frames)
            except Unreachable as error:
                log.warning("decode rank not told", what=what, to=str(to), why=str(error))

        self._errands.spawn(f"{what} to {to}", deliver())


def _is_defect(error: Exception) -> bool:
    return not isinstance(error, Unreachable)
