"""
Which transfer sessions are trusted, and when to ask a blocked one again.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from pdctl.errors import Cause


class Gate(Protocol):
    """What a sender asks of, and tells to, whoever keeps the session table."""

    def reason_blocked(self, session: str) -> str | None:
        """Why no transfer may go to `session` now, as a sentence; None when one may."""

    def failed(self, session: str, cause: Cause, detail: str) -> None:
        """A transfer to `session` failed."""

    def registered(self, session: str) -> None:
        """The peer has announced `session` anew: whatever was held against it is over."""


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
