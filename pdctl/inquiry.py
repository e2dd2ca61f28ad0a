"""
What `pdctl sessions` and `pdctl probe` ask a service of its session table. Who asks the peer itself is firsthand.py.

Prints nothing, and has no engine.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from pdctl.client import RegistryClient
from pdctl.config import Settings
from pdctl.core.exchange import Exchange
from pdctl.core.route import as_object, needed
from pdctl.errors import BadField

Row = Mapping[str, Any]
"""One session as `GET /v1/sessions` has it."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of one question. `works`: bytes flow, as deep as was asked for. `detail`: how that is known, or the
    cause why not."""

    session: str
    works: bool
    depth: str | None
    detail: str
    seconds: float


async def standings(settings: Settings, state: str | None) -> Sequence[Row]:
    """Every session that the service at `node.registry` knows. Raises as RegistryClient.tell, and Unreachable."""
    params = {} if state is None else {"state": state}
    found: list[Row] = []
    async with _service(settings) as client:
        while True:
            page = await client.tell(Exchange("list of sessions", "GET", "/v1/sessions", _page, params))
            found += page.rows
            if page.further is None:
                return found
            params["after"] = page.further


async def lift(settings: Settings, session: str) -> Row:
    """Let the service trust `session` again, by hand; how it stands then."""
    async with _service(settings) as client:
        return await client.tell(Exchange("lifting of a session", "DELETE", _path(session), _row))


async def ask_service(settings: Settings, session: str) -> Verdict:
    """Let the service ask now: it has the link, and knows which life is meant."""
    async with _service(settings) as client:
        row = await client.tell(Exchange("probe of a session", "POST", f"{_path(session)}/probe", _row))
    works, detail, seconds = (needed(row, name) for name in ("works", "detail", "seconds"))
    return Verdict(session, bool(works), row.get("depth"), str(detail), float(seconds))


def _service(settings: Settings) -> RegistryClient:
    return RegistryClient(settings.node.registry, policy=settings.retry, credentials=settings.client)


def _path(session: str) -> str:
    if not session or "/" in session:
        raise BadField("session", f"is {session[:80]!r}: give ip:port, or [ip]:port")
    return f"/v1/sessions/{quote(session, safe=':[]')}"


@dataclass(frozen=True, slots=True)
class _Page:
    rows: Sequence[Row]
    further: str | None


def _page(body: bytes) -> _Page:
    said = as_object(json.loads(body))
    rows, further = needed(said, "sessions"), said.get("next")
    if not isinstance(rows, list) or not (further is None or isinstance(further, str)):
        raise BadField("sessions", "is no list: give the URL of a pdctl service")
    return _Page([as_object(row) for row in rows], further)


def _row(body: bytes) -> Row:
    return as_object(json.loads(body))
