"""
What a prefill rank says to decode ranks at a room's end: how it ended, again until a connection takes it, and again to
who has not heard it; and that nothing of it is in flight any more.

A connection that breaks loses what it has taken, and only the decode rank sees that something is missing: it names its
pages again, and is told again what it was told. Knows no rooms: which of them have ended, and what of, the sender says.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace

import structlog

from pdctl.core.address import Endpoint
from pdctl.core.frames import Frames
from pdctl.core.sums import Sums
from pdctl.core.transfer import Phase, RoomTimeouts, Word
from pdctl.core.wire import FIRST_QUESTION, NOT_REGISTERED, AbortAck, Metadata, Send, Status
from pdctl.errands import Errands
from pdctl.errors import Unreachable
from pdctl.retry import RetryPolicy, until_reached

log = structlog.get_logger(__name__)

_FLUSH_S = 1.0  # what a peer is allowed for taking a last status
_MAX_OVER = 4096  # rooms' ends that are remembered for who asks again
_MAX_NBYTES = 16 << 20  # of what was said then: sums are 4 bytes a page
# A decode that does not hear how a room ended waits for all of its waiting_s, and loses a room that has succeeded. A
# way that was cut for a moment is found again so; who is gone for longer has lost more than a status.
_AGAIN = RetryPolicy(first_wait_s=0.2, max_wait_s=2.0, give_up_after_s=30.0)


class LastWords:
    """Of prefill rank `rank`, by `send`. What is said beside goes on until `aclose`. `lost`: told of each word that has
    to be said again because it did not come."""

    def __init__(self, send: Send, rank: int, timeouts: RoomTimeouts, lost: Callable[[Word], None]) -> None:
        self._send, self._rank, self._timeouts, self._lost = send, rank, timeouts, lost
        self._over: OrderedDict[tuple[int, Endpoint], tuple[int | None, Frames]] = OrderedDict()
        self._nbytes = 0
        self._given_up: OrderedDict[int, str] = OrderedDict()
        self._policy = replace(_AGAIN, give_up_after_s=min(_AGAIN.give_up_after_s or 0.0, timeouts.waiting_s))
        self._untold: dict[tuple[int, Endpoint], asyncio.Task[None]] = {}
        self._errands = Errands()
        self.reports = Errands()  # apart: what cannot be delivered stays long, and may not crowd out an abort's answer

    async def aclose(self) -> None:
        await asyncio.gather(self.reports.aclose(_FLUSH_S), self._errands.aclose(_FLUSH_S))

    def report(
        self,
        named: Metadata,
        phase: Phase,
        reason: str | None = None,
        sums: Sequence[Sums] | None = None,
        *,
        is_permanent: bool = False,
    ) -> None:
        """How the room that `named` speaks of has ended."""
        given = None if sums is None else tuple(sums)
        is_permanent = is_permanent and named.use is not None  # for one of ours
        frames = Status(named.room, phase, self._rank, reason, given, named.use, is_permanent).to_frames()
        self.over(named.room, named.reply, named.use, frames)
        self._tell(named.room, named.reply, frames)

    def over(self, room: int, to: Endpoint, use: int | None, said: Frames = ()) -> None:
        """That use of the room's number has ended here, and `to` is told so by `said`, or need not be told."""
        if use is None:
            return
        self._forget(room, to)
        self._over[room, to] = use, said
        self._nbytes += sum(map(len, said))
        while len(self._over) > _MAX_OVER or self._nbytes > _MAX_NBYTES:
            self._forget(*next(iter(self._over)))

    def has_ended(self, room: int, to: Endpoint, use: int | None) -> bool:
        """Whether that use of the room's number is known to be over here, or may be."""
        return use is None or room in self._given_up or self._over.get((room, to), (None, ()))[0] == use

    def again(self, named: Metadata) -> bool:
        """Whether the use of the room's number that it speaks of is over; whoever has not heard that is told again."""
        use, said = self._over.get((named.room, named.reply), (None, ()))
        if use is None or use != named.use:
            return False
        if said:
            self._tell(named.room, named.reply, said)
            if named.again:
                self._lost(Word.STATUS)
        return True

    def gave_up(self, room: int, reason: str) -> None:
        """Before every decode rank had named its pages there. Who names them yet may mean the number's next use, until
        it says again what it has said."""
        self._given_up[room] = reason
        self._given_up.move_to_end(room)
        while len(self._given_up) > _MAX_OVER:
            self._given_up.popitem(last=False)

    def opened(self, room: int) -> None:
        self._given_up.pop(room, None)

    def too_late(self, named: Metadata) -> bool:
        """Whether it has waited for a room that was given up before it was named, which it is told."""
        reason = self._given_up.get(named.room)
        if reason is None or not named.again:
            return False
        self.report(named, Phase.FAILED, reason)
        return True

    def ask_memory(self, named: Metadata) -> None:
        """Of a decode rank that says again what gets no answer: that it has not been heard of here."""
        why = f"{NOT_REGISTERED}: {named.session} has named pages, and its buffer registration has not come"
        frames = Status(named.room, Phase.BOOTSTRAPPING, self._rank, why, None, named.use).to_frames()
        self._post(named.reply, frames, "question")

    def _forget(self, room: int, to: Endpoint) -> None:
        _, said = self._over.pop((room, to), (None, ()))
        self._nbytes -= sum(map(len, said))

    def _tell(self, room: int, to: Endpoint, frames: Frames) -> None:
        """Until a connection takes it, or nobody there wants to know any more."""

        async def deliver() -> None:
            try:
                await until_reached(self._policy, lambda: self._send(to, frames))
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
        again = room >= FIRST_QUESTION
        self._post(to, AbortAck(room, self._rank, generation, sums, again).to_frames(), "abort ack")

    def _post(self, to: Endpoint, frames: Frames, what: str) -> None:
        async def deliver() -> None:
            try:
                await self._send(to, frames)
            except Unreachable as error:
                log.warning("decode rank not told", what=what, to=str(to), why=str(error))

        self._errands.spawn(f"{what} to {to}", deliver())
