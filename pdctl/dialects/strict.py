"""
What the paths under /v1 have in common: bodies are read strictly, schemas are published, errors go out as JSON.

No path and no field is known here.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import Response
from fastapi.routing import APIRoute
from pydantic import TypeAdapter, ValidationError

from pdctl.dialects.edge import json_answer, peer_of
from pdctl.errors import BadField, PdctlError

T = TypeVar("T")
Handler = Callable[[Request], Coroutine[Any, Any, Response]]
Refused = Callable[[PdctlError, str, str], PdctlError]


@dataclass(frozen=True, slots=True)
class Problem:
    """`message`: what happened: what to do. `fix` is the second half, `field` what is wrong where one is."""

    message: str
    field: str | None = None
    fix: str | None = None


@dataclass(frozen=True, slots=True)
class Failed:
    error: Problem


_WORDS = {
    400: "A field cannot be used, or contradicts what is known.",
    404: "Not known here.",
    408: "The body did not arrive in time.",
    409: "A later epoch, or another host that lives, holds the seat.",
    413: "Over a limit that the text names.",
    429: "A table is at the limit that the text names; `Retry-After`.",
    503: "Not now, and nothing was changed; `Retry-After`.",
}


def fails(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The answers of a path that are errors, for its schema."""
    return {status: {"description": _WORDS[status], "model": Failed} for status in statuses}


def takes(adapter: TypeAdapter[Any], *, required: bool = True) -> dict[str, Any]:
    """The body's schema: handlers read it themselves, bounded in size and time."""
    return {"requestBody": {"required": required, "content": {"application/json": {"schema": _inlined(adapter)}}}}


def as_body(adapter: TypeAdapter[T], body: bytes) -> T:
    """Strictly: no text for numbers, no field that nobody knows. Raises BadField for the first that is wrong."""
    try:
        return adapter.validate_json(body, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    name = ".".join(str(part) for part in first["loc"]) or "body"
    raise BadField(name[:200], f"{first['msg'][:1].lower()}{first['msg'][1:200]}: see the schema in /docs")


def route_class(refused: Refused) -> type[APIRoute]:
    """Routes that answer our errors as JSON. `refused` is told of each, with the path and the peer, and says how it is
    worded here."""

    class StrictRoute(APIRoute):
        def get_route_handler(self) -> Handler:
            handle = super().get_route_handler()

            async def answering(request: Request) -> Response:
                try:
                    return await handle(request)
                except PdctlError as error:
                    return json_answer(refused(error, request.url.path, peer_of(request)))

            return answering

    return StrictRoute


def _inlined(adapter: TypeAdapter[Any]) -> dict[str, Any]:
    schema = adapter.json_schema()
    defined = schema.pop("$defs", {})
    whole: dict[str, Any] = _resolved(schema, defined)
    return whole


def _resolved(part: Any, defined: Mapping[str, Any]) -> Any:
    """With what it refers to in its place, however deep: in an OpenAPI its own definitions have none."""
    if isinstance(part, list):
        return [_resolved(each, defined) for each in part]
    if not isinstance(part, dict):
        return part
    if "$ref" in part:
        return _resolved(defined[part["$ref"].rpartition("/")[2]], defined)
    return {name: _resolved(value, defined) for name, value in part.items()}
