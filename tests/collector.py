"""A collector of spans that truly takes them: OTLP over HTTP, its bodies read with OpenTelemetry's own messages."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.small_server import listening

WITHIN_S = 60.0


@dataclass
class Taken:
    """One span as it came. `about`: what stands beside all spans of its process."""

    name: str
    trace_id: str
    span_id: str
    parent: str
    attributes: dict[str, Any]
    events: list[tuple[str, int]]
    links: list[tuple[str, str]]
    error: str | None
    state: str
    kind: int
    began_ns: int
    ended_ns: int
    about: dict[str, Any]


@dataclass
class Collector:
    url: str = ""
    spans: list[Taken] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    came: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def take(self, request: web.Request) -> web.Response:
        said = ExportTraceServiceRequest()
        said.ParseFromString(await request.read())
        async with self.came:
            self.paths.append(request.path)
            self.spans += [
                _taken(span, _plain(each.resource.attributes))
                for each in said.resource_spans
                for scope in each.scope_spans
                for span in scope.spans
            ]
            self.came.notify_all()
        return web.Response(body=b"", content_type="application/x-protobuf")

    async def until(self, enough: Callable[[list[Taken]], bool]) -> list[Taken]:
        async with asyncio.timeout(WITHIN_S), self.came:
            await self.came.wait_for(lambda: enough(self.spans))
        return self.spans

    def named(self, name: str) -> list[Taken]:
        return [span for span in self.spans if span.name == name]


@asynccontextmanager
async def collector() -> AsyncIterator[Collector]:
    it = Collector()
    app = web.Application(client_max_size=64 << 20)
    app.add_routes([web.post("/{path:.*}", it.take)])
    async with listening(web.AppRunner(app, access_log=None)) as it.url:
        yield it


def _taken(span: Any, about: dict[str, Any]) -> Taken:
    return Taken(
        span.name,
        span.trace_id.hex(),
        span.span_id.hex(),
        span.parent_span_id.hex(),
        _plain(span.attributes),
        [(event.name, event.time_unix_nano) for event in span.events],
        [(link.trace_id.hex(), link.span_id.hex()) for link in span.links],
        span.status.message if span.status.code == 2 else None,
        span.trace_state,
        span.kind,
        span.start_time_unix_nano,
        span.end_time_unix_nano,
        about,
    )


def _plain(attributes: Any) -> dict[str, Any]:
    return {each.key: _value(each.value) for each in attributes}


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(each) for each in value.array_value.values]
    return getattr(value, kind)
