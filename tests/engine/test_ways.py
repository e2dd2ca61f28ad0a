"""Names for one way each, and what is answered to whoever asks under them."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import socket
import struct
from collections.abc import AsyncIterator
from typing import Any

import pytest

from pdctl.engine import handshake
from pdctl.engine.handshake import Kind
from pdctl.engine.ways import Introduction, Serial, n_spellings, spelled
from pdctl.errors import Cause, LimitReached, TransferFailed

SOUND = {
    "name": "127.0.0.1:16001",
    "protocol": "tcp",
    "tcp_data_host": "127.0.0.1",
    "tcp_data_port": 15001,
    "buffers": [{"addr": 4096, "length": 64, "name": "cpu:0"}],
}


def led_to(host: str) -> str:
    return str(socket.getaddrinfo(host, 1, type=socket.SOCK_STREAM)[0][4][0])


@pytest.mark.parametrize("host", ["127.0.0.1", "10.200.3.255", "0.0.0.0", "::1", "fd00:1:22:333:4444::9"])
def test_every_spelling_leads_to_the_same_place(host: str) -> None:
    spellings = [spelled(host, n) for n in (*range(200), 4_095, 65_535, 999_999)]
    assert {led_to(spelling) for spelling in spellings} == {host}


@pytest.mark.parametrize(
    ("host", "count"),
    [("127.0.0.1", 32**4), ("10.200.3.255", 32**4), ("::1", 4**8), ("fd00:1:22:333:4444::9", 4**4 * 3 * 2)],
)
def test_no_two_spellings_are_alike_until_they_come_round(host: str, count: int) -> None:
    some = range(min(count, 20_000))
    assert len({spelled(host, n) for n in some}) == len(some)
    assert n_spellings(host) == count
    assert spelled(host, count) == spelled(host, 0)


def test_no_name_is_given_twice_though_ports_are_free_again() -> None:
    """The engine caches by name for ever: a name given again would lead to the peer that had it before."""
    serial = Serial()
    names = [serial.name("::1", port) for _ in range(1_000) for port in (40_001, 40_002)]
    assert len(set(names)) == 2_000


def test_a_port_whose_names_are_all_given_says_so() -> None:
    serial, host = Serial(), "1111:2222:3333:4444:5555:6666:777:8"
    names = {serial.name(host, 1) for _ in range(n_spellings(host))}
    assert len(names) == 8
    with pytest.raises(LimitReached, match="all 8 names of port 1 at 1111:"):
        serial.name(host, 1)
    assert serial.name(host, 2) not in names


@pytest.fixture
async def introduction() -> AsyncIterator[Introduction]:
    it = await Introduction.listening(json.dumps(SOUND).encode(), "127.0.0.1", Serial())
    yield it
    it.close()


async def test_an_introduction_that_is_cancelled_at_whatever_moment_leaves_no_port_open() -> None:
    """As when the time for a question to a peer runs out just then: each would be open for ever."""
    before = set(os.listdir("/proc/self/fd"))
    for steps in range(8):
        making = asyncio.create_task(Introduction.listening(json.dumps(SOUND).encode(), "127.0.0.1", Serial()))
        for _ in range(steps):
            await asyncio.sleep(0)
        making.cancel()
        await asyncio.wait([making])
        if not making.cancelled():
            making.result().close()
        await asyncio.sleep(0)
        assert set(os.listdir("/proc/self/fd")) <= before, f"after {steps} steps"
    assert not making.cancelled(), "the last one was whole: every moment before it has been tried"


async def asked_of(name: str) -> dict[str, Any]:
    host, port = name.rsplit(":", 1)
    return (await handshake.ask(led_to(host), int(port), Kind.METADATA, {}, deadline_s=30)).body


async def test_each_answer_leads_to_the_same_peer_by_a_name_and_a_spelling_of_its_own(
    introduction: Introduction,
) -> None:
    """The engine keys connections by the text of the host, and retires those of a name whose host has changed."""
    answers = [await asked_of(name) for name in itertools.islice(introduction.names, 20)]
    assert len({answer["tcp_data_host"] for answer in answers}) == 20
    assert {led_to(answer["tcp_data_host"]) for answer in answers} == {"127.0.0.1"}
    assert len({answer["name"] for answer in answers}) == 20
    told = [{**answer, "name": SOUND["name"], "tcp_data_host": SOUND["tcp_data_host"]} for answer in answers]
    assert told == [SOUND] * 20


async def test_an_introduction_waits_for_the_whole_question(introduction: Introduction) -> None:
    host, port = next(introduction.names).rsplit(":", 1)
    reader, writer = await asyncio.open_connection(host, int(port))
    question = struct.pack("<Q", 4) + bytes([Kind.METADATA]) + b"{}\n"
    for part in (question[:5], question[5:10]):
        writer.write(part)
        await writer.drain()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.readexactly(1), 0.05)
    writer.write(question[10:])
    assert struct.unpack("<Q", await reader.readexactly(8))[0] > 4
    writer.close()
    await writer.wait_closed()


async def test_nobody_answers_for_a_life_that_is_not_meant_any_more(introduction: Introduction) -> None:
    name = next(introduction.names)
    introduction.close()
    with pytest.raises(TransferFailed) as caught:
        await asked_of(name)
    assert caught.value.cause is Cause.REFUSED
