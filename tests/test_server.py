"""Bound first, served after; a taken port names its holder; cancelled, it drains and goes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager

import aiohttp
import pytest
from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse
from structlog.testing import capture_logs

from pdctl.dialects.edge import read_json
from pdctl.errors import AddressTaken, BadField, ConfigError
from pdctl.metrics import Metrics
from pdctl.server import UNREAD_S, app, bind, bound, listen, serve

LISTENER = """
import socket, sys
s = socket.create_server((sys.argv[1], 0), family=socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET)
print(s.getsockname()[1], flush=True)
sys.stdin.read()
"""


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this host has no IPv6 loopback")


@pytest.fixture
def stranger(request: pytest.FixtureRequest) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Another process that listens at a port of its own, with a secret on its command line."""
    host = getattr(request, "param", "127.0.0.1")
    command = [sys.executable, "-c", LISTENER, host, "--api-key", "s3cret"]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdin is not None
    assert child.stdout is not None
    yield child, int(child.stdout.readline())
    child.stdin.close()
    child.wait(60)
    child.stdout.close()


@asynccontextmanager
async def served(
    *routers: APIRouter, unready: Callable[[], list[str]] = list, host: str = "127.0.0.1", grace_s: float = 1.0
) -> AsyncIterator[tuple[str, asyncio.Task[None]]]:
    with bind(host, 0) as sock:
        server = asyncio.create_task(serve(app(routers, Metrics(), unready), sock, grace_s=grace_s))
        yield f"http://{bound(sock)}", server
        server.cancel()
        await asyncio.wait({server})


async def get(url: str) -> tuple[int, str]:
    async with aiohttp.ClientSession() as session, session.get(url) as answer:
        return answer.status, await answer.text()


def test_a_bound_socket_takes_connections_before_anything_serves() -> None:
    with bind("127.0.0.1", 0) as sock, socket.create_connection(sock.getsockname(), timeout=30):
        assert bound(sock).port > 0


def test_a_socket_that_does_not_listen_yet_refuses_who_comes_too_early() -> None:
    """What queued up until then would be answered as one lump."""
    with bind("127.0.0.1", 0, listens=False) as sock:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(sock.getsockname(), timeout=30)
        listen(sock)
        socket.create_connection(sock.getsockname(), timeout=30).close()


def test_of_two_that_were_bound_alike_the_second_is_told_who_listens() -> None:
    with bind("127.0.0.1", 0, listens=False) as first, bind("127.0.0.1", bound(first).port, listens=False) as second:
        listen(first)
        with pytest.raises(AddressTaken, match=f"{bound(first).port} is taken by pid {os.getpid()} "):
            listen(second)


def test_who_leaves_everything_unread_is_let_go_of_by_the_kernel() -> None:
    """Closing flushes first: nothing else ends the connection of a reader that takes nothing."""
    with bind("127.0.0.1", 0) as sock, socket.create_connection(sock.getsockname(), timeout=30):
        sock.setblocking(True)
        served, _ = sock.accept()
        with served:
            assert served.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == UNREAD_S * 1000


def test_the_port_asked_for_is_the_port_bound() -> None:
    with bind("127.0.0.1", 0) as first:
        port = bound(first).port
    with bind("127.0.0.1", port) as again:
        assert bound(again).port == port


@pytest.mark.parametrize("stranger", ["127.0.0.1", pytest.param("::1", marks=needs_ipv6)], indirect=True)
@pytest.mark.parametrize("host", ["same", pytest.param("every", marks=needs_ipv6)])
def test_a_taken_port_names_its_holder_but_not_its_secrets(
    stranger: tuple[subprocess.Popen[str], int], host: str, request: pytest.FixtureRequest
) -> None:
    child, port = stranger
    theirs = request.node.callspec.params["stranger"]
    where = "::" if host == "every" else theirs
    with pytest.raises(AddressTaken) as taken:
        bind(where, port)
    assert f"pid {child.pid} ({sys.executable})" in str(taken.value)
    assert str(port) in str(taken.value)
    assert "choose another port" in str(taken.value)
    assert "s3cret" not in str(taken.value)


def test_our_own_second_socket_is_told_that_we_hold_the_first() -> None:
    with bind("127.0.0.1", 0) as sock, pytest.raises(AddressTaken, match=f"pid {os.getpid()} "):
        bind("127.0.0.1", bound(sock).port)


@pytest.mark.parametrize("host", ["203.0.113.7", "no-such-host.invalid", "a" * 300, "2001:db8::7"])
def test_an_address_that_is_not_ours_is_a_setting_to_change(host: str) -> None:
    with pytest.raises(ConfigError, match=r"cannot listen at .*: give an address of this host"):
        bind(host, 0)


@needs_ipv6
async def test_ipv6_is_served() -> None:
    async with served(host="::1") as (url, _):
        assert url.startswith("http://[::1]:")
        assert await get(f"{url}/livez") == (200, "OK")


@needs_ipv6
async def test_the_ipv6_wildcard_serves_ipv4_too() -> None:
    async with served(host="::") as (url, _):
        port = url.rpartition(":")[2]
        assert await get(f"http://127.0.0.1:{port}/livez") == (200, "OK")
        assert await get(f"http://[::1]:{port}/livez") == (200, "OK")


async def test_ready_says_why_not() -> None:
    reasons = ["the registry refused us"]
    async with served(unready=lambda: reasons) as (url, _):
        status, body = await get(f"{url}/readyz")
        assert (status, json.loads(body)) == (503, {"ready": False, "reasons": ["the registry refused us"]})
        reasons.clear()
        status, body = await get(f"{url}/readyz")
        assert (status, json.loads(body)) == (200, {"ready": True, "reasons": []})
        assert (await get(f"{url}/livez"))[0] == 200


async def test_metrics_and_docs_are_served() -> None:
    async with served() as (url, _):
        status, body = await get(f"{url}/metrics")
        assert status == 200
        assert "pdctl_registry_rooms 0.0" in body
        assert "swagger" in (await get(f"{url}/docs"))[1]


def failing(error: Exception) -> APIRouter:
    api = APIRouter()

    @api.get("/v1/fail")
    async def fail() -> None:
        raise error

    return api


async def test_an_error_of_the_caller_is_told_in_json_with_its_field() -> None:
    async with served(failing(BadField("page_size", "is 0: give 1 or more"))) as (url, _):
        status, body = await get(f"{url}/v1/fail")
    assert status == 400
    told = {"message": "page_size: is 0: give 1 or more", "field": "page_size", "fix": "give 1 or more"}
    assert json.loads(body) == {"error": told}


@pytest.mark.filterwarnings("default")
async def test_a_bug_is_a_500_without_its_traceback() -> None:
    async with served(failing(ZeroDivisionError("secret detail"))) as (url, _):
        status, body = await get(f"{url}/v1/fail")
    assert status == 500
    assert "secret" not in body
    assert "log" in json.loads(body)["error"]["message"]


async def test_an_unknown_path_is_told_as_aiohttp_tells_it() -> None:
    async with served() as (url, _):
        assert await get(f"{url}/nothing") == (404, "404: Not Found")


def slow() -> tuple[APIRouter, asyncio.Event, asyncio.Event]:
    """A path that says when it was reached and answers when it is let go."""
    api, reached, release = APIRouter(), asyncio.Event(), asyncio.Event()

    @api.get("/slow")
    async def answer() -> PlainTextResponse:
        reached.set()
        await release.wait()
        return PlainTextResponse("done")

    return api, reached, release


async def test_a_request_under_way_is_answered_while_new_ones_are_turned_away() -> None:
    api, reached, release = slow()
    async with served(api, grace_s=60.0) as (url, server):
        asked = asyncio.create_task(get(f"{url}/slow"))
        await reached.wait()
        server.cancel()
        async with asyncio.timeout(60):
            while True:
                try:
                    await get(f"{url}/livez")
                except aiohttp.ClientError:
                    break
        release.set()
        assert await asked == (200, "done")
        await asyncio.wait({server}, timeout=40.0)
        assert server.cancelled()


async def test_a_request_that_does_not_end_is_cut_off_after_the_grace() -> None:
    api, reached, _ = slow()
    async with served(api, grace_s=0.2) as (url, server):
        asked = asyncio.create_task(get(f"{url}/slow"))
        await reached.wait()
        began = time.monotonic()
        server.cancel()
        await asyncio.wait({server}, timeout=40.0)
        assert server.done()
        assert time.monotonic() - began < 20.0
        assert (await asked)[0] == 500


async def test_an_idle_connection_does_not_hold_up_the_end() -> None:
    async with served(grace_s=60.0) as (url, server), aiohttp.ClientSession() as session:
        async with session.get(f"{url}/livez") as answer:
            await answer.read()
        began = time.monotonic()
        server.cancel()
        await asyncio.wait({server}, timeout=40.0)
        assert server.done()
        assert time.monotonic() - began < 20.0


async def test_an_answer_does_not_wait_for_a_delayed_ack() -> None:
    """Headers and body are two segments: with Nagle on, each answer of a kept connection takes 40 ms more. Of several
    rounds the best: a busy machine takes as long now and then, a delayed ack each time."""
    async with served() as (url, _):
        rounds = list[float]()
        while len(rounds) < 10 and min(rounds, default=1.0) >= 0.035:
            rounds.append(await median_answer_s(url))
    assert min(rounds) < 0.035


async def median_answer_s(url: str) -> float:
    took: list[float] = []
    async with aiohttp.ClientSession() as session:
        for _ in range(30):
            began = time.monotonic()
            async with session.get(f"{url}/livez") as answer:
                await answer.read()
            took.append(time.monotonic() - began)
    return statistics.median(took)


async def test_the_port_is_free_when_serving_has_ended() -> None:
    async with served() as (url, server):
        await get(f"{url}/livez")
        server.cancel()
        await asyncio.wait({server})
        bind("127.0.0.1", int(url.rpartition(":")[2])).close()


async def test_cancelled_before_its_first_request_it_ends_at_once() -> None:
    with bind("127.0.0.1", 0) as sock:
        server = asyncio.create_task(serve(app([], Metrics(), list), sock, grace_s=60.0))
        await asyncio.sleep(0)
        server.cancel()
        done, _ = await asyncio.wait({server}, timeout=30.0)
    assert done
    assert server.cancelled()


async def test_signals_stay_with_whoever_has_them() -> None:
    def mine(*_: object) -> None:
        """Ours."""

    before = signal.signal(signal.SIGTERM, mine)
    try:
        async with served() as (url, _):
            await get(f"{url}/livez")
            assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)


async def test_no_server_header_and_no_access_log() -> None:
    with capture_logs() as logs:
        async with served() as (url, _), aiohttp.ClientSession() as session, session.get(f"{url}/livez") as answer:
            assert "Server" not in answer.headers
    assert logs == []


def reading(deadline_s: float) -> APIRouter:
    api = APIRouter()

    @api.put("/v1/body")
    async def body(request: Request) -> PlainTextResponse:
        return PlainTextResponse(str(await read_json(request, 100, deadline_s)))

    return api


async def test_a_body_that_does_not_come_is_given_up(caplog: pytest.LogCaptureFixture) -> None:
    async with served(reading(deadline_s=0.1)) as (url, _):
        host, port = url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"PUT /v1/body HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n[1")
        async with asyncio.timeout(60):
            head = await reader.readuntil(b"\r\n")
        assert b" 408 " in head
        writer.close()
        await writer.wait_closed()


async def test_a_client_that_leaves_in_mid_body_leaves_no_error_behind(caplog: pytest.LogCaptureFixture) -> None:
    async with served(reading(deadline_s=60.0)) as (url, _):
        host, port = url.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"PUT /v1/body HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n[1")
        await writer.drain()
        writer.close()
        await writer.wait_closed()
        assert (await get(f"{url}/livez"))[0] == 200
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
