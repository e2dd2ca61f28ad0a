"""
Keeps what ranks say of themselves and what has happened, for whoever looks at the fleet: the page, people, alerts.

The shell around core.overview and core.chronicle. Nobody waits for it, and nothing is decided by it: a registry whose
lookout knew nothing would serve as well. In memory only. What ranks tell another registry over the same etcd stands
there, and here as a copy (`elsewhere`, which `replicas` fills).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NoReturn, Protocol

from pdctl.core import lives, standing
from pdctl.core.access import Denied
from pdctl.core.capacity import ReportLimits
from pdctl.core.chronicle import Chronicle
from pdctl.core.elsewhere import Elsewhere
from pdctl.core.instances import InstanceView
from pdctl.core.kinds import ChangeKind, Kind, State
from pdctl.core.latest import Latest
from pdctl.core.lives import ENDINGS, Owner
from pdctl.core.naming import SESSION_KEY
from pdctl.core.native import read_seat
from pdctl.core.overview import News, Place, ReportBook, speaker
from pdctl.core.report import Report, Wanted, in_a_line, short_seat
from pdctl.core.route import Seat
from pdctl.core.sayings import (
    CROWD,
    Refusal,
    crowds,
    of_denial,
    of_life,
    of_link,
    of_room,
    of_session,
    of_turn,
    place_in,
    sides_of,
)
from pdctl.errors import BadField, PdctlError
from pdctl.metrics import Metrics

TICK_S = 0.5
MOST_LINKS = 64
"""Events of one report at most, of links and of rooms alike; the rest is counted in one."""

_MAX_NAME = 128
_KNOWN_HERE = frozenset(ChangeKind)

GOODBYES = frozenset({ChangeKind.LEFT, ChangeKind.DRAINED})
"""That its transfer session goes with it is no event of its own."""

Hear = Callable[[str, Hashable], None]


class Registry(Protocol):
    """`registrar.Registrar`, as far as it is looked at."""

    def view(self, instance: str) -> InstanceView | None: ...

    @property
    def trouble(self) -> str | None: ...


class Lookout:
    """One registry's. Stand its `run` beside the server."""

    def __init__(
        self,
        registry: Registry,
        limits: ReportLimits,
        metrics: Metrics,
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
    ) -> None:
        self.reports = ReportBook(limits)
        self.elsewhere = Elsewhere(limits)
        self.events = Chronicle()
        self.own = Latest[Place]()  # whose report here is otherwise, for other registries that ask
        self.clock = clock
        self._registry = registry
        self._wall_clock = wall_clock
        self._counts = metrics.reports
        self._hearers: list[Hear] = []
        self._trouble: str | None = None
        self._bade: frozenset[str] = frozenset()  # sessions of lives that have just said goodbye
        self._counts.follow(lambda: len(self.reports), lambda: self.reports.nbytes)

    def subscribe(self, hear: Hear) -> None:
        """Call `hear` with the kind and the name of what is otherwise: report, event, session."""
        self._hearers.append(hear)

    # What is told

    def report(self, place: Place, report: Report, body: bytes, owner: Owner) -> Wanted:
        """A rank says how it is. Raises UnknownLease, Superseded, Occupied, LimitReached."""
        try:
            life = speaker(self._registry.view(place[0]), place, report.epoch, owner)
            news = self.reports.take(place, life.epoch, report, body, self.clock())
        except PdctlError:
            self._counts.refused()
            raise
        self._counts.taken()
        self._reported(place)
        self._tell_of(place, news)
        return Wanted(self.reports.again_s)

    def heard(self, changes: Sequence[lives.Change]) -> None:
        """What the registry says; to be told before the session table is."""
        self._bade = frozenset(filter(None, map(_bade, changes)))
        for change in changes:
            over = [change.life] if change.kind in ENDINGS or change.kind is ChangeKind.LOST else []
            for life in (*over, change.before):
                if life is None:
                    continue
                place = change.instance, life.seat
                if self.reports.drop(place, life.epoch):
                    self._reported(place)
                if self.elsewhere.over(place, life.epoch):
                    self._changed("report", place)
        for crowd in crowds(changes):
            if len(crowd) > CROWD:
                self._add(*of_life(crowd[0], len(crowd)), instance=crowd[0].instance, count=len(crowd))
                continue
            for change in crowd:
                self._add(
                    *of_life(change),
                    instance=change.instance,
                    rank=short_seat(change.seat),
                    session=_bade(change),
                    peer=str(change.life.address),
                    cause=None if change.why is None else in_a_line(change.why),
                )

    def turned(self, changes: Sequence[standing.Change]) -> None:
        """What this service's own session table says."""
        for change in changes:
            cause = None if change.cause is None else change.cause.value
            if change.kind is not standing.ChangeKind.DROPPED or change.session not in self._bade:
                self._add(*of_session(change), session=change.session or None, cause=cause)
            if change.session:
                self._changed("session", change.session)

    def refused(self, error: PdctlError, reason: Refusal, path: str, peer: str, instance: str | None) -> None:
        named, seat = place_in(path)
        held, offered = sides_of(error)
        about = {
            "peer": peer,
            "instance": instance or named,
            "rank": None if seat is None else _short(seat),
            "reason": reason.value,
            "field": getattr(error, "field", None),
            "held": held,
            "offered": offered,
        }
        event = self.events.refused(f"{peer} was refused: {error}", self._wall_clock(), self.clock(), **about)
        self._changed("event", event.id)

    def denied(self, denied: Denied, asked: str, peer: str) -> None:
        """The door has not let somebody in; `asked`: a method and a path."""
        instance, seat = place_in(asked.partition(" ")[2])
        self._kept_out(
            Kind.DENIED,
            of_denial(peer, asked, denied.text),
            "many more were denied: see the log of this registry, which names some, and who can reach its port",
            peer=peer,
            instance=None if instance is None else in_a_line(instance, _MAX_NAME),
            rank=None if seat is None else _short(seat),
            reason=denied.why.value,
            offered=asked,
        )

    def put_off(self, wait_s: int, peer: str) -> None:
        """A registration has to come again after that time."""
        others = "many more registrations wait for their turn: nothing, they come again by themselves"
        self._kept_out(Kind.PUT_OFF, of_turn(peer, wait_s), others, peer=peer)

    def copied(self, registry: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """What another registry of this fleet has seen; lives that come and go are known here as they are there."""
        for row in rows:
            if row.get("kind") not in _KNOWN_HERE and not (row.get("kind") == Kind.REPORT_LOST and self._reports(row)):
                self._changed("event", self.events.copied(registry, row).id)

    @property
    def misses_some(self) -> bool:
        """Whether a rank is silent for so long that it may tell another registry by now."""
        longest = next((held.at for _, held in self.reports), None)
        return longest is not None and self.clock() - longest > self.reports.expire_after_s / 2

    # What time brings about

    async def run(self) -> NoReturn:
        """Until cancelled."""
        while True:
            self.tick()
            await asyncio.sleep(TICK_S)

    def tick(self) -> None:
        silent_s = self.reports.expire_after_s
        for place in self.elsewhere.expire(self.clock(), silent_s):
            self._changed("report", place)
        for place in self.reports.expire(self.clock()):
            self._reported(place)
            if self.elsewhere.freshest(place) is not None:
                continue  # it tells another registry now
            instance, rank = place[0], short_seat(place[1])
            silent = f"{instance} {rank} has not told how it is for {silent_s:g} s"
            self._counts.lost()
            self._add(Kind.REPORT_LOST, f"{silent}: see its log and its load", instance=instance, rank=rank)
        before, self._trouble = self._trouble, self._registry.trouble
        if self._trouble is not None and before is None:
            self._add(Kind.JOURNAL_TROUBLE, f"the journal takes no rows, nobody new is seated: {self._trouble}")
        elif self._trouble is None and before is not None:
            self._add(Kind.JOURNAL_WELL, "the journal takes rows again: nothing is left to do")

    # How it is done

    def _tell_of(self, place: Place, news: News) -> None:
        """What one report says that the one before did not."""
        instance, rank = place[0], short_seat(place[1])
        who, about = f"{instance} {rank}", {"instance": instance, "rank": rank}
        for was, link in news.links[:MOST_LINKS]:
            cause = None if link.cause is None else link.cause.value
            self._add(*of_link(who, was, link), session=link.session, cause=cause, **about)
        if (more := news.links[MOST_LINKS:]) and (out := [link for _, link in more if link.state is State.BLOCKED]):
            words = f"{who} sees {len(out)} more sessions ejected: look at its overview, and at its own network"
            self._add(Kind.EJECTED, words, count=len(out), **about)
        for room in news.failed:
            self._add(*of_room(who, room), room=room.room, peer=room.peer, cause=room.cause, **about)
        if news.more:
            words = f"{news.more} more rooms failed at {who}: see its log"
            self._add(Kind.ROOM_FAILED, words, count=news.more, **about)
        if news.doubt is not None:
            words = "takes the fault for its own: see its load" if news.doubt else "has no doubt of itself any more"
            self._add(Kind.DOUBT, f"{who} {words}", **about)
        if news.panicking is not None:
            groups = ", ".join(repr(group) for group in news.panicking)
            words = (
                f"serves all of {groups}, too many are out: see their hosts" if groups else "refuses who is out again"
            )
            self._add(Kind.PANIC, f"{who} {words}", **about)

    def _reports(self, row: Mapping[str, Any]) -> bool:
        """Whether the rank that another registry misses tells this one."""
        seat = _seat(str(row.get("rank")))
        return seat is not None and self.reports.get((str(row.get("instance")), seat)) is not None

    def _reported(self, place: Place) -> None:
        self.own.touch(place)
        self._changed("report", place)

    def _kept_out(self, kind: Kind, sentence: str, others: str, **about: object) -> None:
        event = self.events.kept_out(kind, sentence, others, self._wall_clock(), self.clock(), **about)
        self._changed("event", event.id)

    def _add(self, kind: str, sentence: str, **about: object) -> None:
        event = self.events.add(kind, sentence, self._wall_clock(), **about)
        self._changed("event", event.id)

    def _changed(self, kind: str, name: Hashable) -> None:
        for hear in self._hearers:
            hear(kind, name)


def _bade(change: lives.Change) -> str | None:
    """The transfer session of a life that has said goodbye."""
    said = change.life.claim.metadata.get(SESSION_KEY)
    return said if change.kind in GOODBYES and isinstance(said, str) else None


def _short(seat: str) -> str | None:
    found = _seat(seat)
    return None if found is None else short_seat(found)


def _seat(text: str) -> Seat | None:
    try:
        return read_seat(text)
    except BadField:
        return None
