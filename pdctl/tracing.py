"""
Spans to a collector, by OpenTelemetry's SDK over OTLP/HTTP; the only file that imports it, and only if wanted.

    async with open_tracing(settings.trace, role="prefill") as spans:     # None where no endpoint is set

Never in the way: a span is put into a bounded queue, a thread of the SDK sends batches, and a collector that is away
costs spans and not rooms. Closing waits CLOSE_S for the last of them and no longer.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any
from urllib.parse import urlsplit

import structlog

from pdctl.core.trace import Span, TraceContext
from pdctl.errors import ConfigError
from pdctl.spans import Spans

log = structlog.get_logger(__name__)

ASK_S = 2.0  # for one batch; what the collector does not take in that time is tried again, and then dropped
CLOSE_S = 2.0
_PATH = "/v1/traces"


@dataclass(frozen=True, slots=True)
class TraceSettings:
    """Where spans go; by default nowhere.

    endpoint  the collector's OTLP/HTTP address, `http://collector:4318`; spans are posted to /v1/traces below it.
              `none`, or nothing: no spans. The environment's OTEL_EXPORTER_OTLP_ENDPOINT is understood, and, by the SDK
              itself, OTEL_EXPORTER_OTLP_HEADERS, _CERTIFICATE and _COMPRESSION, OTEL_SERVICE_NAME,
              OTEL_RESOURCE_ATTRIBUTES and OTEL_BSP_*. Only http/protobuf is spoken. Needs `pip install 'pdctl[otel]'`.
              Without that, or with an address that is none, one warning says that nothing is exported: it may be the
              platform's variable, and no rank shall fail for it
    ratio     of the traces that begin here, how many are recorded (1.0 all, 0.01 one in a hundred); whoever gives a
              trace has decided that already, and is obeyed
    """

    endpoint: str = ""
    ratio: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.ratio <= 1.0:
            raise ConfigError(f"trace ratio is {self.ratio}: give a number from 0 (none) to 1 (all)")

    @property
    def is_on(self) -> bool:
        return self.endpoint not in ("", "none")

    @property
    def url(self) -> str:
        base = self.endpoint.rstrip("/")
        return base if base.endswith(_PATH) else base + _PATH


@asynccontextmanager
async def open_tracing(settings: TraceSettings, **about: str) -> AsyncIterator[Spans | None]:
    """Where spans go, closed at the end of the block; None where nobody wants any, or where nobody can send them.

    about  what tells this process from its siblings: role, rank, instance; it stands beside every span
    """
    exporting = _exporting(settings, about) if settings.is_on else None
    if exporting is None:
        yield None
        return
    log.info("spans are exported", endpoint=settings.url, ratio=settings.ratio)
    try:
        yield Spans(exporting.record, settings.ratio)
    finally:
        await exporting.aclose()


def _exporting(settings: TraceSettings, about: dict[str, str]) -> _Exporting | None:
    """A process whose environment names a collector must not fail for what only spans need."""
    parts = urlsplit(settings.endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        fix = "give http://HOST:4318, or PDCTL_TRACE__ENDPOINT=none"
        log.warning("no spans are exported", endpoint=settings.endpoint, why="it is no address of HTTP", fix=fix)
        return None
    try:
        return _Exporting(settings, about)
    except ImportError as error:
        fix = "pip install 'pdctl[otel]', or PDCTL_TRACE__ENDPOINT=none"
        log.warning("no spans are exported", missing=str(error), fix=fix)
        return None


class _Exporting:
    """The SDK's queue and exporter, told of spans that are over."""

    def __init__(self, settings: TraceSettings, about: dict[str, str]) -> None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        own = {"service.name": "pdctl", "service.version": version("pdctl")}
        own |= {f"pdctl.{name}": value for name, value in about.items()}
        self._exporter: Any = OTLPSpanExporter(endpoint=settings.url, timeout=ASK_S)
        self._queue: Any = BatchSpanProcessor(self._exporter)
        self._as_sdk_span = _translation(_named(Resource.create(own), own))

    def record(self, span: Span) -> None:
        self._queue.on_end(self._as_sdk_span(span))

    async def aclose(self) -> None:
        """The SDK waits for up to 30 s in here, for a collector that may be gone: not on the loop, and not so long."""
        closing = asyncio.get_running_loop().run_in_executor(None, self._queue.shutdown)
        done, _ = await asyncio.wait({closing}, timeout=CLOSE_S)
        if not done:
            log.warning("last spans were not taken by the collector", waited_s=CLOSE_S)
            self._exporter.shutdown()  # which ends its waiting for another attempt


def _named(resource: Any, own: dict[str, str]) -> Any:
    """The environment's OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES win over what we would call ourselves."""
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource

    theirs = {**OTELResourceDetector().detect().attributes}
    return resource.merge(Resource({name: value for name, value in theirs.items() if name in own}))


def _translation(resource: Any) -> Callable[[Span], Any]:
    """From our spans to the SDK's. Its own classes would draw the ids themselves, and read the clock."""
    from opentelemetry.sdk.trace import Event, ReadableSpan
    from opentelemetry.sdk.util.instrumentation import InstrumentationScope
    from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState

    scope = InstrumentationScope("pdctl", version("pdctl"))

    def context(of: TraceContext, *, is_remote: bool) -> Any:
        state = TraceState.from_header([of.state]) if of.state else None
        return SpanContext(int(of.trace_id, 16), int(of.span_id, 16), is_remote, TraceFlags(of.flags), state)

    def translated(span: Span) -> Any:
        behind_ns = time.time_ns() - int(time.monotonic() * 1e9)  # drawn anew: the wall clock is set, and ours is not

        def at_ns(at: float) -> int:
            return int(at * 1e9) + behind_ns

        return ReadableSpan(
            span.name,
            context(span.context, is_remote=False),
            None if span.parent is None else context(span.parent, is_remote=True),
            resource,
            dict(span.attributes),
            [Event(event.name, dict(event.attributes), at_ns(event.at)) for event in span.events],
            [Link(context(link, is_remote=True)) for link in span.links],
            SpanKind.SERVER if span.serves else SpanKind.INTERNAL,
            status=Status(StatusCode.UNSET) if span.error is None else Status(StatusCode.ERROR, span.error),
            start_time=at_ns(span.began),
            end_time=at_ns(span.ended),
            instrumentation_scope=scope,
        )

    return translated
