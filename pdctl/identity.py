"""
Who answers at a URL: our registry, a stock one, a rank, some other program, or nobody.

Asks a few harmless GETs, each within a deadline, and says what it saw; what that means for anybody is not decided here.
"""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from enum import StrEnum
from http import HTTPStatus
from typing import Any, Self
from urllib.parse import urlsplit

import aiohttp

from pdctl.credentials import Credentials, client_tls, own_token
from pdctl.retry import root_cause

DEADLINE_S = 3.0
LONGEST = 256 << 20
"""The overview of 20,000 ranks, each with hundreds of links, is 100 MB."""

_TOPOLOGY = dict.fromkeys(("prefill_dp_rank", "prefill_cp_rank", "target_tp_rank", "target_pp_rank"), "-1")


class Who(StrEnum):
    """In words that go on after "there is"."""

    REGISTRY = "a pdctl registry"
    STOCK = "SGLang's own bootstrap server"
    RANK = "a pdctl rank's own port, not the registry's"
    ENGINE = "an engine's API, not the registry"
    OTHER = "another HTTP service"
    NO_HTTP = "a program that speaks no HTTP"
    LOCKED = "a service that does not let us in"
    UNTRUSTED = "a service whose certificate is not believed"
    REFUSED = "nobody: the connection is refused"
    SILENT = "no answer"
    NO_NAME = "no such host"
    NO_WAY = "no way to that host"

    @property
    def is_http(self) -> bool:
        return self in (Who.REGISTRY, Who.STOCK, Who.RANK, Who.ENGINE, Who.OTHER, Who.LOCKED)


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer: `date` as its header has it, `took_s` from the question to its last byte."""

    status: int
    body: bytes
    date: datetime | None
    took_s: float

    @property
    def json(self) -> Any:
        """None for what is no JSON."""
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError):
            return None

    @property
    def words(self) -> str:
        """On one line, short enough to be shown."""
        text = " ".join(self.body[:400].decode(errors="replace").split())
        return "".join(c if c.isprintable() else "?" for c in text)[:160] or HTTPStatus(self.status).phrase


@dataclass(frozen=True, slots=True)
class Identity:
    """`who` it is, and how that is known."""

    who: Who
    detail: str
    reply: Reply | None = None


class Service:
    """One service that is asked; an `async with`. `credentials` go to it and to nobody else."""

    def __init__(self, url: str, credentials: Credentials | None = None, deadline_s: float = DEADLINE_S) -> None:
        self.url = url.rstrip("/")
        given = credentials or Credentials()
        self._token = own_token(given)
        self._tls = client_tls(given) if self.url.startswith("https:") else None
        self._deadline_s = deadline_s
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(use_dns_cache=False, force_close=True),
            timeout=aiohttp.ClientTimeout(total=self._deadline_s),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()

    async def get(
        self, path: str, params: Mapping[str, str] | None = None, *, deadline_s: float | None = None
    ) -> Reply:
        """Raises aiohttp.ClientError, OSError, TimeoutError."""
        return await self._ask("GET", path, params=params, deadline_s=deadline_s)

    async def post(self, path: str, body: object) -> Reply:
        """As `get`."""
        return await self._ask("POST", path, json=body)

    async def _ask(self, method: str, path: str, deadline_s: float | None = None, **what: Any) -> Reply:
        assert self._session is not None  # noqa: S101 - `async with`
        token, began = self._token.refresh(), time.monotonic()
        asked = self._session.request(
            method,
            self.url + path,
            **what,
            headers={} if token is None else {"Authorization": f"Bearer {token}"},
            ssl=True if self._tls is None else self._tls.refresh(),
            allow_redirects=False,
            timeout=aiohttp.ClientTimeout(total=deadline_s or self._deadline_s),
        )
        async with asked as answer:
            body = await answer.content.read(LONGEST)
            while piece := await answer.content.read(LONGEST - len(body)):
                body += piece
            return Reply(answer.status, body, _date(answer.headers.get("Date")), time.monotonic() - began)

    async def identify(self, *, deep: bool = True) -> Identity:
        """`deep`: what is no registry of ours is asked what else it may be. Never raises for what the other does."""
        try:
            return await self._identify(deep)
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            return Identity(_nobody(error), root_cause(error) or type(error).__name__)

    async def _identify(self, deep: bool) -> Identity:
        listed = await self.get("/v1/instances")
        if listed.status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
            return Identity(Who.LOCKED, f"GET /v1/instances: {listed.status} {listed.words}", listed)
        if listed.status == HTTPStatus.OK and isinstance(found := listed.json, dict) and "instances" in found:
            return Identity(Who.REGISTRY, f"GET /v1/instances: {listed.status}", listed)
        for path, params, is_it, who in _SIGNS if deep else ():
            reply = await self.get(path, params)
            if is_it(reply):
                return Identity(who, f"GET {path}: {reply.status} {reply.words}", reply)
        return Identity(Who.OTHER, f"GET /v1/instances: {listed.status} {listed.words}", listed)


def _is_stock(reply: Reply) -> bool:
    told = reply.json
    is_topology = isinstance(told, dict) and "attn_tp_size" in told
    return is_topology or (reply.status == HTTPStatus.SERVICE_UNAVAILABLE and b"not fully registered" in reply.body)


def _is_rank(reply: Reply) -> bool:
    told = reply.json
    return isinstance(told, dict) and {"ready", "reasons"} <= told.keys()


def _is_engine(reply: Reply) -> bool:
    told = reply.json
    return reply.status == HTTPStatus.OK and isinstance(told, dict) and "data" in told


_SIGNS = (
    ("/route", _TOPOLOGY, _is_stock, Who.STOCK),
    ("/readyz", None, _is_rank, Who.RANK),
    ("/v1/models", None, _is_engine, Who.ENGINE),
)


def _nobody(error: BaseException) -> Who:
    inner = getattr(error, "os_error", None) or error
    if isinstance(error, aiohttp.ClientSSLError | ssl.SSLError) or isinstance(inner, ssl.SSLError):
        return Who.UNTRUSTED
    if isinstance(inner, socket.gaierror) or isinstance(error, aiohttp.ClientConnectorDNSError):
        return Who.NO_NAME
    if isinstance(error, TimeoutError):
        return Who.SILENT
    if isinstance(inner, ConnectionRefusedError):
        return Who.REFUSED
    if isinstance(error, aiohttp.ClientConnectorError):
        return Who.REFUSED if "refused" in str(inner).lower() else Who.NO_WAY
    return Who.NO_HTTP  # it took the connection, and what it said was no answer


def _date(text: str | None) -> datetime | None:
    try:
        return None if text is None else parsedate_to_datetime(text)
    except ValueError:
        return None


async def identify(
    url: str, credentials: Credentials | None = None, deadline_s: float = DEADLINE_S, *, deep: bool = True
) -> Identity:
    async with Service(url, credentials, deadline_s) as service:
        return await service.identify(deep=deep)


async def is_ours(host: str) -> bool:
    """Whether the name or address is one of this host's."""
    name = host.strip("[]")
    try:
        found = await asyncio.get_running_loop().getaddrinfo(name, 0, type=socket.SOCK_STREAM)
    except OSError:
        return False
    return any(_can_bind(family, address[0]) for family, _, _, _, address in found)


def _can_bind(family: int, host: object) -> bool:
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        try:
            sock.bind((host, 0))
        except OSError:
            return False
    return True


def host_of(url: str) -> str:
    return urlsplit(url).hostname or ""


def port_of(url: str) -> int:
    parts = urlsplit(url)
    return parts.port or (443 if parts.scheme == "https" else 80)
