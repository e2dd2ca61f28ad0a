"""
The prefill ranks that a decode rank has to do with: which of them know its memory, which sum, and which may be told
everything twice.

What is said over a connection that breaks in that moment is lost, and ZMQ calls it sent. So whoever waits says it
again. A prefill of ours knows each use of a room's number from any other, and answers what it has answered before; a
stock one takes up anew a room that is named after its end, and keeps it for ever: there it is said again only where a
room has waited for long. Which of the two it is, it says itself, to a question that stock answers as well.

Knows no rooms: what of them is said again, and when, the receiver decides.
"""

from __future__ import annotations

import asyncio
import itertools
import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import structlog

from pdctl.core.address import Endpoint
from pdctl.core.comparing import Checksum
from pdctl.core.transfer import RoomTimeouts
from pdctl.core.wire import FIRST_QUESTION, Abort, AbortAck, Matched, RegisterBuffers, Send, Status
from pdctl.errands import Errands
from pdctl.errors import ChecksumsMissing, Unreachable
from pdctl.retry import RetryPolicy, until_reached

log = structlog.get_logger(__name__)

_AGAIN = RetryPolicy(first_wait_s=0.2, max_wait_s=2.0)
_ANSWER_S = 2.0  # for a question beside the rooms, which nobody waits for
_APART_S = 1.0  # between two registrations with one prefill that say the same: its rooms wait together
_STOCK_AFTER_S = 30.0  # stock's own patience with an abort that nobody confirms
_MAX_PREFILLS = 4096  # of which is remembered what they know
_MAX_MATCHES = 4096


@dataclass(slots=True)
class _Contact:
    """What a prefill rank has been told, and has said of itself; `again`: None until it has been asked. The lock makes
    rooms of the same moment tell it, and ask it, once."""

    told: bool = False
    sums: bool = False
    again: bool | None = None
    asked_at: float = -math.inf
    reminded_at: float = -math.inf
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class Contacts:
    """Of the decode rank whose memory is `registration`, by `send`. `errands`: where what is said beside goes on."""

    def __init__(
        self,
        send: Send,
        registration: RegisterBuffers,
        timeouts: RoomTimeouts,
        clock: Callable[[], float],
        errands: Errands,
    ) -> None:
        self._send, self._timeouts, self._clock, self._errands = send, timeouts, clock, errands
        self._session, self._reply = registration.session, registration.reply
        self._registration = registration.to_frames()
        self._repetition = replace(registration, again=True).to_frames()
        self._contacts: OrderedDict[Endpoint, _Contact] = OrderedDict()
        self._numbers = itertools.count()
        self._questions: dict[int, asyncio.Future[AbortAck]] = {}
        self._matches: OrderedDict[tuple[int, int, int], tuple[Endpoint, Matched]] = OrderedDict()

    @property
    def told(self) -> tuple[Endpoint, ...]:
        """Prefill ranks that have been told of our memory."""
        return tuple(at for at, contact in self._contacts.items() if contact.told)

    def forget(self, prefill: Endpoint) -> None:
        """Tell this prefill rank of our memory again before its next room."""
        self._contacts.pop(prefill, None)

    async def tell_memory(self, prefill: Endpoint) -> None:
        """Register our buffers there, unless that has been done. Raises Unreachable, and ChecksumsMissing."""
        contact = self._contact(prefill)
        async with contact.lock:
            if self._timeouts.checksum is Checksum.REQUIRED and not contact.sums:
                await self._require_sums(prefill, contact)
            if not contact.told:
                await self._send(prefill, self._registration)
                contact.told = True

    async def remind(self, prefill: Endpoint, waited_s: float, reminded_s: float) -> bool:
        """Register our buffers there once more, and say whether a room that has waited for so long, and had for
        `reminded_s` when it was last named again, may be named there once more. Raises Unreachable."""
        contact = self._contact(prefill)
        async with contact.lock:
            if contact.again is None and self._clock() - contact.asked_at >= _ANSWER_S:
                contact.asked_at = self._clock()
                contact.again = (await self._ask(prefill, _ANSWER_S, "whether it may be told things twice")).again
            if contact.again is None or not (contact.again or waited_s >= max(_STOCK_AFTER_S, 2 * reminded_s)):
                return False
            if self._clock() - contact.reminded_at >= _APART_S:
                await self._send(prefill, self._repetition)
                contact.told, contact.reminded_at = True, self._clock()
        return True

    def not_known_at(self, prefill: Endpoint) -> None:
        """It says so itself, to a decode rank that will say it again: nobody else tells it that."""
        contact = self._contact(prefill)
        contact.again, contact.reminded_at = True, -math.inf

    def answered(self, ack: AbortAck) -> bool:
        """Whether it is the answer to a question."""
        question = self._questions.get(ack.room)
        if question is not None and not question.done():
            question.set_result(ack)
        return question is not None

    def matched(self, prefill: Endpoint, match: Matched, rank: int) -> None:
        """Tell a prefill rank that what has arrived is what its sums say: for as long as it waits to hear it."""
        if match.use is not None:
            self._matches[match.room, match.use, rank] = prefill, match
            while len(self._matches) > _MAX_MATCHES:
                self._matches.popitem(last=False)
        self._say(prefill, match)

    def matched_before(self, status: Status) -> bool:
        """Whether it speaks of a room that is over here because it matched; its prefill has not heard that."""
        said = None if status.use is None else self._matches.get((status.room, status.use, status.rank))
        if said is not None:
            self._say(*said)
        return said is not None

    def _contact(self, prefill: Endpoint) -> _Contact:
        contact = self._contacts.setdefault(prefill, _Contact())
        self._contacts.move_to_end(prefill)
        while len(self._contacts) > _MAX_PREFILLS:
            self._contacts.popitem(last=False)
        return contact

    def _say(self, prefill: Endpoint, match: Matched) -> None:
        frames = match.to_frames()
        policy = replace(_AGAIN, give_up_after_s=self._timeouts.transfer_s)

        async def tell() -> None:
            try:
                await until_reached(policy, lambda: self._send(prefill, frames))
            except Unreachable as error:
                log.warning("prefill rank not told of a match", room=match.room, to=str(prefill), why=str(error))

        self._errands.spawn(f"match to {prefill}", tell())

    async def _require_sums(self, prefill: Endpoint, contact: _Contact) -> None:
        answer = await self._ask(
            prefill, self._timeouts.transfer_s, "whether it gives checksums, which room.checksum requires here"
        )
        if not answer.sums:
            raise ChecksumsMissing(
                f"prefill rank at {prefill} gives no checksums, and room.checksum is required here: start that prefill "
                "with room.checksum offered or required (a stock one cannot), or this decode with offered"
            )
        contact.sums, contact.again = True, answer.again

    async def _ask(self, prefill: Endpoint, limit_s: float, what: str) -> AbortAck:
        """Stock knows no such question; it is put so that it answers, and at once (`FIRST_QUESTION`)."""
        number = next(self._numbers)
        room = FIRST_QUESTION + number % (2**64 - FIRST_QUESTION)
        answer = self._questions[room] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(limit_s):
                await self._send(prefill, Abort(room, self._reply, number).to_frames())
                said: AbortAck = await answer
                return said
        except TimeoutError:
            raise Unreachable(
                f"prefill rank at {prefill} has not said within {limit_s:g} s {what}: see "
                "whether it is stopped, and whether it can reach this control port"
            ) from None
        finally:
            del self._questions[room]
