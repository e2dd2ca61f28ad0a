"""
One question to a server that may do anything: answer wrongly, hang up, or never end.

Every question is put once and has a deadline. What came back is a value, whatever its status: nothing is raised for a
4xx or 5xx, only `NoAnswer` where none came. Nothing is understood here of what is asked.
"""

from __future__ import annotations

import io
import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import EllipsisType
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from pdctl.credentials import Credentials, client_tls, own_token
from pdctl.errors import ConfigError, Unreachable
from pdctl.retry import root_cause

DEADLINE_S = 5.0
MAX_ANSWER_NBYTES = 1 << 20
_SHOWN = 80


class NoAnswer(Unreachable):
    """The server took no connection, hung up without an answer, or took longer than the deadline."""


@dataclass(frozen=True, slots=True)
class Said:
    """What the server answered. `body` is what its JSON says, `...` where it is none."""

    status: int
    text: str
    body: Any = ...

    @property
    def refuses(self) -> bool:
        """A 4xx: whoever asked is told that it is their mistake."""
        return 400 <= self.status < 500

    def row(self) -> Mapping[str, Any]:
        """The JSON object that came; empty where none did."""
        return self.body if isinstance(self.body, Mapping) else {}

    def __str__(self) -> str:
        words = " ".join(self.text.split())
        short = words if len(words) <= _SHOWN else f"{words[:_SHOWN]}..."
        return f"{self.status} {short}".strip()


class Asker:
    """Puts questions to one server, from one address of this host. `connections()`: how many it has made."""

    def __init__(
        self, url: str, session: aiohttp.ClientSession, credentials: Credentials, connections: Callable[[], int]
    ) -> None:
        self.url = url
        self.connections = connections
        self._session = session
        self._token = own_token(credentials)
        self._tls = client_tls(credentials) if url.startswith("https:") else None

    async def __call__(
        self,
        method: str,
        path: str,
        body: object = ...,
        *,
        text: str | None = None,
        params: Mapping[str, object] | None = None,
    ) -> Said:
        """`body` is sent as JSON, `text` as it stands. Raises NoAnswer."""
        data = text if isinstance(body, EllipsisType) else json.dumps(body)
        shown = {} if self._token.value is None else {"Authorization": f"Bearer {self._token.value}"}
        headers = shown if data is None else {**shown, "Content-Type": "application/json"}
        try:
            async with self._session.request(
                method,
                self.url + path,
                data=None if data is None else _sent(data.encode()),
                params=None if params is None else {name: str(value) for name, value in params.items()},
                headers=headers,
                ssl=True if self._tls is None else self._tls.value,
                allow_redirects=False,
            ) as response:
                return _said(response.status, await _received(response))
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            why = f"none within {DEADLINE_S:g} s" if isinstance(error, TimeoutError) else root_cause(error)
            raise NoAnswer(f"no answer to {method} {path}: {why}") from error


@asynccontextmanager
async def asking(url: str, credentials: Credentials | None = None, local: str | None = None) -> AsyncIterator[Asker]:
    """`local`: the address of this host to ask from; None, whichever the system takes. Raises ConfigError."""
    connector = aiohttp.TCPConnector(
        use_dns_cache=False, keepalive_timeout=3600.0, local_addr=None if local is None else (local, 0)
    )
    timeout = aiohttp.ClientTimeout(total=DEADLINE_S)
    made: list[None] = []

    async def count(*_: object) -> None:
        made.append(None)

    trace = aiohttp.TraceConfig()
    trace.on_connection_create_end.append(count)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, trace_configs=[trace]) as session:
        session._retry_connection = False  # as in client.py: a question is put once
        yield Asker(checked(url), session, credentials or Credentials(), lambda: len(made))


def checked(url: str) -> str:
    """`url` without its last slash. Raises ConfigError for what is none."""
    text = url.strip() if "://" in url else f"http://{url.strip()}"
    try:
        parts = urlsplit(text)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        usable = None
    if not usable or "@" in text or "?" in text or "#" in text or " " in text or not text.isprintable():
        raise ConfigError(f"{url!r} is no URL of a server: write http://host:port")
    return text.rstrip("/")


def _sent(data: bytes) -> bytes | io.BytesIO:
    """aiohttp warns of a body over 1 MiB that comes as bytes."""
    return data if len(data) <= 1 << 20 else io.BytesIO(data)


async def _received(response: aiohttp.ClientResponse) -> bytes:
    body = bytearray()
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > MAX_ANSWER_NBYTES:
            raise NoAnswer(f"no end to an answer: more than {MAX_ANSWER_NBYTES} bytes")
    return bytes(body)


def _said(status: int, body: bytes) -> Said:
    text = body.decode(errors="replace")
    try:
        return Said(status, text, json.loads(text))
    except (ValueError, RecursionError):
        return Said(status, text)
