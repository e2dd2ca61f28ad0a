"""
pdctl's own wire, version 1, under /v1: leases for ranks that renew, and what operators and routers want to see.

    PUT, DELETE  /v1/instances/{instance}/ranks/{seat}            register and renew hold a seat, goodbye gives it up
    POST         /v1/instances/{instance}/ranks/{seat}/renew
    POST         /v1/instances/{instance}[/ranks/{seat}]/drain
    GET          /v1/instances, /v1/instances/{instance}
    GET          /v1/watch                                        `watch` says what comes

A seat is written `dp0-cp0-tp1-pp0`, or without its zeros: `tp1`. Translates only: bodies are read strictly
(`core.native` has them), what a claim means is decided in `core`, and applied by the registrar. Errors are JSON that
says what happened, in which field, and what to do.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from itertools import islice
from math import inf
from typing import Annotated, Any, Protocol

from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import JSONResponse, Response
from pydantic import TypeAdapter
from pydantic_core import to_json

from pdctl.core.feed import Feed, WatchLimits
from pdctl.core.instances import Incarnation, InstanceView
from pdctl.core.kinds import ChangeKind
from pdctl.core.lives import Change, Life
from pdctl.core.native import NAME, SEAT, Drain, Grant, Registration, Renewal, check_name, in_our_words, read_seat
from pdctl.core.route import Seat, as_integer
from pdctl.dialects.edge import owner_of, received
from pdctl.dialects.strict import Refused, as_body, fails, route_class, takes
from pdctl.dialects.watch import Broadcast
from pdctl.errors import BadField, PdctlError
from pdctl.metrics import Metrics
from pdctl.registrar import Registrar

MISSING_SHOWN = 1000
BODY_LIMIT = 1 << 18  # a layout of DeepSeek's is some KB, metadata are bounded by the registry's own limit

_REGISTRATION, _RENEWAL, _DRAIN = TypeAdapter(Registration), TypeAdapter(Renewal), TypeAdapter(Drain)


Instance = Annotated[str, Path(description="The instance's name.", json_schema_extra={"pattern": f"^{NAME}$"})]
Shown = Annotated[str, Path(description="As the list has it: of vLLM's prefills, `vllm:` and the ID.")]
SeatName = Annotated[str, Path(description="dp0-cp0-tp1-pp0, or tp1.", json_schema_extra={"pattern": f"^{SEAT}$"})]


class Others(Protocol):
    """Instances that another wire has, as this one shows them."""

    def names(self) -> Iterable[str]: ...

    def summaries(self, role: str | None = None) -> Iterable[dict[str, Any]]: ...

    def detail(self, instance: str) -> dict[str, Any] | None: ...


def broadcast(
    registrar: Registrar, metrics: Metrics, limits: WatchLimits | None = None, others: Others | None = None
) -> Broadcast:
    """What watchers hear, from now on. Stand its `run` beside the server. What happens to `others` they publish."""

    def detail(name: str) -> bytes | None:
        view = registrar.view(name)
        found = _detail(view) if view is not None else others.detail(name) if others is not None else None
        return None if found is None else line(found)

    def tell(changes: Iterable[Change]) -> None:
        stands: dict[str, dict[str, Any] | None] = {}
        for change in changes:
            name = change.instance
            if name not in stands:  # after all of them: each tells of the instance as it is now
                view = registrar.view(name)
                stands[name] = None if view is None else _summary(view)
            news.publish(change.revision, name, line(_told(change, stands[name])))

    def names() -> list[str]:
        return [*(view.name for view in registrar.views()), *(() if others is None else others.names())]

    news = Broadcast(names, detail, metrics, feed=Feed(registrar.revision), limits=limits)
    registrar.herald.subscribe(tell)
    return news


def router(registrar: Registrar, news: Broadcast | None = None, others: Others | None = None) -> APIRouter:
    """`news`: without it, nothing can be watched. `others` are listed beside the registry's own."""
    api = APIRouter(prefix="/v1", tags=["pdctl"], route_class=route_class(refusing(registrar)))
    _add_ranks(api, registrar)
    _add_drains(api, registrar)
    _add_lists(api, registrar, news, others)
    if news is not None:
        news.add_to(api, "Every change from now on, or from `since` on, as server-sent events")
    return api


def _add_ranks(api: APIRouter, registrar: Registrar) -> None:
    path = "/instances/{instance}/ranks/{seat}"

    @api.put(
        path,
        summary="Register: take a seat, or say again that it is held",
        response_model=Grant,
        responses=fails(400, 408, 409, 413, 429, 503),
        openapi_extra=takes(_REGISTRATION),
    )
    async def register(request: Request, instance: Instance, seat: SeatName) -> Response:
        place = check_name(instance, "instance"), read_seat(seat)
        said = as_body(_REGISTRATION, await received(request.receive, BODY_LIMIT))
        life = await registrar.register(said.claim(*place, owner_of(request.scope)))
        return _granted(life, registrar)

    @api.post(
        f"{path}/renew",
        summary="Renew a lease: this rank still serves",
        response_model=Grant,
        responses=fails(400, 404, 408, 409, 413, 503),
        openapi_extra=takes(_RENEWAL),
    )
    async def renew(request: Request, instance: Instance, seat: SeatName) -> Response:
        place = check_name(instance, "instance"), read_seat(seat)
        said = as_body(_RENEWAL, await received(request.receive, BODY_LIMIT))
        life = await registrar.renew(*place, said.epoch, owner_of(request.scope), said.rooms)
        return _granted(life, registrar)

    @api.delete(
        path,
        summary="Goodbye: the seat is free",
        responses=fails(400, 404, 409, 503),
    )
    async def leave(
        request: Request,
        instance: Instance,
        seat: SeatName,
        epoch: Annotated[str | None, Query(description="Only if the holder has it.", pattern=None)] = None,
    ) -> Response:
        place = check_name(instance, "instance"), read_seat(seat)
        number = None if epoch is None else as_integer(epoch, "epoch")
        await registrar.leave(*place, number, owner_of(request.scope))
        return JSONResponse({"revision": registrar.revision})


def _add_drains(api: APIRouter, registrar: Registrar) -> None:
    how: dict[str, Any] = {
        "responses": fails(400, 404, 408, 409, 413, 503),
        "openapi_extra": takes(_DRAIN, required=False),
    }

    async def drain(request: Request, instance: str, seat: Seat | None) -> Response:
        body = await received(request.receive, BODY_LIMIT)
        said = as_body(_DRAIN, body) if body else Drain()
        await registrar.drain(check_name(instance, "instance"), seat, said.grace_s, owner_of(request.scope))
        return JSONResponse({"revision": registrar.revision, "grace_s": said.grace_s})

    @api.post("/instances/{instance}/drain", summary="Nothing new for this instance; gone when it is done", **how)
    async def drain_instance(request: Request, instance: Instance) -> Response:
        return await drain(request, instance, None)

    @api.post("/instances/{instance}/ranks/{seat}/drain", summary="Nothing new for this rank; gone when done", **how)
    async def drain_rank(request: Request, instance: Instance, seat: SeatName) -> Response:
        return await drain(request, instance, read_seat(seat))


def _add_lists(api: APIRouter, registrar: Registrar, news: Broadcast | None, others: Others | None) -> None:
    @api.get("/instances", summary="Every instance, with how many of its seats are held")
    async def instances(
        role: Annotated[str | None, Query(description="Only those that play this role: prefill, decode, ...")] = None,
    ) -> Response:
        shown = [_summary(view) for view in registrar.views() if role is None or view.role == role]
        shown += [] if others is None else others.summaries(role)
        cursor = None if news is None else news.cursor
        return JSONResponse({"revision": registrar.revision, "cursor": cursor, "instances": shown})

    @api.get(
        "/instances/{instance}",
        summary="One instance: its shape, who sits where, and who is missing",
        responses=fails(400, 404),
    )
    async def one(instance: Shown) -> Response:
        found = detail(registrar, others, instance)
        if found is None:
            check_name(instance, "instance")
            what, fix = f"no rank of {instance!r} has registered yet", "wait, or compare the name with /v1/instances"
            return JSONResponse({"error": {"message": f"{what}: {fix}", "fix": fix}}, 404)
        return JSONResponse(found)


def detail(registrar: Registrar, others: Others | None, name: str) -> dict[str, Any] | None:
    """One instance, whole, as it is now; None where nobody has heard of it, or not any more."""
    found = None if others is None else others.detail(name)
    if found is not None:
        return {**found, "health": None}
    view = registrar.view(name)
    return None if view is None else _detail_now(view, registrar.now())


def refusing(registrar: Registrar) -> Refused:
    """Counts what is refused under /v1, and names fields as these bodies do."""

    def refused(error: PdctlError, path: str, peer: str) -> PdctlError:
        told = in_our_words(error) if isinstance(error, BadField) else error
        registrar.herald.refused(told, path, peer)
        return told

    return refused


def _granted(life: Life, registrar: Registrar) -> Response:
    grant = Grant(
        instance=life.claim.instance,
        seat=str(life.seat),
        epoch=life.epoch,
        ttl_s=life.ttl_s,
        standing=life.standing(registrar.now()).value,
        revision=registrar.revision,
    )
    return JSONResponse(asdict(grant))


def _told(change: Change, summary: dict[str, Any] | None) -> dict[str, Any]:
    """One change, the row that it left behind, and how the instance stands now.

    `gone`: epochs whose rows are over. The shape stands only where an incarnation begins or is served from now on.
    """
    life = change.life
    over = [life] if change.is_end or change.kind is ChangeKind.LOST else []
    begins = life.epoch == life.incarnation or change.kind is ChangeKind.RESHAPED
    return {
        "revision": change.revision,
        "kind": change.kind.value,
        "instance": change.instance,
        "gone": [each.epoch for each in (*over, change.before) if each is not None],
        "rank": None if over else _row(life),
        "why": change.why,
        "summary": summary,
        **({"shape": asdict(life.announcement.shape)} if begins else {}),
    }


def _summary(view: InstanceView) -> dict[str, Any]:
    return {
        "name": view.name,
        "role": view.role,
        "ready": view.ready,
        "draining": view.draining,
        "dead": view.served.death is not None,
        "seats": view.shape.n_seats,
        "alive": len(view.alive),
        "missing": view.shape.n_seats - len(view.alive),
        "epoch": view.last_epoch,
        "incarnation": view.served.number,
        "revision": view.revision,
    }


def _detail(view: InstanceView, now: float | None = None) -> dict[str, Any]:
    """`now`: with what is only true now; without, with what has been told."""
    forming = None if view.forming is None else _incarnation(view.forming, now)
    return {**_summary(view), **_incarnation(view.served, now), "forming": forming}


def _detail_now(view: InstanceView, now: float) -> dict[str, Any]:
    return {**_detail(view, now), "health": view.health(now)}


def _incarnation(incarnation: Incarnation, now: float | None) -> dict[str, Any]:
    return {
        "incarnation": incarnation.number,
        "shape": asdict(incarnation.shape),
        "alive_seats": [_row(life, now) for _, life in sorted(incarnation.alive.items())],
        "missing_seats": [_place(seat) for seat in islice(incarnation.missing, MISSING_SHOWN)],
    }


def _row(life: Life, now: float | None = None) -> dict[str, Any]:
    claim = life.claim
    # What time alone says of a lease is told when it is noticed: before, a watcher would never hear that it was renewed
    standing = life.standing(-inf if now is None else now)
    return {
        **_place(life.seat),
        "address": str(life.address),
        "prefill_http_port": claim.announcement.prefill_http_port,
        "epoch": life.epoch,
        "incarnation": life.incarnation,
        "standing": standing.value,
        "ttl_s": life.ttl_s,
        "labels": dict(claim.labels),
        "metadata": dict(claim.metadata),
        **({} if now is None else {"age_s": round(now - life.since, 3), "registered_from": claim.owner.host}),
    }


def _place(seat: Seat) -> dict[str, Any]:
    return {"seat": str(seat), "dp": seat.dp, "cp": seat.cp, "tp": seat.tp, "pp": seat.pp}


def line(body: object) -> bytes:
    """As watchers get it."""
    try:
        return to_json(body)
    except ValueError:  # hundreds of levels, lone surrogates: a watcher must hear it all the same
        return json.dumps(body, separators=(",", ":")).encode()
