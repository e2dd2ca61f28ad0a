"""
The session table over HTTP, under /v1/sessions: for engines that move their KV themselves, for operators, for the page.

    GET     /v1/sessions?state=blocked          every known session, and why it stands where it stands
    GET     /v1/sessions/watch?since=...        changes as server-sent events: `watch` says what comes
    GET     /v1/sessions/{session}
    PUT     /v1/sessions/{session}              a link has been made: who answers there now is the life that is meant
    POST    /v1/sessions/{session}/failures     a transfer has failed, and why
    POST    /v1/sessions/{session}/successes    a transfer has landed
    POST    /v1/sessions/{session}/probe        ask now, and wait for what comes of it
    DELETE  /v1/sessions/{session}              lift by hand, whatever is held against it

Translates only; who is trusted is decided in `core.sessions`. Whoever may PUT makes this service open a connection to
the address that they name: these paths stand behind the same guard as the rest of /v1.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Protocol

from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import JSONResponse, Response
from pydantic import TypeAdapter

from pdctl.core.feed import WatchLimits
from pdctl.core.kinds import Depth, State
from pdctl.core.standing import Change, Standing
from pdctl.dialects.edge import owner_of, received
from pdctl.dialects.strict import Refused, as_body, fails, route_class, takes
from pdctl.dialects.watch import Broadcast
from pdctl.errors import BadField, Cause
from pdctl.metrics import Metrics

BODY_LIMIT = 1 << 16
MAX_POINTERS = 4096
PAGE = 1000
AT_ONCE = 64
SESSION = r"[A-Za-z0-9_.:%\[\]-]{1,255}"
"""`ip:port` or `[ip]:port`, or the name that an engine has with a metadata server."""

_STRICT = {"extra": "forbid"}


@dataclass(frozen=True, slots=True)
class Link:
    """ "I have made a link to this session."

    group     which sessions stand or fall together: at most a share of a group is ejected (default: all are one)
    pointers  addresses that the peer has announced to you; they must lie in what its handshake shows
    """

    __pydantic_config__ = _STRICT

    group: str = ""
    pointers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if len(self.group) > 128 or not self.group.isprintable():
            raise BadField("group", "is not printable or longer than 128: give a short name")
        if len(self.pointers) > MAX_POINTERS or not all(0 < pointer < 1 << 64 for pointer in self.pointers):
            raise BadField("pointers", f"are more than {MAX_POINTERS}, or no addresses: give those of the KV entries")


@dataclass(frozen=True, slots=True)
class Failure:
    """ "A transfer to this session has failed."

    cause   as far as you know it; refused, timed_out, peer_gone, ... Causes that do not speak of the peer block nobody
    detail  in words, for whoever asks why
    """

    __pydantic_config__ = _STRICT

    cause: Cause = Cause.PEER_GONE
    detail: str = "reported by an engine"

    def __post_init__(self) -> None:
        if not 0 < len(self.detail) <= 500 or not self.detail.isprintable():
            raise BadField("detail", "is empty, not printable or longer than 500: give one line of text")


class Asked(Protocol):
    """What one question has brought; `prober.Answer` is one."""

    @property
    def is_well(self) -> bool: ...

    @property
    def cause(self) -> Cause | None: ...

    @property
    def detail(self) -> str: ...

    @property
    def depth(self) -> Depth | None: ...

    @property
    def how(self) -> str: ...

    @property
    def cured(self) -> str | None: ...

    @property
    def seconds(self) -> float: ...

    @property
    def standing(self) -> Standing: ...


class Links(Protocol):
    """Who keeps the sessions: the prober."""

    @property
    def panicking(self) -> Sequence[str]: ...

    @property
    def doubting(self) -> bool: ...

    def standing(self, session: str) -> Standing: ...

    def sessions(self) -> Sequence[str]: ...

    def registered(self, session: str, pointers: Sequence[int] = ()) -> None: ...

    def announce(self, session: str, group: str = "") -> None: ...

    def failed(self, session: str, cause: Cause, detail: str) -> None: ...

    def succeeded(self, session: str) -> None: ...

    def lift(self, session: str, detail: str) -> bool: ...

    async def ask_now(self, session: str) -> Asked: ...

    def subscribe(self, hear: Callable[[Sequence[Change]], None]) -> Callable[[], None]: ...


_LINK, _FAILURE = TypeAdapter(Link), TypeAdapter(Failure)
Session = Annotated[
    str, Path(description="`ip:port` of the peer's engine.", json_schema_extra={"pattern": f"^{SESSION}$"})
]


def router(links: Links, news: Broadcast, refused: Refused) -> APIRouter:
    """`refused` is told of every request that is answered with an error, and words it."""
    api = APIRouter(prefix="/v1/sessions", tags=["pdctl"], route_class=route_class(refused))
    _add_reads(api, links, news)
    _add_reports(api, links)
    _add_hands(api, links)
    return api


def broadcast(links: Links, metrics: Metrics, limits: WatchLimits | None = None) -> Broadcast:
    """What watchers of sessions hear, from now on. Stand its `run` beside the server."""
    revisions = itertools.count(1)

    def detail(session: str) -> bytes | None:
        return _line(_shown(links.standing(session)))

    def tell(changes: Sequence[Change]) -> None:
        for change in changes:
            revision = next(revisions)
            news.publish(revision, change.session, _line(_told(change, links, revision)))

    news = Broadcast(links.sessions, detail, metrics, limits=limits, row="session", kept=False)
    links.subscribe(tell)
    return news


def _add_reads(api: APIRouter, links: Links, news: Broadcast) -> None:
    @api.get("", summary="Every known transfer session: where it stands, and why")
    async def sessions(
        state: Annotated[State | None, Query(description="Only those that stand so.")] = None,
        group: Annotated[str | None, Query(description="Only those of this group.")] = None,
        after: Annotated[str, Query(description="Only those after this one: `next` of the last answer.")] = "",
        limit: Annotated[int, Query(description="So many at most.", ge=1, le=PAGE)] = PAGE,
    ) -> Response:
        found, further = await _page(links, after, limit, state, group)
        body = {"cursor": news.cursor, "panicking": links.panicking, "doubting": links.doubting, "next": further}
        return JSONResponse(body | {"sessions": found})

    news.add_to(api, "Every change of a session's standing, as server-sent events")

    @api.get("/{session}", summary="One session; one that nobody has heard of is trusted", responses=fails(400))
    async def one(session: Session) -> Response:
        return _answer(links, _named(session))


async def _page(
    links: Links, after: str, limit: int, state: State | None, group: str | None
) -> tuple[list[dict[str, Any]], str | None]:
    """The first `limit` that fit, and the name of the last where there may be more."""
    names = links.sessions()
    found: list[dict[str, Any]] = []
    for number, name in enumerate(names[bisect_right(names, after) :]):
        if number % AT_ONCE == AT_ONCE - 1:
            await asyncio.sleep(0)  # 10,000 of them take 0.2 s
        standing = links.standing(name)
        if (state is None or standing.state is state) and (group is None or standing.group == group):
            found.append(_shown(standing))
            if len(found) == limit:
                return found, name
    return found, None


def _add_reports(api: APIRouter, links: Links) -> None:
    @api.put(
        "/{session}",
        summary="A link has been made: who answers there now is the life that is meant",
        description="Whatever was held against the session is over. Say it when the peer has registered with you.",
        responses=fails(400, 408, 413),
        openapi_extra=takes(_LINK, required=False),
    )
    async def announce(request: Request, session: Session) -> Response:
        name, body = _named(session), await received(request.receive, BODY_LIMIT)
        said = as_body(_LINK, body) if body else Link()
        links.announce(name, said.group)
        links.registered(name, said.pointers)
        return _answer(links, name)

    @api.post(
        "/{session}/failures",
        summary="A transfer to it has failed",
        responses=fails(400, 408, 413),
        openapi_extra=takes(_FAILURE, required=False),
    )
    async def failures(request: Request, session: Session) -> Response:
        name, body = _named(session), await received(request.receive, BODY_LIMIT)
        said = as_body(_FAILURE, body) if body else Failure()
        links.failed(name, said.cause, said.detail)
        return _answer(links, name)

    @api.post("/{session}/successes", summary="A transfer to it has landed: a trial is over", responses=fails(400))
    async def successes(session: Session) -> Response:
        name = _named(session)
        links.succeeded(name)
        return _answer(links, name)


def _add_hands(api: APIRouter, links: Links) -> None:
    @api.post("/{session}/probe", summary="Ask now, and wait for what comes of it", responses=fails(400))
    async def probe(session: Session) -> Response:
        name = _named(session)
        return JSONResponse(_asked(await links.ask_now(name)))

    @api.delete("/{session}", summary="Lift by hand, whatever is held against it", responses=fails(400))
    async def lift(request: Request, session: Session) -> Response:
        name, who = _named(session), owner_of(request.scope)
        links.lift(name, f"lifted by hand from {who.principal or who.host}")
        return _answer(links, name)


def row(links: Links, session: str) -> bytes:
    """One session as it is shown, as JSON."""
    return _line(_shown(links.standing(session)))


def is_session(text: str) -> bool:
    """Whether a path can bear it."""
    return re.fullmatch(SESSION, text, re.ASCII) is not None


def _named(session: str) -> str:
    if not is_session(session):
        raise BadField("session", f"is {session[:80]!r}: give ip:port, [ip]:port, or the name of an engine")
    return session


def _answer(links: Links, session: str) -> Response:
    return JSONResponse(_shown(links.standing(session)))


def _shown(standing: Standing) -> dict[str, Any]:
    shown = {name: round(value, 3) if isinstance(value, float) else value for name, value in asdict(standing).items()}
    return shown | {
        "depth": None if standing.depth is None else standing.depth.name.lower(),
        "sentence": standing.sentence,
    }


def _asked(asked: Asked) -> dict[str, Any]:
    """`works` is about this answer: a session may stay out all the same, and its standing says why. Somebody who only
    answers proves nothing."""
    cause = None if asked.cause is None else asked.cause.value
    return {
        "works": asked.is_well and asked.depth is not Depth.HANDSHAKE,
        "cause": cause,
        "detail": asked.how if asked.is_well else f"{cause}: {asked.detail}".replace("_", " ", 1),
        "depth": None if asked.depth is None else asked.depth.name.lower(),
        "cured": asked.cured,
        "seconds": round(asked.seconds, 6),
        "standing": _shown(asked.standing),
    }


def _told(change: Change, links: Links, revision: int) -> dict[str, Any]:
    """One change, and how the session stands now. Of a group or of us all, it names no session."""
    return {
        "revision": revision,
        "kind": change.kind.value,
        "cause": None if change.cause is None else change.cause.value,
        "detail": change.detail,
        "blocked_s": round(change.blocked_s, 3),
        "group": change.group,
        "session": _shown(links.standing(change.session)) if change.session else None,
    }


def _line(body: object) -> bytes:
    return json.dumps(body, separators=(",", ":")).encode()
