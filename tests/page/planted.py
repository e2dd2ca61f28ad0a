"""
A fleet of paper: what a registry would tell the page of it, and a service that tells it, line by line as told to.

The bodies have the shape of GET /v1/overview; a test of the real service holds them against it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from pdctl.dialects import page
from pdctl.metrics import Metrics
from pdctl.server import app, bind, bound, serve

Row = dict[str, Any]

SHAPE = {"attn_cp_size": 1, "dp_size": 1, "pp_size": 1, "page_size": 64, "kv_cache_dtype": "bfloat16"}


def place(tp: int) -> Row:
    return {"seat": f"dp0/cp0/tp{tp}/pp0", "dp": 0, "cp": 0, "tp": tp, "pp": 0}


def session_of(role: str, number: int, tp: int) -> str:
    """A private address by its numbers: 10.1 are prefills, 10.2 decodes."""
    return f"10.{1 if role == 'prefill' else 2}.{number // 250}.{number % 250 + 1}:{15001 + tp}"


def instance(
    name: str, role: str, number: int, tp: int, *, missing: Iterable[int] = (), suspect: Iterable[int] = (), **more: Any
) -> Row:
    gone, silent = set(missing), set(suspect)
    alive = [
        {
            **place(n),
            "address": session_of(role, number, n),
            "prefill_http_port": None,
            "epoch": (7 << 32) + number * 100 + n + 1,
            "incarnation": (7 << 32) + 1,
            "standing": "suspect" if n in silent else "alive",
            "ttl_s": 15.0,
            "labels": {},
            "metadata": {"mooncake_session": session_of(role, number, n)},
            "age_s": 7384.0,
        }
        for n in range(tp)
        if n not in gone
    ]
    return {
        "name": name,
        "role": role,
        "ready": not gone,
        "draining": False,
        "dead": False,
        "seats": tp,
        "alive": len(alive),
        "missing": len(gone),
        "epoch": 7 << 32,
        "incarnation": (7 << 32) + 1,
        "revision": 40,
        "shape": {**SHAPE, "attn_tp_size": tp},
        "alive_seats": alive,
        "missing_seats": [place(n) for n in sorted(gone)],
        "forming": None,
        "health": None,
        **more,
    }


def report(name: str, role: str, number: int, tp: int, links: Iterable[Row] = (), **more: Any) -> Row:
    return {
        "instance": name,
        "seat": f"tp{tp}",
        "age_s": 0.2,
        "role": role,
        "epoch": (7 << 32) + number * 100 + tp + 1,
        "session": session_of(role, number, tp),
        "unready": [],
        "links": list(links),
        "rooms": {"sender" if role == "prefill" else "receiver": {"waiting_for_input": 1, "transferring": 2}},
        "ended": {"success": 100, "failed": 0},
        "bytes": 10**9,
        "open": [],
        "failed": [],
        "quarantined": 0,
        "doubt": False,
        "panicking": [],
        "store": None,
        **more,
    }


def link(session: str, state: str = "trusted", **more: Any) -> Row:
    row = {"session": session, "state": state, "cause": None, "sentence": "trusted", "again_in_s": None, "since_s": 0.0}
    return {**row, **more}


def blocked(session: str) -> Row:
    sentence = "timed out (one of 12 blocks did not move for 1.0 s) 4.0 s ago, 1 strike; asked 3 times, next in 2.0 s"
    return link(session, "blocked", cause="timed_out", sentence=sentence, again_in_s=2.0, since_s=4.0)


def event(number: int, kind: str, sentence: str, **more: Any) -> Row:
    row = {"id": number, "at": f"2026-11-21T23:{number // 60 % 60:02}:{number % 60:02}.000Z", "kind": kind}
    about = dict.fromkeys(("instance", "rank", "session", "peer", "cause", "room"))
    return {**row, "sentence": sentence, **about, "count": 1, **more}


@dataclass
class Fleet:
    """`prefills` x `decodes` instances of `tp` ranks, all well, each prefill rank with a link to each decode rank of
    its own tp; `links` of them at most."""

    prefills: int = 1
    decodes: int = 1
    tp: int = 1
    links: int = 64
    instances: dict[str, Row] = field(default_factory=dict)
    reports: dict[tuple[str, int], Row] = field(default_factory=dict)
    events: list[Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        for role, count in (("prefill", self.prefills), ("decode", self.decodes)):
            for n in range(count):
                name = f"{role}-{n}"
                self.instances[name] = instance(name, role, n, self.tp)
                for tp in range(self.tp):
                    links = [] if role == "decode" else self._links(n, tp)
                    self.reports[name, tp] = report(name, role, n, tp, links)

    def _links(self, number: int, tp: int) -> list[Row]:
        n = min(self.decodes, self.links)
        return [link(session_of("decode", (number + k) % self.decodes, tp)) for k in range(n)]

    def block(self, prefill: int, decode: int, tp: int = 0) -> Row:
        """From now on the prefill's rank refuses the decode's; its report."""
        told = self.reports[f"prefill-{prefill}", tp]
        out = session_of("decode", decode, tp)
        told["links"] = [each for each in told["links"] if each["session"] != out] + [blocked(out)]
        return told

    def trust(self, prefill: int, decode: int, tp: int = 0) -> Row:
        told = self.reports[f"prefill-{prefill}", tp]
        out = session_of("decode", decode, tp)
        told["links"] = [link(out) if each["session"] == out else each for each in told["links"]]
        return told

    def overview(self) -> Row:
        seats = sum(row["seats"] for row in self.instances.values())
        alive = sum(row["alive"] for row in self.instances.values())
        return {
            "revision": 40,
            "cursor": "5f0c-40",
            "service": {
                "version": "0.1.0",
                "journal": "sqlite",
                "age_s": 0.0,
                "unready": [],
                "uptime_s": 86400.0,
                "counts": {"instances": len(self.instances), "ready": 0, "seats": seats, "alive": alive, "rooms": 0},
            },
            "instances": list(self.instances.values()),
            "reports": list(self.reports.values()),
            "sessions": [],
            "events": {"next": self.events[-1]["id"] + 1 if self.events else 1, "oldest": 1},
        }


class Told:
    """What the planted service says. `say` reaches every reader; `hang_up` ends their streams."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.token: str | None = None
        self.refusal: tuple[int, str] | None = None
        self.readers: list[asyncio.Queue[bytes | None]] = []
        self.n_came = 0

    def say(self, kind: str, body: Row) -> None:
        for reader in self.readers:
            reader.put_nowait(_line(kind, body))

    def happens(self, kind: str, sentence: str, **about: Any) -> None:
        """An event, to all readers and for those who ask later."""
        number = self.fleet.events[-1]["id"] + 1 if self.fleet.events else 1
        self.fleet.events.append(event(number, kind, sentence, **about))
        self.say("event", self.fleet.events[-1])

    def hang_up(self) -> None:
        for reader in self.readers:
            reader.put_nowait(None)

    def denied(self, request: Request) -> Response | None:
        if self.refusal is not None:
            return JSONResponse({"error": {"message": self.refusal[1]}}, self.refusal[0])
        if self.token is not None and request.headers.get("authorization") != f"Bearer {self.token}":
            return JSONResponse({"error": {"message": "this path needs a token: send one"}}, 401)
        return None

    async def stream(self) -> AsyncIterator[bytes]:
        reader: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.readers.append(reader)
        self.n_came += 1
        try:
            yield b"retry: 1000\n\n" + _line("overview", self.fleet.overview())
            while (piece := await reader.get()) is not None:
                yield piece
        finally:
            self.readers.remove(reader)

    def router(self) -> APIRouter:
        api = APIRouter()

        @api.get("/v1/overview/watch")
        async def watch(request: Request) -> Response:
            return self.denied(request) or StreamingResponse(self.stream(), media_type="text/event-stream")

        @api.get("/v1/events")
        async def events(request: Request, since: int = 0, limit: int = 200) -> Response:
            found = [each for each in self.fleet.events if each["id"] >= since][:limit]
            return self.denied(request) or JSONResponse({"events": found, "next": since + len(found), "oldest": 1})

        return api


@asynccontextmanager
async def planted(fleet: Fleet | None = None, port: int = 0) -> AsyncIterator[tuple[Told, str]]:
    """A service that tells of `fleet`, with the real page at its root."""
    told = Told(fleet or Fleet())
    service = app([page.router(), told.router()], Metrics(), unready=list)
    with bind("127.0.0.1", port) as sock:
        url = f"http://{bound(sock)}"
        server = asyncio.create_task(serve(service, sock, grace_s=0.2))
        try:
            yield told, url
        finally:
            told.hang_up()
            server.cancel()
            await asyncio.wait({server})


def _line(kind: str, body: Row) -> bytes:
    return f"event: {kind}\ndata: {json.dumps(body)}\n\n".encode()
