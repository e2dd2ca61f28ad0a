"""
vLLM's Mooncake bootstrap server, for many prefills at once: /register and /query as stock has them, and
/e/{engine}/query for a decode whose `remote_bootstrap_addr` names its prefill.

The stock server refuses a worker that comes back under another address, and a second engine of a DP rank; it shows what
it has, complete or not, and a decode keeps that for ever. Here a restart is accepted, and what is not complete is not
shown: the answer is 503 with who is missing, or the complete prefills alone. `{}` means, as with stock, that nobody has
come yet.

The plain /query shows the complete prefills that registered for the same instance (core.naming: the listener, or the
host name), so that each prefill of a shared registry has a map of its own where it has a name of its own. Where several
share one, decodes are served as well, since they look at `engine_id` and not at the key: of two with the same DP rank
the later one gets the next free number. Whoever counts the keys, as vLLM's example proxy does, asks /e/{engine}/query.

Translates only: what a claim means is decided in `core.fleet`, and the roster performs it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from starlette.types import Scope

from pdctl.core.address import Endpoint, is_loopback
from pdctl.core.fleet import Place, Sizes, Worker
from pdctl.core.naming import DEFAULT
from pdctl.core.route import as_integer, as_object, needed
from pdctl.dialects.edge import MIB, peer_of, read_json, status_of
from pdctl.errors import BadField, LimitReached, NotReady, PdctlError
from pdctl.roster import Presence, Roster

BODY_LIMIT = MIB
LOOK_DEADLINE_S = 0.5
MISSING_SHOWN = 1000

Refused = Callable[[PdctlError, str, str], None]
InstanceOf = Callable[[Scope], str]

_RANK = {"type": "integer", "minimum": 0, "maximum": 65535}
_SIZE = {"type": ["integer", "null"], "minimum": 1, "maximum": 65536}
_WORKER = {
    "type": "object",
    "required": ["engine_id", "dp_rank", "tp_rank", "pp_rank", "addr"],
    "properties": {
        "engine_id": {"type": "string", "minLength": 1, "maxLength": 256},
        "addr": {"type": "string", "description": "tcp://host:port"},
        **dict.fromkeys(("dp_rank", "tp_rank", "pp_rank"), _RANK),
        **dict.fromkeys(("dp_size", "tp_size", "pp_size"), _SIZE),
    },
}
_REGISTER = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": _WORKER,
                "example": {
                    "engine_id": "prefill-a_dp0", "dp_rank": 0, "tp_rank": 0, "pp_rank": 0, "addr": "tcp://10.0.0.1:4200",
                },
            }
        },
    }
}  # fmt: skip
_TEXTS = {
    200: "done", 404: "no such prefill", 408: "the body did not come in time", 409: "the seat's holder still answers",
    413: "too large", 422: "a field that cannot be used", 429: "a limit is reached", 503: "not complete yet",
}  # fmt: skip


def router(roster: Roster, refused: Refused, instance_of: InstanceOf = lambda _: DEFAULT) -> APIRouter:
    """`refused` is told of every claim that is; `instance_of` says for which instance a request speaks."""
    api = APIRouter(tags=["vLLM bootstrap server"])

    def no(error: PdctlError, request: Request) -> Response:
        refused(error, request.url.path, peer_of(request))
        headers = {"Retry-After": "1"} if isinstance(error, NotReady | LimitReached) else None
        return JSONResponse({"detail": str(error)}, 422 if isinstance(error, BadField) else status_of(error), headers)

    async def register(request: Request) -> Response:
        try:
            worker = _worker(await read_json(request, BODY_LIMIT), peer_of(request), instance_of(request.scope))
            await roster.register(worker)
        except PdctlError as error:
            return no(error, request)
        return JSONResponse({"status": "ok"})

    async def query(request: Request) -> Response:
        engine = request.path_params.get("engine")
        try:
            found = roster.query(instance_of(request.scope)) if engine is None else roster.query_engine(engine)
            return JSONResponse(found)
        except PdctlError as error:
            return no(error, request)

    api.add_api_route(
        "/register", register, methods=["POST"], summary="A prefill worker says where it is",
        responses=said(200, 408, 409, 413, 422, 429, 503), openapi_extra=_REGISTER,
    )  # fmt: skip
    api.add_api_route(
        "/query", query, methods=["GET"], summary="Every engine of every complete prefill", responses=said(200, 503)
    )
    engine = {"name": "engine", "in": "path", "required": True, "schema": {"type": "string"}}
    api.add_api_route(
        "/e/{engine}/query", query, methods=["GET"], summary="The engines of one prefill, when it is complete",
        description="By the ID of the prefill, or of one of its engines (`ID_dp0`).",
        responses=said(200, 503), openapi_extra={"parameters": [engine]},
    )  # fmt: skip
    return api


async def look(address: Endpoint) -> Presence:
    """Ask the host whether somebody listens at a worker's address."""
    try:
        async with asyncio.timeout(LOOK_DEADLINE_S):
            _, writer = await asyncio.open_connection(address.host, address.port)
    except ConnectionRefusedError:
        return Presence.REFUSED
    except OSError:  # TimeoutError is one, and so is a name that is not known any more
        return Presence.SILENT
    writer.transport.abort()
    return Presence.THERE


def said(*codes: int) -> dict[int | str, dict[str, Any]]:
    """Statuses in words, for the OpenAPI."""
    return {code: {"description": _TEXTS[code]} for code in codes}


def _worker(body: object, host: str, instance: str) -> Worker:
    row = as_object(body)
    texts = {name: needed(row, name) for name in ("engine_id", "addr")}
    for name, text in texts.items():
        if not isinstance(text, str):
            raise BadField(name, f"is {text!r}: send text")
    ranks = [as_integer(needed(row, f"{axis}_rank"), f"{axis}_rank") for axis in ("dp", "tp", "pp")]
    sizes = {axis: row.get(f"{axis}_size") for axis in ("dp", "tp", "pp")}
    known = {axis: as_integer(size, f"{axis}_size") for axis, size in sizes.items() if size is not None}
    worker = Worker(place=Place(*ranks), host=host, sizes=Sizes(**known), instance=instance, **texts)
    if worker.address.is_loopback and not is_loopback(host):
        raise BadField("addr", f"is {worker.addr}, but it speaks from {host}: start vLLM with VLLM_HOST_IP={host}")
    return worker
