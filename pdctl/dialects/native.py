"""
pdctl's own wire, version 1: what operators see of the instances. Read only so far.
"""

from __future__ import annotations

from itertools import islice
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response

from pdctl.core.registry import InstanceView
from pdctl.core.route import Seat
from pdctl.registrar import Registrar

MISSING_SHOWN = 1000


def router(registrar: Registrar) -> APIRouter:
    api = APIRouter(prefix="/v1", tags=["pdctl"])

    @api.get("/instances", summary="Every instance, with how many of its seats are held")
    async def instances() -> dict[str, Any]:
        return {"instances": [_summary(view) for view in registrar.views()]}

    @api.get(
        "/instances/{instance}",
        summary="One instance: its shape, who sits where, and who is missing",
        responses={404: {"description": "No rank of this instance has registered yet."}},
    )
    async def one(instance: str) -> Response:
        view = registrar.view(instance)
        if view is None:
            return JSONResponse({"error": {"message": f"no rank of {instance!r} has registered yet"}}, 404)
        return JSONResponse(_detail(view, registrar))

    return api


def _summary(view: InstanceView) -> dict[str, Any]:
    return {
        "name": view.name,
        "ready": view.ready,
        "seats": view.shape.n_seats,
        "alive": len(view.alive),
        "missing": view.shape.n_seats - len(view.alive),
        "epoch": view.last_epoch,
    }


def _detail(view: InstanceView, registrar: Registrar) -> dict[str, Any]:
    seats = [
        {
            **_place(seat),
            "address": str(life.address),
            "epoch": life.epoch,
            "age_s": round(registrar.age_s(life.since), 3),
        }
        for seat, life in sorted(view.alive.items())
    ]
    missing = [_place(seat) for seat in islice(view.missing, MISSING_SHOWN)]
    return {**_summary(view), "alive_seats": seats, "missing_seats": missing}


def _place(seat: Seat) -> dict[str, Any]:
    return {"seat": str(seat), "dp": seat.dp, "cp": seat.cp, "tp": seat.tp, "pp": seat.pp}
