"""
Keeps what ranks say of themselves and what has happened, for whoever looks at the fleet: the page, people, alerts.

The shell around core.overview and core.chronicle. Nobody waits for it, and nothing is decided by it: a registry whose
lookout knew nothing would serve as well. In memory only, and of this registry alone: what ranks tell another one, over
the same etcd or not, stands there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import NoReturn

from pdctl.core.chronicle import Chronicle, Event, Kind
from pdctl.core.instances import InstanceView
from pdctl.core.lives import ENDINGS, Change, ChangeKind, Owner
from pdctl.core.overview import Place, ReportBook, ReportLimits, speaker
from pdctl.core.report import Report, Wanted, short_seat

TICK_S = 0.5


class Lookout:
    """One registry's. Stand its `run` beside the server."""

    def __init__(
        self,
        view: Callable[[str], InstanceView | None],
        limits: ReportLimits,
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
    ) -> None:
        self.reports = ReportBook(limits)
        self.events = Chronicle()
        self.clock = clock
        self._view = view
        self._wall_clock = wall_clock

    def report(self, place: Place, report: Report, body: bytes, owner: Owner) -> Wanted:
        """A rank says how it is. Raises UnknownLease, Superseded, Occupied, LimitReached."""
        life = speaker(self._view(place[0]), place, report.epoch, owner)
        self.reports.take(place, life.epoch, report, body, self.clock())
        return Wanted(self.reports.limits.again_s)

    def heard(self, changes: Sequence[Change]) -> None:
        """What the registry says."""
        for change in changes:
            over = [change.life] if change.kind in ENDINGS or change.kind is ChangeKind.LOST else []
            for life in (*over, change.before):
                if life is not None:
                    self.reports.drop((change.instance, life.seat), life.epoch)

    async def run(self) -> NoReturn:
        """Notice what time alone brings about; until cancelled."""
        while True:
            self.tick()
            await asyncio.sleep(TICK_S)

    def tick(self) -> None:
        for instance, seat in self.reports.expire(self.clock()):
            rank = short_seat(seat)
            silent = f"{instance} {rank} has not told how it is for {self.reports.limits.expire_after_s:g} s"
            self._add(Kind.REPORT_LOST, f"{silent}: see its log and its load", instance=instance, rank=rank)

    def _add(self, kind: str, sentence: str, **about: object) -> Event:
        return self.events.add(kind, sentence, self._wall_clock(), **about)
