"""
The last word of each rank about itself, as long as it is fresh: the registry's picture of its fleet.

No sockets, no clock, no JSON: `now` is an argument (seconds, monotonic, any zero), reports come in as values and
bodies, and what has changed since the rank's last one leaves as values. In memory only: after a restart of the registry
every rank says it again within seconds. A report is of one life, and goes with it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice

from pdctl.core.capacity import ReportLimits
from pdctl.core.claims import check_may_change, not_held
from pdctl.core.instances import InstanceView
from pdctl.core.kinds import State
from pdctl.core.lives import Life, Owner
from pdctl.core.report import FailedRoom, LinkSeen, Report
from pdctl.core.route import Seat
from pdctl.errors import LimitReached, UnknownLease

Place = tuple[str, Seat]
"""An instance, and a seat of it."""

LONGEST_AGO_S = 60.0
"""Of a rank's first report only rooms that have failed since are news: the rest is of before this registry knew it."""


@dataclass(frozen=True, slots=True)
class Held:
    """A rank's last report: `body` as JSON on one line, `at` by the registry's clock.

    `out`: links that are not trusted; all 4,096 as values would be a second copy of the body.
    """

    epoch: int
    at: float
    body: bytes
    out: Mapping[str, LinkSeen]
    n_failed: int
    doubt: bool
    panicking: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class News:
    """What a report says that the one before did not.

    links     whose state is another now, and what it was; a peer that is not named stands trusted
    failed    rooms, the oldest first; `more` failed besides, of which nothing else is known
    doubt     as it is now, where it has changed; `panicking` likewise
    """

    links: tuple[tuple[State, LinkSeen], ...] = ()
    failed: tuple[FailedRoom, ...] = ()
    more: int = 0
    doubt: bool | None = None
    panicking: tuple[str, ...] | None = None


@dataclass(slots=True)
class ReportBook:
    """Who has told what; the longest silent first."""

    limits: ReportLimits = field(default_factory=ReportLimits)
    nbytes: int = 0
    _held: OrderedDict[Place, Held] = field(default_factory=OrderedDict)

    def __len__(self) -> int:
        return len(self._held)

    def __iter__(self) -> Iterator[tuple[Place, Held]]:
        return iter(self._held.items())

    def get(self, place: Place) -> Held | None:
        return self._held.get(place)

    @property
    def again_s(self) -> float:
        """How soon at the latest the next report of each is wanted, of as many as there are."""
        return max(self.limits.again_s, round(len(self._held) / self.limits.per_s, 1))

    @property
    def expire_after_s(self) -> float:
        return self.limits.expire_after_s * self.again_s / self.limits.again_s

    def take(self, place: Place, epoch: int, report: Report, body: bytes, now: float) -> News:
        """This is how the rank is. Raises LimitReached, and then its last word stays what it was."""
        before = self._held.get(place)
        if before is None and len(self._held) >= self.limits.max_reports:
            raise LimitReached(
                f"{len(self._held)} reports are held, the limit (reports max_reports): raise it, or let ranks report "
                "elsewhere"
            )
        nbytes = self.nbytes + len(body) - (0 if before is None else len(before.body))
        if nbytes > self.limits.max_nbytes:
            raise LimitReached(
                f"reports have {self.nbytes} bytes, and the limit (reports max_nbytes) is {self.limits.max_nbytes}: "
                "raise it, or let ranks name fewer links"
            )
        out = {link.session: link for link in report.links if link.state is not State.TRUSTED}
        held = Held(epoch, now, body, out, report.ended.failed, report.doubt, report.panicking)
        self.nbytes = nbytes
        self._held[place] = held
        self._held.move_to_end(place)
        return _news(before if before is not None and before.epoch == epoch else None, held, report)

    def drop(self, place: Place, epoch: int | None = None) -> bool:
        """Its life is over; `epoch`: only if it is of that one. Whether there was one."""
        held = self._held.get(place)
        if held is None or (epoch is not None and held.epoch != epoch):
            return False
        del self._held[place]
        self.nbytes -= len(held.body)
        return True

    def expire(self, now: float, limit: int = 256) -> list[Place]:
        """Those that have been silent for too long are held no more."""
        over = [place for place, held in islice(self._held.items(), limit) if now - held.at >= self.expire_after_s]
        for place in over:
            self.drop(place)
        return over


def speaker(view: InstanceView | None, place: Place, epoch: int | None, owner: Owner) -> Life:
    """The life that speaks. Raises UnknownLease, Superseded, Occupied."""
    name, seat = place
    if view is None:
        raise UnknownLease(f"no rank of {name} is registered here: register first")
    if epoch is not None:
        life = view.holder(seat, epoch)
    else:
        life = next((found for each in view.incarnations if (found := each.alive.get(seat)) is not None), None)
    if life is None:
        if epoch is None:
            raise UnknownLease(f"seat {seat} of {name} is held by nobody: register first")
        raise not_held(view, seat, epoch)
    check_may_change(life, owner)
    return life


def _news(before: Held | None, now: Held, report: Report) -> News:
    failed, more = _failed_since(before, report)
    doubt = now.doubt if now.doubt != (before is not None and before.doubt) else None
    panicking = now.panicking if now.panicking != (() if before is None else before.panicking) else None
    return News(tuple(_turned({} if before is None else before.out, now.out, report)), failed, more, doubt, panicking)


def _turned(
    was: Mapping[str, LinkSeen], out: Mapping[str, LinkSeen], report: Report
) -> Iterator[tuple[State, LinkSeen]]:
    for session, link in out.items():
        before = was[session].state if session in was else State.TRUSTED
        if link.state is not before:
            yield before, link
    back = was.keys() - out.keys()
    if back:
        named = {link.session: link for link in report.links if link.session in back}
        for session in sorted(back):
            yield was[session].state, named.get(session) or LinkSeen(session, sentence="not known there any more")


def _failed_since(before: Held | None, report: Report) -> tuple[tuple[FailedRoom, ...], int]:
    if before is None:
        return tuple(room for room in report.failed if room.age_s < LONGEST_AGO_S), 0
    n_new = max(0, report.ended.failed - before.n_failed)
    told = report.failed[max(0, len(report.failed) - n_new) :] if n_new else ()
    return told, n_new - len(told)
