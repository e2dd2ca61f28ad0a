"""
Which transfer sessions are trusted, and when to ask a blocked one again.

No sockets, no clock, no logging, no locks. Time arrives as `now` (seconds, monotonic, any zero); what happened leaves
as a list of `Change`.

    TRUSTED --a transfer failed--> BLOCKED --a question proved it well, or it registered anew--> TRUSTED
    BLOCKED --another life answers--> DROPPED --it registered anew--> TRUSTED
    BLOCKED --nobody wants it for idle_timeout_s, or the table is full--> (forgotten: TRUSTED until it fails again)

A session that the table does not hold is trusted. What an answer proves is only as good as the card that it shows
(MOONCAKE_FACTS H5, H6: any process on that port answers the handshake). So the card last seen while the session was
trusted is remembered, and an answer that cannot be the same life never lifts. Without a remembered card the first
answer lifts, and its card is what the next one is held against.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from enum import IntEnum, StrEnum
from typing import Generic, Protocol, Self, TypeVar

from pdctl.errors import Cause, ConfigError


class Gate(Protocol):
    """What a sender asks of, and tells to, whoever keeps the session table."""

    def reason_blocked(self, session: str) -> str | None:
        """Why no transfer may go to `session` now, as a sentence; None when one may."""

    def failed(self, session: str, cause: Cause, detail: str) -> None:
        """A transfer to `session` failed."""

    def registered(self, session: str) -> None:
        """The peer has announced `session` anew: whatever was held against it is over."""


@dataclass(frozen=True, slots=True)
class ProbePolicy:
    """When a blocked session is asked, for how long, and how many at once.

    enabled: off means that only a registration lifts, as with an engine that nobody can ask.
    interval_s: wait before the first question; doubled after each that was not answered well. 100 ms, because an answer
        costs 0.3 ms and a peer that hiccupped should be back well within a second (stock SGLang: 30 s).
    max_interval_s: where doubling ends. 30 s: a peer down for hours costs two questions a minute. Below interval_s it
        means interval_s: who sets stock's own 60 s for the first must not be refused for our default of the second.
    idle_timeout_s: a blocked session that no request has wanted for so long is forgotten: a restarted peer comes back
        under a new session, and nobody ever registers the old one again. 10 minutes is above every request's time-out.
    deadline_s: what one question may take. A time-out means unknown, not dead: the peer's listener serves one
        connection at a time, and one idle connection of a stranger delays it 5 s (MOONCAKE_FACTS 5.2). 1 s is 3,000
        times the usual answer; waiting longer would only hold a place that another question can use.
    jitter: each wait is shortened by a random share of at most this, so that sessions which failed together do not
        ask together for ever. Shortened, never lengthened: max_interval_s stays a bound.
    max_concurrent: questions in flight. 64 hung peers hold every place for one deadline at first; at max_interval_s
        it takes 64 * 30 of them to do so.
    max_sessions: what the table holds at most, about 0.5 KB each; see SessionTable for what happens there.
    """

    enabled: bool = True
    interval_s: float = 0.1
    max_interval_s: float = 30.0
    idle_timeout_s: float = 600.0
    deadline_s: float = 1.0
    jitter: float = 0.1
    max_concurrent: int = 64
    max_sessions: int = 65_536

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name.endswith("_s") and not (math.isfinite(value) and value > 0):
                raise ConfigError(f"probe {field.name} is {value}: give a number of seconds above 0")
            if field.name.startswith("max_") and value < 1 and field.name != "max_interval_s":
                raise ConfigError(f"probe {field.name} is {value}: give at least 1")
        if not 0 <= self.jitter < 1:
            raise ConfigError(f"probe jitter is {self.jitter}: give a share from 0 up to, not including, 1")


class Depth(IntEnum):
    """What an answer proves, from least to most.

    HANDSHAKE: somebody answers; an echo server would. It never lifts anything. IDENTITY: what answers shows the life
    that is known. DATA: bytes reached that life's memory.
    """

    HANDSHAKE = 1
    IDENTITY = 2
    DATA = 3


class Life(Protocol):
    """What a peer's answer shows of its process; `engine.base.PeerCard` is one."""

    def same_life(self, later: Self, /) -> bool:
        """Whether `later` can be the same process."""


LifeT = TypeVar("LifeT", bound=Life)


@dataclass(frozen=True, slots=True)
class Question:
    """One question that is being asked. A failure that comes while it is makes its answer void."""

    session: str
    number: int


@dataclass(frozen=True, slots=True)
class Well(Generic[LifeT]):
    """The peer answered and showed this."""

    life: LifeT


@dataclass(frozen=True, slots=True)
class Unwell:
    """The peer did not answer as it should."""

    cause: Cause
    detail: str


class ChangeKind(StrEnum):
    """What can happen to a session's standing."""

    BLOCKED = "blocked"  # trusted until now, a transfer failed
    DROPPED = "dropped"  # another life answers there: only a registration helps
    RECOVERED = "recovered"  # blocked until now, an answer proved the peer well
    LIFTED = "lifted"  # blocked until now, the peer has registered anew
    FORGOTTEN = "forgotten"  # blocked until now, nobody has asked for it, or the table is full


@dataclass(frozen=True, slots=True)
class Change:
    """One session's standing has changed: to be counted and logged once, by the shell.

    `cause` is what holds it blocked from now on (BLOCKED, DROPPED) or held it until now (the others); `before` is the
    cause that held it until now, None if nothing did. `blocked_s`: seconds since the first failure of this block.
    """

    kind: ChangeKind
    session: str
    cause: Cause
    before: Cause | None
    detail: str
    blocked_s: float = 0.0
    questions: int = 0


@dataclass(slots=True)
class _Block:
    """Why and since when a session is blocked. `next_at` counts only while nothing is being asked."""

    session: str
    cause: Cause
    detail: str
    since: float
    next_at: float = math.inf
    asking: Question | None = None
    questions: int = 0
    last_answer: Cause | None = None

    @property
    def dropped(self) -> bool:
        return self.cause is Cause.PEER_CHANGED


@dataclass(slots=True)
class _Record(Generic[LifeT]):
    wanted_at: float
    life: LifeT | None = None
    block: _Block | None = None

    @property
    def dropped(self) -> bool:
        return self.block is not None and self.block.dropped


class SessionTable(Generic[LifeT]):
    """The sessions that are blocked, and the cards of those that are not.

    At `max_sessions` the session that no request has wanted for longest makes room. If it was blocked it is trusted
    again, and a request for it, should one ever come, costs one more failed transfer; refusing to hold the new failure
    instead would cost one for every request of a session that is wanted now. Dropped sessions go last, and never by
    idleness: what they guard is another process's memory.

    `random` gives the next chance, from 0 up to 1: `random.random` of a real source, or of a seeded one.
    """

    def __init__(self, policy: ProbePolicy, random: Callable[[], float]) -> None:
        self.policy = policy
        self._random = random
        self._questions = 0
        # Ordered by wanted_at, so that the idlest are found without a search.
        self._records: OrderedDict[str, _Record[LifeT]] = OrderedDict()
        # (next_at, session); an entry whose block says otherwise by now is void, and leaves when it comes to the top.
        self._agenda: list[tuple[float, str]] = []

    def __len__(self) -> int:
        return len(self._records)

    def blocked(self) -> dict[str, Cause]:
        """Every blocked session, dropped ones included, with its cause."""
        return {session: record.block.cause for session, record in self._records.items() if record.block}

    # What happens to a session

    def fail(self, session: str, cause: Cause, detail: str, now: float) -> list[Change]:
        """A transfer failed. Blocks if the cause speaks of the peer; the first cause stays, later ones are symptoms."""
        if not cause.speaks_of_peer:
            return []
        record, changes = self._wanted(session, now)
        if record.block is None:
            return [*changes, self._block(session, record, cause, detail, now)]
        if cause is Cause.PEER_CHANGED:
            return changes + self._drop(record, record.block, detail, now)
        if record.block.asking:
            self._schedule(record.block, now)
        return changes

    def registered(self, session: str, now: float) -> list[Change]:
        """The peer has announced the session anew: it is a life of which nothing is known yet."""
        record = self._records.pop(session, None)
        if record is None or record.block is None:
            return []
        return [_ending(ChangeKind.LIFTED, record.block, "the peer has registered anew", now)]

    def remember(self, session: str, life: LifeT, now: float) -> list[Change]:
        """This is what the peer shows of itself. Learned after a failure it says nothing of the life that failed."""
        record, changes = self._wanted(session, now)
        if record.block is None:
            record.life = life
        return changes

    def requested(self, session: str, now: float) -> None:
        """A request wants this session: it is not idle."""
        if session in self._records:
            self._wanted(session, now)

    # Questions and answers

    @property
    def next_due(self) -> float | None:
        """When the next question is to be put; None while there is none."""
        block = self._next()
        return None if block is None else block.next_at

    def ask_due(self, now: float, limit: int) -> list[Question]:
        """At most `limit` questions that are due, the most overdue first. They are being asked from now on."""
        questions: list[Question] = []
        while len(questions) < limit and (block := self._next()) is not None and block.next_at <= now:
            self._questions += 1
            block.questions += 1
            block.asking = Question(block.session, self._questions)
            questions.append(block.asking)
        return questions

    def answered(self, question: Question, verdict: Well[LifeT] | Unwell, now: float) -> list[Change]:
        """How a question ended. Late news about a block that is over, or that was renewed meanwhile, is not news."""
        record = self._records.get(question.session)
        if record is None or record.block is None or record.block.asking != question:
            return []
        if isinstance(verdict, Well):
            return self._answered_well(record, record.block, verdict.life, now)
        if verdict.cause is Cause.PEER_CHANGED:
            return self._drop(record, record.block, verdict.detail, now)
        record.block.last_answer = verdict.cause
        self._schedule(record.block, now)
        return []

    def forget_idle(self, now: float) -> list[Change]:
        """Let go of the sessions that no request has wanted for `idle_timeout_s`.

        There is no moment of its own for it: a blocked session is asked at least every `max_interval_s`, and whoever
        does so calls this first. With probing off nothing is forgotten: to forget is to trust again.
        """
        changes: list[Change] = []
        while self.policy.enabled and self._records:
            session, record = next(iter(self._records.items()))
            if now - record.wanted_at < self.policy.idle_timeout_s:
                break
            if record.dropped:
                self._wanted(session, now)
                continue
            changes += self._forget(session, "no request has wanted it", now)
        return changes

    def reason_blocked(self, session: str, now: float) -> str | None:
        """Why no transfer may go there now, as a sentence for whoever wanted one; None when one may."""
        record = self._records.get(session)
        if record is None or record.block is None:
            return None
        block = record.block
        return f"{_words(block.cause)} ({block.detail}) {now - block.since:.1f} s ago; {self._outlook(block, now)}"

    # How

    def _outlook(self, block: _Block, now: float) -> str:
        if block.dropped or not self.policy.enabled:
            return "blocked until the peer registers anew"
        asked = f"asked {block.questions} time{'' if block.questions == 1 else 's'}"
        if block.last_answer is not None:
            asked += f" (last answer: {_words(block.last_answer)})"
        if block.asking:
            return f"{asked}, being asked now"
        return f"{asked}, next question in {max(0.0, block.next_at - now):.1f} s"

    def _block(self, session: str, record: _Record[LifeT], cause: Cause, detail: str, now: float) -> Change:
        record.block = _Block(session, cause, detail, since=now)
        self._schedule(record.block, now)
        kind = ChangeKind.DROPPED if record.dropped else ChangeKind.BLOCKED
        return Change(kind, session, cause, None, detail)

    def _answered_well(self, record: _Record[LifeT], block: _Block, life: LifeT, now: float) -> list[Change]:
        if record.life is not None and not record.life.same_life(life):
            return self._drop(record, block, "another process, or another life, answers there", now)
        record.block, record.life = None, life
        return [_ending(ChangeKind.RECOVERED, block, "an answer has proved it well", now)]

    def _drop(self, record: _Record[LifeT], block: _Block, detail: str, now: float) -> list[Change]:
        if block.dropped:
            return []
        cause = Cause.PEER_CHANGED
        record.block = replace(block, cause=cause, detail=detail, asking=None, next_at=math.inf)
        return [
            Change(ChangeKind.DROPPED, block.session, cause, block.cause, detail, now - block.since, block.questions)
        ]

    def _schedule(self, block: _Block, now: float) -> None:
        """Set the time of the next question, counted from now, unless none may help."""
        block.asking = None
        if block.dropped or not self.policy.enabled:
            return
        # 2.0 ** 1024 overflows, and a peer down for a working day gets there at 30 s a question.
        doubled_s = self.policy.interval_s * 2.0 ** min(block.questions, 64)
        ceiling_s = max(self.policy.interval_s, self.policy.max_interval_s)
        wait_s = min(doubled_s, ceiling_s) * (1 - self.policy.jitter * self._random())
        block.next_at = now + wait_s
        heapq.heappush(self._agenda, (block.next_at, block.session))

    def _next(self) -> _Block | None:
        """The block to be asked about first; void entries above it leave the agenda."""
        while self._agenda:
            at, session = self._agenda[0]
            record = self._records.get(session)
            if record and record.block and record.block.asking is None and record.block.next_at == at:
                return record.block
            heapq.heappop(self._agenda)
        return None

    def _wanted(self, session: str, now: float) -> tuple[_Record[LifeT], list[Change]]:
        """The session's record, made if there is none, as the one wanted last; and what making room for it cost."""
        record = self._records.get(session)
        changes = self._make_room(now) if record is None else []
        if record is None:
            record = self._records[session] = _Record(now)
        record.wanted_at = now
        self._records.move_to_end(session)
        return record, changes

    def _make_room(self, now: float) -> list[Change]:
        if len(self._records) < self.policy.max_sessions:
            return []
        idlest = next(iter(self._records))
        session = next((name for name, record in self._records.items() if not record.dropped), idlest)
        return self._forget(session, "the table is full", now)

    def _forget(self, session: str, detail: str, now: float) -> list[Change]:
        block = self._records.pop(session).block
        return [] if block is None else [_ending(ChangeKind.FORGOTTEN, block, detail, now)]


def _ending(kind: ChangeKind, block: _Block, detail: str, now: float) -> Change:
    return Change(kind, block.session, block.cause, block.cause, detail, now - block.since, block.questions)


def _words(cause: Cause) -> str:
    return cause.replace("_", " ")
