"""
Which transfer sessions are trusted, and when to ask a blocked one again.
"""

from __future__ import annotations

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
