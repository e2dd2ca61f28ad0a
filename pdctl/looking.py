"""
What a sidecar shows of its fleet: the lookout, wired to the registry and to what it is seen on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from fastapi import APIRouter

from pdctl.config import Settings
from pdctl.dialects import native, overview, sessions
from pdctl.dialects.native import Others
from pdctl.dialects.watch import Broadcast
from pdctl.links import Links
from pdctl.lookout import Lookout
from pdctl.registrar import Registrar


@dataclass(frozen=True, slots=True)
class Looking:
    """Stand its `loops` beside the server."""

    lookout: Lookout
    router: APIRouter

    @classmethod
    def open(
        cls,
        settings: Settings,
        registrar: Registrar,
        news: Broadcast,
        others: Others | None,
        links: Links,
        journal: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> Looking:
        """`journal`: the URL of the registrar's."""
        lookout = Lookout(registrar.view, settings.reports, clock, time.time)
        registrar.subscribe(lookout.heard)
        began = clock()

        def instances() -> Iterator[tuple[str, bytes]]:
            return ((told["name"], native.line(told)) for told in native.details(registrar, others))

        def service() -> dict[str, Any]:
            return {
                "version": version("pdctl"),
                "journal": journal.partition(":")[0],
                "age_s": round(registrar.copy_age_s, 3),
                "unready": registrar.unready(),
                "uptime_s": round(clock() - began, 3),
                "counts": _counts(registrar),
            }

        shown = overview.Shown(
            lambda: {"revision": registrar.revision, "cursor": news.cursor, "service": service()},
            instances,
            lambda: ((name, sessions.row(links.prober, name)) for name in links.prober.sessions()),
        )
        return cls(lookout, overview.router(lookout, shown, native.refusing(registrar)))

    @property
    def loops(self) -> dict[str, Coroutine[Any, Any, None]]:
        """By name; each to be awaited once."""
        return {"lookout": self.lookout.run()}


def _counts(registrar: Registrar) -> dict[str, int]:
    views = list(registrar.views())
    return {
        "instances": len(views),
        "ready": sum(view.ready for view in views),
        "seats": sum(view.shape.n_seats for view in views),
        "alive": sum(len(view.alive) for view in views),
        "rooms": registrar.n_rooms,
    }
