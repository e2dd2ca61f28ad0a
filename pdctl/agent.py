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
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy.typing as npt
import structlog
from aiohttp import web

from pdctl.core.handover import Mapped, Offer, Row
from pdctl.core.layout import Pool, RankPools, Region
from pdctl.core.plan import Ints
from pdctl.core.trace import TraceContext
from pdctl.core.transfer import Quarantined
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

log = structlog.get_logger(__name__)

MAX_BODY_BYTES = 8 << 20  # a million page numbers; to read them holds the loop for 60 ms
_BODY_S = 10.0
_LAST_WORD_S = 0.2  # for the engine to take it: it may be stopped, and then its socket is full
_MOST_REVOKED = 4096
_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid

Release = Callable[[Ints], None]
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class NotOpen(CallerError):
    """What the request speaks of is not here, or not any more."""


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


class Sending(Protocol):
    """A room at a prefill rank."""

    @property
    def prefix_len(self) -> int: ...

    @property
    def n_pages(self) -> int: ...

    async def peers_ready(self) -> None: ...

    async def send(self, pages: npt.ArrayLike, layers: range | None = None) -> None: ...

    async def finish(
        self,
        aux_row: int | None = None,
        state_rows: Sequence[npt.ArrayLike] = (),
        pages: npt.ArrayLike | None = None,
    ) -> None: ...


class Arriving(Protocol):
    """A room at a decode rank."""

    async def arrived(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Arrival:
    """What an engine asks of `receive`."""

    pages: list[int]
    aux_row: int
    prefix_len: int
    state_rows: tuple[tuple[int, ...], ...]
    trace: TraceContext | None = None


class Rank(Protocol):
    """A rank that is open; of `sending` and `receiving` it can do one."""

    @property
    def session(self) -> str: ...

    @property
    def metrics_url(self) -> str: ...

    @property
    def registered(self) -> bool: ...

    @property
    def rooms(self) -> Sequence[int]: ...

    @property
    def quarantine(self) -> Sequence[Quarantined]: ...

    def sending(
        self, room: int, release: Release, trace: TraceContext | None
    ) -> AbstractAsyncContextManager[Sending]: ...

    async def announce(self, room: int) -> None:
        """Say at the registry that this rank's DP group has the room."""

    async def receiving(self, room: int, asked: Arrival, release: Release) -> AbstractAsyncContextManager[Arriving]:
        """Find who sends the room. Raises before anybody was told of the pages."""


OpenRank = Callable[[Offer, RankPools, Sequence[Region]], AbstractAsyncContextManager[Rank]]
Map = Callable[[Offer, int | None], Awaitable[list[Mapped]]]


@dataclass(slots=True)
class _Room:
    """A room at the sending side between two requests; whoever takes it out of the table closes it."""

    sending: Sending
    stack: AsyncExitStack
    ticket: int


class _Arrival(NamedTuple):
    """A room at the receiving side."""

    task: asyncio.Task[None]
    ticket: int


@dataclass(slots=True)
class _Life:
    """From the handover to the end. `left`: nobody wants it any more; `events`: what the open answer says next."""

    offer: Offer
    pools: RankPools
    mapped: list[Mapped]
    peer: Peer
    opened: asyncio.Future[Rank]
    left: asyncio.Event = field(default_factory=asyncio.Event)
    events: asyncio.Queue[dict[str, Any]] = field(default_factory=asyncio.Queue)
    rank: Rank | None = None
    sending: dict[int, _Room] = field(default_factory=dict)
    receiving: dict[int, _Arrival] = field(default_factory=dict)
    tickets: set[int] = field(default_factory=set)
    revoked: dict[int, None] = field(default_factory=dict)

    def release(self, room: int, ticket: int) -> Release:
        return lambda _: self.free(room, ticket)

    def free(self, room: int, ticket: int) -> None:
        """Nothing touches the pages any more: say so, once."""
        if ticket in self.tickets:
            self.tickets.discard(ticket)
            self.events.put_nowait({"event": "released", "room": room, "ticket": ticket})

    def take(self, ticket: int) -> None:
        """Raises CallerError for one that is in use, or that was given up before it came."""
        if ticket in self.revoked:
            raise CallerError(f"ticket {ticket} was given up before: this request came after its own end")
        if ticket in self.tickets:
            raise CallerError(f"ticket {ticket} is in use: give each room a ticket of its own")
        self.tickets.add(ticket)

    def revoke(self, ticket: int) -> bool:
        """Give a ticket up; whether its pages are free already. One that has not come yet is refused if it does."""
        if ticket in self.tickets:
            return False
        self.revoked[ticket] = None
        while len(self.revoked) > _MOST_REVOKED:
            self.revoked.pop(next(iter(self.revoked)))
        return True

    async def end_rooms(self) -> None:
        """Give up what is under way; decode ranks, or prefill ranks, hear of it."""
        arrivals = [arrival.task for arrival in self.receiving.values()]
        for task in arrivals:
            task.cancel()
        rooms = [self.sending.pop(room) for room in list(self.sending)]
        closing = [asyncio.ensure_future(room.stack.aclose()) for room in rooms]
        if waiting := [*closing, *arrivals]:
            await asyncio.wait(waiting)

    async def say_last(self, word: dict[str, Any]) -> None:
        self.events.put_nowait(word)
        with suppress(TimeoutError):
            await asyncio.wait_for(self.events.join(), _LAST_WORD_S)


class Agent:
    """`live` is its whole life; `app` is what it says at the socket meanwhile.

    users: who may speak to it, by user id. hurry: called when the rank is no longer wanted: the process must end soon,
    whether or not all has been closed in order.
    """

    def __init__(self, open_rank: OpenRank, mapping: Map, users: frozenset[int], hurry: Callable[[], object]) -> None:
        self._open_rank, self._map, self._users, self._hurry = open_rank, mapping, users, hurry
        self._taken: asyncio.Future[_Life] = asyncio.get_running_loop().create_future()
        self._life: _Life | None = None

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

    async def _serve(self, life: _Life) -> None:
        regions = [mapped.region for mapped in life.mapped]
        async with self._open_rank(life.offer, life.pools, regions) as rank:
            life.rank = rank
            life.opened.set_result(rank)
            log.info("pool taken over", role=life.offer.role.value, session=rank.session, engine_pid=life.peer.pid)
            try:
                with _watching(life.peer.pid, life.left.set):
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
        life = self._life = _Life(offer, pools, mapped, peer, opened)
        self._taken.set_result(life)
        try:
            return await self._stream(request, life)
        finally:
            life.left.set()
            self._hurry()

    def _check_free(self, claimant: Peer) -> None:
        if self._life is not None:
            raise Occupied(
                f"process {self._life.peer.pid} has handed over its pool here: give each rank a socket of its own",
                holder=str(self._life.peer.pid),
                claimant=str(claimant.pid),
            )

    async def _stream(self, request: web.Request, life: _Life) -> web.StreamResponse:
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

    def _held(self) -> _Life:
        if self._life is None:
            raise NotOpen("no pool has been handed over: POST /v1/rank first")
        return self._life

    def _opened(self) -> tuple[_Life, Rank]:
        life = self._held()
        if life.rank is None or life.left.is_set():
            raise NotOpen("the rank is being opened or let go: wait for the first line of the handover's answer")
        return life, life.rank

    def _card(self, life: _Life) -> dict[str, Any]:
        said: dict[str, Any] = {"role": life.offer.role.value, "agent_pid": os.getpid(), "engine_pid": life.peer.pid}
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
        async with self._entered(life, rank, room, ticket, trace) as sending:
            if announce:
                await rank.announce(room)
            await sending.peers_ready()
            said = {"prefix_len": sending.prefix_len, "n_pages": sending.n_pages}
            if whole:
                await sending.finish(aux_row, states, pages)
        if whole:
            await self._close(life, room)
        return web.json_response(said)

    async def _send(self, request: web.Request) -> web.Response:
        room, (life, _), row = _number(request), self._opened(), await _row(request)
        pages, layers = _pages(row, life.pools.kv), _layers(row)
        row.end()
        async with self._at(life, room) as sending:
            await sending.send(pages, layers)
        return web.json_response({})

    async def _finish(self, request: web.Request) -> web.Response:
        room, (life, _), row = _number(request), self._opened(), await _row(request)
        pages = _pages(row, life.pools.kv) if row.get("pages") is not None else None
        aux_row, states = _rows(row, life.pools)
        row.end()
        async with self._at(life, room) as sending:
            await sending.finish(aux_row, states, pages)
        await self._close(life, room)
        return web.json_response({})

    async def _abort_sending(self, request: web.Request) -> web.Response:
        room, (life, _), ticket = _number(request), self._opened(), _ticket(request)
        free = ticket is not None and life.revoke(ticket)
        held = life.sending.get(room)
        if held is not None and ticket in (None, held.ticket):
            await self._close(life, room)
        return web.json_response({"free": free})

    @asynccontextmanager
    async def _entered(
        self, life: _Life, rank: Rank, room: int, ticket: int, trace: TraceContext | None
    ) -> AsyncIterator[Sending]:
        """A new room; closed, and so failed, if the block is left by an error."""
        life.take(ticket)
        stack, release = AsyncExitStack(), life.release(room, ticket)
        try:
            sending = await stack.enter_async_context(rank.sending(room, release, trace))
        except BaseException:
            life.tickets.discard(ticket)  # nothing was begun
            raise
        life.sending[room] = _Room(sending, stack, ticket)
        try:
            yield sending
        except BaseException:
            await self._close(life, room)
            raise

    @asynccontextmanager
    async def _at(self, life: _Life, room: int) -> AsyncIterator[Sending]:
        """Our own mistakes leave the room as it is; what ends it, or cuts the request short, closes it."""
        if room not in life.sending:
            raise NotOpen(f"room {room} is not open: open it first; it may have failed, and that was answered then")
        try:
            yield life.sending[room].sending
        except CallerError:
            raise
        except BaseException:
            await self._close(life, room)
            raise

    async def _close(self, life: _Life, room: int) -> None:
        if (held := life.sending.pop(room, None)) is not None:
            await held.stack.aclose()

    # --- a decode's rooms

    async def _receive(self, request: web.Request) -> web.Response:
        room, (life, rank), row = _number(request), self._opened(), await _row(request)
        ticket, prefix_len = row.integer("ticket", 1), row.integer("prefix_len", 0, 0, most=2**31 - 1)
        pages, (aux_row, states) = _pages(row, life.pools.kv), _rows(row, life.pools)
        row.end()
        if aux_row is None:
            raise BadField("aux_row", "is missing: name the row for what comes beside the pages")
        if room in life.receiving:
            raise CallerError(f"room {room} is open already: give each request a room of its own")
        asked = Arrival(pages, aux_row, prefix_len, states, TraceContext.from_headers(request.headers))
        task = asyncio.create_task(_arrive(life, rank, room, ticket, asked), name=f"arrival of room {room}")
        life.receiving[room] = _Arrival(task, ticket)
        try:
            await asyncio.wait({task})
        finally:
            task.cancel()
            await asyncio.wait({task})
            del life.receiving[room]
        if task.cancelled():
            raise RoomFailed(room, "this engine has given it up")
        task.result()
        return web.json_response({})

    async def _abort_receiving(self, request: web.Request) -> web.Response:
        room, (life, _), ticket = _number(request), self._opened(), _ticket(request)
        free = ticket is not None and life.revoke(ticket)
        held = life.receiving.get(room)
        if held is not None and ticket in (None, held.ticket):
            held.task.cancel()
            await asyncio.wait({held.task})
        return web.json_response({"free": free})

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


async def _arrive(life: _Life, rank: Rank, room: int, ticket: int, asked: Arrival) -> None:
    """The ticket is taken here, and not before: a task that is cancelled at once never runs."""
    life.take(ticket)
    try:
        entering = await rank.receiving(room, asked, life.release(room, ticket))
    except BaseException:
        life.free(room, ticket)
        raise
    async with entering as arriving:
        await arriving.arrived()


@contextmanager
def _watching(pid: int, gone: Callable[[], None]) -> Iterator[None]:
    """Call `gone` when that process ends: a child that it has forked may keep its connection open."""
    try:
        fd = os.pidfd_open(pid) if pid else None
    except OSError:  # it is gone, and so will be its connection; or it lives where its number means nothing
        fd = None
    if fd is None:
        yield
        return
    loop = asyncio.get_running_loop()
    loop.add_reader(fd, gone)
    try:
        yield
    finally:
        loop.remove_reader(fd)
        os.close(fd)


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
    said |= {name: getattr(error, name) for name in ("field", "room", "reason") if hasattr(error, name)}
    return {"error": said}
