"""
vLLM's prefills as /v1 shows them: beside the instances of the other wires in its list and its watch, and by themselves.

    GET          /v1/instances, /v1/instances/vllm:ID, /v1/watch      as instances
    GET, DELETE  /v1/engines, /v1/engines/{engine}                    as vLLM names them, and the goodbye it never says

`vllm:` and a prefill's ID are the instance's name, which no other wire can give: a colon stands in none of theirs. vLLM
knows no leases, drains or incarnations and no shape but its sizes: these say so instead of being left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any
from urllib.parse import quote, unquote

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from pdctl.core.fleet import Move, Place, Prefill, Worker
from pdctl.core.lives import PREFILL
from pdctl.dialects.edge import owner_of
from pdctl.dialects.strict import Refused, route_class
from pdctl.dialects.vllm import MISSING_SHOWN, said
from pdctl.roster import Roster

SCHEME = "vllm:"


class Engines:
    """vLLM's prefills as rows of /v1."""

    def __init__(self, roster: Roster) -> None:
        self._roster = roster
        self._revisions: dict[str, int] = {}

    def names(self) -> list[str]:
        return [_instance(prefill.name) for prefill in self._roster]

    def summaries(self, role: str | None = None) -> Iterator[dict[str, Any]]:
        if role in (None, PREFILL):
            yield from map(self._summary, self._roster)

    def detail(self, instance: str) -> dict[str, Any] | None:
        """None where the name is none of ours, or nobody is left."""
        prefill = self._roster.get(unquote(instance.removeprefix(SCHEME))) if instance.startswith(SCHEME) else None
        if prefill is None:
            return None
        missing = [_seat(place) for place in islice(self._roster.missing(prefill), MISSING_SHOWN)]
        rows = [_row(worker) for _, worker in sorted(prefill.workers.items())]
        return {**self._summary(prefill), "shape": None, "alive_seats": rows, "missing_seats": missing, "forming": None}

    def told(self, revision: int, name: str, move: Move | None) -> tuple[str, dict[str, Any]]:
        """A change for watchers: the instance, and what is said. No move: the prefill is complete."""
        prefill = self._roster.get(name)
        if prefill is None:
            self._revisions.pop(name, None)
        else:
            self._revisions[name] = revision
        before = None if move is None else move.before
        worker = move.row.worker if move is not None else None if prefill is None else prefill.last
        return _instance(name), {
            "revision": revision,
            "kind": _kind(move),
            "instance": _instance(name),
            "gone": [] if before is None else [before.epoch],
            "rank": None if worker is None else _row(worker),
            "why": None,
            "summary": None if prefill is None else self._summary(prefill),
        }

    def _summary(self, prefill: Prefill) -> dict[str, Any]:
        seats, alive = self._roster.n_seats(prefill), len(prefill.workers)
        return {
            "name": _instance(prefill.name),
            "role": PREFILL,
            "wire": "vllm",
            "serves": prefill.last.instance,
            "ready": self._roster.is_complete(prefill),
            "draining": False,
            "dead": False,
            "seats": seats,
            "alive": alive,
            "missing": max(0, seats - alive),
            "epoch": max(worker.epoch for worker in prefill.workers.values()),
            "incarnation": 0,
            "revision": self._revisions.get(prefill.name, 0),
        }


def operators_router(roster: Roster, refused: Refused) -> APIRouter:
    """vLLM's prefills by their own names, and the goodbye that vLLM itself never says. `refused`: as elsewhere."""
    api = APIRouter(prefix="/v1/engines", tags=["pdctl"], route_class=route_class(refused))

    @api.get("", summary="Every prefill of vLLM, with who is missing")
    async def engines() -> dict[str, Any]:
        return {"prefills": [_shown(prefill, roster) for prefill in roster]}

    @api.delete("/{engine}", summary="Forget a prefill that is gone", responses=said(404, 409, 503))
    async def forget(request: Request, engine: str) -> Response:
        if await roster.remove(engine, owner_of(request.scope)):
            return JSONResponse({"status": "ok"})
        return JSONResponse({"error": {"message": f"no worker of engine {engine!r} is registered"}}, 404)

    return api


def _shown(prefill: Prefill, roster: Roster) -> dict[str, Any]:
    workers = [
        {"engine_id": worker.engine_id, "place": str(place), "addr": worker.addr, "host": worker.host}
        for place, worker in sorted(prefill.workers.items())
    ]
    missing = [str(place) for place in islice(roster.missing(prefill), MISSING_SHOWN)]
    return {
        "name": prefill.name,
        "instance": prefill.last.instance,
        "complete": roster.is_complete(prefill),
        "workers": workers,
        "missing": missing,
    }


def _instance(prefill: str) -> str:
    """An ID may have any printable character: those that no path bears are escaped."""
    return SCHEME + quote(prefill, safe="")


def _kind(move: Move | None) -> str:
    if move is None:
        return "completed"
    if move.row.worker is None:
        return "left"
    return "seated" if move.before is None else "replaced"


def _row(worker: Worker) -> dict[str, Any]:
    return {
        **_seat(worker.place),
        "address": str(worker.address),
        "prefill_http_port": None,
        "epoch": worker.epoch,
        "incarnation": 0,
        "standing": "alive",
        "ttl_s": None,
        "labels": {},
        "metadata": {"engine_id": worker.engine_id},
    }


def _seat(place: Place) -> dict[str, Any]:
    at = {"dp": place.dp, "cp": 0, "tp": place.tp, "pp": place.pp}
    return {"seat": "/".join(f"{axis}{rank}" for axis, rank in at.items()), **at}
