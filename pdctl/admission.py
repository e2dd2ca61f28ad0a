"""
The turnstile before the service: registrations come in at the pace that core.admission sets; everything else passes.

It stands before any parsing, so that a client that is put off costs as little as can be, and it reads no body. It
knows registrations by method and path; whose wire they are on is decided there, not by what a client calls itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable

from starlette.types import ASGIApp, Receive, Scope, Send

from pdctl.core.access import plain_host
from pdctl.core.admission import Admission, Lane
from pdctl.metrics import Metrics
from pdctl.shortcut import Answer, Answered, at_once_of

_ENGINES_OWN = {("PUT", "/route"), ("POST", "/register"), ("PUT", "/metadata")}
_INSTANCES, _RANKS, _REPORT = "/v1/instances/", "/ranks/", "/report"
_ADMITTED = "admitted"


class Turnstile:
    """An ASGI application around another. `hear` is told of each that has to come again: in how many seconds, who."""

    def __init__(
        self,
        inner: ASGIApp,
        admission: Admission,
        clock: Callable[[], float],
        metrics: Metrics,
        hear: Callable[[int, str], None] = lambda *_: None,
    ) -> None:
        self._inner = inner
        self._admission = admission
        self._clock = clock
        self._counts = metrics.admission
        self._hear = hear
        self._at_once = at_once_of(inner)

    def at_once(self, scope: Scope, body: bytes) -> Answered:
        """The short way. Each registration is asked about once, whichever way it goes on."""
        return self._put_off(scope) or self._at_once(scope, body)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        put_off = self._put_off(scope) if scope["type"] == "http" else None
        if put_off is None:
            await self._inner(scope, receive, send)
        else:
            await put_off.send(send)

    def _put_off(self, scope: Scope) -> Answer | None:
        """What a registration that has to wait is told; None for one that may go on."""
        lane = None if scope["method"] == "GET" else lane_of(scope["method"], scope["path"])
        if lane is None or scope.setdefault("state", {}).get(_ADMITTED):
            return None
        wait_s = self._admission.ask(lane, self._clock())
        self._counts.asked(lane, admitted=wait_s is None)
        if wait_s is None:
            scope["state"][_ADMITTED] = True
            return None
        client = scope.get("client")
        self._hear(wait_s, plain_host(client[0]) if client else "unknown")
        return _come_again(wait_s, self._admission.policy.per_s)


def lane_of(method: str, path: str) -> Lane | None:
    """Whose registration it is; None for what is none. A renewal is none: to let it wait would end the lease. Nor is a
    report, of which thousands of ranks send hundreds a second."""
    if (method, path) in _ENGINES_OWN:
        return Lane.STOCK
    if method == "PUT" and path.startswith(_INSTANCES) and _RANKS in path and not path.endswith(_REPORT):
        return Lane.LEASED
    return None


def _come_again(wait_s: int, per_s: float) -> Answer:
    """503 and not 429: nobody has asked too often, many have asked at once."""
    text = f"registrations are let in at {per_s:g} a second and others were before this one: come again in {wait_s} s"
    body = json.dumps({"error": {"message": text}}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"retry-after", str(wait_s).encode()),
    ]
    return Answer(503, headers, body)
