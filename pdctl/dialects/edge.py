"""
What every dialect does at its edge: bodies come in bounded in size and time, errors go out as statuses.

No path and no field is known here.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic_core import from_json
from starlette.types import Receive, Scope

from pdctl.core.access import plain_host
from pdctl.core.lives import Owner
from pdctl.errors import (
    BadField,
    CallerError,
    JournalUnavailable,
    LimitReached,
    NotNow,
    NotReady,
    Occupied,
    PdctlError,
    Superseded,
    TooLarge,
    TooSlow,
    UnknownLease,
)

MIB = 1 << 20
BODY_DEADLINE_S = 10.0

_STATUSES = (
    (TooLarge, 413),
    (Occupied, 409),
    (Superseded, 409),
    (UnknownLease, 404),
    (CallerError, 400),
    (LimitReached, 429),
    (TooSlow, 408),
    (NotNow, 503),
)


async def read_json(request: Request, limit: int, deadline_s: float = BODY_DEADLINE_S) -> Any:
    """The body as JSON, whatever its content type. Raises as `received` and `parsed`."""
    return parsed(await received(request.receive, limit, deadline_s))


async def read_body(request: Request, limit: int, deadline_s: float = BODY_DEADLINE_S) -> bytes:
    """The body as it came. Raises as `received`."""
    return await received(request.receive, limit, deadline_s)


async def received(receive: Receive, limit: int, deadline_s: float = BODY_DEADLINE_S) -> bytes:
    """The whole body of an ASGI request. Raises TooLarge, TooSlow, BadField("body") when the client left."""
    body = bytearray()
    try:
        async with asyncio.timeout(deadline_s):
            while True:
                message = await receive()
                if message["type"] != "http.request":
                    raise BadField("body", f"ended after {len(body)} bytes: the client closed the connection")
                body += message.get("body", b"")
                if len(body) > limit:  # uvicorn throws the rest away, so that the client can read the answer
                    raise TooLarge(f"body: is over {limit} bytes, the limit of this path: send less at a time")
                if not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError:
        raise TooSlow(f"body: {len(body)} bytes came in {deadline_s:g} s: send it at once") from None


def parsed(body: bytes) -> Any:
    """What the JSON says. Raises BadField("body")."""
    try:
        return from_json(body)  # what it reads it reads as json.loads does, in a third of the time
    except ValueError:
        return _parsed_or_why_not(body)


def _parsed_or_why_not(body: bytes) -> Any:
    """Lone surrogates and hundreds of levels are still JSON."""
    try:
        return json.loads(body.decode())
    except UnicodeDecodeError as error:
        raise BadField("body", f"is not UTF-8 at byte {error.start}: send JSON") from None
    except json.JSONDecodeError as error:
        raise BadField("body", f"is not JSON ({error.msg} at character {error.pos}): send one JSON object") from None
    except (ValueError, RecursionError):  # an integer of more than 4,300 digits; nesting without end
        raise BadField("body", "holds a number too long or is nested too deeply: send one flat JSON object") from None


def status_of(error: PdctlError) -> int:
    return next((status for kind, status in _STATUSES if isinstance(error, kind)), 500)


def text_answer(error: PdctlError) -> Response:
    return PlainTextResponse(str(error), status_of(error), _headers(error))


def json_answer(error: PdctlError) -> Response:
    told: dict[str, Any] = {"message": str(error)}
    field = getattr(error, "field", None)
    if field is not None:
        told["field"] = field
    _, colon, fix = str(error).rpartition(": ")  # what happened: what to do
    if colon:
        told["fix"] = fix
    return JSONResponse({"error": told}, status_of(error), _headers(error))


def peer_of(request: Request) -> str:
    """Who asked; an IPv4 client of a dual-stack socket by its IPv4 address."""
    return peer_host(request.scope)


def peer_host(scope: Scope) -> str:
    """As `peer_of`, for those who have no Request."""
    client = scope.get("client")
    return plain_host(client[0]) if client else "unknown"


def owner_of(scope: Scope) -> Owner:
    """Who asked, with the name of their token: by the guard's word where one stands at the door."""
    caller: Owner | None = scope.get("state", {}).get("caller")
    return Owner(peer_host(scope)) if caller is None else caller


def _headers(error: PdctlError) -> dict[str, str] | None:
    return {"Retry-After": "1"} if isinstance(error, NotReady | LimitReached | JournalUnavailable) else None
