"""
The door of the service: ASGI around the whole app, which admits a request or answers it.

What is admitted carries an `Owner` in `scope["state"]["caller"]`. No path is served here, no body is read, and who
may change which row is none of its business.
"""

from __future__ import annotations

from collections.abc import Callable

import structlog
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from pdctl.core.access import STOCK_ONLY, Denied, Rules, TrustList, is_native, plain_host
from pdctl.core.lives import Owner
from pdctl.counts.service import AccessMetrics
from pdctl.shortcut import Answered, at_once_of

log = structlog.get_logger(__name__)

REMEMBERED = 4096
SAY_EVERY_S = 1.0
"""A scanner makes thousands of requests: one line a second tells of it, the counter of the rest."""

_LONGEST_PATH = 200

Hear = Callable[[Denied, str, str], None]


class Guard:
    """`rules` is asked for every request, so that a new token holds from the next one on.

    stock_only  /v1 is not served here: at a listener in the clear of a service that else speaks TLS
    hear        is told of each who is not let in: why, of what, and the peer
    """

    def __init__(
        self,
        app: ASGIApp,
        rules: Callable[[], Rules],
        metrics: AccessMetrics,
        clock: Callable[[], float],
        *,
        stock_only: bool = False,
        hear: Hear | None = None,
    ) -> None:
        self._app = app
        self._rules = rules
        self._counts = metrics
        self._clock = clock
        self._stock_only = stock_only
        self._hear = hear
        self._known: dict[tuple[str, str], tuple[Owner, bool]] = {}
        self._quiet_until = float("-inf")
        self._unsaid = 0
        self._at_once = at_once_of(app)

    def at_once(self, scope: Scope, body: bytes) -> Answered:
        """The short way, for those who may; who may not is told so on the usual one."""
        verdict = self._verdict(scope)
        if isinstance(verdict, Denied):
            return None
        scope.setdefault("state", {})["caller"] = verdict
        return self._at_once(scope, body)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        verdict = self._verdict(scope)
        if isinstance(verdict, Denied):
            self._tell(verdict, scope)
            await _answer(verdict, scope)(scope, receive, send)
            return
        scope.setdefault("state", {})["caller"] = verdict
        await self._app(scope, receive, send)

    def _verdict(self, scope: Scope) -> Owner | Denied:
        if self._stock_only and is_native(scope["path"]):
            return STOCK_ONLY
        rules = self._rules()
        ends = _ends(scope)
        caller, trusted = self._known.get(ends) or self._look_at(rules.trust, ends)
        authorization = None if rules.tokens is None else _authorization(scope)
        return rules.admit(scope["path"], caller, trusted, authorization)

    def _look_at(self, trust: TrustList, ends: tuple[str, str]) -> tuple[Owner, bool]:
        """Remembered: the networks never change while we run, and reading two addresses takes 10 us."""
        if len(self._known) >= REMEMBERED:
            self._known.clear()
        host, here = (plain_host(end) for end in ends)
        self._known[ends] = found = Owner(host), trust.trusts(host, here)
        return found

    def _tell(self, denied: Denied, scope: Scope) -> None:
        self._counts.denied(denied.why)
        peer, path = plain_host(_ends(scope)[0]), scope["path"][:_LONGEST_PATH]
        if self._hear is not None:
            self._hear(denied, f"{scope['method']} {path}", peer)
        now = self._clock()
        if now < self._quiet_until:
            self._unsaid += 1
            return
        log.warning("request denied", reason=denied.why.value, peer=peer, path=path, unsaid=self._unsaid)
        self._quiet_until, self._unsaid = now + SAY_EVERY_S, 0


def _ends(scope: Scope) -> tuple[str, str]:
    """The hosts that the connection goes from and to, as the socket gives them."""
    client, server = scope.get("client"), scope.get("server")
    return client[0] if client else "unknown", server[0] if server else "unknown"


def _authorization(scope: Scope) -> str | None:
    """The header's text; two of them are a text that is no token's."""
    found = [value for name, value in scope["headers"] if name == b"authorization"]
    return b", ".join(found).decode("latin-1") if found else None


def _answer(denied: Denied, scope: Scope) -> Response:
    headers = {"WWW-Authenticate": 'Bearer realm="pdctl"'} if denied.status == 401 else None
    if is_native(scope["path"]):
        return JSONResponse({"error": {"message": denied.text}}, denied.status, headers)
    return PlainTextResponse(denied.text, denied.status, headers)
