"""
The one owner of the registry: applies a command, journals what it changed, then acknowledges.

Everything between reading and writing the tables happens without an await, so that no lock is needed. Each Change is
counted and logged here and nowhere else. No wire is spoken here: the dialects translate.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn

import structlog

from pdctl.core.address import Endpoint
from pdctl.core.registry import Change, ChangeKind, InstanceView, Registry
from pdctl.core.rooms import RoomBook
from pdctl.core.route import Announcement, Seat
from pdctl.errors import LimitReached, NotNow, NotReady, PdctlError, Refused, TooLarge
from pdctl.metrics import Found, Lookup, Metrics, Refusal
from pdctl.persistence.base import Journal

SWEEP_EVERY_S = 1.0
SWEEP_BUDGET = 500  # rows; about 1 ms, 4 at worst, before the loop serves somebody else

log = structlog.get_logger(__name__)


class Registrar:
    """Dialects call it; `sweep` runs beside the server."""

    def __init__(
        self, registry: Registry, rooms: RoomBook, journal: Journal, metrics: Metrics, clock: Callable[[], float]
    ) -> None:
        self._registry = registry
        self._rooms = rooms
        self._journal = journal
        self._counts = metrics.registry
        self._clock = clock
        self._revision = 0
        self._counts.follow(lambda: registry, lambda: len(rooms))

    @property
    def revision(self) -> int:
        """Rises with every change of any instance: what was read at a revision is true as long as it stands."""
        return self._revision

    async def restore(self) -> None:
        """Take back what the journal kept. Before the first request."""
        changes = await self._journal.load()
        for change in changes:
            self._registry.restore(change, self._clock())
        self._revision += len(changes)
        if changes:
            log.info("restored from the journal", seats=sum(len(view.alive) for view in self._registry))

    async def register(self, instance: str, claim: Announcement) -> None:
        """Return when the claim holds and is journalled. Raises Refused."""
        changes = self._registry.register(instance, claim, self._clock())
        self._revision += len(changes)
        if changes:
            await self._journal.append(changes)
        self._tell(changes)

    def topology(self, instance: str) -> InstanceView:
        """The instance, complete. Raises NotReady."""
        view = self._ready(Lookup.TOPOLOGY, instance)
        self._counts.looked_up(Lookup.TOPOLOGY, Found.SERVED)
        return view

    def rank(self, instance: str, seat: Seat) -> Endpoint | None:
        """Where the rank listens, None for a seat that the instance does not have. Raises NotReady."""
        life = self._ready(Lookup.RANK, instance).alive.get(seat)
        self._counts.looked_up(Lookup.RANK, Found.SERVED if life else Found.UNKNOWN)
        return life.address if life else None

    def answered_again(self, what: Lookup) -> None:
        """A dialect has given an answer of this revision again, without asking."""
        self._counts.looked_up(what, Found.SERVED)

    def announce_room(self, room: int, dp_rank: int) -> None:
        """Raises LimitReached."""
        self._rooms.put(room, dp_rank, self._clock())

    def rooms(self, rooms: Sequence[int]) -> dict[int, int]:
        """DP rank by room; unknown ones are absent."""
        found = self._rooms.get(rooms, self._clock())
        self._counts.looked_up(Lookup.ROOM, Found.SERVED, len(found))
        self._counts.looked_up(Lookup.ROOM, Found.UNKNOWN, len(rooms) - len(found))
        return found

    def view(self, instance: str) -> InstanceView | None:
        """What is known of an instance, complete or not."""
        return self._registry.view(instance)

    def views(self) -> Iterable[InstanceView]:
        return self._registry

    def age_s(self, since: float) -> float:
        return self._clock() - since

    def refused(self, error: PdctlError, path: str, peer: str) -> None:
        """A dialect is about to answer with this error. NotReady is an answer like another; the rest is news."""
        if isinstance(error, NotReady):
            return
        reason = _reason(error)
        self._counts.refused(reason)
        log.warning("request refused", reason=reason.value, path=path, peer=peer, detail=str(error))

    async def sweep(self) -> NoReturn:
        """Drop the rooms that are over, a slice at a time; until cancelled."""
        while True:
            settled = self._rooms.expire(self._clock(), SWEEP_BUDGET)
            await asyncio.sleep(0 if settled == SWEEP_BUDGET else SWEEP_EVERY_S)

    def _ready(self, what: Lookup, instance: str) -> InstanceView:
        view = self._registry.view(instance)
        if view is None or not view.ready:
            self._counts.looked_up(what, Found.NOT_READY)
            held = len(view.alive) if view else 0
            raise NotReady(f"Prefill server not fully registered yet ({held} workers registered).")
        return view

    def _tell(self, changes: Iterable[Change]) -> None:
        for change in changes:
            self._counts.changed(change.kind)
            if change.kind is ChangeKind.COMPLETED:
                seats = change.life.announcement.shape.n_seats
                log.info("instance complete", instance=change.instance, seats=seats)
            else:
                before = None if change.before is None else str(change.before)
                log.info(
                    _EVENTS[change.kind],
                    instance=change.instance,
                    seat=str(change.seat),
                    address=str(change.life.address),
                    epoch=change.life.epoch,
                    before=before,
                )


_EVENTS = {
    ChangeKind.SEATED: "seat taken",
    ChangeKind.REPLACED: "seat taken by a new life",
    ChangeKind.RESHAPED: "instance restarted with other settings",
    ChangeKind.AMENDED: "seat amended",
}


def _reason(error: PdctlError) -> Refusal:
    match error:
        case Refused():
            return Refusal.CONTRADICTION
        case TooLarge() | LimitReached():
            return Refusal.LIMIT
        case NotNow():
            return Refusal.UNAVAILABLE
    return Refusal.MALFORMED
