"""
The HTTP service: a socket that is bound before anything else, an app with the dialects mounted, and uvicorn between
them until it is cancelled.

Installs no signal handler and starts no loop of its own; knows nothing of what the dialects say.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import ssl
from collections.abc import Callable, Collection, Generator, Iterable, Mapping
from typing import Any

import uvicorn
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from pdctl.core.address import Endpoint
from pdctl.dialects.edge import json_answer
from pdctl.errors import AddressTaken, ConfigError, PdctlError
from pdctl.listeners import holders
from pdctl.metrics import Metrics
from pdctl.shortcut import ShortcutProtocol

BACKLOG = 2048
KEEP_ALIVE_S = (
    3630  # stock's: a decode tries a rank look-up once, and loses it on a connection that we closed meanwhile
)

UNREAD_S = 60
"""For how long somebody may leave unread, or unacknowledged, what we owe them. Closing waits for them too: a watcher
that was cut off, or a client whose host has vanished, would stay in our memory for as long as TCP hopes, and longer."""


def bind(host: str, port: int, *, listens: bool = True) -> socket.socket:
    """A socket that has the address, and listens; `port` 0 takes any free one. "::" listens to IPv4 as well.

    listens   False: connections are refused until `listen`. Otherwise the kernel takes them meanwhile, up to BACKLOG,
              and all of them are answered at one moment: a registry that reads its journal first would answer a fifth
              of a herd within the same 100 ms (docs/outages.md). Whoever is refused draws another moment.

    Raises AddressTaken, which names the holder where /proc tells, and ConfigError for an address that is not ours.
    """
    family, address = _resolve(host, port)
    # With protocol 0 asyncio does not know it for TCP and leaves Nagle on: headers and body go out as two segments,
    # and the second waits 40 ms for a delayed ACK (measured: 700 look-ups/s where there should be thousands).
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if host == "::" else 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNREAD_S * 1000)  # accepted sockets inherit it
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise _cannot_listen(host, port, error) from error
    sock.setblocking(False)
    if listens:
        listen(sock)
    return sock


def listen(sock: socket.socket) -> None:
    """Take connections from now on. Raises AddressTaken: of two that were bound alike the first to listen has it."""
    try:
        sock.listen(BACKLOG)
    except OSError as error:
        at = bound(sock)
        raise _cannot_listen(at.host, at.port, error) from error


def bound(sock: socket.socket) -> Endpoint:
    """Where a bound socket listens."""
    host, port = sock.getsockname()[:2]
    return Endpoint(host, port)


def app(routers: Iterable[APIRouter], metrics: Metrics, unready: Callable[[], list[str]]) -> FastAPI:
    """The dialects, and what every service of ours answers: /livez, /readyz, /metrics, /docs.

    `unready` gives the reasons why this service should get no traffic; none when it should.
    """
    api = FastAPI(title="pdctl", description="Registry for prefill/decode disaggregated serving.", redoc_url=None)
    for router in routers:
        api.include_router(router)
    api.include_router(_own_paths(metrics, unready))
    api.add_exception_handler(PdctlError, _on_error)
    api.add_exception_handler(HTTPException, _on_http_error)
    api.add_exception_handler(Exception, _on_bug)
    return api


async def serve(asgi: ASGIApp, *socks: socket.socket, grace_s: float, tls: ssl.SSLContext | None = None) -> None:
    """Serve on `socks` until cancelled; then stop accepting, let requests under way end within `grace_s`, and close.

    `tls`: HTTPS with this context, and nothing else on these sockets.
    A task that is cancelled before its first step closes nothing: whoever bound the sockets holds them in a `with`.
    """
    server = _Server(_config(asgi, grace_s, tls))
    running = asyncio.create_task(server.serve(list(socks)), name="http server")
    try:
        await asyncio.shield(running)
    finally:
        server.should_exit = True
        done, _ = await asyncio.wait({running}, timeout=grace_s + 2.0)
        if not done:
            running.cancel()
        for sock in socks:
            sock.close()


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Leave signals alone: uvicorn would replace the handlers that withdraw and drain first, then kill us again."""
        yield


class _Protocol(ShortcutProtocol):
    """Bears who pipelines. As uvicorn has it,

    it reads on after each answer, so that who reads none fills our memory: 35 MB of questions took 240 MB;
    it tells the last question that the client is gone, not the one under way, which writes to a closed transport:
    an error for uvloop, and a traceback in the log for whoever wants one there.
    """

    _under_way: RequestResponseCycle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        self.flow = _Flow(transport, self.pipeline)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._under_way is not None:
            self._under_way.disconnected = True
            self._under_way.message_event.set()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._under_way = cycle
        super()._start_asgi_task(cycle, app)


class _Flow(FlowControl):
    def __init__(self, transport: asyncio.Transport, waiting: Collection[object]) -> None:
        super().__init__(transport)
        self._waiting = waiting

    def resume_reading(self) -> None:
        if not self._waiting:  # the answer to the last of them comes by here again
            super().resume_reading()


def _config(asgi: ASGIApp, grace_s: float, tls: ssl.SSLContext | None) -> uvicorn.Config:
    config = uvicorn.Config(
        asgi,
        http=_Protocol,
        lifespan="off",  # a loop that dies inside a lifespan leaves /health at 200
        ws="none",
        access_log=False,
        log_config=None,
        log_level="warning",
        server_header=False,
        proxy_headers=False,  # whoever may claim a seat is judged by the address that the connection comes from
        timeout_keep_alive=KEEP_ALIVE_S,
        backlog=BACKLOG,
        ssl_context_factory=None if tls is None else lambda config, default: tls,  # noqa: ARG005
    )
    config.timeout_graceful_shutdown = grace_s  # type: ignore[assignment]  # handed to asyncio.wait_for as it is
    return config


def _own_paths(metrics: Metrics, unready: Callable[[], list[str]]) -> APIRouter:
    api = APIRouter(tags=["service"])

    @api.get("/livez", summary="The process serves", response_class=PlainTextResponse)
    async def livez() -> str:
        return "OK"

    @api.get("/readyz", summary="200, or 503 with the reasons", response_class=JSONResponse)
    async def readyz() -> Response:
        reasons = unready()
        return JSONResponse({"ready": not reasons, "reasons": reasons}, 503 if reasons else 200)

    @api.get("/metrics", summary="Prometheus metrics", response_class=PlainTextResponse)
    async def exposition() -> Response:
        body, content_type = metrics.exposition()
        return Response(body, media_type=content_type)

    return api


async def _on_error(request: Request, error: Exception) -> Response:  # noqa: ARG001
    assert isinstance(error, PdctlError)  # noqa: S101
    return json_answer(error)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101
    return _told(request, error.status_code, error.detail, error.headers)


async def _on_bug(request: Request, error: Exception) -> Response:  # noqa: ARG001
    """Uvicorn logs the traceback; the client learns only that it is ours to mend."""
    return _told(request, 500, "Internal Server Error: the service's log has the traceback")


def _told(request: Request, status: int, text: str, headers: Mapping[str, str] | None = None) -> Response:
    """In JSON under /v1, elsewhere in the form that aiohttp gives stock's clients."""
    if request.url.path.startswith("/v1"):
        return JSONResponse({"error": {"message": text}}, status, headers)
    return PlainTextResponse(f"{status}: {text}", status, headers)


def _resolve(host: str, port: int) -> tuple[socket.AddressFamily, tuple[str, int] | tuple[str, int, int, int]]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        raise ConfigError(f"cannot listen at {host!r}: {error}: give an address of this host") from error
    family, _, _, _, address = found[0]
    return family, address  # type: ignore[return-value]  # (int, bytes) is for hosts built without IPv6


def _cannot_listen(host: str, port: int, error: OSError) -> AddressTaken | ConfigError:
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    if error.errno == errno.EADDRINUSE:
        who = ", ".join(map(str, holders(port))) or "a process that /proc does not show to this user"
        return AddressTaken(f"{where} is taken by {who}: stop it, or choose another port")
    advice = "choose a port from 1024 on" if error.errno == errno.EACCES else "give an address of this host"
    return ConfigError(f"cannot listen at {where}: {error.strerror}: {advice}")
