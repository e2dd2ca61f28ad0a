"""
Mooncake's HTTP metadata server, as a transfer engine in metadata-server mode speaks to it: GET, PUT and DELETE on
`/metadata?key=...`.

Statuses and texts are stock's, and so is the content type that calls everything JSON. Three answers differ, on purpose:
an rpc_meta key may be written again (stock: 400, so that no engine could ever restart), a key of a living engine is
neither overwritten nor deleted by another (409), and limits are named (413, 429). The engine's client waits 3 s in all
and tries once: the question to a holder is bounded below that.

Translates only: whose a key is, is decided in `core.metadata`, and the keyring performs it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from fastapi import APIRouter, Request, Response

from pdctl.core.address import Endpoint, is_loopback
from pdctl.core.metadata import handshake_address, is_rpc_meta
from pdctl.dialects.edge import MIB, json_answer, peer_of, read_body
from pdctl.engine import handshake
from pdctl.errors import BadField, Cause, PdctlError, TransferFailed
from pdctl.keyring import Keyring

VALUE_LIMIT = MIB
PROBE_DEADLINE_S = 1.0
CONNECT_DEADLINE_S = 0.5

Refused = Callable[[PdctlError, str, str], None]

_KEY = {"name": "key", "in": "query", "required": True, "schema": {"type": "string", "maxLength": 1024}}
_TEXTS = {
    200: "done, or the value as it was written", 400: "no key, or a value that no peer could use", 404: "no such key",
    405: "another method", 409: "it belongs to an engine that answers", 413: "too large", 429: "a limit is reached",
    503: "the journal takes no rows", 408: "the body did not come in time",
}  # fmt: skip


def router(keyring: Keyring, refused: Refused, value_limit: int = VALUE_LIMIT) -> APIRouter:
    """`refused` is told of every claim that is; `value_limit`: bytes that are read of a value."""
    api = APIRouter(tags=["Mooncake metadata server"])

    async def put(request: Request, key: str) -> Response:
        value = await read_body(request, value_limit)
        host = peer_of(request)
        _check_advertised(key, value, host)
        await keyring.put(key, value, host)
        return _text(200, "metadata updated")

    async def delete(request: Request, key: str) -> Response:
        was_there = await keyring.delete(key, peer_of(request))
        return _text(200, "metadata deleted") if was_there else _text(404, "metadata not found")

    async def get(request: Request, key: str) -> Response:  # noqa: ARG001
        value = keyring.get(key)
        return _text(404, "metadata not found") if value is None else _text(200, value)

    handlers = {"GET": get, "PUT": put, "DELETE": delete}

    async def metadata(request: Request) -> Response:
        key = request.query_params.get("key", "").strip()
        if not key:
            return _text(400, "metadata key is required")
        try:
            return await handlers[request.method](request, key)
        except PdctlError as error:
            refused(error, request.url.path, peer_of(request))
            return json_answer(error)

    async def other(request: Request) -> Response:
        allowed = bool(request.query_params.get("key", "").strip())
        if not allowed:
            return _text(400, "metadata key is required")
        return _text(405, "Method not allowed", {"Allow": ", ".join(handlers)})

    for method, codes in _CODES.items():
        api.add_api_route(
            "/metadata",
            metadata,
            methods=[method],
            summary=_SUMMARIES[method],
            responses={code: {"description": _TEXTS[code]} for code in codes},
            openapi_extra=_extra(method),
            operation_id=f"metadata_{method.lower()}",
        )
    api.add_api_route("/metadata", other, methods=["HEAD", "POST", "PATCH", "OPTIONS"], include_in_schema=False)
    return api


async def engine_answers(address: Endpoint) -> bool:
    """Whether a Mooncake engine is at `address`: one that answers, or one that accepts and is too busy to answer.

    The handshake's listener is one thread: an idle connection to it holds an answer up for 5 s, and a host that is
    gone accepts nothing. So who accepts and says nothing is taken for living: its name is not to be had by mistake.
    """
    try:
        await handshake.probe(str(address), deadline_s=PROBE_DEADLINE_S)
    except TransferFailed as failed:
        return failed.cause is Cause.TIMED_OUT and await _accepts(address)
    return True


async def _accepts(address: Endpoint) -> bool:
    try:
        async with asyncio.timeout(CONNECT_DEADLINE_S):
            _, writer = await asyncio.open_connection(address.host, address.port)
    except OSError:  # TimeoutError is one
        return False
    writer.transport.abort()
    return True


def _check_advertised(key: str, value: bytes, host: str) -> None:
    """An address that an engine gives must be one that its peers can use; what says none is kept as with stock."""
    if not is_rpc_meta(key):
        return
    address = handshake_address(value)
    if address is None:
        return
    if address.is_wildcard or (address.is_loopback and not is_loopback(host)):
        raise BadField(
            "ip_or_host_name",
            f"is {address.host}, where no peer finds the engine at {host}: start it with MC_TCP_BIND_ADDRESS={host}",
        )


def _text(status: int, body: str | bytes, headers: dict[str, str] | None = None) -> Response:
    return Response(body, status, headers, media_type="application/json")  # as stock has it, for texts too


def _extra(method: str) -> dict[str, object]:
    binary = {"schema": {"type": "string", "format": "binary"}}
    body = {"requestBody": {"content": {"application/json": binary}}} if method == "PUT" else {}
    return {"parameters": [_KEY], **body}


_CODES = {
    "GET": (200, 400, 404),
    "PUT": (200, 400, 408, 409, 413, 429, 503),
    "DELETE": (200, 400, 404, 409, 503),
}
_SUMMARIES = {
    "GET": "The value of a key, as it was written",
    "PUT": "Write a key; the same bytes again are fine",
    "DELETE": "Remove a key of one's own",
}
