"""
Tells what has become of the registry: each change counted, logged and told to whoever listens; the same of each request
that is refused.

Once each, in the order in which they hold. Decides nothing and keeps nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import structlog

from pdctl.core.kinds import ChangeKind
from pdctl.core.lives import Change
from pdctl.core.sayings import CROWD, LIVES, Refusal, crowds, refusal_of
from pdctl.errors import NotReady, PdctlError

Hear = Callable[[Sequence[Change]], None]
HearRefusal = Callable[[PdctlError, Refusal, str, str, str | None], None]

log = structlog.get_logger(__name__)


class Herald:
    """The registrar tells it of changes, the dialects of what they refuse."""

    def __init__(self, count: Callable[[ChangeKind, int], None], count_refusal: Callable[[Refusal], None]) -> None:
        self._count = count
        self._count_refusal = count_refusal
        self._hearers: list[Hear] = []
        self._refusal_hearers: list[HearRefusal] = []

    def subscribe(self, hear: Hear) -> Callable[[], None]:
        """Call `hear` with the changes of each group, in the order of their revisions; returns how to stop it."""
        self._hearers.append(hear)
        return lambda: self._hearers.remove(hear)

    def subscribe_refusals(self, hear: HearRefusal) -> None:
        """Call `hear` with each request that is refused: the error, why, the path, the peer, and the instance where the
        path does not name it."""
        self._refusal_hearers.append(hear)

    def tell(self, changes: Sequence[Change]) -> None:
        for crowd in crowds(changes):
            self._count(crowd[0].kind, len(crowd))
            if len(crowd) <= CROWD:
                for change in crowd:
                    _log(change)
            else:
                _log(crowd[0], seats=len(crowd))
        if changes:
            for hear in tuple(self._hearers):
                hear(changes)

    def refused(self, error: PdctlError, path: str, peer: str, instance: str | None = None) -> None:
        """A dialect is about to answer with this error. NotReady is an answer like another; the rest is news."""
        if isinstance(error, NotReady):
            return
        reason = refusal_of(error)
        self._count_refusal(reason)
        log.warning("request refused", reason=reason.value, path=path, peer=peer, detail=str(error))
        for hear in self._refusal_hearers:
            hear(error, reason, path, peer, instance)


def _log(change: Change, **more: object) -> None:
    """One line; `more` has `seats` where it stands for several."""
    if change.before is not None:
        more["before"] = str(change.before.address)
    if change.why is not None:
        more["why"] = change.why
    log.info(
        LIVES[change.kind],
        instance=change.instance,
        seat=str(change.seat),
        address=str(change.life.address),
        epoch=change.life.epoch,
        **more,
    )
