"""The agent's client as whoever listens at its socket sees it: which connections it keeps, what it makes of them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from pdctl.agent import _body
from pdctl.agent_client import AgentClient, AgentReceiver, AgentSender, _Stream
from pdctl.errors import CallerError, RoomFailed, Unreachable
from tests.patience import until

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
ANSWER = b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 10\r\n\r\n{"free":1}'


@asynccontextmanager
async def listening(at: Path, serve: Serve) -> AsyncIterator[AgentClient]:
    async with await asyncio.start_unix_server(serve, at / "sock"), AgentClient(at / "sock") as client:
        yield client


async def heard(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    return head + await reader.readexactly(int(head.split(b"Content-Length: ")[1].split(b"\r\n")[0]))


async def test_questions_one_after_another_go_by_one_connection_and_at_once_by_several(tmp_path: Path) -> None:
    connections: list[list[bytes]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(said := [])
        while not reader.at_eof():
            said.append(await heard(reader))
            writer.write(ANSWER)
            if len(said) == 3:
                break
        writer.close()

    async with listening(tmp_path, serve) as client:
        for _ in range(2):
            assert await client.ask("POST", "/v1/sending/7", {"ticket": 1}) == {"free": 1}
        assert len(connections) == 1
        assert connections[0][0].endswith(b'\r\n\r\n{"ticket": 1}')
        await asyncio.gather(*(client.ask("DELETE", "/v1/sending/7", ticket=n) for n in (1, 2)))
        assert len(connections) == 2, "one of them was idle"
        assert connections[1][0].startswith(b"DELETE /v1/sending/7?ticket=2 HTTP/1.1\r\n")
        await client.ask("GET", "/v1/rank")
        await client.ask("GET", "/v1/rank")


async def test_a_connection_that_was_ended_while_it_was_idle_is_not_used(tmp_path: Path) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await heard(reader)
        writer.write(ANSWER)
        writer.close()
        await writer.wait_closed()
        ended.set()

    async with listening(tmp_path, serve) as client:
        for _ in range(3):
            ended = asyncio.Event()
            assert await client.ask("GET", "/v1/rank") == {"free": 1}
            await ended.wait()
            await asyncio.sleep(0.01)


async def test_a_cancelled_question_ends_its_connection(tmp_path: Path) -> None:
    asked, ended = asyncio.Event(), asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await heard(reader)
        asked.set()
        assert await reader.read() == b""
        ended.set()
        writer.close()

    async with listening(tmp_path, serve) as client:
        asking = asyncio.create_task(client.ask("GET", "/v1/rank"))
        await asked.wait()
        asking.cancel()
        await asyncio.wait_for(ended.wait(), 60)
        with pytest.raises(asyncio.CancelledError):
            await asking


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200 OK\r\n\r\n", b"SSH-2.0\r\n\r\n", ANSWER[:-3]])
async def test_what_is_no_answer_is_unreachable(tmp_path: Path, answer: bytes) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await heard(reader)
        writer.write(answer)
        writer.close()

    async with listening(tmp_path, serve) as client:
        with pytest.raises(Unreachable, match="start pdctl agent"):
            await client.ask("GET", "/v1/rank")


@pytest.mark.parametrize("is_permanent", [False, True])
async def test_a_room_that_failed_is_told_with_whether_another_could_go_better(
    tmp_path: Path, is_permanent: bool
) -> None:
    body = json.dumps(_body(RoomFailed(5, "no fit", is_permanent=is_permanent))).encode()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await heard(reader)
        writer.write(b"HTTP/1.1 424 Failed Dependency\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        writer.close()

    async with listening(tmp_path, serve) as client:
        with pytest.raises(RoomFailed, match="room 5 failed: no fit") as failed:
            await client.ask("POST", "/v1/sending/5")
    assert (failed.value.room, failed.value.reason, failed.value.is_permanent) == (5, "no fit", is_permanent)


async def test_pages_of_a_room_whose_answer_is_lost_are_asked_after(tmp_path: Path) -> None:
    heard_of: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard_of.append((await heard(reader)).split(b" HTTP")[0])
        if heard_of[-1].startswith(b"DELETE"):
            writer.write(ANSWER.replace(b'10\r\n\r\n{"free":1}', b'13\r\n\r\n{"free":true}'))
        writer.close()

    async with listening(tmp_path, serve) as client:
        freed: list[int] = []
        card = {"session": "s", "metrics_url": "", "agent_pid": 1}
        rank = AgentReceiver(client, _Stream(None, card))  # type: ignore[arg-type]
        with pytest.raises(Unreachable):
            await rank.receive(5, [3, 4], 0, release=lambda pages: freed.extend(pages.tolist()))
        await until(lambda: bool(freed))
    assert heard_of == [b"POST /v1/receiving/5", b"DELETE /v1/receiving/5?ticket=1"]
    assert freed == [3, 4]


async def test_who_does_not_answer_after_that_holds_nobody_up(tmp_path: Path) -> None:
    """The heir of an agent that has ended takes a connection long before it answers."""
    asked, ended = list[bytes](), list[bytes]()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(said := await heard(reader))
        if said.startswith(b"DELETE"):
            await reader.read()
        writer.close()
        await writer.wait_closed()
        ended.append(said)

    async with asyncio.timeout(60), listening(tmp_path, serve) as client:
        rank = AgentSender(client, _Stream(None, {"session": "s", "metrics_url": "", "agent_pid": 1}))  # type: ignore[arg-type]
        with pytest.raises(Unreachable):
            await rank.send(5, [3])
        assert len(asked) == 1, "it was told before anybody was asked"
        with pytest.raises(Unreachable):
            async with rank.room(6) as room:
                await room.peers_ready()
        await until(lambda: len(asked) == 4)
    assert not client.asking
    await until(lambda: len(ended) == 4)


async def test_nobody_there_and_not_open_are_said(tmp_path: Path) -> None:
    client = AgentClient(tmp_path / "nobody")
    with pytest.raises(CallerError, match="not open"):
        await client.ask("GET", "/v1/rank")
    async with client:
        with pytest.raises(Unreachable, match="start pdctl agent"):
            await client.ask("GET", "/v1/rank")
