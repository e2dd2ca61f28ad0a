"""Spans as a real collector gets them, over OTLP/HTTP; and what a collector that is away costs."""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from starlette.types import Receive, Scope, Send
from structlog.testing import capture_logs

from pdctl import config
from pdctl.client import RegistryClient
from pdctl.core.address import Endpoint
from pdctl.core.route import Announcement, Seat, Shape
from pdctl.core.trace import Event, Span, TraceContext
from pdctl.errors import ConfigError, RegistrationGaveUp
from pdctl.retry import RetryPolicy
from pdctl.shortcut import Answer, Answered
from pdctl.spans import Spans, within
from pdctl.traced import Traced
from pdctl.tracing import CLOSE_S, TraceSettings, open_tracing
from tests.collector import Collector, collector
from tests.service import service

CALLER = TraceContext("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7", state="vendor=1")
OWN = TraceContext(CALLER.trace_id, "1234567890abcdef", state="vendor=1")
OTHER = TraceContext("1" * 32, "2" * 16)
SHAPE = Shape(1, 1, 1, 1, 16, "bfloat16", follow_bootstrap_room=True)
SERVER = 2


def span(**changes: Any) -> Span:
    values: dict[str, Any] = {
        "name": "pdctl.room.sender",
        "context": OWN,
        "parent": CALLER,
        "began": 10.0,
        "ended": 12.5,
    }
    return Span(**values | changes)


def announcement() -> Announcement:
    return Announcement(Seat(0, 0, 0, 0), SHAPE, Endpoint("10.0.0.7", 7000))


@asynccontextmanager
async def recording(at: Collector, **about: str) -> AsyncIterator[Spans]:
    async with open_tracing(TraceSettings(at.url), **about) as spans:
        assert spans is not None
        yield spans


async def test_a_span_arrives_as_it_was_told() -> None:
    now, wall_ns = time.monotonic(), time.time_ns()
    async with collector() as at:
        async with recording(at, role="prefill", rank="dp0/cp0/tp0/pp0") as spans:
            spans.record(
                span(
                    began=now - 3.0,
                    ended=now - 1.0,
                    attributes={"pdctl.nbytes": 7, "pdctl.peers": ("a", "b")},
                    events=(Event("transferring", now - 2.0, {"n": 1}),),
                    links=(OTHER,),
                    error="the peer hangs",
                )
            )
        (taken,) = at.spans
    assert at.paths == ["/v1/traces"]
    assert (taken.name, taken.trace_id, taken.span_id) == ("pdctl.room.sender", OWN.trace_id, OWN.span_id)
    assert (taken.parent, taken.state) == (CALLER.span_id, "vendor=1")
    assert taken.attributes == {"pdctl.nbytes": 7, "pdctl.peers": ["a", "b"]}
    assert (taken.error, taken.links) == ("the peer hangs", [(OTHER.trace_id, OTHER.span_id)])
    assert taken.ended_ns - taken.began_ns == pytest.approx(2e9, abs=1e4)
    assert abs(taken.began_ns - (wall_ns - 3e9)) < 1e9
    assert taken.events[0][1] - taken.began_ns == pytest.approx(1e9, abs=1e4)
    assert taken.about["service.name"] == "pdctl"
    assert (taken.about["pdctl.role"], taken.about["pdctl.rank"]) == ("prefill", "dp0/cp0/tp0/pp0")


async def test_the_environment_may_name_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "decode-of-team-a")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "zone=b")
    async with collector() as at:
        async with recording(at) as spans:
            spans.record(span())
        assert (at.spans[0].about["service.name"], at.spans[0].about["zone"]) == ("decode-of-team-a", "b")


@pytest.mark.parametrize("endpoint", ["", "none"])
async def test_without_an_endpoint_nothing_is_loaded_and_nobody_records(endpoint: str) -> None:
    async with open_tracing(TraceSettings(endpoint)) as spans:
        assert spans is None


async def test_an_address_that_is_none_for_http_costs_a_warning_and_no_rank() -> None:
    with capture_logs() as lines:
        async with open_tracing(TraceSettings("otel:4317")) as spans:
            assert spans is None
    assert [(line["log_level"], line["endpoint"]) for line in lines] == [("warning", "otel:4317")]


async def test_without_the_package_all_goes_on_and_one_warning_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with capture_logs() as lines:
        async with open_tracing(TraceSettings("http://127.0.0.1:1")) as spans:
            assert spans is None
    (line,) = lines
    assert (line["log_level"], line["event"]) == ("warning", "no spans are exported")
    assert "pdctl[otel]" in line["fix"]


@pytest.mark.parametrize("answers", [pytest.param(False, id="refused"), pytest.param(True, id="takes, never answers")])
async def test_a_collector_that_is_away_holds_nobody_up(answers: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        settings = TraceSettings(f"http://127.0.0.1:{sock.getsockname()[1]}")
        if not answers:
            sock.close()
        async with open_tracing(settings) as spans:
            assert spans is not None
            began = time.monotonic()
            for _ in range(3000):  # more than the queue holds
                spans.record(span())
            told_s, began = time.monotonic() - began, time.monotonic()
        assert told_s < 8
        assert time.monotonic() - began < CLOSE_S + 1.0


async def test_a_registration_is_one_span_and_the_registrys_part_lies_below_it(tmp_path: Path) -> None:
    async with collector() as at:
        told = {"PDCTL_TRACE__ENDPOINT": at.url, "OTEL_BSP_SCHEDULE_DELAY": "100"}
        with service(tmp_path / "log", "--journal", "memory:", **told) as registry:
            async with recording(at) as spans, RegistryClient(registry.url, spans=spans) as client:
                with within(CALLER):
                    await client.register(announcement())
                    await client.register(announcement())  # a repetition is no news
                    await client.topology()
                async with aiohttp.ClientSession() as http:
                    for path in ("/health", "/v1/instances/default"):
                        headers = {"traceparent": OTHER.traceparent} if path != "/health" else {}
                        await (await http.get(registry.url + path, headers=headers)).read()
            await at.until(lambda spans: len([s for s in spans if s.kind == SERVER]) >= 4)
    (registration,) = at.named("pdctl.registration")
    served = [each for each in at.spans if each.kind == SERVER]
    assert (registration.trace_id, registration.parent, registration.error) == (
        CALLER.trace_id,
        CALLER.span_id,
        None,
    )
    assert registration.attributes["pdctl.registry"] == registry.url
    assert sorted((each.name, each.parent) for each in served) == sorted(
        [
            ("PUT /route", registration.span_id),
            ("PUT /route", CALLER.span_id),
            ("GET /route", CALLER.span_id),
            ("GET /v1/instances/{instance}", OTHER.span_id),
        ]
    )
    assert {each.about["pdctl.role"] for each in served} == {"registry"}
    assert all(each.attributes["http.response.status_code"] == 200 for each in served)


async def test_a_registration_that_gives_up_says_each_attempt() -> None:
    found: list[Span] = []
    policy = RetryPolicy(first_wait_s=0.01, max_wait_s=0.02, max_attempts=3)
    async with RegistryClient("http://127.0.0.1:1", policy=policy, spans=Spans(found.append)) as client:
        with pytest.raises(RegistrationGaveUp):
            await client.register(announcement())
    (given_up,) = found
    assert [event.attributes["attempt"] for event in given_up.events] == [1, 2, 3]
    assert "RegistrationGaveUp" in (given_up.error or "")


def test_the_environments_own_name_for_the_collector_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://otel:4318")
    assert config.load().trace.url == "http://otel:4318/v1/traces"
    monkeypatch.setenv("PDCTL_TRACE__ENDPOINT", "none")
    assert not config.load().trace.is_on


def test_an_endpoint_that_names_the_path_keeps_it() -> None:
    assert TraceSettings("http://otel:4318/v1/traces").url == "http://otel:4318/v1/traces"
    assert TraceSettings("http://otel/below/").url == "http://otel/below/v1/traces"


@pytest.mark.parametrize("wrong", [{"ratio": 1.5}, {"ratio": -0.1}])
def test_what_cannot_be_is_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"trace {next(iter(wrong))} is"):
        TraceSettings(**wrong)


class Inner:
    """An application with a short way; `asked` says which way each request came."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def at_once(self, scope: Scope, body: bytes) -> Answered:
        self.asked.append("at once")
        return Answer(200, [], b"")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        raise AssertionError("nobody has taken the usual way here")


@pytest.mark.parametrize(
    ("said", "short"),
    [
        pytest.param(None, True, id="no trace"),
        pytest.param(CALLER.traceparent, False, id="a trace that is recorded"),
        pytest.param(CALLER.traceparent[:-1] + "0", True, id="one that is not"),
        pytest.param("nonsense", True, id="none"),
    ],
)
def test_only_a_request_that_has_a_span_leaves_the_short_way(said: str | None, short: bool) -> None:
    inner, found = Inner(), list[Span]()
    service = Traced(inner, Spans(found.append))
    headers = [(b"host", b"x")] + ([] if said is None else [(b"traceparent", said.encode())])
    answer = service.at_once({"type": "http", "method": "GET", "path": "/health", "headers": headers}, b"")
    assert (answer is not None, bool(inner.asked)) == (short, short)
    assert found == []
