"""
The judgement of links in one service: the session table, its prober, and the wire on which both are seen.

A prefill rank has one for its own engine; the sidecar has one for engines that move their KV themselves, and lets it
hear what the registry knows: a life that is over takes its session with it (a rank says its session in its lease, under
`SESSION_KEY`), so that nothing is ever lifted for a process that another has replaced.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from random import SystemRandom
from typing import Any

from fastapi import APIRouter

from pdctl.config import Settings
from pdctl.core.kinds import ChangeKind
from pdctl.core.lives import ENDINGS, Change, Life
from pdctl.core.naming import SESSION_KEY
from pdctl.core.sessions import SessionTable
from pdctl.dialects import sessions
from pdctl.dialects.strict import Refused
from pdctl.dialects.watch import Broadcast
from pdctl.engine.asking import Asking
from pdctl.engine.base import PeerCard
from pdctl.metrics import Metrics
from pdctl.prober import Prober


@dataclass(frozen=True, slots=True)
class Links:
    """Stand its `loops` beside the server."""

    prober: Prober
    router: APIRouter
    _news: Broadcast

    @classmethod
    def open(
        cls,
        settings: Settings,
        asking: Asking,
        metrics: Metrics,
        refused: Refused,
        known: Callable[[str], PeerCard | None] = lambda _: None,
    ) -> Links:
        """`known`: the card that an engine has pinned for a session, where there is an engine."""
        table: SessionTable[PeerCard] = SessionTable(settings.probe, SystemRandom().random)
        prober = Prober(table, asking, clock=time.monotonic, metrics=metrics, known=known)
        news = sessions.broadcast(prober, metrics, settings.watch)
        return cls(prober, sessions.router(prober, news, refused), news)

    @property
    def loops(self) -> dict[str, Coroutine[Any, Any, None]]:
        """By name; each to be awaited once."""
        return {"prober": self.prober.run(), "links": self._news.run()}

    def heard(self, changes: Iterable[Change]) -> None:
        """What the registry says of lives that have a session."""
        for change in changes:
            over = [change.life] if change.kind in ENDINGS else []
            for life in (*over, change.before):
                if life is not None and (session := session_of(life)) is not None:
                    self.prober.superseded(session, f"{change.instance} {life.seat}: {_end(change)}")
            if change.kind not in ENDINGS and (session := session_of(change.life)) is not None:
                self._speaks(change, session)

    def _speaks(self, change: Change, session: str) -> None:
        self.prober.announce(session, change.instance)
        if change.kind in (ChangeKind.SEATED, ChangeKind.REPLACED):
            self.prober.registered(session)


def session_of(life: Life) -> str | None:
    """Under which its engine is reached, if it has said so."""
    said = life.claim.metadata.get(SESSION_KEY)
    return said if isinstance(said, str) and sessions.is_session(said) else None


def _end(change: Change) -> str:
    if change.kind is ChangeKind.REPLACED:
        return f"epoch {change.life.epoch} holds its seat"
    return change.kind.value if change.why is None else f"{change.kind.value} ({change.why})"
