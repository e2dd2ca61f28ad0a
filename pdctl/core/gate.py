"""What a sender asks of whoever keeps the session table, and tells it; `pdctl.prober` is one."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from pdctl.errors import Cause


class Gate(Protocol):
    """What a sender asks of, and tells to, whoever keeps the session table."""

    def reason_blocked(self, session: str) -> str | None:
        """Why no transfer may go to `session` now, as a sentence; None when one may."""

    def failed(self, session: str, cause: Cause, detail: str) -> None:
        """A transfer to `session` failed."""

    def registered(self, session: str, pointers: Sequence[int] = ()) -> None:
        """The peer has announced `session` anew, with memory at `pointers`: whatever was held against it is over."""

    def passing(self, session: str) -> AbstractAsyncContextManager[None]:
        """Around one transfer: raises SessionBlocked at once, waits for its turn while the session is on trial, and
        tells the table how it ended: well, or by the TransferFailed that leaves the block."""
