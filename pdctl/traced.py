"""
Requests that say whose trace they are part of, as spans of that trace: an ASGI application around another.

There only where spans are exported. A request that names no trace, or one that is not recorded, goes by untouched: who
asks for /health a thousand times a second shall find none of it in a collector.
"""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pdctl.core.trace import TRACEPARENT, TRACESTATE, Attribute, Span, TraceContext
from pdctl.shortcut import Answered, at_once_of
from pdctl.spans import Spans, within

_NAMES = {TRACEPARENT.encode(): TRACEPARENT, TRACESTATE.encode(): TRACESTATE}


class Traced:
    """`at_once` is asked for all but those that will have a span: these go the usual way, where there is time."""

    def __init__(self, inner: ASGIApp, spans: Spans) -> None:
        self._inner, self._spans = inner, spans
        self._at_once = at_once_of(inner)

    def at_once(self, scope: Scope, body: bytes) -> Answered:
        return self._at_once(scope, body) if recorded(scope) is None else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = recorded(scope) if scope["type"] == "http" else None
        if given is None:
            await self._inner(scope, receive, send)
            return
        context, began, status = self._spans.begin(given), self._spans.clock(), 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = int(message["status"])
            await send(message)

        try:
            with within(context):
                await self._inner(scope, receive, watched)
        finally:
            self._spans.record(_span(scope, status, context, given, began, self._spans.clock()))


def traced(app: ASGIApp, spans: Spans | None) -> ASGIApp:
    return app if spans is None else Traced(app, spans)


def recorded(scope: Scope) -> TraceContext | None:
    """The trace that the request names, if its caller records it."""
    said = {_NAMES[name]: value.decode("latin-1") for name, value in scope["headers"] if name in _NAMES}
    context = TraceContext.from_headers(said) if said else None
    return context if context is not None and context.is_sampled else None


def _span(scope: Scope, status: int, context: TraceContext, given: TraceContext, began: float, ended: float) -> Span:
    """Named by its route, of which there are few; what is answered in front of all routes has a path of its own."""
    unknown = status in (404, 405)
    route = str(getattr(scope.get("route"), "path", "" if unknown else scope["path"]))
    attributes: dict[str, Attribute] = {
        "http.request.method": scope["method"],
        "http.response.status_code": status,
        "url.path": scope["path"],
    }
    if route:
        attributes["http.route"] = route
    error = f"answered {status}" if status >= 500 or not status else None
    name = f"{scope['method']} {route}".rstrip()
    return Span(name, context, given, began, ended, attributes, error=error, serves=True)
