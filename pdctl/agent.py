"""
The KV mover for an engine in another process: HTTP over a Unix socket, one rank a process (docs/agent.md).

The handover is a request whose answer stays open. While it lives the pool lives; when it ends, however it ends, the
rooms are given up, the rank leaves the registry, and this process ends: that is what makes it certain that nothing
writes the pool any more, and what lets it go. Mooncake's engine gives memory back no earlier (MOONCAKE_FACTS H9, H12).

Never serves a second rank, never opens a node or maps memory by itself: it is given who does.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import struct
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, NamedTuple

import structlog
from aiohttp import web

from pdctl.core.handover import Mapped, Offer, Row
from pdctl.core.layout import Pool, RankPools, Region
from pdctl.core.trace import TraceContext
from pdctl.errors import (
    BadField,
    CallerError,
    Occupied,
    OperatorError,
    PdctlError,
    RoomFailed,
    TooLarge,
    TooSlow,
)
from pdctl.tenancy import Arrival, NotOpen, Rank, Tenancy, watching

log = structlog.get_logger(__name__)

MAX_BODY_BYTES = 8 << 20  # a million page numbers; to read them holds the loop for 60 ms
_BODY_S = 10.0
_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Forbidden(CallerError):
    """Who asks may not."""


class Peer(NamedTuple):
    """Who is at the other end of a connection, by the kernel's word; `pid` is 0 for one that we cannot see."""

    pid: int
    uid: int
    gid: int

    @classmethod
    def of(cls, request: web.Request) -> Peer:
        sock = request.get_extra_info("socket")
        return cls._make(_CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)))


OpenRank = Callable[[Offer, RankPools, Sequence[Region]], AbstractAsyncContextManager[Rank]]
Map = Callable[[Offer, int | None], Awaitable[list[Mapped]]]


class Agent:
    """`live` is its whole life; `app` is what it says at the socket meanwhile.

    users: who may speak to it, by user id. hurry: called when the rank is no longer wanted: the process must end soon,
    whether or not all has been closed in order.
    """

    def __init__(self, open_rank: OpenRank, mapping: Map, users: frozenset[int], hurry: Callable[[], object]) -> None:
        self._open_rank, self._map, self._users, self._hurry = open_rank, mapping, users, hurry
        self._taken: asyncio.Future[Tenancy] = asyncio.get_running_loop().create_future()
        self._life: Tenancy | None = None

    def app(self) -> web.Application:
        app = web.Application(middlewares=[self._answering], client_max_size=MAX_BODY_BYTES)
        app.add_routes(
            [
                web.post("/v1/rank", self._handover),
                web.get("/v1/rank", self._shown),
                web.delete("/v1/rank", self._let_go),
                web.post("/v1/sending/{room}", self._open),
                web.post("/v1/sending/{room}/pages", self._send),
                web.post("/v1/sending/{room}/finish", self._finish),
                web.delete("/v1/sending/{room}", self._abort_sending),
                web.post("/v1/receiving/{room}", self._receive),
                web.delete("/v1/receiving/{room}", self._abort_receiving),
            ]
        )
        return app

    async def live(self) -> None:
        """Wait for a handover, serve that rank, return when it is over. Nothing of it can be used again afterwards."""
        life = await self._taken
        try:
            await self._serve(life)
        except PdctlError as error:
            log.error("rank ended", reason=str(error))
            if life.opened.done():
                await life.say_last({"event": "ended", **_body(error)})
            else:
                life.opened.set_exception(error)
                await life.left.wait()  # its engine has the answer now
        except asyncio.CancelledError:
            await life.say_last({"event": "ended", "error": {"message": "the agent was told to stop: hand over again"}})
            raise

    async def _serve(self, life: Tenancy) -> None:
        regions = [mapped.region for mapped in life.mapped]
        async with self._open_rank(life.offer, life.pools, regions) as rank:
            life.rank = rank
            life.opened.set_result(rank)
            log.info("pool taken over", role=life.offer.role.value, session=rank.session, engine_pid=life.engine_pid)
            try:
                with watching(life.engine_pid, life.left.set):
                    await life.left.wait()
            finally:
                self._hurry()
                await life.end_rooms()
        log.info("pool let go", session=rank.session)

    # --- the handover

    async def _handover(self, request: web.Request) -> web.StreamResponse:
        offer, peer = Offer.from_body(await _json(request)), Peer.of(request)
        self._check_free(peer)
        mapped = await self._map(offer, None if peer.uid in (0, os.geteuid()) else peer.uid)
        self._check_free(peer)  # another may have come while a device was opened
        pools = offer.pools([each.region for each in mapped])
        opened: asyncio.Future[Rank] = asyncio.get_running_loop().create_future()
        life = self._life = Tenancy(offer, pools, mapped, peer.pid, opened)
        self._taken.set_result(life)
        try:
            return await self._stream(request, life)
        finally:
            life.left.set()
            self._hurry()

    def _check_free(self, claimant: Peer) -> None:
        if self._life is not None:
            raise Occupied(
                f"process {self._life.engine_pid} has handed over its pool here: give each rank a socket of its own",
                holder=str(self._life.engine_pid),
                claimant=str(claimant.pid),
            )

    async def _stream(self, request: web.Request, life: Tenancy) -> web.StreamResponse:
        """Returns only what has been refused: an open answer ends with the process."""
        try:
            await asyncio.shield(life.opened)
        except PdctlError as error:
            answer = _answer(error)
            await answer.prepare(request)
            await answer.write_eof()
            return answer
        stream = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        await stream.prepare(request)
        await stream.write(_line({"event": "opened", **self._card(life)}))
        while True:
            event = await life.events.get()
            await stream.write(_line(event))
            life.events.task_done()

    async def _shown(self, request: web.Request) -> web.Response:  # noqa: ARG002
        return web.json_response(self._card(self._held()))

    async def _let_go(self, request: web.Request) -> web.Response:  # noqa: ARG002
        self._held().left.set()
        return web.json_response({})

    def _held(self) -> Tenancy:
        if self._life is None:
            raise NotOpen("no pool has been handed over: POST /v1/rank first")
        return self._life

    def _opened(self) -> tuple[Tenancy, Rank]:
        life = self._held()
        if life.rank is None or life.left.is_set():
            raise NotOpen("the rank is being opened or let go: wait for the first line of the handover's answer")
        return life, life.rank

    def _card(self, life: Tenancy) -> dict[str, Any]:
        said: dict[str, Any] = {"role": life.offer.role.value, "agent_pid": os.getpid(), "engine_pid": life.engine_pid}
        if (rank := life.rank) is None:
            return said
        return said | {
            "session": rank.session,
            "metrics_url": rank.metrics_url,
            "registered": rank.registered,
            "rooms": list(rank.rooms),
            "tickets": sorted(life.tickets),
            "quarantine": [
                {"room": q.room, "pages": len(q.pages), "reason": q.reason, "waiting_for": list(q.waiting_for)}
                for q in rank.quarantine
            ],
        }

    # --- a prefill's rooms

    async def _open(self, request: web.Request) -> web.Response:
        """Wait until decode has named its pages; with `pages` in the body, do all that there is to do."""
        room, (life, rank), row = _number(request), self._opened(), await _row(request)
        ticket, announce = row.integer("ticket", 1), row.get("announce") is True
        whole = row.get("pages") is not None
        pages, (aux_row, states) = _pages(row, life.pools.kv), _rows(row, life.pools)
        row.end()
        trace = TraceContext.from_headers(request.headers)
        async with life.entered(rank, room, ticket, trace) as sending:
            if announce:
                await rank.announce(room)
            await sending.peers_ready()
            said: dict[str, Any] = {"prefix_len": sending.prefix_len, "n_pages": sending.n_pages}
            if whole:
                said["free"] = await life.finish(room, aux_row, states, pages)
        return web.json_response(said)

    async def _send(self, request: web.Request) -> web.Response:
        room, (life, _), row = _number(request), self._opened(), await _row(request)
        pages, layers = _pages(row, life.pools.kv), _layers(row)
        row.end()
        async with life.at(room) as sending:
            await sending.send(pages, layers)
        return web.json_response({})

    async def _finish(self, request: web.Request) -> web.Response:
        room, (life, _), row = _number(request), self._opened(), await _row(request)
        pages = _pages(row, life.pools.kv) if row.get("pages") is not None else None
        aux_row, states = _rows(row, life.pools)
        row.end()
        async with life.at(room):
            free = await life.finish(room, aux_row, states, pages)
        return web.json_response({"free": free})

    async def _abort_sending(self, request: web.Request) -> web.Response:
        room, (life, _), ticket = _number(request), self._opened(), _ticket(request)
        return web.json_response({"free": await life.give_up_sending(room, ticket)})

    # --- a decode's rooms

    async def _receive(self, request: web.Request) -> web.Response:
        room, (life, rank), row = _number(request), self._opened(), await _row(request)
        ticket, prefix_len = row.integer("ticket", 1), row.integer("prefix_len", 0, 0, most=2**31 - 1)
        pages, (aux_row, states) = _pages(row, life.pools.kv), _rows(row, life.pools)
        row.end()
        if aux_row is None:
            raise BadField("aux_row", "is missing: name the row for what comes beside the pages")
        asked = Arrival(pages, aux_row, prefix_len, states, TraceContext.from_headers(request.headers))
        return web.json_response({"free": await life.arrive(rank, room, ticket, asked)})

    async def _abort_receiving(self, request: web.Request) -> web.Response:
        room, (life, _), ticket = _number(request), self._opened(), _ticket(request)
        return web.json_response({"free": await life.give_up_arrival(room, ticket)})

    # --- answers

    @web.middleware
    async def _answering(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            self._admit(Peer.of(request))
            return await handler(request)
        except web.HTTPRequestEntityTooLarge:
            return _answer(TooLarge(f"body is over {MAX_BODY_BYTES} bytes: send fewer pages at once"))
        except web.HTTPException as error:
            why = f"{request.method} {request.path} is not served ({error.reason}): docs/agent.md lists what is"
            return _answer(NotOpen(why), error.status)
        except PdctlError as error:
            return _answer(error)
        except Exception as error:
            log.error("request failed by a defect", path=request.path, exc_info=error)
            said = {"kind": "Defect", "message": f"defect in the agent: {error!r}"}
            return web.json_response({"error": said}, status=500)

    def _admit(self, peer: Peer) -> None:
        if peer.uid not in self._users:
            log.warning("caller refused", uid=peer.uid, pid=peer.pid)
            raise Forbidden(f"user {peer.uid} may not speak to this agent: run it as the same user, or give --user")


# --- bodies


async def _json(request: web.Request) -> object:
    try:
        async with asyncio.timeout(_BODY_S):
            raw = await request.read()
        return json.loads(raw)
    except TimeoutError:
        raise TooSlow(f"the body did not arrive within {_BODY_S:g} s: send it whole") from None
    except (ValueError, RecursionError) as error:
        raise BadField("body", f"is no JSON ({error}): send one object") from None


async def _row(request: web.Request) -> Row:
    return Row.of(await _json(request))


def _number(request: web.Request) -> int:
    text = request.match_info["room"]
    if not text.isascii() or not text.isdigit() or len(text) > 19 or int(text) >= 1 << 63:
        raise BadField("room", f"is {text[:64]!r}: give a number from 0 to 2**63 - 1")
    return int(text)


def _ticket(request: web.Request) -> int | None:
    """Which opening of the room is meant; None: whichever there is."""
    if (text := request.query.get("ticket")) is None:
        return None
    if not text.isascii() or not text.isdigit() or len(text) > 19:
        raise BadField("ticket", f"is {text[:64]!r}: give the number that the room was opened with")
    return int(text)


def _pages(row: Row, pool: Pool) -> list[int]:
    return row.integers("pages", most=(pool.n_items or 1) - 1)


def _layers(row: Row) -> range | None:
    """`[first, end]`, the end not included."""
    given = row.integers("layers")
    if not given:
        return None
    if len(given) != 2 or given[0] >= given[1]:
        raise row.wrong("layers", f"is {given}: give the first and the one after the last")
    return range(*given)


def _rows(row: Row, pools: RankPools) -> tuple[int | None, tuple[tuple[int, ...], ...]]:
    most = (pools.aux.n_items or 1) - 1
    aux_row = None if row.get("aux_row") is None else row.integer("aux_row", 0, most=most)
    states = row.lists("state_rows")
    if len(states) > len(pools.states):
        raise row.wrong("state_rows", f"names {len(states)} groups of {len(pools.states)}: hand over all of them")
    for number, (rows, pool) in enumerate(zip(states, pools.states, strict=False)):
        if rows and max(rows) >= (pool.n_items or 1):
            raise row.wrong(f"state_rows.{number}", f"has {max(rows)}: give 0 to {(pool.n_items or 1) - 1}")
    return aux_row, states


def _line(event: dict[str, Any]) -> bytes:
    return json.dumps(event).encode() + b"\n"


def _answer(error: PdctlError, status: int | None = None) -> web.Response:
    return web.json_response(_body(error), status=status or _status(error))


def _status(error: PdctlError) -> int:
    for kind, status in _STATUS:
        if isinstance(error, kind):
            return status
    return 503


_STATUS: tuple[tuple[type[PdctlError], int], ...] = (
    (Forbidden, 403),
    (NotOpen, 404),
    (Occupied, 409),
    (TooSlow, 408),
    (TooLarge, 413),
    (CallerError, 400),
    (RoomFailed, 424),
    (OperatorError, 503),
)


def _body(error: PdctlError) -> dict[str, Any]:
    said: dict[str, Any] = {"kind": type(error).__name__, "message": str(error)}
    said |= {name: getattr(error, name) for name in ("field", "room", "reason", "is_permanent") if hasattr(error, name)}
    return {"error": said}
