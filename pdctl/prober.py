"""
Asks blocked sessions "are you well, and still who you were?", and tells the table. The shell around core.sessions.

It is the Gate that senders use. It never transfers, never decides who is trusted, and never waits for one peer before
it asks another. Everything here runs on one event loop; from another thread, go through `call_soon_threadsafe`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from typing import Protocol

import structlog

from pdctl.core.sessions import Change, ChangeKind, Depth, Entry, Question, SessionTable, Turn, Unwell, Well
from pdctl.engine.base import Announced, PeerCard
from pdctl.errors import Cause, SessionBlocked, TransferFailed
from pdctl.metrics import Metrics

log = structlog.get_logger(__name__)

_EVENTS = {
    ChangeKind.BLOCKED: "session blocked: requests for it fail at once until it is well",
    ChangeKind.DROPPED: "session dropped: another process answers there, it must register anew",
    ChangeKind.RECOVERED: "session recovered",
    ChangeKind.TRIAL_PASSED: "session trusted again",
    ChangeKind.LIFTED: "session lifted",
    ChangeKind.FORGOTTEN: "blocked session forgotten",
    ChangeKind.PANIC_BEGAN: "too many sessions blocked: all of the group are served",
    ChangeKind.PANIC_ENDED: "enough sessions well again: blocked ones are refused",
    ChangeKind.DOUBT_BEGAN: "the fault may be here: time-outs block nobody",
    ChangeKind.DOUBT_ENDED: "time-outs speak of the peer again",
}
# 100 handshakes begun at once held the loop for 12 ms, in handfuls of 4 for at most 6 (2 shared cores, real engines).
_AT_ONCE = 4
_BAD_NEWS = (ChangeKind.BLOCKED, ChangeKind.DROPPED, ChangeKind.PANIC_BEGAN, ChangeKind.DOUBT_BEGAN)


class Ask(Protocol):
    """`Engine.probe`: who answers at `session`? Raises TransferFailed. Must be cancellable at any moment."""

    def __call__(self, session: str, *, deadline_s: float) -> Awaitable[PeerCard]: ...


class Prober:
    """One engine's session table, kept true. `run` is its only loop; without it nothing is lifted but by registration.

    `ask` gets the policy's deadline and is also held to it from here: an engine that forgets its own costs nothing.
    `known` is the card of the life that transfers are meant for, if the engine has one pinned: what an answer after a
    failure is held against. Who has no such look-up calls `remember` whenever a trusted session shows its card.
    """

    def __init__(
        self,
        table: SessionTable[PeerCard],
        ask: Ask,
        *,
        clock: Callable[[], float],
        metrics: Metrics,
        known: Callable[[str], PeerCard | None] = lambda _: None,
    ) -> None:
        self._table = table
        self._policy = table.policy
        self._ask = ask
        self._known = known
        self._clock = clock
        self._metrics = metrics.sessions
        self._asking = 0
        self._news = asyncio.Event()  # something may be due earlier than `run` thinks
        self._moved = asyncio.Event()  # who waits for a turn may have it: set once, then replaced

    # The Gate

    def reason_blocked(self, session: str) -> str | None:
        now = self._clock()
        self._table.requested(session, now)
        return self._table.reason_blocked(session, now)

    def failed(self, session: str, cause: Cause, detail: str) -> None:
        self._failed(session, cause, detail, None)

    def registered(self, session: str, pointers: Sequence[int] = ()) -> None:
        life = Announced(session, tuple(pointers)) if pointers else None
        self._tell(self._table.registered(session, self._clock(), life))
        self._wake()

    @contextlib.asynccontextmanager
    async def passing(self, session: str) -> AsyncIterator[None]:
        entry = await self._turn(session)
        try:
            yield
        except TransferFailed as failure:
            self._failed(session, failure.cause, failure.detail, entry)
            raise
        else:
            self._tell(self._table.succeed(session, self._clock(), entry))
        finally:
            self._table.leave(entry)
            self._wake()

    async def _turn(self, session: str) -> Entry:
        while True:
            moved, entry = self._moved, self._table.enter(session, self._clock())
            if entry.turn is Turn.GO:
                return entry
            if entry.reason is not None:
                raise SessionBlocked(session, entry.reason)
            await moved.wait()

    def _failed(self, session: str, cause: Cause, detail: str, entry: Entry | None) -> None:
        if cause.speaks_of_peer and (card := self._known(session)) is not None:
            self.remember(session, card)
        self._tell(self._table.fail(session, cause, detail, self._clock(), entry))
        self._wake()

    def _wake(self) -> None:
        self._news.set()
        self._moved.set()
        self._moved = asyncio.Event()

    def remember(self, session: str, card: PeerCard) -> None:
        """The card that a trusted session shows."""
        self._tell(self._table.remember(session, card, self._clock()))

    # The loop

    async def run(self) -> None:
        """Ask whoever is due, until cancelled. Leaves no task behind."""
        if not self._policy.enabled:
            log.warning("probing is off: a blocked session stays blocked until its peer registers anew")
            await asyncio.Event().wait()
        async with asyncio.TaskGroup() as questions:
            while True:
                await self._something_due()
                now = self._clock()
                self._tell(self._table.tick(now))
                free = self._policy.max_concurrent - self._asking
                for question in self._table.ask_due(now, min(free, _AT_ONCE)):
                    self._asking += 1
                    questions.create_task(self._put(question), name=f"probe {question.session}")
                await asyncio.sleep(0)  # transfers and answers have their turn between two handfuls

    async def _something_due(self) -> None:
        """Return when a question is due and there is a place for it. Wakes for news only, never to look."""
        while True:
            self._news.clear()
            due = self._table.next_due if self._asking < self._policy.max_concurrent else None
            wait_s = None if due is None else due - self._clock()
            if wait_s is not None and wait_s <= 0:
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._news.wait()

    async def _put(self, question: Question) -> None:
        """Put one question and hand the answer to the table. Only our own stop ends it without one."""
        asked_at = self._clock()
        try:
            verdict = await self._verdict(question.session)
        finally:
            self._asking -= 1
        now = self._clock()
        changes = self._table.answered(question, verdict, now)
        self._metrics.answered(_result(verdict, changes), now - asked_at)
        self._tell(changes)
        self._wake()

    async def _verdict(self, session: str) -> Well[PeerCard] | Unwell:
        deadline_s = self._table.deadline_s
        try:
            async with asyncio.timeout(deadline_s):
                return Well(await self._ask(session, deadline_s=deadline_s), Depth.IDENTITY)
        except TransferFailed as failure:
            return Unwell(failure.cause, failure.detail)
        except TimeoutError:
            return Unwell(Cause.TIMED_OUT, f"no answer in {deadline_s} s")
        except asyncio.CancelledError as stray:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            return self._own_fault(session, stray)  # from inside the question: nobody has cancelled us
        except Exception as defect:
            return self._own_fault(session, defect)

    def _own_fault(self, session: str, defect: BaseException) -> Unwell:
        log.warning("question failed on our side", session=session, exc_info=defect)
        return Unwell(Cause.LOCAL, repr(defect))

    def _tell(self, changes: Iterable[Change]) -> None:
        """Count and log each change: the only place that does."""
        for change in changes:
            self._metrics.changed(change)
            self._wake()
            say = log.warning if change.kind in _BAD_NEWS else log.info
            say(
                _EVENTS[change.kind],
                session=change.session,
                cause=None if change.cause is None else change.cause.value,
                detail=change.detail,
                blocked_s=round(change.blocked_s, 3),
                questions=change.questions,
            )


def _result(verdict: Well[PeerCard] | Unwell, changes: list[Change]) -> Cause | None:
    """What an answer is counted as: well, unless the card it showed was another life's."""
    if isinstance(verdict, Unwell):
        return verdict.cause
    return next((change.cause for change in changes if change.kind is ChangeKind.DROPPED), None)
