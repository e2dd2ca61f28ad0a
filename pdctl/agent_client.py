"""
What an engine needs to have its KV moved by `pdctl agent`: hand a pool over, send, receive, abort, await the end.

    arena = Arena(nbytes, shared=Path("/kv/rank0"))           # or shared="/rank0", POSIX shared memory
    async with AgentClient("/run/pdctl/agent.sock") as agent:
        async with agent.decode(pools, [arena.handed], shape=shape) as rank:
            await rank.receive(room, pages, aux_row, release=give_pages_back)

Loads no transfer engine. The same promises as in process (sender.py, receiver.py): `release` is called once, with the
pages, when nothing can touch them any more. When the agent ends, that is now: its process was all that could. Nothing
is retried, and a pool is not handed over again by itself: `lost` says when to.
"""

from __future__ import annotations

import asyncio
import io
import itertools
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp
import numpy as np
import numpy.typing as npt
import structlog

from pdctl.core.handover import Handed, Offer, Role
from pdctl.core.layout import RankPools
from pdctl.core.plan import Ints
from pdctl.core.route import Seat, Shape
from pdctl.core.trace import Trace, TraceContext, trace_of
from pdctl.errands import Errands
from pdctl.errors import BadField, CallerError, NotReady, PdctlError, RoomFailed, Unreachable

log = structlog.get_logger(__name__)

Release = Callable[[Ints], None]

_NOT_OPEN = "the agent's client is not open: use it in `async with`"
_CONNECT_S = 5.0
_IDLE_S = 30.0  # the agent ends a connection that has been idle for 75
_GOODBYE_S = 5.0  # the agent's process ends within one; it may be stopped


class AgentClient:
    """Speaks to the agent that listens at `socket`. Open with `async with`."""

    def __init__(self, socket: str | Path) -> None:
        self.socket = str(socket)
        self._http: aiohttp.ClientSession | None = None
        self._lines = _Connections(self.socket)
        self.asking = Errands(None)
        """What is asked beside, and ends with the client."""

    async def __aenter__(self) -> Self:
        connector = aiohttp.UnixConnector(self.socket, limit=0)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S)
        self._http = aiohttp.ClientSession("http://agent", connector=connector, timeout=timeout)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.asking.aclose(0)
        self._lines.close()
        await asyncio.sleep(0)  # which is when the loop ends them
        if self._http is not None:
            await self._http.close()

    @asynccontextmanager
    async def prefill(
        self,
        pools: RankPools,
        memory: Sequence[Handed],
        *,
        seat: Seat,
        shape: Shape,
        registry: str | None = None,
        instance: str | None = None,
    ) -> AsyncIterator[AgentSender]:
        """Hand over the pools of a prefill rank, all of them inside `memory`; it is registered while the block lasts.

        `registry` and `instance` stand in for the agent's own settings. Raises BadField, LayoutMismatch's words as
        CallerError, NotReady where the rank cannot be opened now, Unreachable where no agent is.
        """
        offer = Offer.of(Role.PREFILL, pools, memory, seat, shape, registry, instance)
        async with self._handed_over(offer) as stream:
            yield AgentSender(self, stream)

    @asynccontextmanager
    async def decode(
        self,
        pools: RankPools,
        memory: Sequence[Handed],
        *,
        shape: Shape,
        tp_rank: int = 0,
        pp_rank: int = 0,
        registry: str | None = None,
        instance: str | None = None,
    ) -> AsyncIterator[AgentReceiver]:
        """The same for a decode rank. With an `instance` it is listed in the registry as well."""
        offer = Offer.of(Role.DECODE, pools, memory, Seat(0, 0, tp_rank, pp_rank), shape, registry, instance)
        async with self._handed_over(offer) as stream:
            yield AgentReceiver(self, stream)

    async def ask(
        self, method: str, path: str, body: object = None, trace: TraceContext | None = None, **query: int
    ) -> dict[str, Any]:
        """One request. Raises RoomFailed, BadField, CallerError, NotReady, Unreachable."""
        if self._http is None:
            raise CallerError(_NOT_OPEN)
        data = b"" if body is None else json.dumps(body).encode()
        asked = "?" + "&".join(f"{name}={value}" for name, value in query.items()) if query else ""
        try:
            status, raw = await self._lines.ask(f"{method} {path}{asked}", data, trace)
        except (OSError, EOFError, asyncio.LimitOverrunError, ValueError) as error:
            raise self._unreachable(error) from error
        return _said(status, raw)

    @asynccontextmanager
    async def _handed_over(self, offer: Offer) -> AsyncIterator[_Stream]:
        try:
            answer = await self._session.post("/v1/rank", data=io.BytesIO(json.dumps(offer.to_body()).encode()))
        except aiohttp.ClientError as error:
            raise self._unreachable(error) from error
        async with answer:
            if answer.status != 200:
                _said(answer.status, await answer.read())
            stream = await _Stream.begun(answer)
            reading = asyncio.create_task(stream.read(), name="handover")
            try:
                yield stream
            finally:
                await self._take_back(stream)
                answer.close()
                await asyncio.wait({reading})

    async def _take_back(self, stream: _Stream) -> None:
        """After this nobody moves the pool: its process has ended, or did not answer, and that is said."""
        if stream.lost.done():
            return
        try:
            async with asyncio.timeout(_GOODBYE_S):
                await self.ask("DELETE", "/v1/rank")
                await asyncio.shield(stream.lost)
        except (TimeoutError, Unreachable, CallerError):
            if not stream.lost.done():
                log.warning("agent has not confirmed the end: it may still touch the pool", socket=self.socket)

    @property
    def _session(self) -> aiohttp.ClientSession:
        if self._http is None:
            raise CallerError(_NOT_OPEN)
        return self._http

    def _unreachable(self, error: Exception) -> Unreachable:
        return Unreachable(f"no agent answers at {self.socket} ({error}): start pdctl agent, then hand the pool over")


class _Connections:
    """Short requests to the agent, each alone on a connection that is kept for the next.

    Not aiohttp's client: of what a small room costs its engine that was most, 155 us of CPU time a request, this takes
    34. It knows what the agent answers: a status and a body of a length that is said.
    """

    def __init__(self, socket: str) -> None:
        self._socket = socket
        self._idle: list[tuple[float, _Connection]] = []
        self._closed = False

    async def ask(self, what: str, body: bytes, trace: TraceContext | None = None) -> tuple[int, bytes]:
        """Status and body. Raises OSError, EOFError, ValueError and LimitOverrunError. Cancelled, the connection ends,
        by which the agent knows."""
        connection = self._take() or await self._connect()
        try:
            status, answer, is_kept = await connection.ask(what, body, trace)
        except BaseException:
            connection.close()
            raise
        if is_kept and not self._closed:
            self._idle.append((asyncio.get_running_loop().time(), connection))
        else:
            connection.close()
        return status, answer

    def close(self) -> None:
        self._closed = True
        while self._idle:
            self._idle.pop()[1].close()

    def _take(self) -> _Connection | None:
        """The one used last, if it still stands."""
        while self._idle:
            since, connection = self._idle.pop()
            if connection.stands and asyncio.get_running_loop().time() - since < _IDLE_S:
                return connection
            connection.close()
        return None

    async def _connect(self) -> _Connection:
        async with asyncio.timeout(_CONNECT_S):
            return _Connection(*await asyncio.open_unix_connection(self._socket))


@dataclass(frozen=True, slots=True)
class _Connection:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    @property
    def stands(self) -> bool:
        return not self.reader.at_eof() and not self.writer.is_closing()

    async def ask(self, what: str, body: bytes, trace: TraceContext | None) -> tuple[int, bytes, bool]:
        """Status, body, and whether the connection may be asked again."""
        said = "" if trace is None else "".join(f"{name}: {value}\r\n" for name, value in trace.headers().items())
        head = f"{what} HTTP/1.1\r\nHost: agent\r\n{said}Content-Length: {len(body)}\r\n\r\n"
        self.writer.write(head.encode() + body)
        with suppress(ConnectionError):  # it may refuse a body before it has read it, and then says so
            await self.writer.drain()
        lines = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower().split("\r\n")
        fields = dict(line.split(": ", 1) for line in lines[1:] if ": " in line)
        answer = await self.reader.readexactly(int(fields.get("content-length", "none")))
        return int(lines[0].split()[1]), answer, fields.get("connection") != "close"

    def close(self) -> None:
        self.writer.close()


class _Stream:
    """The answer to a handover, which stays open: what pages have become free, and the end."""

    def __init__(self, answer: aiohttp.ClientResponse, card: dict[str, Any]) -> None:
        self.card = card
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._answer = answer
        self._tickets = itertools.count(1)
        self._held: dict[int, tuple[Release | None, list[Ints]]] = {}

    @classmethod
    async def begun(cls, answer: aiohttp.ClientResponse) -> _Stream:
        line = await answer.content.readline()
        if not line:
            raise Unreachable("the agent has ended while it took the pool over: see its log, and hand over again")
        return cls(answer, json.loads(line))

    async def read(self) -> None:
        """Until the agent's process has ended, and with it all that could touch a page."""
        why = "its process has ended"
        try:
            async for line in self._answer.content:
                event = json.loads(line)
                if event["event"] == "released":
                    self.free(event["ticket"])
                elif event["event"] == "ended":
                    why = event["error"]["message"]
        except (aiohttp.ClientError, ValueError) as error:
            log.debug("handover ended", how=repr(error))
        finally:
            self.lost.set_result(why)
            for ticket in list(self._held):
                self.free(ticket)

    def hold(self, release: Release | None) -> int:
        """A ticket for the pages of one room."""
        if self.lost.done():
            raise Unreachable(f"the agent has ended ({self.lost.result()}): hand the pool over again")
        ticket = next(self._tickets)
        self._held[ticket] = (release, [])
        return ticket

    def add(self, ticket: int, pages: npt.ArrayLike) -> list[int]:
        given = np.asarray(pages, dtype=np.int64).ravel()
        if ticket in self._held:
            self._held[ticket][1].append(given)
        return given.tolist()

    def free(self, ticket: int) -> None:
        """Once, whoever says it first."""
        release, pages = self._held.pop(ticket, (None, []))
        if release is not None:
            release(np.concatenate(pages) if pages else np.empty(0, np.int64))


class AgentRank:
    """A rank that the agent has opened. `session`: under which peers reach its engine."""

    def __init__(self, client: AgentClient, stream: _Stream) -> None:
        self._client, self._stream = client, stream
        self.session = str(stream.card["session"])
        self.metrics_url = str(stream.card["metrics_url"])
        self.agent_pid = int(stream.card["agent_pid"])

    async def lost(self) -> str:
        """Return when the agent has ended, with the reason: all pages are free, and the pool can be handed over."""
        return await asyncio.shield(self._stream.lost)

    async def status(self) -> dict[str, Any]:
        """Whether it is registered, its open rooms, its quarantine: docs/agent.md."""
        return await self._client.ask("GET", "/v1/rank")

    async def _ask(self, path: str, ticket: int, body: dict[str, Any], trace: Trace = None) -> None:
        """A room in one request; what ends it without the agent's word for its pages is settled here."""
        try:
            said = await self._post(path, ticket, body, trace_of(trace))
        except (RoomFailed, Unreachable):
            raise  # the agent says when its pages are free, at the latest by its end
        except BaseException:
            await self._give_up(path, ticket)
            raise
        self._heard(said, ticket)

    async def _post(self, path: str, ticket: int, body: object, trace: TraceContext | None) -> dict[str, Any]:
        """Where no agent answers, that is said at once and its pages are asked after beside: it may have an heir."""
        try:
            return await self._client.ask("POST", path, body, trace)
        except Unreachable:
            self._ask_after(path, ticket)
            raise

    def _heard(self, said: dict[str, Any], ticket: int) -> None:
        """An answer by which the room is over: its pages are free, or will be said to be."""
        if said["free"]:
            self._stream.free(ticket)

    async def _give_up(self, path: str, ticket: int) -> None:
        """Whatever has become of the request: if the agent knows of no such ticket, it will never take it any more."""
        asking = self._ask_after(path, ticket)
        if asking is not None:
            await asyncio.wait({asking}, timeout=_GOODBYE_S)

    def _ask_after(self, path: str, ticket: int) -> asyncio.Task[None] | None:
        return self._client.asking.spawn(f"goodbye of {path}", self._say_goodbye(path, ticket))

    async def _say_goodbye(self, path: str, ticket: int) -> None:
        base = "/".join(path.split("/")[:4])
        try:
            self._heard(await self._client.ask("DELETE", base, ticket=ticket), ticket)
        except PdctlError as error:
            log.debug("agent has not answered a goodbye", why=str(error))


class AgentSender(AgentRank):
    """A prefill rank."""

    def room(
        self, room: int, release: Release | None = None, *, announce: bool = False, trace: Trace = None
    ) -> AgentRoom:
        """`announce`: say at the registry that this DP group has the room, where rooms are given to groups freely.
        `trace`: whose request it is."""
        return AgentRoom(self, room, release, announce=announce, trace=trace)

    async def send(
        self,
        room: int,
        pages: npt.ArrayLike,
        aux_row: int | None = None,
        state_rows: Sequence[Sequence[int]] = (),
        release: Release | None = None,
        *,
        announce: bool = False,
        trace: Trace = None,
    ) -> None:
        """A whole room in one request: its pages after the prefix that decode has, then the rest. Raises RoomFailed."""
        ticket = self._stream.hold(release)
        body = {"ticket": ticket, "announce": announce, "pages": self._stream.add(ticket, pages)}
        await self._ask(f"/v1/sending/{room}", ticket, body | _rows(aux_row, state_rows), trace)

    async def abort(self, room: int) -> None:
        """Give up a room that is being sent, whoever waits for it: that one hears RoomFailed."""
        await self._client.ask("DELETE", f"/v1/sending/{room}")


class AgentRoom:
    """One room of a prefill rank. Every failure comes out of its methods as RoomFailed with the first cause."""

    def __init__(
        self, rank: AgentSender, room: int, release: Release | None, *, announce: bool, trace: Trace = None
    ) -> None:
        self.room = room
        self.prefix_len = 0
        self.n_pages = 0
        self._rank, self._release, self._announce, self._trace = rank, release, announce, trace_of(trace)
        self._path = f"/v1/sending/{room}"
        self._is_open = True

    async def __aenter__(self) -> Self:
        self._ticket = self._rank._stream.hold(self._release)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_open:
            await self._rank._give_up(self._path, self._ticket)

    async def peers_ready(self) -> None:
        """Return when every decode rank of the room has named its pages."""
        said = await self._step("", {"ticket": self._ticket, "announce": self._announce}, self._trace)
        self.prefix_len, self.n_pages = said["prefix_len"], said["n_pages"]

    async def send(self, pages: npt.ArrayLike, layers: range | None = None) -> None:
        """As SendingRoom.send: returns when the pages have landed."""
        body: dict[str, Any] = {"pages": self._rank._stream.add(self._ticket, pages)}
        await self._step("/pages", body | ({} if layers is None else {"layers": [layers.start, layers.stop]}))

    async def finish(
        self,
        aux_row: int | None = None,
        state_rows: Sequence[Sequence[int]] = (),
        pages: npt.ArrayLike | None = None,
    ) -> None:
        """As SendingRoom.finish, with the last `pages` in the same transfer: then the decode ranks hear of success."""
        last = {} if pages is None else {"pages": self._rank._stream.add(self._ticket, pages)}
        self._rank._heard(await self._step("/finish", last | _rows(aux_row, state_rows)), self._ticket)
        self._is_open = False

    async def _step(self, what: str, body: dict[str, Any], trace: TraceContext | None = None) -> dict[str, Any]:
        try:
            return await self._rank._post(self._path + what, self._ticket, body, trace)
        except (RoomFailed, Unreachable):
            self._is_open = False
            raise


class AgentReceiver(AgentRank):
    """A decode rank."""

    async def receive(
        self,
        room: int,
        pages: npt.ArrayLike,
        aux_row: int,
        prefix_len: int = 0,
        state_rows: Sequence[Sequence[int]] = (),
        release: Release | None = None,
        *,
        trace: Trace = None,
    ) -> None:
        """Return when the room's pages, aux row and state are here. Raises RoomFailed, and NotReady where it is not
        known yet who sends it; cancelled, the room is given up."""
        ticket = self._stream.hold(release)
        body = {"ticket": ticket, "pages": self._stream.add(ticket, pages), "prefix_len": prefix_len}
        await self._ask(f"/v1/receiving/{room}", ticket, body | _rows(aux_row, state_rows), trace)

    async def abort(self, room: int) -> None:
        """Give up a room that is being received, whoever waits for it: that one hears RoomFailed."""
        await self._client.ask("DELETE", f"/v1/receiving/{room}")


def _rows(aux_row: int | None, state_rows: Sequence[Sequence[int]]) -> dict[str, Any]:
    return {"aux_row": aux_row, "state_rows": [[int(row) for row in rows] for rows in state_rows]}


def _said(status: int, raw: bytes) -> dict[str, Any]:
    """What it says; an error as the exception that it was at the agent, as near as matters here."""
    try:
        said = json.loads(raw)
    except ValueError:
        raise Unreachable(f"the agent has answered {status} without a reason: see its log") from None
    if status == 200:
        return dict(said)
    raise _as_exception(status, said["error"])


def _as_exception(status: int, error: dict[str, Any]) -> Exception:
    message = str(error["message"])
    if error["kind"] == "RoomFailed":
        return RoomFailed(error["room"], error["reason"], is_permanent=error.get("is_permanent", False))
    if error["kind"] == "BadField":
        return BadField(error["field"], message.removeprefix(f"{error['field']}: "))
    return NotReady(message) if status >= 500 else CallerError(message)
