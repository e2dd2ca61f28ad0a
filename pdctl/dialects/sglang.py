"""
SGLang's bootstrap registry, as stock ranks and decodes of 0.5.23 speak to it, on the plain paths.

Statuses, texts and key sets are stock's where a client can see them; malformed input, which stock answers with 500, is
a 400 in plain text that names the field. Translates only: what a claim means is decided in `core`, and applied by the
registrar. Ranks and decodes ask these paths all the time, so they are bare ASGI that `in_front` puts before FastAPI,
and what they answer is encoded once a change (docs/performance.md has the figures). The OpenAPI is written by hand in
`sglang_openapi`.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import parse_qsl

from fastapi import APIRouter, Response
from fastapi.routing import APIRoute
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pdctl.core.lives import Claim
from pdctl.core.route import MAX_SEATS, Announcement, Seat, as_integer, as_object, needed, rank_body, topology_body
from pdctl.dialects import sglang_openapi as docs
from pdctl.dialects.edge import MIB, owner_of, parsed, peer_host, received, text_answer
from pdctl.errors import BadField, PdctlError
from pdctl.metrics import Lookup
from pdctl.registrar import Registrar

ROUTE_LIMIT = MIB
ROOM_LIMIT = MIB
QUERY_LIMIT = 8 * MIB  # stock stops at 1 MiB: about 50,000 rooms; a decode asks for all that are unresolved at once

_JSON = "application/json; charset=utf-8"
_TEXT = "text/plain; charset=utf-8"
_RANKS = ("prefill_dp_rank", "prefill_cp_rank", "target_tp_rank", "target_pp_rank")
_TOPOLOGY = Seat(-1, -1, -1, -1)
_KEPT = 4096  # one question can be written in many ways, and strangers write them too

Answer = tuple[Message, Message]
"""Both messages of an answer, ready to be sent: how often does not matter, they are only read."""

Handler = Callable[[Scope, Receive], Awaitable[Answer]]


def router(registrar: Registrar, instance: str = "default") -> APIRouter:
    """The plain paths, speaking for one instance: what FastAPI knows of them, and documents."""
    return Plain(registrar, instance).router()


def in_front(plain: Plain, api: ASGIApp) -> ASGIApp:
    """`plain` answers what it knows, before `api` has looked at the request; `api` everything else."""

    async def service(scope: Scope, receive: Receive, send: Send) -> None:
        await (plain if plain.knows(scope) else api)(scope, receive, send)

    return service


class Plain:
    """The paths of one instance, as an ASGI app that is only given requests that it `knows`."""

    def __init__(self, registrar: Registrar, instance: str = "default") -> None:
        self._registrar = registrar
        self._instance = instance
        self._kept: dict[bytes, tuple[Lookup, Answer]] = {}
        self._kept_at = -1
        self._handlers: dict[tuple[str, str], Handler] = {
            ("GET", "/route"): self._get_route,
            ("PUT", "/route"): self._put_route,
            ("POST", "/register_dp_rank"): self._register_dp_rank,
            ("POST", "/query_dp_ranks"): self._query_dp_ranks,
            ("GET", "/health"): self._health,
            ("HEAD", "/health"): self._health,
        }

    def knows(self, scope: Scope) -> bool:
        return scope["type"] == "http" and (scope["method"], scope["path"]) in self._handlers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            start, body = await self._handlers[scope["method"], scope["path"]](scope, receive)
        except PdctlError as error:
            self._registrar.refused(error, scope["path"], peer_host(scope))
            await text_answer(error)(scope, receive, send)
        else:
            await send(start)
            await send(body)

    def router(self) -> APIRouter:
        """These paths as FastAPI's routes: for the OpenAPI, and the same answers where nothing is in front."""
        plain = self

        class PlainRoute(APIRoute):
            async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
                await (plain if plain.knows(scope) else super().handle)(scope, receive, send)

        api = APIRouter(route_class=PlainRoute, tags=["SGLang bootstrap registry"])
        for path, method, shown in _DOCUMENTED:
            api.add_api_route(path, _documented, methods=[method], **shown)
        api.add_api_route("/health", _documented, methods=["HEAD"], include_in_schema=False)
        api.routes.append(Route("/route", _MethodNotAllowed(), include_in_schema=False))
        return api

    async def _put_route(self, scope: Scope, receive: Receive) -> Answer:
        announcement = Announcement.from_body(parsed(await received(receive, ROUTE_LIMIT)))
        await self._registrar.register(Claim(self._instance, announcement, owner_of(scope)))
        return _OK

    async def _get_route(self, scope: Scope, receive: Receive) -> Answer:  # noqa: ARG002
        asked: bytes = scope["query_string"]
        revision = self._registrar.revision
        if revision != self._kept_at or len(self._kept) > _KEPT:
            self._kept, self._kept_at = {}, revision
        kept = self._kept.get(asked)
        if kept is None:
            return self._look_up(asked)
        self._registrar.answered_again(kept[0])
        return kept[1]

    def _look_up(self, asked: bytes) -> Answer:
        """Find out, and keep what stays true until something changes: answers with an address or a topology."""
        sent = _ranks_sent(asked)
        if not all(sent):
            return _answer(400, _TEXT, b"Missing inputs for bootstrap server.")
        seat = Seat(*(as_integer(text, name) for text, name in zip(sent, _RANKS, strict=True)))
        if seat == _TOPOLOGY:
            view = self._registrar.topology(self._instance)
            return self._keep(asked, Lookup.TOPOLOGY, topology_body(view.shape, view.http_port))
        address = self._registrar.rank(self._instance, seat)
        if address is None:
            dp, cp, tp, pp = sent
            text = f"Bootstrap info not found for dp_rank={dp} cp_rank={cp} tp_rank={tp} pp_rank={pp}"
            return _answer(404, _TEXT, text.encode())
        return self._keep(asked, Lookup.RANK, rank_body(address))

    def _keep(self, asked: bytes, what: Lookup, body: object) -> Answer:
        answer = _json(body)
        self._kept[asked] = what, answer
        return answer

    async def _register_dp_rank(self, scope: Scope, receive: Receive) -> Answer:  # noqa: ARG002
        row = as_object(parsed(await received(receive, ROOM_LIMIT)))
        room = as_integer(needed(row, "bootstrap_room"), "bootstrap_room")
        dp_rank = as_integer(needed(row, "dp_rank"), "dp_rank")
        if not 0 <= dp_rank < MAX_SEATS:
            raise BadField("dp_rank", f"is {dp_rank}: ranks count from 0 to {MAX_SEATS - 1} at most")
        await self._registrar.announce_room(room, dp_rank)
        return _OK

    async def _query_dp_ranks(self, scope: Scope, receive: Receive) -> Answer:  # noqa: ARG002
        rooms = needed(as_object(parsed(await received(receive, QUERY_LIMIT))), "bootstrap_rooms")
        if not isinstance(rooms, list):
            raise BadField("bootstrap_rooms", "is no array: send an array of rooms")
        if any(type(room) is not int for room in rooms):
            rooms = [as_integer(room, f"bootstrap_rooms[{place}]") for place, room in enumerate(rooms)]
        return _json(self._registrar.rooms(rooms))

    async def _health(self, scope: Scope, receive: Receive) -> Answer:  # noqa: ARG002
        return _OK


class _MethodNotAllowed:
    """Any other method on /route, as stock has it: text that calls itself JSON."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await Response("Method not allowed", 405, {"Allow": "GET, PUT"}, media_type=_JSON)(scope, receive, send)


async def _documented() -> None:
    """Stands in FastAPI's table for what `Plain` answers; never called."""


def _ranks_sent(query: bytes) -> list[str]:
    """The four ranks as text, "" for one that is not there; the first of two that have one name."""
    sent: dict[str, str] = {}
    for name, text in parse_qsl(query.decode("latin-1"), keep_blank_values=True):
        sent.setdefault(name, text)
    return [sent.get(name, "") for name in _RANKS]


def _answer(status: int, content_type: str, body: bytes) -> Answer:
    headers = [(b"content-length", b"%d" % len(body)), (b"content-type", content_type.encode())]
    return (
        {"type": "http.response.start", "status": status, "headers": headers},
        {"type": "http.response.body", "body": body},
    )


def _json(body: Any) -> Answer:
    return _answer(200, _JSON, json.dumps(body).encode())


_OK = _answer(200, _TEXT, b"OK")
_DOCUMENTED = (
    ("/route", "PUT", docs.PUT_ROUTE),
    ("/route", "GET", docs.GET_ROUTE),
    ("/register_dp_rank", "POST", docs.REGISTER_DP_RANK),
    ("/query_dp_ranks", "POST", docs.QUERY_DP_RANKS),
    ("/health", "GET", docs.HEALTH),
)
