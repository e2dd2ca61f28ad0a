"""
Asks what `core.explain` has to know: a registry for all it has, the ranks in question whether they are there, and this
host for what its processes were told.

Changes nothing anywhere, and waits for nobody longer than its deadline. Where no registry answers, it says what does.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from typing import Any
from urllib.parse import quote

import aiohttp

from pdctl import listeners
from pdctl.config import Settings
from pdctl.core.address import Endpoint
from pdctl.core.explain import explain, with_ranks_of
from pdctl.core.findings import Culprit, Finding, Scope
from pdctl.core.naming import SESSION_KEY
from pdctl.core.route import Seat, shape_from_topology
from pdctl.core.seen import Astray, Door, Knock, Row, Seen, endpoint_of
from pdctl.engine.asking import Asking
from pdctl.errors import BadField, Cause, TransferFailed
from pdctl.identity import Identity, Service, Who, host_of, identify, is_ours, port_of
from pdctl.retry import root_cause
from pdctl.several import of_each

ASKED = 256
"""Ranks that are asked at most: who names nobody has the rest from the registry alone."""
AT_ONCE = 64
DEADLINE_S = 2.0
USUAL_PORT = 8998
ASTRAY = 16
BESIDE = 256
BESIDE_S = 3.0
ENGINES = range(15_000, 17_001)
"""Where Mooncake's engines listen, one question at a time: no place to look for a registry."""
EVERYTHING = Scope()

Question = Callable[[], Awaitable[Knock]]

_PAGE = 1000
_GREETING = (0xFF, 0x7F)  # the first and the tenth byte of whoever speaks ZMTP, whatever is between
_LIKELY = ("pdctl", "sglang", "vllm", "mooncake", "python")
_FLAGS = ("--registry", "--disaggregation-bootstrap-port")
_VARIABLES = ("PDCTL_NODE__REGISTRY",)
_DOORS = {
    Cause.REFUSED: Door.REFUSED,
    Cause.TIMED_OUT: Door.SILENT,
    Cause.NOT_AN_ENGINE: Door.ANOTHER,
    Cause.PEER_GONE: Door.ANOTHER,
}


@dataclass(frozen=True, slots=True)
class Explained:
    """`registry` that was asked, who it is, whether it could be `reached`; how many ranks were `asked` besides."""

    scope: Scope
    registry: str
    reached: bool
    findings: list[Finding] = field(default_factory=list)
    asked: int = 0
    known: int = 0


async def why(settings: Settings, scope: Scope, tell: Callable[[str], None] = lambda _: None) -> Explained:
    """What keeps `scope` from serving; `tell` hears what is being done. Raises ConfigError for credentials that cannot
    be used."""
    down: list[Finding] = []
    for url in settings.node.registry.split(","):
        async with Service(url, settings.client) as service:
            tell(f"asking {url}")
            told = await service.identify()
            if told.who in (Who.REGISTRY, Who.STOCK):
                seen = await _look(service, told.who, scope.room)
                return await _explained(seen, scope if told.who is Who.REGISTRY else EVERYTHING, down, tell)
            down.append(await nobody_there(url, told, scope))
    return Explained(scope, settings.node.registry, False, down)


async def _explained(seen: Seen, scope: Scope, down: list[Finding], tell: Callable[[str], None]) -> Explained:
    questions = _questions(seen, scope, beside=await is_ours(host_of(seen.registry)))
    tell(f"asking {len(questions)} addresses of ranks")
    knocks = await _knocks(questions)
    # frozen, and what is cached in it says nothing of knocks
    astray = await _astray(seen.registry)
    whole = Seen(seen.overview, seen.events, knocks, seen.now, seen.registry, seen.here, astray)
    found = [*down, *explain(whole, scope)]
    return Explained(scope, seen.registry, True, found, len(knocks), len(seen.ranks))


# --- the registry


async def _look(service: Service, who: Who, room: int | None) -> Seen:
    if who is Who.STOCK:
        return Seen(await _stock(service), registry=service.url, here=socket.gethostname())
    whole = await _json(service, "/v1/overview")
    overview = dict(whole if whole is not None else await _piecemeal(service))
    if room is not None:
        overview["announced"] = await _announced(service, room)
    events, now = [], None
    async with aclosing(_events(service)) as pages:
        async for page, date in pages:
            events += page
            now = date
    return Seen(overview, events, {}, now, service.url, socket.gethostname())


async def _json(service: Service, path: str, params: Mapping[str, str] | None = None) -> Row | None:
    """None for what is not there, or cannot be read."""
    try:
        reply = await service.get(path, params, deadline_s=30.0)
    except (aiohttp.ClientError, OSError, TimeoutError):
        return None
    found = reply.json if reply.status == HTTPStatus.OK else None
    return found if isinstance(found, dict) else None


async def _announced(service: Service, room: int) -> Row:
    """Which DP rank has it, where one has said so."""
    try:
        found = (await service.post("/query_dp_ranks", {"bootstrap_rooms": [room]})).json
    except (aiohttp.ClientError, OSError, TimeoutError):
        return {}
    return found if isinstance(found, dict) else {}


async def _piecemeal(service: Service) -> Row:
    """Of a registry without an overview: older than this one."""
    listed = await _json(service, "/v1/instances") or {}
    names = [str(row["name"]) for row in listed.get("instances", ())]
    found = [await _json(service, f"/v1/instances/{quote(name)}") for name in names]
    sessions = await _json(service, "/v1/sessions") or {}
    return {"instances": [row for row in found if row], "sessions": sessions.get("sessions", []), "reports": []}


async def _events(service: Service) -> AsyncGenerator[tuple[list[Row], Any]]:
    since = 0
    while True:
        try:
            reply = await service.get("/v1/events", {"since": str(since), "limit": str(_PAGE)})
        except (aiohttp.ClientError, OSError, TimeoutError):
            return
        found = reply.json
        if reply.status != HTTPStatus.OK or not isinstance(found, dict) or "events" not in found:
            return
        yield found["events"], reply.date
        if not found["events"] or found.get("next", 0) <= since:
            return
        since = int(found["next"])


async def _stock(service: Service) -> Row:
    """What a stock server lets out: how many have registered, or who they are."""
    ask = dict.fromkeys(("prefill_dp_rank", "prefill_cp_rank", "target_tp_rank", "target_pp_rank"), "-1")
    reply = await service.get("/route", ask)
    if reply.status != HTTPStatus.OK:
        return {"instances": [], "stock": reply.words}
    try:
        shape = shape_from_topology(reply.json)
    except BadField:
        return {"instances": []}
    seats = sorted(shape.seats())[:ASKED]
    rows = await asyncio.gather(*(_stock_rank(service, seat) for seat in seats))
    alive = [row for row in rows if "address" in row]
    missing = [row for row in rows if "address" not in row]
    return {
        "instances": [
            {
                "name": "default",
                "role": "prefill",
                "ready": not missing,
                "seats": shape.n_seats,
                "alive": len(alive),
                "shape": reply.json,
                "alive_seats": alive,
                "missing_seats": missing,
            }
        ]
    }


async def _stock_rank(service: Service, seat: Seat) -> dict[str, Any]:
    names = ("prefill_dp_rank", "prefill_cp_rank", "target_tp_rank", "target_pp_rank")
    found = await _json(service, "/route", dict(zip(names, map(str, seat), strict=True)))
    row: dict[str, Any] = {"seat": str(seat), "ttl_s": None, "metadata": {}}
    try:
        return row if found is None else row | {"address": str(Endpoint(found["rank_ip"], int(found["rank_port"])))}
    except (BadField, KeyError, ValueError, TypeError):
        return row


# --- where there is none


async def nobody_there(url: str, told: Identity, scope: Scope = EVERYTHING) -> Finding:
    """What is where the registry should be, and where it is instead, if that can be seen from here."""
    if told.who in (Who.LOCKED, Who.UNTRUSTED):
        do = "give --token-file, or ask from a network that it trusts (docs/security.md)"
        if told.who is Who.UNTRUSTED:
            do = "give --tls-ca with the authority of its certificate, or the scheme that it speaks (docs/security.md)"
        return Finding(Culprit.ACCESS_REFUSED, url, f"at {url} there is {told.who}", do, (told.detail,))
    beside = await _registries_beside(url)
    meant = [at for at, names in beside.items() if names and (not scope.places or any(map(scope.covers, names)))]
    known = (f"a registry at {at} knows {', '.join(sorted(names)) or 'nobody'}" for at, names in beside.items())
    facts = (f"GET {url}/v1/instances: {told.detail}", *_holding(url, told), *known)
    if meant:
        why = f"at {url} there is {told.who}; the registry is at {meant[0]}"
        do = f"give that one ({meant[0]}), here and to every engine and router (--disaggregation-bootstrap-port)"
        return Finding(Culprit.WRONG_BOOTSTRAP_PORT, url, why, do, facts)
    if told.who.is_http or told.who is Who.NO_HTTP:
        do = f"the registry's own port is {USUAL_PORT} unless pdctl serve was told another: give that, everywhere"
        return Finding(Culprit.WRONG_BOOTSTRAP_PORT, url, f"at {url} there is {told.who}", do, facts)
    return Finding(Culprit.REGISTRY_DOWN, url, f"at {url} there is {told.who}", _revive(told.who), facts)


def _revive(who: Who) -> str:
    match who:
        case Who.SILENT:
            return "the host is down, a firewall drops what goes there, or the process stands still: look there"
        case Who.NO_NAME | Who.NO_WAY:
            return "compare the name with DNS (or the Service's), and the routes and policies of this host"
    return "start it (pdctl serve), or see in its log why it ended; ranks with leases come back to it by themselves"


def _holding(url: str, told: Identity) -> Iterator[str]:
    """Who listens there, where that is this host."""
    if told.who.is_http or told.who is Who.NO_HTTP:
        yield from (f"port {port_of(url)} is held by {process}" for process in listeners.holders(port_of(url)))


async def _registries_beside(url: str) -> dict[str, list[str]]:
    """Registries at other ports of the same host, and which instances each knows: of this host those of likely
    programs, of another one the usual port."""
    host, port = host_of(url), port_of(url)
    ports = {USUAL_PORT}
    if await is_ours(host):
        likely = (found for process, found in listeners.listening() if any(word in process.command for word in _LIKELY))
        ports |= {each for found in likely for each in found if each not in ENGINES}
    wanted = sorted(ports - {port}, key=lambda each: (each != USUAL_PORT, each))[:BESIDE]
    urls = [f"http://{Endpoint(host, each)}" for each in wanted]
    told = await asyncio.gather(*(identify(each, deadline_s=BESIDE_S, deep=False) for each in urls))
    found = zip(urls, told, strict=True)
    return {each: _names(identity) for each, identity in found if identity.who is Who.REGISTRY}


def _names(told: Identity) -> list[str]:
    rows = {} if told.reply is None else told.reply.json
    return [str(row.get("name")) for row in rows.get("instances", ())]


async def _astray(registry: str) -> list[Astray]:
    """Processes of this host that were told of another port, or of another URL, than the one that was asked, where no
    registry of ours is: those of another fleet are where they should be."""
    port, found = port_of(registry), list[Astray]()
    for process, flag, value in (*listeners.options(_FLAGS), *listeners.variables(_VARIABLES)):
        if process.pid == os.getpid() or not any(word in process.command for word in _LIKELY):
            continue  # a shell that only hands its environment on
        urls = value.split(",") if "://" in value else [f"http://127.0.0.1:{value}"] if value.isdigit() else []
        if not urls or any(_port(each) in (port, None) for each in urls) or len(found) == ASTRAY:
            continue
        told = await asyncio.gather(*(identify(each, deadline_s=BESIDE_S, deep=False) for each in urls))
        if all(each.who is not Who.REGISTRY for each in told):
            found.append(Astray(str(process), flag, value))
    return found


def _port(url: str) -> int | None:
    try:
        return port_of(url)
    except ValueError:
        return None


# --- the ranks


def _questions(seen: Seen, scope: Scope, *, beside: bool) -> dict[str, Question]:
    """Each question that is worth asking, by address. `beside`: the registry is on this host, so that what is loopback
    to its ranks is the same here; elsewhere it would be somebody else's."""
    asked = scope if scope.room is None else with_ranks_of(seen, scope)
    found: dict[str, Question] = {}
    ranks = [(key, row) for key, row in seen.ranks.items() if asked.covers(*key)]
    for (name, _), row in ranks[:ASKED]:
        if (at := endpoint_of(row)) is not None and (beside or not at.is_loopback):
            found[str(at)] = partial(control, at, is_zmq=not name.startswith("vllm:"))
        sessions = [row.get("metadata", {}).get(SESSION_KEY)]
        found |= {str(each): partial(engine, each) for each in sessions if _can_be_asked(each, beside)}
    for session in _out(seen):
        if len(found) < 2 * ASKED and _can_be_asked(session, beside):
            found[session] = partial(engine, session)
    return found


def _out(seen: Seen) -> Iterator[str]:
    """Sessions that somebody holds to be in trouble."""
    rows = [link for report in seen.reports.values() for link in report.get("links", ())]
    for row in (*rows, *seen.overview.get("sessions", ())):
        if row.get("state") in ("blocked", "dropped"):
            yield str(row.get("session"))


def _can_be_asked(session: object, beside: bool) -> bool:
    try:
        at = Endpoint.parse(str(session))
    except BadField:
        return False
    return beside or not at.is_loopback


async def _knocks(questions: Mapping[str, Question]) -> dict[str, Knock]:
    answers = await of_each(lambda question: question(), questions.values(), at_once=AT_ONCE)
    return dict(zip(questions, answers, strict=True))


async def control(at: Endpoint, *, is_zmq: bool = True, deadline_s: float = DEADLINE_S) -> Knock:
    """Whether a control link listens there: ZeroMQ greets whoever connects, before a word is said."""
    try:
        async with asyncio.timeout(deadline_s):
            reader, writer = await asyncio.open_connection(at.host, at.port)
    except TimeoutError:
        return Knock(Door.NO_WAY, f"no connection within {deadline_s:g} s: filtered, or another network")
    except ConnectionRefusedError as error:
        return Knock(Door.REFUSED, root_cause(error))
    except OSError as error:
        return Knock(Door.NO_WAY, root_cause(error))
    try:
        return await _first_words(reader, writer, deadline_s) if is_zmq else Knock(Door.ANSWERS, "takes connections")
    except (OSError, EOFError):
        return Knock(Door.ANOTHER, "it takes the connection and closes it, which no control link does")
    finally:
        writer.transport.abort()


async def _first_words(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, deadline_s: float) -> Knock:
    """Who is silent is asked in HTTP: most of those who let others speak first have an answer to that."""
    for words in (b"", b"GET / HTTP/1.0\r\n\r\n"):
        writer.write(words)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(deadline_s):
                return _greeted(await reader.readexactly(10))
    return Knock(Door.SILENT, f"it takes the connection and says nothing within {2 * deadline_s:g} s")


def _greeted(first: bytes) -> Knock:
    if (first[0], first[9]) == _GREETING:
        return Knock(Door.ANSWERS, "it greets as control links do")
    return Knock(Door.ANOTHER, f"it says {first!r}, which is no ZeroMQ")


async def engine(session: str, *, deadline_s: float = DEADLINE_S) -> Knock:
    """Whether a Mooncake engine answers there."""
    try:
        await Asking().prove(session, deadline_s=deadline_s)
    except TransferFailed as failure:
        return Knock(_DOORS.get(failure.cause, Door.NO_WAY), failure.detail)
    return Knock(Door.ANSWERS, "its engine answers the handshake")


def as_rows(findings: Iterable[Finding]) -> list[dict[str, Any]]:
    """For JSON."""
    return [
        {"what": each.what.value, "who": each.who, "why": each.why, "evidence": list(each.evidence), "do": each.do}
        for each in findings
    ]
