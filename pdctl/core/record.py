"""
What is known of one session, and what is held against it.

The values that the table in sessions.py moves about: who is out, who is on trial, and what is said when that ends. They
decide nothing: when, and why, the table says.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Generic

from pdctl.core.ejection import Health
from pdctl.core.kinds import Depth, State
from pdctl.core.standing import Change, ChangeKind, Entry, Life, Question, ShownT
from pdctl.errors import Cause


@dataclass(slots=True)
class Block:
    """Why and since when a session is out. `number` counts everything that happened before.

    tries: questions in a row that were not answered well; good: those that were. hold_until: it stays out until then.
    """

    cause: Cause
    detail: str
    since: float
    number: int
    hold_until: float = -math.inf
    relapse: bool = False
    questions: int = 0
    tries: int = 0
    good: int = 0
    asked_at: float = -math.inf
    well_at: float | None = None
    last_answer: str | None = None

    @property
    def dropped(self) -> bool:
        return self.cause is Cause.PEER_CHANGED


NOTHING = Block(Cause.LOCAL, "", 0.0, 0)
"""Stands where nothing is held against a session."""


@dataclass(slots=True)
class Trial:
    """A session that is back on trial, `after` this block. running: transfers that hold a place."""

    after: Block
    number: int
    running: int = 0


@dataclass(slots=True)
class Record(Generic[ShownT]):
    """One session. lifted: what began before this number is about another life, or about one that was lifted since;
    returned: about a time before it came back. well_at: when it was last known to be well, None if never."""

    session: str
    group: str
    wanted_at: float
    health: Health
    life: Life[ShownT] | None = None
    held: Block | Trial | None = None
    asking: Question | None = None
    depth: Depth | None = None
    lifted: int = 0
    returned: int = 0
    well_at: float | None = None

    @property
    def state(self) -> State:
        if self.held is None:
            return State.TRUSTED
        if isinstance(self.held, Trial):
            return State.TRIAL
        return State.DROPPED if self.held.dropped else State.BLOCKED

    @property
    def block(self) -> Block | None:
        return self.held if isinstance(self.held, Block) else None

    @property
    def trial(self) -> Trial | None:
        return self.held if isinstance(self.held, Trial) else None


def older(entry: Entry | None, number: int) -> bool:
    """Whether a transfer began before that. Of one without an entry nothing is known: it is about now."""
    return entry is not None and entry.number < number


def weight(state: State | None) -> tuple[int, int]:
    """How much one session adds to its group's members, and to those of them that are blocked."""
    return (state not in (None, State.DROPPED), state is State.BLOCKED)


def endings(
    kind: ChangeKind, record: Record[ShownT], was: State, held: Block | Trial | None, detail: str, now: float
) -> list[Change]:
    if held is None:
        return []
    block = held if isinstance(held, Block) else held.after
    return [ending(kind, record, was, block, detail, now)]


def ending(kind: ChangeKind, record: Record[ShownT], was: State, block: Block, detail: str, now: float) -> Change:
    before = None if was is State.TRIAL else block.cause
    return Change(
        kind, record.session, block.cause, before, detail, now - block.since, block.questions, was, record.state
    )
