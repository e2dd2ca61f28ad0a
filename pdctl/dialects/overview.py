"""
How the fleet is, over HTTP, under /v1: for the page, for people, for `pdctl status` and `pdctl explain`.

    PUT  /v1/instances/{instance}/ranks/{seat}/report    a rank says how it is (core.report)
    GET  /v1/overview                                    all at once
    GET  /v1/overview/watch                              and whatever changes, as server-sent events (`board`)
    GET  /v1/events?since=41&kind=ejected                what has happened of late
    GET  /v1/reports?since=12                            reports that came here, for the other registries of the fleet

Translates only; `lookout` keeps it. Reports are shown as they were sent, with their age beside them.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Annotated, Any, Protocol

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import TypeAdapter
from starlette.types import ASGIApp, Scope

from pdctl.core.elsewhere import Copied
from pdctl.core.feed import WatchLimits
from pdctl.core.latest import Latest
from pdctl.core.lives import Owner
from pdctl.core.native import check_name, read_seat
from pdctl.core.overview import Held, Place
from pdctl.core.report import Report, Wanted, short_seat
from pdctl.dialects.board import AT_ONCE, Board, Tell
from pdctl.dialects.edge import json_answer, owner_of, peer_host, peer_of, received
from pdctl.dialects.native import Instance, SeatName
from pdctl.dialects.strict import Refused, as_body, fails, route_class, takes
from pdctl.errors import PdctlError, TooLarge
from pdctl.lookout import Lookout
from pdctl.metrics import Metrics
from pdctl.shortcut import Answer, Answered, Beside, at_once_of

BODY_LIMIT = 2 << 20
"""4,096 links in trouble are 1.0 MB, with the longest names and sentences that a rank of ours gives them."""
EVENTS_SHOWN = 1000

_REPORT = TypeAdapter(Report)
_PATH = re.compile(r"/v1/instances/([^/]+)/ranks/([^/]+)/report", re.ASCII)


class Others(Protocol):
    """The other registries of the fleet: `replicas.Replicas`. `name` is this registry's own among them."""

    @property
    def name(self) -> str: ...

    async def look(self) -> None: ...

    def url_of(self, name: str) -> str | None: ...


@dataclass(frozen=True, slots=True)
class Shown:
    """What stands in the overview besides reports and events, asked at every question: names, and JSON on one line.

    others  None where this registry is the only one
    """

    head: Callable[[], dict[str, Any]]
    service: Callable[[], dict[str, Any]]
    instances: Callable[[], Iterable[str]]
    instance: Callable[[str], bytes | None]
    sessions: Callable[[], Iterable[str]]
    session: Callable[[str], bytes]
    others: Others | None = None


def board(lookout: Lookout, shown: Shown, metrics: Metrics, limits: WatchLimits) -> Board:
    """What watchers are told, from now on. Stand its `run` beside the server; tell it of instances and the service."""

    def instance(name: str) -> bytes:
        return shown.instance(name) or _line({"name": name, "gone": True})

    def report(place: Place) -> bytes:
        gone = {"instance": place[0], "seat": short_seat(place[1]), "gone": True}
        return told_of(place, lookout, shown) or _line(gone)

    def event(number: int) -> bytes | None:
        found = lookout.events.get(number)
        return None if found is None else _line(asdict(found))

    kinds: dict[str, Tell] = {
        "instance": instance,
        "report": report,
        "session": shown.session,
        "event": event,
        "service": lambda _: _line(shown.service()),
    }
    found = Board(Latest(), kinds, frozenset({"instance"}), lambda: whole(lookout, shown), metrics, limits)
    lookout.subscribe(found.changed)
    return found


def router(lookout: Lookout, shown: Shown, refused: Refused, news: Board) -> APIRouter:
    api = APIRouter(prefix="/v1", tags=["fleet"], route_class=route_class(refused))
    _add_report(api, lookout)
    _add_reads(api, lookout, shown, news)
    return api


def in_front(lookout: Lookout, refused: Refused, api: ASGIApp) -> ASGIApp:
    """`api`, with the short way for reports: of 2,000 ranks 400 come in a second (docs/overview.md has figures)."""
    others = at_once_of(api)

    def at_once(scope: Scope, body: bytes) -> Answered:
        found = _PATH.fullmatch(scope["path"]) if scope["method"] == "PUT" else None
        if found is None:
            return others(scope, body)
        try:
            if len(body) > BODY_LIMIT:
                raise TooLarge(f"body: is over {BODY_LIMIT} bytes, the limit of this path: send less at a time")
            return _taken(_take(lookout, found[1], found[2], body, owner_of(scope)).again_s)
        except PdctlError as error:
            told = json_answer(refused(error, scope["path"], peer_host(scope)))
            return Answer(told.status_code, told.raw_headers, bytes(told.body))

    return Beside(api, at_once)


def _take(lookout: Lookout, instance: str, seat: str, body: bytes, owner: Owner) -> Wanted:
    place = check_name(instance, "instance"), read_seat(seat)
    said = as_body(_REPORT, body)
    return lookout.report(place, said, _REPORT.dump_json(said), owner)


@lru_cache(maxsize=16)
def _taken(again_s: float) -> Answer:
    told = _line(asdict(Wanted(again_s)))
    return Answer(200, [(b"content-length", b"%d" % len(told)), (b"content-type", b"application/json")], told)


def _add_report(api: APIRouter, lookout: Lookout) -> None:
    @api.put(
        "/instances/{instance}/ranks/{seat}/report",
        summary="How a rank is: of the life that holds the seat, kept until the next one, or for a few seconds",
        response_model=Wanted,
        responses=fails(400, 404, 408, 409, 413, 429),
        openapi_extra=takes(_REPORT),
    )
    async def report(request: Request, instance: Instance, seat: SeatName) -> Response:
        body = await received(request.receive, BODY_LIMIT)
        return JSONResponse(asdict(_take(lookout, instance, seat, body, owner_of(request.scope))))


def _add_reads(api: APIRouter, lookout: Lookout, shown: Shown, news: Board) -> None:
    @api.get("/overview", summary="The fleet as this registry sees it: instances, reports of ranks, links, itself")
    async def overview() -> Response:
        return StreamingResponse(whole(lookout, shown), media_type="application/json")

    @api.get(
        "/overview/watch",
        summary="The same, and whatever changes, as server-sent events",
        description="Events: overview, then instance, report, session, event, service as they change; bye at the end.",
        response_class=Response,
        responses={200: {"content": {"text/event-stream": {}}}, **fails(429)},
    )
    async def watch(request: Request) -> Response:
        return news.response(peer_of(request))

    @api.get(
        "/reports",
        summary="What ranks have told this registry itself, for the others over the same etcd",
        response_class=Response,
        responses={200: {"content": {"text/plain": {}}}, **fails(400)},
    )
    async def reports(
        since: Annotated[int | None, Query(description="Changed since: `next` of the last answer.", ge=0)] = None,
    ) -> Response:
        name = None if shown.others is None else shown.others.name
        return StreamingResponse(own(lookout, name, since), media_type="text/plain")

    @api.get("/events", summary="What has happened of late, oldest first", responses=fails(400))
    async def events(
        since: Annotated[int, Query(description="From this id on: `next` of the last answer.", ge=0)] = 0,
        kind: Annotated[str | None, Query(description="Only of this kind.")] = None,
        instance: Annotated[str | None, Query(description="Only of this instance.")] = None,
        limit: Annotated[int, Query(description="So many at most.", ge=1, le=EVENTS_SHOWN)] = 200,
    ) -> Response:
        book = lookout.events
        found, following = book.since(since, limit, kind, instance)
        return JSONResponse({"events": list(map(asdict, found)), "next": following, "oldest": book.oldest})


async def whole(lookout: Lookout, shown: Shown) -> AsyncIterator[bytes]:
    """Everything, as one JSON object, a piece at a time: of thousands of ranks it has megabytes, and others wait."""
    if shown.others is not None:
        await shown.others.look()
    head = {
        **shown.head(),
        "reports_from": "here" if shown.others is None else "all",
        "reporting": {"again_s": lookout.reports.again_s, "expire_after_s": lookout.reports.expire_after_s},
        "service": shown.service(),
        "events": {"next": lookout.events.next, "oldest": lookout.events.oldest},
    }
    yield _line(head)[:-1]

    def report(place: Place) -> bytes | None:
        return told_of(place, lookout, shown)

    reporting = dict.fromkeys([*(place for place, _ in lookout.reports), *lookout.elsewhere])
    lists: tuple[tuple[bytes, list[Any], Callable[[Any], bytes | None]], ...] = (
        (b"instances", list(shown.instances()), shown.instance),
        (b"reports", list(reporting), report),
        (b"sessions", list(shown.sessions()), shown.session),
    )
    for name, names, tell in lists:
        yield b',"%b":[' % name
        comma = b""
        for start in range(0, len(names), AT_ONCE):
            found = [told for each in names[start : start + AT_ONCE] if (told := tell(each)) is not None]
            if found:
                yield comma + b",".join(found)
                comma = b","
            await asyncio.sleep(0)
        yield b"]"
    yield b"}"


def told_of(place: Place, lookout: Lookout, shown: Shown) -> bytes | None:
    """A rank's last report, whichever registry it told."""
    held, now = lookout.reports.get(place), lookout.clock()
    found = lookout.elsewhere.freshest(place)
    if found is not None and (held is None or held.at < found[1].at):
        registry, copied = found
        return entry(place, copied, now, None if shown.others is None else shown.others.url_of(registry))
    return None if held is None else entry(place, held, now)


def entry(place: Place, held: Held | Copied, now: float, registry: str | None = None) -> bytes:
    """A rank's report, and whose it is; `registry`: another one that was told."""
    instance, seat = place
    whose = {
        "instance": instance,
        "seat": short_seat(seat),
        **seat._asdict(),
        "age_s": round(max(0.0, now - held.at), 3),
        **({} if registry is None else {"registry": registry}),
    }
    return _line(whose)[:-1] + b"," + held.body[1:]


async def own(lookout: Lookout, name: str | None, since: int | None) -> AsyncIterator[bytes]:
    """What ranks have told this registry, for the others: a line says how much there is, then one for each rank has
    whose it is, a tab, and the report; nothing behind the tab where there is none any more."""
    places = None if since is None or since > lookout.own.number else lookout.own.since(since)
    head = {"registry": name, "next": lookout.own.number, "whole": places is None}
    yield _line(head) + b"\n"
    names = [place for place, _ in lookout.reports] if places is None else places
    for start in range(0, len(names), AT_ONCE):
        yield b"".join(_own(place, lookout) for place in names[start : start + AT_ONCE])
        await asyncio.sleep(0)


def _own(place: Place, lookout: Lookout) -> bytes:
    held = lookout.reports.get(place)
    whose: dict[str, Any] = {"instance": place[0], "seat": str(place[1]).replace("/", "-")}
    if held is None:
        return _line(whose) + b"\t\n"
    whose |= {"epoch": held.epoch, "age_s": round(lookout.clock() - held.at, 3)}
    return b"%b\t%b\n" % (_line(whose), held.body)


def _line(body: object) -> bytes:
    return json.dumps(body, separators=(",", ":")).encode()
