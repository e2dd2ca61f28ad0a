"""A real HTTP server on port 0 that misbehaves as told, one act a request; for the registration client's tests."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

Act = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


@dataclass
class Scripted:
    """Does `acts` one after the other, then `otherwise` for ever; `asked` is what came in."""

    acts: deque[Act] = field(default_factory=deque)
    otherwise: Act = field(default_factory=lambda: answers(200, "OK"))
    asked: list[tuple[str, str, Any]] = field(default_factory=list)
    connections: set[int] = field(default_factory=set)
    url: str = ""

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        body = await request.json() if request.can_read_body else None
        self.asked.append((request.method, request.path_qs, body))
        assert request.transport is not None
        self.connections.add(request.transport.get_extra_info("peername")[1])
        return await (self.acts.popleft() if self.acts else self.otherwise)(request)


@asynccontextmanager
async def scripted(
    *acts: Act, otherwise: Act | None = None, sock: socket.socket | None = None
) -> AsyncIterator[Scripted]:
    script = Scripted(deque(acts))
    script.otherwise = otherwise or script.otherwise
    sock = sock or socket.create_server(("127.0.0.1", 0))
    script.url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    # handler_cancellation: an act that hangs is cancelled when its client leaves, and can say so
    runner = web.ServerRunner(web.Server(script.handle, handler_cancellation=True), shutdown_timeout=0.1)
    await runner.setup()
    await web.SockSite(runner, sock).start()
    try:
        yield script
    finally:
        await runner.cleanup()


def answers(status: int, text: str = "", headers: Mapping[str, str] | None = None) -> Act:
    async def act(request: web.BaseRequest) -> web.StreamResponse:
        return web.Response(status=status, text=text, headers=headers)

    return act


def answers_json(body: object, status: int = 200) -> Act:
    async def act(request: web.BaseRequest) -> web.StreamResponse:
        return web.json_response(body, status=status)

    return act


def hangs(left: asyncio.Event | None = None, entered: asyncio.Event | None = None) -> Act:
    """Never answers. Sets `entered` when asked, `left` when the client has gone."""

    async def act(request: web.BaseRequest) -> web.StreamResponse:
        if entered is not None:
            entered.set()
        try:
            await asyncio.Event().wait()
        finally:
            if left is not None:
                left.set()
        raise AssertionError

    return act


def closes() -> Act:
    """Ends the connection instead of answering."""

    async def act(request: web.BaseRequest) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.close()
        return web.Response()

    return act


def resets() -> Act:
    """Ends it with a RST."""

    async def act(request: web.BaseRequest) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.get_extra_info("socket").setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
        )
        request.transport.abort()
        return web.Response()

    return act


def never_ends() -> Act:
    """A 200 whose body goes on and on."""

    async def act(request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(b"x" * 65536)

    return act


def reserve_port() -> socket.socket:
    """A bound socket that does not listen: connecting is refused, and nobody else is given the port meanwhile."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("127.0.0.1", 0))
    return sock


def streams(*pieces: bytes, then: asyncio.Event | None = None, content_type: str = "text/event-stream") -> Act:
    """A 200 that sends `pieces`, one write each; ends when `then` is set, or at once without it."""

    async def act(request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": content_type})
        await response.prepare(request)
        for piece in pieces:
            await response.write(piece)
        if then is not None:
            await then.wait()
        return response

    return act
