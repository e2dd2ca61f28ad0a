"""The turnstile over real HTTP: a herd of leased clients is paced, and everybody else walks past."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import aiohttp
import pytest
from fastapi import FastAPI, Request

from pdctl.admission import Turnstile, lane_of
from pdctl.core.admission import Admission, AdmissionPolicy, Lane
from pdctl.metrics import Metrics
from pdctl.server import bind, bound, serve
from tests.conftest import Clock

RANK = "/v1/instances/prefill-a/ranks/dp0-cp0-tp3-pp0"
PACE = AdmissionPolicy(per_s=10.0, burst=3, longest_s=30.0)


@pytest.fixture
async def url(clock: Clock, metrics: Metrics) -> AsyncIterator[str]:
    """A service that says OK to everything, behind a turnstile whose time stands still."""
    inner = FastAPI()

    @inner.api_route("/{path:path}", methods=["GET", "PUT", "POST", "DELETE"])
    async def well(path: str, request: Request) -> str:
        return f"OK {len(await request.body())}"

    with bind("127.0.0.1", 0) as sock:
        service = Turnstile(inner, Admission(PACE), clock, metrics)
        server = asyncio.create_task(serve(service, sock, grace_s=1.0))
        yield f"http://{bound(sock)}"
        server.cancel()
        await asyncio.wait({server})


@pytest.fixture
async def http(url: str) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(url) as session:
        yield session


async def statuses(http: aiohttp.ClientSession, method: str, path: str, n: int) -> list[int]:
    answers = [await http.request(method, path, data=b"{}") for _ in range(n)]
    return [answer.status for answer in answers]


def counted(metrics: Metrics, lane: str, result: str) -> float:
    series = f'pdctl_admission_registrations_total{{lane="{lane}",result="{result}"}} '
    (line,) = [line for line in metrics.exposition()[0].decode().splitlines() if line.startswith(series)]
    return float(line.removeprefix(series))


async def test_leased_registrations_beyond_the_pace_are_told_when_to_come_again(
    http: aiohttp.ClientSession, clock: Clock, metrics: Metrics
) -> None:
    assert await statuses(http, "PUT", RANK, 5) == [200, 200, 200, 503, 503]
    for _ in range(20):
        refused = await http.put(RANK, data=b"x" * 100_000)
    assert refused.status == 503
    assert refused.headers["Retry-After"] == "3"  # 22 others have places before, 8 a second
    told = json.loads(await refused.text())["error"]["message"]
    assert told == "registrations are let in at 10 a second and others were before this one: come again in 3 s"
    assert (counted(metrics, "leased", "admitted"), counted(metrics, "leased", "put_off")) == (3, 22)
    clock.forward(3.0)
    assert await statuses(http, "PUT", RANK, 1) == [200]


async def test_stock_clients_renewals_and_look_ups_walk_past_the_herd(
    http: aiohttp.ClientSession, metrics: Metrics
) -> None:
    await statuses(http, "PUT", RANK, 10)
    assert set(await statuses(http, "PUT", "/route", 20)) == {200}
    assert set(await statuses(http, "POST", f"{RANK}/renew", 20)) == {200}
    assert set(await statuses(http, "GET", RANK, 20)) == {200}
    assert set(await statuses(http, "DELETE", RANK, 20)) == {200}
    assert set(await statuses(http, "POST", "/register_dp_rank", 20)) == {200}
    assert counted(metrics, "stock", "admitted") == 20


@pytest.mark.parametrize(
    ("method", "path", "lane"),
    [
        ("PUT", "/route", Lane.STOCK),
        ("POST", "/register", Lane.STOCK),
        ("PUT", "/metadata", Lane.STOCK),
        ("PUT", RANK, Lane.LEASED),
        ("POST", f"{RANK}/renew", None),
        ("POST", f"{RANK}/drain", None),
        ("PUT", f"{RANK}/report", None),
        ("DELETE", RANK, None),
        ("GET", "/route", None),
        ("POST", "/register_dp_rank", None),
        ("POST", "/query", None),
    ],
)
def test_what_a_registration_is(method: str, path: str, lane: Lane | None) -> None:
    assert lane_of(method, path) is lane
