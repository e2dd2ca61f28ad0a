"""
What `pdctl sessions` and `pdctl probe` ask, and whom: a service's session table, or the peer itself.

Prints nothing. Asking a peer directly opens an engine for it where the wheel is installed, since only bytes that arrive
prove that bytes arrive; without one, the peer's handshake is all that can be had, and the answer says so.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import quote

import structlog

from pdctl.client import RegistryClient
from pdctl.config import Settings, environment
from pdctl.core.address import Endpoint
from pdctl.core.exchange import Exchange
from pdctl.core.route import as_object, needed
from pdctl.core.standing import Depth
from pdctl.device.open import open_device
from pdctl.engine.asking import Asking
from pdctl.engine.base import Proof
from pdctl.engine.mooncake import open_mooncake
from pdctl.errors import BadField, EngineUnavailable, TransferFailed

log = structlog.get_logger(__name__)

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


async def ask(settings: Settings, session: str, deadline_s: float, wanted: Depth) -> Verdict:
    """Ask the peer itself, as deep as `wanted`. Raises BadField for what is no session."""
    Endpoint.parse(session)
    if wanted is Depth.HANDSHAKE:
        return await _judged(Asking(), session, deadline_s, wanted)
    try:
        async with (
            open_device(settings.node.accelerator, environ=environment()) as device,
            open_mooncake(replace(settings.engine, host=settings.node.host), device) as engine,
        ):
            return await _judged(Asking(engine), session, deadline_s, wanted)
    except EngineUnavailable as error:
        log.warning("no engine to ask with, only the handshake is asked", why=str(error))
        return await _judged(Asking(), session, deadline_s, wanted)


async def _judged(asking: Asking, session: str, deadline_s: float, wanted: Depth) -> Verdict:
    began = time.monotonic()
    try:
        proof = await asking.prove(session, deadline_s=deadline_s)
    except TransferFailed as failure:
        took_s = time.monotonic() - began
        return Verdict(session, False, None, f"{failure.cause.replace('_', ' ')}: {failure.detail}", took_s)
    return _verdict(session, proof, wanted, time.monotonic() - began)


def _verdict(session: str, proof: Proof, wanted: Depth, seconds: float) -> Verdict:
    depth = proof.depth.name.lower()
    if proof.depth >= wanted:
        return Verdict(session, True, depth, proof.how, seconds)
    why = f"{proof.how}, and no deeper question could be put: whether data flows is not known"
    return Verdict(session, False, depth, why, seconds)


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
