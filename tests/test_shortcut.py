"""The short way gives the same answers as the usual one, in order, and leaves all that is unusual to it."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

import pytest
import uvloop
from starlette.types import Receive, Scope, Send

from pdctl.server import bind, bound, serve
from pdctl.shortcut import Answer, Answered, Beside, Promise, at_once_of, nothing_at_once


def said(text: str) -> Answer:
    body = text.encode()
    return Answer(200, [(b"content-length", b"%d" % len(body)), (b"content-type", b"text/plain")], body)


class App:
    """Says which way a request came, what it asked and what came with it; `/later` when it is let go."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.let_go = asyncio.Event()
        self.tasks = set[asyncio.Task[None]]()

    def at_once(self, scope: Scope, body: bytes) -> Answered:
        if scope["path"] == "/usual":
            return None
        if scope["path"] == "/defect":
            raise ZeroDivisionError("secret")
        if scope["path"].startswith("/later"):
            return self._later(scope)
        if scope["path"] == "/kept":
            kept = Promise()
            kept.keep(said("kept"))
            return kept
        return said(f"short {told(scope, body)}")

    def _later(self, scope: Scope) -> Promise:
        promise = Promise()
        task = asyncio.create_task(self._keep(promise, scope["path"]))
        self.tasks.add(task)
        return promise

    async def _keep(self, promise: Promise, path: str) -> None:
        self.asked.set()
        await self.let_go.wait()
        ends = {"/later/defect": ZeroDivisionError("secret"), "/later/never": asyncio.CancelledError()}
        promise.keep(ends.get(path) or said("later"))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        await said(f"usual {told(scope, body)}").send(send)


def told(scope: Scope, body: bytes) -> str:
    return f"{scope['method']} {scope['path']} {scope['query_string'].decode()} {len(body)}"


@asynccontextmanager
async def served(app: App, grace_s: float = 5.0) -> AsyncIterator[tuple[int, asyncio.Task[None]]]:
    with bind("127.0.0.1", 0) as sock:
        server = asyncio.create_task(serve(app, sock, grace_s=grace_s))
        yield bound(sock).port, server
        server.cancel()
        await asyncio.wait({server})


async def talk(port: int, pieces: Iterable[bytes], n_answers: int = 1) -> list[tuple[int, str, bytes]]:
    """Status, body and head of each answer; every piece in a segment of its own."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for piece in pieces:
        writer.write(piece)
        await writer.drain()
        await asyncio.sleep(0.02)
    async with asyncio.timeout(60):
        answers = [await read(reader) for _ in range(n_answers)]
    writer.close()
    await writer.wait_closed()
    return answers


async def read(reader: asyncio.StreamReader) -> tuple[int, str, bytes]:
    head = await reader.readuntil(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head)
    assert length is not None
    body = await reader.readexactly(int(length[1]))
    return int(head.split()[1]), body.decode(), head


def asking(method: str, target: str, body: bytes = b"", more: str = "", version: str = "1.1") -> bytes:
    length = f"Content-Length: {len(body)}\r\n" if body else ""
    return f"{method} {target} HTTP/{version}\r\nHost: x\r\n{length}{more}\r\n".encode() + body


@pytest.mark.parametrize("method", ["GET", "PUT", "POST", "DELETE"])
async def test_a_request_that_has_come_whole_is_answered_at_once(method: str) -> None:
    async with served(App()) as (port, _):
        ((status, body, head),) = await talk(port, [asking(method, "/route?a=1&b=", b"12345")])
    assert (status, body) == (200, f"short {method} /route a=1&b= 5")
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert head.count(b"date: ") == 1


@pytest.mark.parametrize(
    "pieces",
    [
        [asking("GET", "/usual")],
        [asking("GET", "/a%20b")],
        [asking("GET", "http://x/route")],
        [asking("PATCH", "/route")],
        [asking("GET", "/route", more="Connection: close\r\n")],
        [asking("GET", "/route", version="1.0")],
        [asking("POST", "/route", b"1234")[:-2], b"34"],
        [b"POST /route HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n12\r\n", b"0\r\n\r\n"],
    ],
    ids=["declined", "escaped", "absolute", "method", "close", "HTTP/1.0", "body in pieces", "chunks in pieces"],
)
async def test_what_is_unusual_goes_the_usual_way(pieces: list[bytes]) -> None:
    async with served(App()) as (port, _):
        ((status, body, _),) = await talk(port, pieces)
    assert status == 200
    assert body.startswith("usual ")


async def test_a_head_in_pieces_and_a_whole_body_in_chunks_are_whole() -> None:
    whole = asking("POST", "/route", b"1234")
    chunked = b"POST /route HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n12\r\n2\r\n34\r\n0\r\n\r\n"
    async with served(App()) as (port, _):
        answers = await talk(port, [whole[:9], whole[9:], chunked], n_answers=2)
    assert [body for _, body, _ in answers] == ["short POST /route  4"] * 2


async def test_a_client_that_expects_a_continue_gets_one() -> None:
    async with served(App()) as (port, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(asking("PUT", "/route", b"1234", more="Expect: 100-continue\r\n")[:-4])
        async with asyncio.timeout(60):
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100 ")
            writer.write(b"1234")
            assert (await read(reader))[1] == "usual PUT /route  4"
        writer.close()
        await writer.wait_closed()


async def test_pipelined_questions_are_answered_in_their_order_whichever_way_they_go() -> None:
    app = App()
    targets = ["/a", "/usual", "/b", "/later", "/c", "/usual", "/later", "/d"]
    async with served(app) as (port, _):
        app.let_go.set()
        answers = await talk(port, [b"".join(asking("GET", target) for target in targets)], len(targets))
    assert [body.split()[2] if " " in body else "/later" for _, body, _ in answers] == targets


async def test_who_waits_behind_an_answer_that_is_awaited_is_answered_after_it() -> None:
    app = App()
    async with served(app) as (port, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(asking("PUT", "/later"))
        await app.asked.wait()
        writer.write(asking("GET", "/after"))
        await asyncio.sleep(0.05)
        app.let_go.set()
        async with asyncio.timeout(60):
            assert [(await read(reader))[1].split()[0] for _ in range(2)] == ["later", "usual"]
            writer.write(asking("GET", "/then"))
            assert (await read(reader))[1] == "short GET /then  0"
        writer.close()
        await writer.wait_closed()


@pytest.mark.parametrize("target", ["/defect", "/later/defect"])
async def test_a_defect_is_a_500_that_tells_nothing_and_the_connection_goes_on(
    target: str, caplog: pytest.LogCaptureFixture
) -> None:
    app = App()
    app.let_go.set()
    async with served(app) as (port, _):
        answers = await talk(port, [asking("GET", target), asking("GET", "/after")], 2)
    assert [(status, body) for status, body, _ in answers] == [
        (500, "Internal Server Error"),
        (200, "short GET /after  0"),
    ]
    assert "ZeroDivisionError" in caplog.text


async def test_an_answer_under_way_is_given_when_the_service_stops_and_the_connection_ends() -> None:
    app = App()
    async with served(app) as (port, server):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(asking("PUT", "/later"))
        await app.asked.wait()
        server.cancel()
        await asyncio.sleep(0.3)
        app.let_go.set()
        async with asyncio.timeout(60):
            status, body, head = await read(reader)
            assert (status, body) == (200, "later")
            assert b"connection: close\r\n" in head
            assert await reader.read() == b""
        writer.close()
        await writer.wait_closed()


async def test_a_promise_that_is_kept_before_anybody_hears_is_answered() -> None:
    async with served(App()) as (port, _):
        answers = await talk(port, [asking("PUT", "/kept") * 2 + asking("GET", "/after")], 3)
    assert [body.split()[0] for _, body, _ in answers] == ["kept", "kept", "short"]


async def test_a_promise_that_is_given_up_ends_its_connection_and_no_other() -> None:
    app = App()
    async with served(app) as (port, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(asking("PUT", "/later/never"))
        await app.asked.wait()
        app.let_go.set()
        async with asyncio.timeout(60):
            assert await reader.read() == b""
        assert (await talk(port, [asking("GET", "/after")]))[0][0] == 200
        writer.close()
        await writer.wait_closed()


async def test_a_promise_can_be_awaited_before_it_is_kept_and_after() -> None:
    promise, broken = Promise(), Promise()
    waiter, gone = asyncio.ensure_future(promise), asyncio.ensure_future(broken)
    await asyncio.sleep(0)
    promise.keep(answer := said("later"))
    broken.keep(ZeroDivisionError())
    assert (await waiter, await promise) == (answer, answer)
    for each in (gone, broken):
        with pytest.raises(ZeroDivisionError):
            await each


async def test_who_leaves_while_the_answer_is_awaited_leaves_no_error_behind(caplog: pytest.LogCaptureFixture) -> None:
    app = App()
    async with served(app) as (port, _):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(asking("PUT", "/later"))
        await app.asked.wait()
        writer.close()
        await writer.wait_closed()
        await asyncio.sleep(0.05)
        app.let_go.set()
        assert (await talk(port, [asking("GET", "/after")]))[0][0] == 200
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_who_asks_without_end_and_reads_nothing_is_not_answered_without_end() -> None:
    """Under uvloop, which the service runs on: its transports keep what the socket does not take."""

    async def flood() -> int:
        answered = 0

        class Counting(App):
            def at_once(self, scope: Scope, body: bytes) -> Answered:
                nonlocal answered
                answered += 1
                return said("x" * 4096)

        async with served(Counting(), grace_s=0.1) as (port, _):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            for _ in range(200):
                writer.write(asking("GET", "/") * 1000)
                try:
                    await asyncio.wait_for(writer.drain(), 0.05)
                except TimeoutError:
                    break
            await asyncio.sleep(0.2)
            writer.transport.abort()
        return answered

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(flood()) < 20_000  # 80 MB were asked for


def test_an_app_without_a_short_way_has_one_that_leads_nowhere() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None: ...

    assert at_once_of(app) is nothing_at_once
    assert at_once_of(Beside(app, nothing_at_once)) is nothing_at_once
