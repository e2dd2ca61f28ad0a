"""
SGLang's bootstrap registry, as stock ranks and decodes of 0.5.23 speak to it, on the plain paths.

Statuses, texts and key sets are stock's where a client can see them; malformed input, which stock answers with 500, is
a 400 in plain text that names the field. Translates only: what a claim means is decided in `core`, and applied by the
registrar. Ranks and decodes ask these paths all the time, so they are bare ASGI that `in_front` puts before FastAPI,
with the short way beside it, and what they answer is encoded once a change (docs/performance.md has the figures). The
OpenAPI is written by hand in `sglang_openapi`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from typing import Any
from urllib.parse import parse_qsl

from fastapi import APIRouter, Response
from fastapi.routing import APIRoute
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from pdctl.core.lives import Claim
from pdctl.core.route import MAX_SEATS, Announcement, Seat, as_integer, as_object, needed, rank_body, topology_body
from pdctl.counts.registry import Lookup
from pdctl.dialects import sglang_openapi as docs
from pdctl.dialects.edge import MIB, owner_of, parsed, peer_host, received, text_answer
from pdctl.errors import BadField, PdctlError, TooLarge
from pdctl.registrar import Registrar
from pdctl.shortcut import Answer, Answered, Beside, Promise
from pdctl.waiting import Told

ROUTE_LIMIT = MIB
ROOM_LIMIT = MIB
QUERY_LIMIT = 8 * MIB  # stock stops at 1 MiB: about 50,000 rooms; a decode asks for all that are unresolved at once

_JSON = "application/json; charset=utf-8"
_TEXT = "text/plain; charset=utf-8"
_RANKS = ("prefill_dp_rank", "prefill_cp_rank", "target_tp_rank", "target_pp_rank")
_TOPOLOGY = Seat(-1, -1, -1, -1)
_LIMITS = {"/route": ROUTE_LIMIT, "/register_dp_rank": ROOM_LIMIT, "/query_dp_ranks": QUERY_LIMIT}
_PLAIN = {int}  # a bool is none
_KEPT_BODY_NBYTES = 2048  # stock's has 600; a layout makes it longer
_KEPT, _KEPT_NBYTES = 4096, 256  # one question can be written in many ways and at any length, by strangers too

InstanceOf = Callable[[Scope], str]
"""For which instance a request speaks."""

Handler = Callable[[Scope, bytes], Answer | Promise]


def router(registrar: Registrar, instance: str = "default") -> APIRouter:
    """The plain paths, speaking for one instance: what FastAPI knows of them, and documents."""
    return Plain(registrar, instance).router()


def in_front(plain: Plain, api: ASGIApp) -> ASGIApp:
    """`plain` answers what it knows, before `api` has looked at the request; `api` everything else."""

    async def service(scope: Scope, receive: Receive, send: Send) -> None:
        await (plain if plain.knows(scope) else api)(scope, receive, send)

    return Beside(service, plain.at_once)


class Plain:
    """The paths as an ASGI app that is only given requests that it `knows`, for one instance or for several."""

    def __init__(self, registrar: Registrar, instance: str | InstanceOf = "default") -> None:
        self._registrar = registrar
        self._instance_of: InstanceOf = instance if callable(instance) else lambda scope: instance  # noqa: ARG005
        self._kept: dict[tuple[str, bytes], tuple[Lookup, Answer]] = {}
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

    def at_once(self, scope: Scope, body: bytes) -> Answered:
        """The short way; None for what is not known here."""
        handler = self._handlers.get((scope["method"], scope["path"]))
        if handler is None:
            return None
        try:
            _check_size(scope, len(body))
            return handler(scope, body)
        except PdctlError as error:
            return self._refusal(error, scope)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer: Answered
        try:
            limit = _LIMITS.get(scope["path"]) if scope["method"] in ("PUT", "POST") else None
            answer = self.at_once(scope, b"" if limit is None else await received(receive, limit))
        except PdctlError as error:
            answer = self._refusal(error, scope)
        if answer is not None:
            await (answer if isinstance(answer, Answer) else await answer).send(send)

    def _telling(self, promise: Promise, scope: Scope) -> Told:
        """How the registrar has the promise kept."""

        def told(error: BaseException | None) -> None:
            if error is None:
                promise.keep(_OK)
            else:
                promise.keep(self._refusal(error, scope) if isinstance(error, PdctlError) else error)

        return told

    def _refusal(self, error: PdctlError, scope: Scope) -> Answer:
        self._registrar.herald.refused(error, scope["path"], peer_host(scope), self._instance_of(scope))
        told = text_answer(error)
        return Answer(told.status_code, told.raw_headers, bytes(told.body))

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

    def _put_route(self, scope: Scope, body: bytes) -> Answer | Promise:
        announcement = _announced(body) if len(body) <= _KEPT_BODY_NBYTES else _announced.__wrapped__(body)
        claim = Claim(self._instance_of(scope), announcement, owner_of(scope))
        if self._registrar.heard(claim):
            return _OK
        promise = Promise()
        self._registrar.offer(claim, self._telling(promise, scope))
        return promise

    def _get_route(self, scope: Scope, body: bytes) -> Answer:  # noqa: ARG002
        asked = self._instance_of(scope), scope["query_string"]
        revision = self._registrar.revision
        if revision != self._kept_at or len(self._kept) > _KEPT:
            self._kept, self._kept_at = {}, revision
        kept = self._kept.get(asked)
        if kept is None:
            return self._look_up(*asked)
        self._registrar.answered_again(kept[0])
        return kept[1]

    def _look_up(self, instance: str, query: bytes) -> Answer:
        """Find out, and keep what stays true until something changes: answers with an address or a topology."""
        sent = _ranks_sent(query)
        if not all(sent):
            return _answer(400, _TEXT, b"Missing inputs for bootstrap server.")
        seat = Seat(*(as_integer(text, name) for text, name in zip(sent, _RANKS, strict=True)))
        if seat == _TOPOLOGY:
            view = self._registrar.topology(instance)
            what, found = Lookup.TOPOLOGY, topology_body(view.shape, view.http_port)
        else:
            address = self._registrar.rank(instance, seat)
            if address is None:
                dp, cp, tp, pp = sent
                text = f"Bootstrap info not found for dp_rank={dp} cp_rank={cp} tp_rank={tp} pp_rank={pp}"
                return _answer(404, _TEXT, text.encode())
            what, found = Lookup.RANK, rank_body(address)
        answer = _json(found)
        if len(query) <= _KEPT_NBYTES:
            self._kept[instance, query] = what, answer
        return answer

    def _register_dp_rank(self, scope: Scope, body: bytes) -> Promise:
        row = as_object(parsed(body))
        room = as_integer(needed(row, "bootstrap_room"), "bootstrap_room")
        dp_rank = as_integer(needed(row, "dp_rank"), "dp_rank")
        if not 0 <= dp_rank < MAX_SEATS:
            raise BadField("dp_rank", f"is {dp_rank}: ranks count from 0 to {MAX_SEATS - 1} at most")
        promise = Promise()
        self._registrar.offer_room(room, dp_rank, self._telling(promise, scope))
        return promise

    def _query_dp_ranks(self, scope: Scope, body: bytes) -> Answer:  # noqa: ARG002
        rooms = needed(as_object(parsed(body)), "bootstrap_rooms")
        if not isinstance(rooms, list):
            raise BadField("bootstrap_rooms", "is no array: send an array of rooms")
        if not set(map(type, rooms)) <= _PLAIN:
            rooms = [as_integer(room, f"bootstrap_rooms[{place}]") for place, room in enumerate(rooms)]
        found = self._registrar.rooms(rooms)
        pairs = ", ".join(
            [f'"{room}": {dp_rank}' for room, dp_rank in found.items()]
        )  # as json.dumps, in 3/4 of its time
        return _answer(200, _JSON, f"{{{pairs}}}".encode())

    def _health(self, scope: Scope, body: bytes) -> Answer:  # noqa: ARG002
        """A decode gives a prefill up after two of these that are not 200: 503 for one that is known to be dead."""
        why_dead = self._registrar.health(self._instance_of(scope))
        return _OK if why_dead is None else _answer(503, _TEXT, why_dead.encode())


class _MethodNotAllowed:
    """Any other method on /route, as stock has it: text that calls itself JSON."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await Response("Method not allowed", 405, {"Allow": "GET, PUT"}, media_type=_JSON)(scope, receive, send)


async def _documented() -> None:
    """Stands in FastAPI's table for what `Plain` answers; never called."""


@lru_cache(maxsize=1024)
def _announced(body: bytes) -> Announcement:
    """A rank that says itself again says it in the same bytes."""
    return Announcement.from_body(parsed(body))


def _ranks_sent(query: bytes) -> list[str]:
    """The four ranks as text, "" for one that is not there; the first of two that have one name."""
    sent: dict[str, str] = {}
    for name, text in parse_qsl(query.decode("latin-1"), keep_blank_values=True):
        sent.setdefault(name, text)
    return [sent.get(name, "") for name in _RANKS]


def _check_size(scope: Scope, nbytes: int) -> None:
    limit = _LIMITS.get(scope["path"], ROUTE_LIMIT)
    if nbytes > limit:
        raise TooLarge(f"body: is over {limit} bytes, the limit of this path: send less at a time")


def _answer(status: int, content_type: str, body: bytes) -> Answer:
    return Answer(status, [(b"content-length", b"%d" % len(body)), (b"content-type", content_type.encode())], body)


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
