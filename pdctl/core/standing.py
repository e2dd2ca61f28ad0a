"""
What can be said of a transfer session: its state, what answers prove, what changed, and all of it in one sentence.

Values only; `core.sessions` decides them.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Generic, Protocol, TypeVar

from pdctl.core.kinds import Depth, State
from pdctl.errors import Cause

LaterT_contra = TypeVar("LaterT_contra", contravariant=True)


class Life(Protocol[LaterT_contra]):
    """What is known of a peer's process. `engine.base.PeerCard` is one, and `Announced`; both compare with a card."""

    def same_life(self, later: LaterT_contra, /) -> bool:
        """Whether `later` can be the same process."""


ShownT = TypeVar("ShownT", bound=Life[Any])
"""What an answer shows: itself a life with which the next answer can be compared."""


@dataclass(frozen=True, slots=True)
class Question:
    """One question that is being asked. A failure or a registration that comes while it is makes its answer void."""

    session: str
    number: int


@dataclass(frozen=True, slots=True)
class Well(Generic[ShownT]):
    """The peer answered, and this is what it proved. `life` is None where the question shows none: a handshake only."""

    life: ShownT | None
    depth: Depth


@dataclass(frozen=True, slots=True)
class Unwell:
    """The peer did not answer as it should."""

    cause: Cause
    detail: str


class Turn(StrEnum):
    """What a transfer may do that wants to begin now."""

    GO = "go"
    WAIT = "wait"  # the session is on trial, and its places are taken: ask again when one is left
    NO = "no"  # it is blocked: `Entry.reason`


@dataclass(frozen=True, slots=True)
class Entry:
    """What `SessionTable.enter` says to one transfer, and by what its end is recognised.

    number: counts everything that happened before it began. trial: the trial of which it holds a place.
    """

    session: str
    turn: Turn
    number: int
    reason: str | None = None
    trial: int | None = None


class ChangeKind(StrEnum):
    """What can happen to a session's standing; the last four are about many."""

    BLOCKED = "blocked"  # trusted or on trial until now, a transfer failed
    DROPPED = "dropped"  # another life answers there, or the registry says that its own is over
    RECOVERED = "recovered"  # blocked until now, answers proved the peer well: let back, perhaps on trial
    TRIAL_PASSED = "trial_passed"  # on trial until now, a transfer succeeded or time went by
    LIFTED = "lifted"  # blocked, dropped or on trial until now, the peer has registered anew or a hand lifted it
    FORGOTTEN = "forgotten"  # blocked or on trial until now, nobody has asked for it, or the table is full
    PANIC_BEGAN = "panic_began"  # too many of a group are blocked: all of it is served
    PANIC_ENDED = "panic_ended"
    DOUBT_BEGAN = "doubt_began"  # the fault may be here: deadlines are stretched, time-outs put nobody out
    DOUBT_ENDED = "doubt_ended"


@dataclass(frozen=True, slots=True)
class Change:
    """One session's standing has changed: to be counted and logged once, by the shell.

    cause: what holds it blocked from now on (BLOCKED, DROPPED) or did until now; None for panic and doubt, where
    `session` is empty too. before: the cause that held it BLOCKED or DROPPED until now, None if nothing did.
    was, state: how it stood, and stands. blocked_s: seconds since the first failure of this block.
    """

    kind: ChangeKind
    session: str
    cause: Cause | None
    before: Cause | None
    detail: str
    blocked_s: float = 0.0
    questions: int = 0
    was: State = State.TRUSTED
    state: State = State.TRUSTED
    group: str = ""


@dataclass(frozen=True, slots=True)
class Standing:
    """All about one session, as of one moment.

    cause, detail, since_s: why, and for how long, it has been out; of a session on trial, why it was.
    strikes, ejections: failures since it was well, and how often it was put out, within memory.
    questions: since it was put out; next_question_s: None when none will come by itself, or one is being `asked`.
    held_s: for how much longer no answer lets it back. good: good answers in a row.
    depth: of its last good answer. served: transfers may go there (trusted, on trial, or its group panics).
    """

    session: str
    state: State = State.TRUSTED
    group: str = ""
    cause: Cause | None = None
    detail: str = ""
    since_s: float = 0.0
    strikes: int = 0
    ejections: int = 0
    questions: int = 0
    next_question_s: float | None = None
    asking: bool = False
    held_s: float = 0.0
    good: int = 0
    last_answer: str | None = None
    depth: Depth | None = None
    served: bool = True

    @property
    def sentence(self) -> str:
        """For whoever wanted to send there, the log and the page."""
        if self.cause is None:
            return "trusted"
        since = f"{words(self.cause)} ({self.detail}) {self.since_s:.1f} s ago{self._record}"
        if self.state is State.TRIAL:
            return f"on trial after {since}"
        if not self.asking and self.next_question_s is None:
            return f"{since}; blocked until the peer registers anew"
        return f"{since}; {self._outlook}"

    @property
    def _record(self) -> str:
        strikes = f", {_times(self.strikes, 'strike')}" if self.strikes else ""
        return strikes + (f", out {self.ejections} times of late" if self.ejections > 1 else "")

    @property
    def _outlook(self) -> str:
        asked = f"asked {_times(self.questions, 'time')}"
        if self.last_answer is not None:
            asked += f" (last answer: {self.last_answer})"
        if self.held_s > 0:
            asked = f"held for {self.held_s:.1f} s; {asked}"
        if self.asking:
            return f"{asked}, being asked now"
        return f"{asked}, next question in {self.next_question_s:.1f} s"


def words(cause: Cause) -> str:
    return cause.replace("_", " ")


def _times(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"
