"""
Tells a rank's registry how the rank is: every few seconds, and soon after something has turned.

Nothing depends on it: no room waits for a report, none is said again in haste, and whatever goes wrong is counted and
left at that. Four a second at most. Only a registry that has granted a lease is told, as a stock one knows no such
path; one that answers that it does not know it is left alone for a while, or until it grants another life.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from http import HTTPStatus
from itertools import chain, islice
from typing import NoReturn, Protocol

import structlog

from pdctl.core.course import Ended as EndedRoom
from pdctl.core.exchange import Exchange
from pdctl.core.kinds import State
from pdctl.core.native import Grant
from pdctl.core.report import (
    MAX_FAILED,
    MAX_GROUPS,
    MAX_LINKS,
    MAX_OPEN,
    MAX_REASONS,
    MAX_TEXT,
    Ended,
    FailedRoom,
    LinkSeen,
    OpenRoom,
    Report,
    StoreSeen,
    Wanted,
    in_a_line,
)
from pdctl.core.standing import Standing
from pdctl.core.transfer import Phase, Quarantined, Side
from pdctl.counts.reports import ReportMetrics, Sent
from pdctl.errors import PdctlError, PutOff, RegistryRefused
from pdctl.telling import Telling

LEAST_S = 0.25
"""Between two reports, and until a change is noticed that nobody tells of."""
LEFT_ALONE_S = 60.0
"""After a registry has said that it does not know the path, or takes no report of this rank."""

_AT_ONCE = 64
_TOLD_AT_LENGTH, _IN_BRIEF = 256, 60
"""Links in trouble of which all is said; of more the beginning."""

_MAX_NAME = 255
_FINAL = (HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED)

log = structlog.get_logger(__name__)


class Tell(Protocol):
    """`RegistryClient.tell`."""

    async def __call__(self, exchange: Exchange[Wanted]) -> Wanted: ...


class Room(Protocol):
    """`SendingRoom` and `ArrivingRoom`."""

    room: int
    phase: Phase
    opened_at: float

    @property
    def peers(self) -> Sequence[str]: ...


class Rooms(Protocol):
    """`Sender` and `Receiver`."""

    @property
    def open_rooms(self) -> Mapping[int, Room]: ...

    @property
    def quarantine(self) -> Sequence[Quarantined]: ...


class Links(Protocol):
    """`Prober`."""

    def sessions(self) -> list[str]: ...

    def standing(self, session: str) -> Standing: ...

    @property
    def panicking(self) -> tuple[str, ...]: ...

    @property
    def doubting(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class Rank:
    """Who reports, and where it finds what it says. `links`: None for one that writes to nobody."""

    role: str
    path: str
    session: str
    side: Side
    rooms: Rooms
    telling: Telling
    unready: Callable[[], list[str]]
    links: Links | None = None
    store: Callable[[], StoreSeen | None] = lambda: None


class Reporter:
    """One rank's. Stand its `run` beside the rank.

    granted   the registry's word that the rank holds its seat; None: nobody is told
    every_s   0: never
    """

    def __init__(
        self,
        tell: Tell,
        rank: Rank,
        granted: Callable[[], Grant | None],
        every_s: float,
        counts: ReportMetrics,
        clock: Callable[[], float],
    ) -> None:
        self._tell = tell
        self._rank = rank
        self._granted = granted
        self._every_s = every_s
        self._counts = counts
        self._clock = clock
        self._news = asyncio.Event()
        self._failed: deque[tuple[float, EndedRoom]] = deque(maxlen=MAX_FAILED)
        self._said: object = None
        self._silenced: int | None = None  # the epoch of which no report was taken
        rank.telling.hear = self._room_failed

    def changed(self, _: object = None) -> None:
        """Something has turned."""
        self._news.set()

    async def run(self) -> NoReturn:
        """Until cancelled. Raises nothing."""
        if not self._every_s:
            await asyncio.Event().wait()
        while True:
            granted = self._granted()
            wait_s = LEAST_S if granted is None else await self._report(granted)
            await self._rest(wait_s)

    # Saying it

    async def _report(self, granted: Grant) -> float:
        """Tell once; for how long to be silent then if nothing turns."""
        self._news.clear()
        self._said = self._readiness()
        try:
            body = to_body(await self.report(granted.epoch))
            wanted = await self._tell(Exchange("report", "PUT", f"{self._rank.path}/report", _wanted, body=body))
        except RegistryRefused as refused:
            return self._bear(refused, granted)
        except PutOff as put_off:
            self._counts.sent(Sent.FAILED)
            return max(self._every_s, put_off.retry_after_s or 0.0)
        except PdctlError as error:
            self._counts.sent(Sent.FAILED)
            log.debug("report came to nothing", cause=str(error))
            return self._every_s
        except Exception as defect:  # a rank that serves does not end because it cannot say how it is
            self._counts.sent(Sent.FAILED)
            log.error("report failed by a defect", exc_info=defect)
            return LEFT_ALONE_S
        self._counts.sent(Sent.TAKEN)
        return max(self._every_s, wanted.again_s)  # of a crowd the registry wants to hear less often

    def _bear(self, refused: RegistryRefused, granted: Grant) -> float:
        self._counts.sent(Sent.REFUSED)
        self._silenced = granted.epoch
        say = log.debug if refused.status in _FINAL else log.warning
        say("registry takes no report of this rank", status=refused.status, answered=refused.text[:300])
        return LEFT_ALONE_S

    async def _rest(self, wait_s: float) -> None:
        """Until it is time, or something has turned; LEAST_S at least."""
        began = self._clock()
        await asyncio.sleep(LEAST_S)
        while (left := began + wait_s - self._clock()) > 0 and not self._has_news():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(left, LEAST_S)):
                    await self._news.wait()
            if self._silenced is not None:
                await asyncio.sleep(LEAST_S)  # news are none for one who does not listen
        self._silenced = None

    def _has_news(self) -> bool:
        if self._silenced is not None:
            granted = self._granted()
            return granted is not None and granted.epoch != self._silenced
        return self._news.is_set() or self._readiness() != self._said

    def _readiness(self) -> object:
        granted = self._granted()
        return self._rank.unready(), None if granted is None else granted.epoch

    # What is said

    async def report(self, epoch: int | None) -> Report:
        """How the rank is."""
        rank, now = self._rank, self._clock()
        links = [] if rank.links is None else await _links(rank.links)
        open_rooms, ended = rank.rooms.open_rooms, rank.telling.ended_in
        phases: dict[str, int] = {}
        for room in open_rooms.values():
            phases[room.phase.name.lower()] = phases.get(room.phase.name.lower(), 0) + 1
        phases = {name: n for name, n in phases.items() if name not in ("failed", "success")}
        return Report(
            role=rank.role,
            epoch=epoch,
            session=in_a_line(rank.session, _MAX_NAME),
            unready=tuple(in_a_line(reason) for reason in rank.unready()[:MAX_REASONS]),
            links=tuple(links),
            rooms={rank.side.value: phases},
            ended=Ended(ended[Phase.SUCCESS], ended[Phase.FAILED]),
            bytes=rank.telling.nbytes,
            open=tuple(_open(rank.side, open_rooms.values(), now)),
            failed=tuple(_failed(room, at, now) for at, room in self._failed),
            quarantined=sum(len(held.pages) for held in rank.rooms.quarantine),
            doubt=rank.links is not None and rank.links.doubting,
            panicking=() if rank.links is None else rank.links.panicking[:MAX_GROUPS],
            store=rank.store(),
        )

    def _room_failed(self, room: EndedRoom) -> None:
        self._failed.append((self._clock(), room))
        self.changed()


async def _links(links: Links) -> list[LinkSeen]:
    """Those in trouble first, so that they are named, however many there are."""
    out, well = list[LinkSeen](), list[LinkSeen]()
    for number, session in enumerate(links.sessions()):
        if number % _AT_ONCE == _AT_ONCE - 1:
            await asyncio.sleep(0)  # 10,000 of them take 0.2 s
        standing = links.standing(session)
        most = MAX_TEXT if len(out) < _TOLD_AT_LENGTH else _IN_BRIEF
        (well if standing.state is State.TRUSTED else out).append(_link(standing, most))
    return list(islice(chain(out, well), MAX_LINKS))


def _link(standing: Standing, most: int) -> LinkSeen:
    if standing.state is State.TRUSTED:
        return LinkSeen(standing.session)
    waits = [wait for wait in (standing.held_s or None, standing.next_question_s) if wait is not None]
    return LinkSeen(
        standing.session,
        standing.state,
        standing.cause,
        in_a_line(standing.sentence, most),
        round(max(0.0, *waits), 3) if waits else None,
        round(max(0.0, standing.since_s), 3),
    )


def _open(side: Side, rooms: Iterable[Room], now: float) -> Iterable[OpenRoom]:
    """They are held in the order in which they were opened."""
    going = (room for room in rooms if not room.phase.is_final)
    for room in islice(going, MAX_OPEN):
        age_s = round(max(0.0, now - room.opened_at), 3)
        yield OpenRoom(room.room, side, room.phase.name.lower(), age_s, _peer(room.peers))


def _failed(room: EndedRoom, at: float, now: float) -> FailedRoom:
    return FailedRoom(
        room=room.room,
        side=room.side,
        age_s=round(max(0.0, now - at), 3),
        seconds=round(max(0.0, room.seconds), 6),
        cause=str(room.cause or room.ended_by.value),
        sentence=in_a_line(room.reason or "it gave no reason"),
        peer=_peer(room.peers),
    )


def _peer(peers: Sequence[str]) -> str | None:
    """The one; where there are several, nobody can be named."""
    return in_a_line(peers[0].partition(" ")[0], _MAX_NAME) if len(peers) == 1 else None


def to_body(report: Report) -> dict[str, object]:
    """What the wire has; of the many that are as usual only the name. `asdict` takes ten times as long."""
    return {
        "role": report.role,
        "epoch": report.epoch,
        "session": report.session,
        "unready": report.unready,
        "links": [_link_body(link) for link in report.links],
        "rooms": report.rooms,
        "ended": {"success": report.ended.success, "failed": report.ended.failed},
        "bytes": report.bytes,
        "open": [
            {"room": each.room, "side": each.side, "phase": each.phase, "age_s": each.age_s, "peer": each.peer}
            for each in report.open
        ],
        "failed": [_failed_body(room) for room in report.failed],
        "quarantined": report.quarantined,
        "doubt": report.doubt,
        "panicking": report.panicking,
        "store": None if report.store is None else asdict(report.store),
    }


def _link_body(link: LinkSeen) -> dict[str, object]:
    if link.state is State.TRUSTED:
        return {"session": link.session}
    return {
        "session": link.session,
        "state": link.state,
        "cause": link.cause,
        "sentence": link.sentence,
        "again_in_s": link.again_in_s,
        "since_s": link.since_s,
    }


def _failed_body(room: FailedRoom) -> dict[str, object]:
    return {
        "room": room.room,
        "side": room.side,
        "age_s": room.age_s,
        "seconds": room.seconds,
        "cause": room.cause,
        "sentence": room.sentence,
        "peer": room.peer,
    }


def _wanted(body: bytes) -> Wanted:
    return Wanted.from_body(json.loads(body))
