"""
Asks the other registries over the same etcd what their ranks report, and what has happened there.

Reports are asked for while somebody looks, events all the time, each a question of what is new. Whoever does not answer
is named, and costs who looks LOOK_S once: from then on nobody waits for it until it has answered again. Nothing is
decided here, and a registry that could ask nobody would serve as well.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, NoReturn

import structlog
from pydantic_core import from_json

from pdctl.core.address import Endpoint
from pdctl.core.elsewhere import Copied, Elsewhere
from pdctl.core.native import read_seat
from pdctl.core.overview import Place
from pdctl.credentials import Credentials
from pdctl.errors import BadField, Unreachable
from pdctl.identity import Reply, Service
from pdctl.persistence.etcd_place import EtcdPlace, EtcdSettings
from pdctl.retry import root_cause

LOOK_S = 1.0
ASK_S = 5.0
"""For one answer: reports of 2,000 ranks with links to 64 peers each have 16 MB."""
EVERY_S = 1.0
FRESH_S = 0.25
KNOWN_S = 5.0
"""What was heard longer ago is asked for whole again: copies that nobody has said anew have expired meanwhile."""
PAGE = 500
_AT_ONCE = 64

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class Neighbour:
    """One other registry. `answers`: None until it was asked."""

    name: str
    url: str
    service: Service
    answers: bool | None = None
    why: str | None = None
    heard_at: float = float("-inf")
    seen: int | None = None  # up to which change its reports are known,
    seen_at: float = float("-inf")  # and since when
    next_event: int = 0
    asking: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    stack: AsyncExitStack = field(default_factory=AsyncExitStack)


class Replicas:
    """The others. Stand its `run` beside the server.

    name       of this one among them
    others     where they are, by name, as the journal knows them now
    is_watched whether somebody looks all the time
    changed    is told of each rank whose report is otherwise
    hear       is told of events: the URL of who saw them, and the rows
    look_s     who looks waits no longer, however many the others are
    """

    def __init__(
        self,
        name: str,
        others: Callable[[], Mapping[str, str]],
        elsewhere: Elsewhere,
        credentials: Credentials,
        clock: Callable[[], float],
        *,
        is_watched: Callable[[], bool],
        changed: Callable[[Place], None],
        hear: Callable[[str, list[dict[str, Any]]], None],
        look_s: float = LOOK_S,
    ) -> None:
        self.name = name
        self.elsewhere = elsewhere
        self._others = others
        self._credentials = credentials
        self._clock = clock
        self._is_watched = is_watched
        self._changed = changed
        self._hear = hear
        self._look_s = look_s
        self._known: dict[str, Neighbour] = {}
        self._reports_at = float("-inf")

    async def look(self) -> None:
        """Hear what the others know now, as far as they say it within `look_s`."""
        if self._clock() - self._reports_at < FRESH_S:
            return
        asked = {self._ask(each, "reports"): each for each in self._known.values() if each.answers is not False}
        if asked:
            _, late = await asyncio.wait(asked, timeout=self._look_s)
            for question in late:
                self._away(asked[question], f"no answer within {self._look_s:g} s")
        self._reports_at = self._clock()

    def shown(self) -> list[dict[str, Any]]:
        """Each of the others, as the overview has it."""
        now = self._clock()
        return [
            {
                "url": each.url,
                "answers": each.answers is True,
                "age_s": None if each.heard_at == float("-inf") else round(now - each.heard_at, 3),
                "reports": len(self.elsewhere.of(each.name)),
                "why": each.why,
            }
            for each in self._known.values()
        ]

    def url_of(self, name: str) -> str | None:
        found = self._known.get(name)
        return None if found is None else found.url

    async def run(self) -> NoReturn:
        """Until cancelled. Raises nothing for what others do."""
        try:
            while True:
                await self._follow()
                for each in self._known.values():
                    self._ask(each, "events")
                    if self._is_watched() and each.answers is not False:
                        self._ask(each, "reports")
                await asyncio.sleep(EVERY_S)
        finally:
            for name in list(self._known):
                await self._leave(name)

    # How it is done

    async def _follow(self) -> None:
        """Whoever has come or gone."""
        others = self._others()
        for name in [name for name, each in self._known.items() if others.get(name) != each.url]:
            await self._leave(name)
        for name in others.keys() - self._known.keys():
            each = Neighbour(name, others[name], Service(others[name], self._credentials, ASK_S))
            await each.stack.enter_async_context(each.service)
            self._known[name] = each

    async def _leave(self, name: str) -> None:
        each = self._known.pop(name)
        places = self.elsewhere.of(name)
        self.elsewhere.drop(name, places)
        for place in places:
            self._changed(place)
        for question in each.asking.values():
            question.cancel()
        try:
            if each.asking:
                await asyncio.wait(each.asking.values())
        finally:
            await each.stack.aclose()

    def _ask(self, each: Neighbour, what: str) -> asyncio.Task[None]:
        """One question of each kind at a time; who asks meanwhile waits for the same answer."""
        asking = each.asking.get(what)
        if asking is None or asking.done():
            ask = self._reports if what == "reports" else self._events
            each.asking[what] = asking = asyncio.create_task(self._asked(each, ask), name=f"ask {each.url} for {what}")
        return asking

    async def _asked(self, each: Neighbour, ask: Callable[[Neighbour], Awaitable[None]]) -> None:
        try:
            await ask(each)
        except Exception as error:  # whatever another sends keeps nobody from serving
            self._away(each, root_cause(error) or type(error).__name__)
            return
        if each.answers is False:
            log.info("another registry answers again", url=each.url)
        each.answers, each.why, each.heard_at = True, None, self._clock()

    def _away(self, each: Neighbour, why: str) -> None:
        if each.answers is not False:
            log.warning("another registry does not answer, its ranks' reports are missing", url=each.url, cause=why)
        each.answers, each.why = False, why[:300]

    async def _get(self, each: Neighbour, path: str, params: Mapping[str, str]) -> Reply:
        reply = await each.service.get(path, params, deadline_s=ASK_S)
        if reply.status != HTTPStatus.OK:
            raise Unreachable(f"{each.url}{path} answers {reply.status}: {reply.words}")
        return reply

    async def _reports(self, each: Neighbour) -> None:
        """What has changed since the last time; all, where that is not known any more."""
        asked_at = self._clock()
        is_known = each.seen is not None and asked_at - each.seen_at < KNOWN_S
        params = {"since": str(each.seen)} if is_known else {}
        head, *lines = (await self._get(each, "/v1/reports", params)).body.split(b"\n")
        told = json.loads(head)
        if told["registry"] != each.name:
            raise Unreachable(f"at {each.url} there is another registry: give each its own address (etcd.advertise)")
        kept: set[Place] = set()
        for start in range(0, len(lines), _AT_ONCE):
            for line in filter(None, lines[start : start + _AT_ONCE]):
                kept.add(self._take(each, line, asked_at))
            await asyncio.sleep(0)  # of thousands of ranks it has megabytes, and others wait
        if told["whole"]:
            gone = self.elsewhere.of(each.name) - kept
            self.elsewhere.drop(each.name, gone)
            for place in gone:
                self._changed(place)
        each.seen, each.seen_at = int(told["next"]), asked_at

    def _take(self, each: Neighbour, line: bytes, at: float) -> Place:
        """One rank's. Raises for what no registry of ours sends, which is not to be shown."""
        head, _, body = line.partition(b"\t")
        whose = json.loads(head)
        place = str(whose["instance"]), read_seat(str(whose["seat"]))
        if not body:
            self.elsewhere.drop(each.name, [place])
        else:
            from_json(body)
            copied = Copied(int(whose["epoch"]), at - float(whose["age_s"]), body)
            if not self.elsewhere.take(each.name, place, copied):
                return place
        self._changed(place)
        return place

    async def _events(self, each: Neighbour) -> None:
        """What it has seen itself; what it was told by others those tell."""
        params = {"since": str(each.next_event), "limit": str(PAGE)}
        told = (await self._get(each, "/v1/events", params)).json
        each.next_event = int(told["next"])
        rows = list(_own(told["events"]))
        if rows:
            self._hear(each.url, rows)


async def own_url(scheme: str, at: Endpoint, journal: str, settings: EtcdSettings) -> str | None:
    """Where the others find the service that has been bound `at`; None, and a warning, where nobody can say."""
    if settings.advertise is not None:
        return settings.advertise
    if not at.is_wildcard:
        return f"{scheme}://{at}"
    for member in EtcdPlace.parse(journal).endpoints:
        if (host := await _way_to(member)) is not None:
            return f"{scheme}://{Endpoint(host, at.port)}"
    log.warning(
        "other registries cannot ask this one what its ranks report: give PDCTL_ETCD__ADVERTISE", etcd=journal[:200]
    )
    return None


async def _way_to(member: Endpoint) -> str | None:
    """The address of this host that a packet to there would come from. None is sent: UDP only looks for the way."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(member.host, member.port, type=socket.SOCK_DGRAM)
        family, _, _, _, address = found[0]
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.connect(address)
            return str(sock.getsockname()[0])
    except OSError:
        return None


def _own(rows: Any) -> Iterator[dict[str, Any]]:
    for row in rows:
        if not isinstance(row, dict):
            raise BadField("events", "are no objects")
        if row.get("registry") is None:
            yield row
