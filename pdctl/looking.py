"""
What a sidecar shows of its fleet: the lookout, wired to the registry and to what it is seen on.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any, NoReturn

from fastapi import APIRouter
from starlette.types import ASGIApp

from pdctl.config import Settings
from pdctl.dialects import native, overview, sessions, targets
from pdctl.dialects.board import Board
from pdctl.dialects.native import Others
from pdctl.dialects.strict import Refused
from pdctl.dialects.watch import Broadcast
from pdctl.links import Links
from pdctl.lookout import Lookout
from pdctl.metrics import Metrics
from pdctl.persistence.base import Shared
from pdctl.registrar import Registrar
from pdctl.replicas import Replicas

FIGURES_EVERY_S = 1.0


@dataclass(frozen=True, slots=True)
class Looking:
    """Stand its `loops` beside the server."""

    lookout: Lookout
    router: APIRouter
    _board: Board
    _service: Callable[[], dict[str, Any]]
    _refused: Refused
    _replicas: Replicas | None = None

    @classmethod
    def open(
        cls,
        settings: Settings,
        registrar: Registrar,
        news: Broadcast,
        others: Others | None,
        links: Links,
        metrics: Metrics,
        journal: str,
        clock: Callable[[], float] = time.monotonic,
        shared: Shared | None = None,
    ) -> Looking:
        """`journal`: the URL of the registrar's, which is `shared` with others; `news`: what is told of its
        instances."""
        lookout = Lookout(registrar, settings.reports, metrics, clock, time.time)
        began = clock()

        def service() -> dict[str, Any]:
            return {
                "version": version("pdctl"),
                "journal": journal.partition(":")[0],
                "age_s": round(registrar.copy_age_s, 3),
                "unready": registrar.unready(),
                "uptime_s": round(clock() - began, 3),
                "counts": _counts(registrar),
                "replicas": [] if replicas is None else replicas.shown(),
            }

        replicas = (
            None
            if shared is None
            else Replicas(
                shared.writer,
                lambda: shared.others,
                lookout.elsewhere,
                settings.client,
                clock,
                is_watched=lambda: bool(board.audience) or lookout.misses_some,
                changed=lambda place: board.changed("report", place),
                hear=lookout.copied,
            )
        )
        shown = overview.Shown(
            head=lambda: {"revision": registrar.revision, "cursor": news.cursor},
            service=service,
            instances=news.names,
            instance=lambda name: _line(native.detail(registrar, others, name)),
            sessions=links.prober.sessions,
            session=lambda name: sessions.row(links.prober, name),
            others=replicas,
        )
        board = overview.board(lookout, shown, metrics, settings.watch)
        registrar.herald.subscribe(lookout.heard)
        registrar.herald.subscribe(links.heard)  # after it: of who says goodbye the session's end is not told again
        registrar.herald.subscribe_refusals(lookout.refused)
        links.prober.subscribe(lookout.turned)
        news.subscribe(partial(board.changed, "instance"))
        refused = native.refusing(registrar)
        router = overview.router(lookout, shown, refused, board)
        router.include_router(targets.router(registrar.views))
        return cls(lookout, router, board, service, refused, replicas)

    def in_front(self, api: ASGIApp) -> ASGIApp:
        """`api`, with a short way for what comes most often."""
        return overview.in_front(self.lookout, self._refused, api)

    @property
    def loops(self) -> dict[str, Coroutine[Any, Any, None]]:
        """By name; each to be awaited once."""
        loops: dict[str, Coroutine[Any, Any, None]] = {"lookout": self.lookout.run(), "overview": self._board.run()}
        if self._replicas is not None:
            loops["replicas"] = self._replicas.run()
        return loops | {"figures": self._figures()}

    async def _figures(self) -> NoReturn:
        """Tell of the service when it is otherwise than it was told of; how old it is says everybody's own clock."""
        told: object = None
        while True:
            now = self._service()
            others = [{**each, "age_s": None, "reports": 0} for each in now["replicas"]]
            now |= {"uptime_s": None, "age_s": int(now["age_s"]), "replicas": others}
            if now != told:
                self._board.changed("service", "")
                told = now
            await asyncio.sleep(FIGURES_EVERY_S)


def _line(told: object) -> bytes | None:
    return None if told is None else native.line(told)


def _counts(registrar: Registrar) -> dict[str, int]:
    views = list(registrar.views())
    return {
        "instances": len(views),
        "ready": sum(view.ready for view in views),
        "seats": sum(view.shape.n_seats for view in views),
        "alive": sum(len(view.alive) for view in views),
        "rooms": registrar.n_rooms,
    }
