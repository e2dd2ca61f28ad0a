"""A bootstrap registry with one promise broken: ours, behind a door that tells something else than it says."""

from __future__ import annotations

import io
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import aiohttp
from aiohttp import web

from tests.small_server import listening


@dataclass(frozen=True, slots=True)
class Told:
    """One question, and what the registry says to it."""

    method: str
    path: str
    query: str
    asked: bytes
    status: int
    body: bytes

    @property
    def is_topology(self) -> bool:
        return self.path == "/route" and self.query.count("=-1") == 4

    @property
    def is_look_up(self) -> bool:
        return self.path == "/route" and self.method == "GET" and bool(self.query) and not self.is_topology

    def says(self, status: int, body: Any = "OK") -> Told:
        text = body if isinstance(body, str) else json.dumps(body)
        return replace(self, status=status, body=text.encode())


Alter = Callable[[Told], Told | None]
"""What is told instead; None: the connection is dropped."""


@asynccontextmanager
async def altered(behind: str, alter: Alter, close: bool = False) -> AsyncIterator[str]:
    """`close`: every connection ends with its first answer."""

    async def answer(request: web.Request) -> web.StreamResponse:
        asked = await request.read()
        method, url = request.method, f"{behind}{request.path_qs}"
        async with session.request(
            method, url, data=io.BytesIO(asked) if asked else None, headers=_kept(request)
        ) as found:
            heard = Told(method, request.path, request.query_string, asked, found.status, await found.read())
        told = alter(heard)
        if told is None:
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        response = web.Response(status=told.status, body=told.body)
        if close:
            response.force_close()
        return response

    app = web.Application(client_max_size=1 << 22)
    app.router.add_route("*", "/{path:.*}", answer)
    async with aiohttp.ClientSession() as session, listening(web.AppRunner(app)) as url:
        yield url


def _kept(request: web.Request) -> dict[str, str]:
    return {name: value for name, value in request.headers.items() if name.lower() == "content-type"}
