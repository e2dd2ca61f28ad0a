"""
Asks blocked sessions "are you well, and still who you were?", and tells the table. The shell around core.sessions.

It is the Gate that senders use. It never transfers, never decides who is trusted, and never waits for one peer before
it asks another. Everything here runs on one event loop; from another thread, go through `call_soon_threadsafe`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

import structlog

from pdctl.core.kinds import Depth, State
from pdctl.core.sessions import SessionTable
from pdctl.core.standing import Change, ChangeKind, Entry, Question, Standing, Turn, Unwell, Well
from pdctl.engine.base import Announced, PeerCard, Proof
from pdctl.errors import Cause, LimitReached, SessionBlocked, TransferFailed
from pdctl.lag import LoopLag
from pdctl.metrics import Metrics

log = structlog.get_logger(__name__)

Hear = Callable[[Sequence[Change]], None]

_EVENTS = {
    ChangeKind.BLOCKED: "session blocked: requests for it fail at once until it is well",
    ChangeKind.DROPPED: "session dropped: the life it stands for is over, it must register anew",
    ChangeKind.RECOVERED: "session recovered",
    ChangeKind.TRIAL_PASSED: "session trusted again",
    ChangeKind.LIFTED: "session lifted",
    ChangeKind.FORGOTTEN: "blocked session forgotten",
    ChangeKind.PANIC_BEGAN: "too many sessions blocked: all of the group are served",
    ChangeKind.PANIC_ENDED: "enough sessions well again: blocked ones are refused",
    ChangeKind.DOUBT_BEGAN: "the fault may be here: time-outs block nobody, deadlines are stretched",
    ChangeKind.DOUBT_ENDED: "time-outs speak of the peer again",
}
# 100 handshakes begun at once held the loop for 12 ms, in handfuls of 4 for at most 6 (2 shared cores, real engines).
_AT_ONCE = 4
# 50 proofs at once slow each other: with 64 places they took 17 to 26 s together, with 16 only 2.3 to 2.9 s, and all
# were over at the same time. A question that hangs is not young for long, and keeps nobody else waiting.
_MOST_YOUNG, _YOUNG_S = 16, 0.1
_BAD_NEWS = (ChangeKind.BLOCKED, ChangeKind.DROPPED, ChangeKind.PANIC_BEGAN, ChangeKind.DOUBT_BEGAN)
# Whoever is asked says what the time ran out on, if it is let; one that forgets its deadline is held to this.
_OVERTIME = 1.1


class Asks(Protocol):
    """`engine.asking.Asking`: how sessions are asked. Its questions can be cancelled at any moment."""

    @property
    def held(self) -> tuple[str, ...]: ...

    async def prove(self, session: str, *, deadline_s: float) -> Proof: ...

    async def card(self, session: str, *, deadline_s: float) -> PeerCard | None: ...


@dataclass(frozen=True, slots=True)
class Answer:
    """What one question has brought.

    cause, detail: why the peer is not well; None and "" when it is. how, cured: as in the Proof that it gave.
    depth: None without a proof. standing: of the session, with the answer in it.
    """

    session: str
    cause: Cause | None
    detail: str
    depth: Depth | None
    how: str
    cured: str | None
    seconds: float
    standing: Standing

    @property
    def is_well(self) -> bool:
        return self.cause is None


class Prober:
    """One engine's session table, kept true. `run` is its only loop; without it nothing is lifted but by registration.

    `asks` gets the table's deadline and is also held to it from here: an engine that forgets its own costs nothing.
    `known` is the card of the life that transfers are meant for, if the engine has one pinned: what an answer after a
    failure is held against. Who has no such look-up calls `remember` whenever a trusted session shows its card.
    """

    def __init__(
        self,
        table: SessionTable[PeerCard],
        asks: Asks,
        *,
        clock: Callable[[], float],
        metrics: Metrics,
        known: Callable[[str], PeerCard | None] = lambda _: None,
        lag: LoopLag | None = None,
    ) -> None:
        self._table = table
        self._policy = table.policy
        self._asks = asks
        self._known = known
        self._clock = clock
        self._lag = lag or LoopLag(clock)
        self._metrics = metrics.sessions
        self._metrics.follow(
            lambda: len(table), lambda: len(table.panicking()), lambda: table.doubting, lambda: len(asks.held)
        )
        metrics.out.follow(self.longest_out_s)
        self._came = metrics.loop.came
        self._asking: dict[asyncio.Task[object], float] = {}  # when each was begun, in that order
        self._by_hand = 0
        self._unseen: dict[str, None] = {}  # registered, and to be looked at
        self._looking: dict[str, object] = {}
        self._news = asyncio.Event()  # something may be due earlier than `run` thinks
        self._turns: dict[str, asyncio.Event] = {}
        self._hearers: list[Hear] = []

    # The Gate

    def reason_blocked(self, session: str) -> str | None:
        now = self._clock()
        self._table.requested(session, now)
        reason = self._table.reason_blocked(session, now)
        if reason is not None:
            self._news.set()  # being wanted, it is asked sooner
        return reason

    def failed(self, session: str, cause: Cause, detail: str) -> None:
        self._failed(session, cause, detail, None)

    def succeeded(self, session: str) -> None:
        """A transfer to `session` landed, of an engine that asks nobody before it begins one."""
        self._tell(self._table.succeed(session, self._clock()))

    def registered(self, session: str, pointers: Sequence[int] = ()) -> None:
        life = Announced(session, tuple(pointers)) if pointers else None
        self._tell(self._table.registered(session, self._clock(), life))
        self._look_soon(session)

    def passing(self, session: str) -> AbstractAsyncContextManager[None]:
        return _Passing(self._turn, self._passed, session)

    def _passed(self, entry: Entry, error: BaseException | None) -> None:
        try:
            if isinstance(error, TransferFailed):
                self._failed(entry.session, error.cause, error.detail, entry)
            elif error is None:
                self._tell(self._table.succeed(entry.session, self._clock(), entry))
        finally:
            self._table.leave(entry)
            self._next_turn(entry.session)

    # For the API, the command line and the registry's news

    def standing(self, session: str) -> Standing:
        return self._table.standing(session, self._clock())

    def sessions(self) -> list[str]:
        """Every session that is held, sorted."""
        return sorted(self._table)

    def longest_out_s(self) -> float:
        """How long the session has been blocked that has been for longest. Dropped ones are not out, they are over."""
        now = self._clock()
        found = (self._table.standing(session, now) for session in self._table.blocked())
        return max((standing.since_s for standing in found if standing.state is State.BLOCKED), default=0.0)

    @property
    def panicking(self) -> tuple[str, ...]:
        """Groups of which so many are blocked that all are served."""
        return self._table.panicking()

    @property
    def doubting(self) -> bool:
        """Whether the fault may be here."""
        return self._table.doubting

    def announce(self, session: str, group: str = "") -> None:
        """The session is there, and of this group: see ProbePolicy.max_ejected."""
        self._tell(self._table.announce(session, self._clock(), group))

    def remember(self, session: str, card: PeerCard) -> None:
        """The card that a trusted session shows."""
        self._tell(self._table.remember(session, card, self._clock()))

    def superseded(self, session: str, detail: str) -> None:
        """The registry says that the life which the session stands for is over, and why."""
        self._tell(self._table.supersede(session, detail, self._clock()))

    def lift(self, session: str, detail: str) -> bool:
        """Somebody vouches for it by hand; whether anything was held against it."""
        changes = self._table.lift(session, detail, self._clock())
        self._tell(changes)
        return any(change.kind is ChangeKind.LIFTED for change in changes)

    async def ask_now(self, session: str) -> Answer:
        """Ask, whatever its standing is, and let the answer count. Raises LimitReached; never TransferFailed."""
        if self._by_hand >= self._policy.max_concurrent:
            raise LimitReached(f"{self._by_hand} questions are being asked by hand: wait for their answers")
        self._remember_known(session)
        self._by_hand += 1
        try:
            return await self._put(self._table.ask_now(session, self._clock()))
        finally:
            self._by_hand -= 1

    def subscribe(self, hear: Hear) -> Callable[[], None]:
        """Call `hear` with the changes of each moment, after they are counted; returns how to stop it."""
        self._hearers.append(hear)
        return lambda: self._hearers.remove(hear)

    # The loop

    async def run(self) -> None:
        """Ask whoever is due, until cancelled. Leaves no task behind."""
        if not self._policy.enabled:
            log.warning("probing is off: a blocked session stays blocked until its peer registers anew")
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._lag.run(self._ticked), name="loop lag")
            while True:
                self._news.clear()
                self._begin(tasks)
                await asyncio.sleep(0)  # transfers and answers have their turn between two handfuls
                await self._something_to_do()

    def _begin(self, tasks: asyncio.TaskGroup) -> None:
        """What time has brought about, and a handful of the questions for which there is a place."""
        now = self._clock()
        self._tell(self._table.tick(now))
        for question in self._table.ask_due(now, min(self._free, self._unhurried(now), _AT_ONCE)):
            self._start(tasks, f"probe {question.session}", self._put(question))
        for _ in range(_AT_ONCE):
            if self._may_look and self._unhurried(now):
                session = next(iter(self._unseen))
                del self._unseen[session]
                self._start(tasks, f"first look at {session}", self._look_at(session))

    def _start(self, tasks: asyncio.TaskGroup, name: str, work: Coroutine[Any, Any, object]) -> None:
        task: asyncio.Task[object] = tasks.create_task(work, name=name)
        self._asking[task] = self._clock()
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[object]) -> None:
        del self._asking[task]
        self._news.set()

    @property
    def _free(self) -> int:
        return self._policy.max_concurrent - len(self._asking)

    def _young(self, now: float) -> list[float]:
        """When those were begun that are young, the youngest first."""
        return list(itertools.takewhile(lambda begun: now - begun < _YOUNG_S, reversed(self._asking.values())))

    def _unhurried(self, now: float) -> int:
        """How many more may be young at once."""
        return _MOST_YOUNG - len(self._young(now))

    async def _something_to_do(self) -> None:
        """Wakes for news, and when something is due for which there is a place; never to look."""
        now = self._clock()
        due = self._table.next_due if self._free > 0 else None
        wait_s = 0.0 if self._may_look else None if due is None else due - now
        young = self._young(now)
        if wait_s is not None and len(young) >= _MOST_YOUNG:
            wait_s = max(wait_s, young[_MOST_YOUNG - 1] + _YOUNG_S - now)
        if wait_s is None or wait_s > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._news.wait()

    # Questions

    async def _put(self, question: Question) -> Answer:
        """Put one question and hand the answer to the table."""
        asked_at, session = self._clock(), question.session
        try:
            verdict, proof = await self._verdict(session)
        except asyncio.CancelledError:
            # without an answer the session would wait for it for ever
            self._answered(question, Unwell(Cause.LOCAL, "whoever asked has left"))
            raise
        cause = self._answered(question, verdict)
        seconds, standing = self._clock() - asked_at, self.standing(session)
        depth, how, cured = (None, "", None) if proof is None else (proof.depth, proof.how, proof.cured)
        self._metrics.answered(depth if cause is None else None, cause, seconds)
        result, reached = "well" if cause is None else cause.value, None if depth is None else depth.name.lower()
        log.debug("session asked", session=session, result=result, depth=reached, how=how, seconds=round(seconds, 4))
        if cured is not None:
            self._metrics.cured()
            log.warning("link mended on this side", session=session, cured=cured)
        detail = verdict.detail if isinstance(verdict, Unwell) else standing.detail if cause is not None else ""
        return Answer(session, cause, detail, depth, how, cured, seconds, standing)

    def _answered(self, question: Question, verdict: Well[PeerCard] | Unwell) -> Cause | None:
        """Tell the table; what the answer counts as: well, unless the card it showed was another life's."""
        self._heed(self._lag.late_s)
        changes = self._table.answered(question, verdict, self._clock())
        self._tell(changes)
        self._news.set()
        if isinstance(verdict, Unwell):
            return verdict.cause
        return next((change.cause for change in changes if change.kind is ChangeKind.DROPPED), None)

    async def _verdict(self, session: str) -> tuple[Well[PeerCard] | Unwell, Proof | None]:
        deadline_s = self._table.deadline_s
        try:
            async with asyncio.timeout(deadline_s * _OVERTIME):
                proof = await self._asks.prove(session, deadline_s=deadline_s)
        except TransferFailed as failure:
            return Unwell(failure.cause, failure.detail), None
        except TimeoutError:
            return Unwell(Cause.TIMED_OUT, f"no answer in {deadline_s:g} s"), None
        except asyncio.CancelledError as stray:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            return self._own_fault(session, stray), None  # from inside the question: nobody has cancelled us
        except Exception as defect:
            return self._own_fault(session, defect), None
        shows_nothing = not proof.card.data_port and not proof.card.regions
        return Well(None if shows_nothing else proof.card, proof.depth), proof

    def _own_fault(self, session: str, defect: BaseException) -> Unwell:
        log.warning("question failed on our side", session=session, exc_info=defect)
        return Unwell(Cause.LOCAL, repr(defect))

    # First looks

    @property
    def _may_look(self) -> bool:
        """Half of the places stay free for those who are blocked."""
        return bool(self._unseen) and len(self._asking) < max(1, self._policy.max_concurrent // 2)

    def _look_soon(self, session: str) -> None:
        self._looking.pop(session, None)  # whoever answers that look may be the life before
        if self._policy.enabled:
            self._unseen[session] = None
            while len(self._unseen) > self._policy.max_sessions:
                del self._unseen[next(iter(self._unseen))]
            self._news.set()

    async def _look_at(self, session: str) -> None:
        """Learn who is there while nothing has failed yet: what an answer after a failure is held against."""
        look = self._looking[session] = object()
        card: PeerCard | None = None
        try:
            async with asyncio.timeout(self._table.deadline_s):
                card = await self._asks.card(session, deadline_s=self._table.deadline_s)
        except (TransferFailed, TimeoutError) as failure:
            log.debug("a new link was not answered", session=session, why=str(failure))
        except Exception as defect:
            self._own_fault(session, defect)
        if self._looking.get(session) is look:
            del self._looking[session]
            if card is not None:
                self.remember(session, card)

    # Transfers

    async def _turn(self, session: str) -> Entry:
        """Wait for a place while the session is on trial. Raises SessionBlocked."""
        while True:
            now = self._clock()
            self._table.requested(session, now)
            entry = self._table.enter(session, now)
            if entry.turn is Turn.GO:
                return entry
            if entry.reason is not None:
                self._news.set()
                raise SessionBlocked(session, entry.reason)
            await self._turns.setdefault(session, asyncio.Event()).wait()

    def _next_turn(self, session: str) -> None:
        if (waiting := self._turns.pop(session, None)) is not None:
            waiting.set()

    def _failed(self, session: str, cause: Cause, detail: str, entry: Entry | None) -> None:
        if cause.speaks_of_peer:
            self._heed(self._lag.late_s)
            self._remember_known(session)
        self._tell(self._table.fail(session, cause, detail, self._clock(), entry))
        self._news.set()

    def _remember_known(self, session: str) -> None:
        if (card := self._known(session)) is not None:
            self.remember(session, card)

    # News

    def _ticked(self, late_s: float) -> None:
        self._came(late_s)
        self._heed(late_s)

    def _heed(self, late_s: float) -> None:
        """Our own loop is late: before anybody is judged by a deadline of ours, the table must know."""
        if late_s > self._policy.lag_s:
            self._tell(self._table.lagged(late_s, self._clock()))

    def _tell(self, changes: Sequence[Change]) -> None:
        """Count and log each change: the only place that does."""
        if not changes:
            return
        for change in changes:
            self._metrics.changed(change)
            _log(change)
            for session in [change.session] if change.session else list(self._turns):
                self._next_turn(session)
        for hear in list(self._hearers):
            hear(changes)


class _Passing:
    """A class, since a generator's context costs three times as much, and each room has one."""

    __slots__ = ("_ended", "_entered", "_entry", "_session")

    def __init__(
        self,
        entered: Callable[[str], Awaitable[Entry]],
        ended: Callable[[Entry, BaseException | None], None],
        session: str,
    ) -> None:
        self._entered, self._ended, self._session = entered, ended, session

    async def __aenter__(self) -> None:
        self._entry = await self._entered(self._session)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self._ended(self._entry, error)


def _log(change: Change) -> None:
    say = log.warning if change.kind in _BAD_NEWS else log.info
    if not change.session:
        say(_EVENTS[change.kind], why=change.detail, **({"group": change.group} if change.group else {}))
        return
    say(
        _EVENTS[change.kind],
        session=change.session,
        cause=None if change.cause is None else change.cause.value,
        detail=change.detail,
        state=change.state.value,
        blocked_s=round(change.blocked_s, 3),
        questions=change.questions,
    )
