"""
Whom Prometheus should scrape, over HTTP: GET /v1/targets, in the words of its `http_sd_configs`.

Translates only: core/targets.py decides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from fastapi import APIRouter

from pdctl.core.instances import InstanceView
from pdctl.core.targets import targets


def router(views: Callable[[], Iterable[InstanceView]]) -> APIRouter:
    """`views`: the registry's own."""
    api = APIRouter(tags=["fleet"])

    @api.get("/targets", summary="Where ranks of ours answer /metrics: for Prometheus' http_sd_configs")
    async def scraped() -> list[dict[str, Any]]:
        return [target.to_body() for target in targets(views())]

    return api
