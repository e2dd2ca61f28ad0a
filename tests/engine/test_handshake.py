"""Mooncake's handshake, asked by us of real engines and of things that only look like one."""

from __future__ import annotations

import asyncio
import json
import struct
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from pdctl.core.layout import Region
from pdctl.engine import handshake
from pdctl.engine.handshake import Kind
from pdctl.errors import Cause
from tests.engine.conftest import registered
from tests.engine.processes import Peers
from tests.engine.test_contract import failure

SOUND = {"name": "10.0.0.9:1", "protocol": "tcp", "tcp_data_host": "10.0.0.9", "tcp_data_port": 4711}


def reply(body: object, kind: int = Kind.METADATA) -> bytes:
    text = bytes([kind]) + (body if isinstance(body, bytes) else json.dumps(body).encode())
    return struct.pack("<Q", len(text)) + text


@asynccontextmanager
async def answering(answer: bytes) -> AsyncIterator[str]:
    """A session where each question gets `answer`, and the connection's end."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(4096)
        writer.write(answer)
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def test_a_real_engine_shows_its_ports_and_regions(peers: Peers) -> None:
    far = peers.take()
    pointer = (await far.ask("register", nbytes=4096))["pointer"]
    found = await handshake.metadata(far.session, deadline_s=30)
    assert registered(found.card) == (Region(pointer, 4096),)
    assert 0 < found.card.data_port < 65536
    await handshake.probe(far.session, deadline_s=30)
    peers.give_back(far)


@pytest.mark.parametrize(
    ("answer", "cause"),
    [
        pytest.param(b"HTTP/1.1 400 Bad Request\r\n\r\n", Cause.NOT_AN_ENGINE, id="http"),
        pytest.param(b"", Cause.PEER_GONE, id="closes at once"),
        pytest.param(struct.pack("<Q", 100) + b"\x01{", Cause.PEER_GONE, id="half an answer"),
        pytest.param(struct.pack("<Q", 0), Cause.NOT_AN_ENGINE, id="empty"),
        pytest.param(struct.pack("<Q", 1 << 60) + b"\x01{}", Cause.NOT_AN_ENGINE, id="claims an exabyte"),
        pytest.param(reply(SOUND, kind=3), Cause.NOT_AN_ENGINE, id="answer to another question"),
        pytest.param(reply(b"{nonsense"), Cause.NOT_AN_ENGINE, id="no json"),
        pytest.param(reply(b"[" * 100_000), Cause.NOT_AN_ENGINE, id="json without a bottom"),
        pytest.param(reply(b"\xff\xfe"), Cause.NOT_AN_ENGINE, id="no text"),
        pytest.param(reply([]), Cause.NOT_AN_ENGINE, id="no object"),
        pytest.param(reply({}), Cause.NOT_AN_ENGINE, id="an echo of the question"),
        pytest.param(reply({**SOUND, "tcp_data_port": 70_000}), Cause.NOT_AN_ENGINE, id="impossible port"),
        pytest.param(reply({**SOUND, "buffers": [7]}), Cause.NOT_AN_ENGINE, id="a buffer that is none"),
        pytest.param(reply({**SOUND, "buffers": [{"addr": -1, "length": 1}]}), Cause.NOT_AN_ENGINE, id="negative"),
        pytest.param(
            reply({**SOUND, "buffers": [{"addr": 1 << 62, "length": 1 << 62}]}), Cause.NOT_AN_ENGINE, id="wraps round"
        ),
    ],
)
async def test_what_is_no_engine_is_called_so(answer: bytes, cause: Cause) -> None:
    async with answering(answer) as session:
        assert (await failure(handshake.metadata(session, deadline_s=30))).cause is cause


@pytest.mark.parametrize("session", ["", "nonsense", ":1", "127.0.0.1:", "127.0.0.1:99999", "::1:5", "a b:5"])
async def test_a_session_that_is_no_address_is_not_even_tried(session: str) -> None:
    error = await failure(handshake.metadata(session, deadline_s=30))
    assert error.cause is Cause.REJECTED_ADDRESS
    assert not error.cause.speaks_of_peer


async def test_a_name_that_nobody_knows_is_refused() -> None:
    assert (await failure(handshake.metadata("no-such-host.invalid:5", deadline_s=30))).cause is Cause.REFUSED


async def test_a_server_that_drips_is_cut_off_at_the_deadline() -> None:
    over = asyncio.Event()

    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for byte in reply(SOUND):
            writer.write(bytes([byte]))
            await asyncio.sleep(0.3)
            if writer.is_closing():
                break
        writer.close()
        over.set()

    async with await asyncio.start_server(drip, "127.0.0.1", 0) as server:
        began = time.monotonic()
        session = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        assert (await failure(handshake.metadata(session, deadline_s=0.3))).cause is Cause.TIMED_OUT
        assert time.monotonic() - began < 15, "all of it takes half a minute"
        await over.wait()


async def test_a_region_at_null_is_left_out_of_card_and_opening() -> None:
    buffers = [{"addr": 0, "length": 9, "name": "x"}, {"addr": 4096, "length": 9, "name": "y"}]
    async with answering(reply({**SOUND, "buffers": buffers})) as session:
        found = await handshake.metadata(session, deadline_s=30)
    assert found.card.regions == (Region(4096, 9),)
    assert json.loads(found.opening)["buffers"] == buffers[1:]


async def test_a_peer_cannot_send_our_bytes_to_another_host() -> None:
    """Its descriptor says 10.0.0.9; who was asked is 127.0.0.1."""
    async with answering(reply(SOUND)) as session:
        assert json.loads((await handshake.metadata(session, deadline_s=30)).opening)["tcp_data_host"] == "127.0.0.1"
