"""
How the fleet is, over HTTP, under /v1: for the page, for people, for `pdctl status` and `pdctl explain`.

    PUT  /v1/instances/{instance}/ranks/{seat}/report    a rank says how it is (core.report)
    GET  /v1/overview                                    all at once
    GET  /v1/events?since=41&kind=ejected                what has happened of late

Translates only; `lookout` keeps it. Reports are shown as they were sent, with their age beside them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response
from pydantic import TypeAdapter

from pdctl.core.native import check_name, read_seat
from pdctl.core.overview import Held, Place
from pdctl.core.report import Report, Wanted, short_seat
from pdctl.dialects.edge import owner_of, received
from pdctl.dialects.native import Instance, SeatName
from pdctl.dialects.strict import Refused, as_body, fails, route_class, takes
from pdctl.lookout import Lookout

BODY_LIMIT = 1 << 20
"""4,096 links of a sentence each are 0.8 MB."""
EVENTS_SHOWN = 1000

_REPORT = TypeAdapter(Report)


Named = tuple[str, bytes]
"""What is called so, as JSON."""


@dataclass(frozen=True, slots=True)
class Shown:
    """What stands in the overview besides reports and events; each is asked at every question."""

    head: Callable[[], dict[str, Any]]
    instances: Callable[[], Iterable[Named]]
    sessions: Callable[[], Iterable[Named]]


def router(lookout: Lookout, shown: Shown, refused: Refused) -> APIRouter:
    api = APIRouter(prefix="/v1", tags=["fleet"], route_class=route_class(refused))
    _add_report(api, lookout)
    _add_reads(api, lookout, shown)
    return api


def _add_report(api: APIRouter, lookout: Lookout) -> None:
    @api.put(
        "/instances/{instance}/ranks/{seat}/report",
        summary="How a rank is: of the life that holds the seat, kept until the next one, or for a few seconds",
        response_model=Wanted,
        responses=fails(400, 404, 408, 409, 413, 429),
        openapi_extra=takes(_REPORT),
    )
    async def report(request: Request, instance: Instance, seat: SeatName) -> Response:
        place = check_name(instance, "instance"), read_seat(seat)
        said = as_body(_REPORT, await received(request.receive, BODY_LIMIT))
        wanted = lookout.report(place, said, _REPORT.dump_json(said), owner_of(request.scope))
        return JSONResponse(asdict(wanted))


def _add_reads(api: APIRouter, lookout: Lookout, shown: Shown) -> None:
    @api.get("/overview", summary="The fleet as this registry sees it: instances, reports of ranks, links, itself")
    async def overview() -> Response:
        return Response(whole(lookout, shown), media_type="application/json")

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


def whole(lookout: Lookout, shown: Shown) -> bytes:
    """Everything, as one JSON object. Joined rather than encoded: of thousands of ranks it has megabytes."""
    now = lookout.clock()
    head = {
        **shown.head(),
        "reports_from": "here",
        "events": {"next": lookout.events.next, "oldest": lookout.events.oldest},
    }
    reports = (entry(place, held, now) for place, held in lookout.reports)
    return b'%b,"instances":[%b],"reports":[%b],"sessions":[%b]}' % (
        _line(head)[:-1],
        b",".join(told for _, told in shown.instances()),
        b",".join(reports),
        b",".join(told for _, told in shown.sessions()),
    )


def entry(place: Place, held: Held, now: float) -> bytes:
    """A rank's report, and whose it is."""
    instance, seat = place
    whose = {
        "instance": instance,
        "seat": short_seat(seat),
        **seat._asdict(),
        "age_s": round(now - held.at, 3),
    }
    return _line(whose)[:-1] + b"," + held.body[1:]


def _line(body: object) -> bytes:
    return json.dumps(body, separators=(",", ":")).encode()
