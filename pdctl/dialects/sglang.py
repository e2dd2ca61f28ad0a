"""
SGLang's bootstrap registry, as stock ranks and decodes of 0.5.23 speak to it, on the plain paths.

Statuses, texts and key sets are stock's where a client can see them; malformed input, which stock answers with 500, is
a 400 in plain text that names the field. Translates only: what a claim means is decided in `core`, and applied by the
registrar. The handlers read the raw body themselves, since stock ignores the content type; the OpenAPI is written by
hand in `sglang_openapi`.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse
from fastapi.routing import APIRoute
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from pdctl.core.route import MAX_SEATS, Announcement, Seat, as_integer, as_object, needed, rank_body, topology_body
from pdctl.dialects import sglang_openapi as docs
from pdctl.dialects.edge import MIB, peer_of, read_json, text_answer
from pdctl.errors import BadField, PdctlError
from pdctl.registrar import Registrar

ROUTE_LIMIT = MIB
ROOM_LIMIT = MIB
QUERY_LIMIT = 8 * MIB  # stock stops at 1 MiB: about 50,000 rooms; a decode asks for all that are unresolved at once

_JSON = "application/json; charset=utf-8"
_RANKS = ("prefill_dp_rank", "prefill_cp_rank", "target_tp_rank", "target_pp_rank")
_TOPOLOGY = Seat(-1, -1, -1, -1)

Handler = Callable[[Request], Coroutine[Any, Any, Response]]


def router(registrar: Registrar, instance: str = "default") -> APIRouter:
    """The plain paths, speaking for one instance."""
    wire = _Wire(registrar, instance)
    api = APIRouter(route_class=wire.route_class(), tags=["SGLang bootstrap registry"])
    api.add_api_route("/route", wire.put_route, methods=["PUT"], **docs.PUT_ROUTE)
    api.add_api_route("/route", wire.get_route, methods=["GET"], **docs.GET_ROUTE)
    api.add_api_route("/register_dp_rank", wire.register_dp_rank, methods=["POST"], **docs.REGISTER_DP_RANK)
    api.add_api_route("/query_dp_ranks", wire.query_dp_ranks, methods=["POST"], **docs.QUERY_DP_RANKS)
    api.add_api_route("/health", wire.health, methods=["GET"], **docs.HEALTH)
    api.add_api_route("/health", wire.health, methods=["HEAD"], include_in_schema=False)
    api.routes.append(Route("/route", _MethodNotAllowed(), include_in_schema=False))
    return api


class _Wire:
    """The handlers of one instance."""

    def __init__(self, registrar: Registrar, instance: str) -> None:
        self._registrar = registrar
        self._instance = instance

    async def put_route(self, request: Request) -> Response:
        claim = Announcement.from_body(await read_json(request, ROUTE_LIMIT))
        await self._registrar.register(self._instance, claim)
        return PlainTextResponse("OK")

    async def get_route(self, request: Request) -> Response:
        sent = [next(iter(request.query_params.getlist(name)), "") for name in _RANKS]
        if not all(sent):
            return PlainTextResponse("Missing inputs for bootstrap server.", 400)
        seat = Seat(*(as_integer(text, name) for text, name in zip(sent, _RANKS, strict=True)))
        if seat == _TOPOLOGY:
            view = self._registrar.topology(self._instance)
            return _json(topology_body(view.shape, view.http_port))
        address = self._registrar.rank(self._instance, seat)
        if address is None:
            dp, cp, tp, pp = sent
            text = f"Bootstrap info not found for dp_rank={dp} cp_rank={cp} tp_rank={tp} pp_rank={pp}"
            return PlainTextResponse(text, 404)
        return _json(rank_body(address))

    async def register_dp_rank(self, request: Request) -> Response:
        row = as_object(await read_json(request, ROOM_LIMIT))
        room = as_integer(needed(row, "bootstrap_room"), "bootstrap_room")
        dp_rank = as_integer(needed(row, "dp_rank"), "dp_rank")
        if not 0 <= dp_rank < MAX_SEATS:
            raise BadField("dp_rank", f"is {dp_rank}: ranks count from 0 to {MAX_SEATS - 1} at most")
        self._registrar.announce_room(room, dp_rank)
        return PlainTextResponse("OK")

    async def query_dp_ranks(self, request: Request) -> Response:
        rooms = needed(as_object(await read_json(request, QUERY_LIMIT)), "bootstrap_rooms")
        if not isinstance(rooms, list):
            raise BadField("bootstrap_rooms", "is no array: send an array of rooms")
        numbers = [
            room if type(room) is int else as_integer(room, f"bootstrap_rooms[{place}]")
            for place, room in enumerate(rooms)
        ]
        return _json(self._registrar.rooms(numbers))

    async def health(self, request: Request) -> Response:  # noqa: ARG002
        return PlainTextResponse("OK")

    def route_class(self) -> type[APIRoute]:
        """Routes that hand the request to the handler as it is, and answer our errors in plain text."""
        registrar = self._registrar

        class TextRoute(APIRoute):
            def get_route_handler(self) -> Handler:
                return _answering(self.endpoint, registrar)

        return TextRoute


class _MethodNotAllowed:
    """Any other method on /route, as stock has it: text that calls itself JSON."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await Response("Method not allowed", 405, media_type=_JSON)(scope, receive, send)


def _answering(endpoint: Callable[[Request], Awaitable[Response]], registrar: Registrar) -> Handler:
    async def handle(request: Request) -> Response:
        try:
            return await endpoint(request)
        except PdctlError as error:
            registrar.refused(error, request.url.path, peer_of(request))
            return text_answer(error)

    return handle


def _json(body: object) -> Response:
    return Response(json.dumps(body), media_type=_JSON)
