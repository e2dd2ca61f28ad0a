"""
The turnstile before the service: registrations come in at the pace that core.admission sets; everything else passes.

It stands before any parsing, so that a client that is put off costs as little as can be, and it reads no body. It
knows registrations by method and path; whose wire they are on is decided there, not by what a client calls itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable

from starlette.types import ASGIApp, Receive, Scope, Send

from pdctl.core.admission import Admission, Lane
from pdctl.metrics import Metrics

_ENGINES_OWN = {("PUT", "/route"), ("POST", "/register"), ("PUT", "/metadata")}
_INSTANCES, _RANKS = "/v1/instances/", "/ranks/"


class Turnstile:
    """An ASGI application around another."""

    def __init__(self, inner: ASGIApp, admission: Admission, clock: Callable[[], float], metrics: Metrics) -> None:
        self._inner = inner
        self._admission = admission
        self._clock = clock
        self._counts = metrics.admission

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        lane = None if scope["type"] != "http" or scope["method"] == "GET" else lane_of(scope["method"], scope["path"])
        if lane is None:
            await self._inner(scope, receive, send)
            return
        wait_s = self._admission.ask(lane, self._clock())
        self._counts.asked(lane, admitted=wait_s is None)
        if wait_s is None:
            await self._inner(scope, receive, send)
        else:
            await _put_off(send, wait_s, self._admission.policy.per_s)


def lane_of(method: str, path: str) -> Lane | None:
    """Whose registration it is; None for what is none. A renewal is none: to let it wait would end the lease."""
    if (method, path) in _ENGINES_OWN:
        return Lane.STOCK
    if method == "PUT" and path.startswith(_INSTANCES) and _RANKS in path:
        return Lane.LEASED
    return None


async def _put_off(send: Send, wait_s: int, per_s: float) -> None:
    """503 and not 429: nobody has asked too often, many have asked at once."""
    text = f"registrations are let in at {per_s:g} a second and others were before this one: come again in {wait_s} s"
    body = json.dumps({"error": {"message": text}}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"retry-after", str(wait_s).encode()),
    ]
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": body})
