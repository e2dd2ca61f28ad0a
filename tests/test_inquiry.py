"""`pdctl probe` and `pdctl sessions` as an operator meets them: real processes, a real engine on the other side."""

from __future__ import annotations

import asyncio
import json
import socket
from pathlib import Path

import aiohttp
import pytest

from tests.faults.test_links import peers
from tests.service import service
from tests.test_cli import ended
from tests.test_node import fleet


async def test_a_peer_that_works_is_proven_by_data_and_exits_0() -> None:
    with peers(1) as peer:
        status, out, err = await ended("probe", peer.session)
        assert (status, err) == (0, "")
        assert out.startswith(f"{peer.session} works: data (")


async def test_a_handshake_alone_is_no_proof_unless_it_is_all_that_was_asked_for() -> None:
    with peers(1) as peer:
        status, out, _ = await ended("probe", peer.session, "--depth", "handshake")
        assert (status, "works: identity (descriptor compared)" in out) == (0, True)


async def test_nobody_there_exits_1_with_the_cause() -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        session = f"127.0.0.1:{nobody.getsockname()[1]}"
        status, out, _ = await ended("probe", session)
    assert status == 1
    assert out.startswith(f"{session} does not work (refused: ")


async def test_a_stopped_peer_exits_1_within_the_deadline() -> None:
    with peers(1) as peer:
        peer.stop()
        status, out, _ = await ended("probe", peer.session, "--deadline", "0.5")
        assert (status, "does not work (timed out: " in out) == (1, True)


async def test_something_that_is_no_engine_exits_1_and_says_so() -> None:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.read(1 << 16))
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    async with server:
        status, out, _ = await ended("probe", f"127.0.0.1:{server.sockets[0].getsockname()[1]}")
    assert (status, "not an engine" in out) == (1, True)


@pytest.mark.parametrize("session", ["nonsense", "127.0.0.1:99999", "127.0.0.1"])
async def test_what_is_no_session_is_a_usage_error(session: str) -> None:
    status, out, err = await ended("probe", session)
    assert (status, out) == (2, "")
    assert session.rpartition(":")[2] in err


async def test_a_service_that_is_not_there_is_told_from_a_session_that_does_not_work() -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        at = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        for command in (["sessions"], ["probe", "127.0.0.1:1"]):
            status, out, err = await ended(*command, "--at", at)
            assert (status, out) == (69, "")
            assert at in err


async def test_a_services_table_is_listed_asked_and_lifted(tmp_path: Path) -> None:
    with peers(1) as peer, service(tmp_path / "log") as running:
        at = ["--at", running.url]
        assert (await ended("sessions", *at))[:2] == (0, "no session is known there\n")
        async with aiohttp.ClientSession() as http, http.put(f"{running.url}/v1/sessions/{peer.session}") as answer:
            assert answer.status == 200
        status, out, _ = await ended("probe", peer.session, *at)
        assert (status, out.startswith(f"{peer.session} works: identity (descriptor compared), ")) == (0, True)
        peer.stop()
        status, out, _ = await ended("probe", peer.session, *at)
        assert (status, "does not work (timed out: " in out) == (1, True)
        async with (
            aiohttp.ClientSession() as http,
            http.post(f"{running.url}/v1/sessions/{peer.session}/failures", json={"detail": "reset"}) as answer,
        ):
            assert answer.status == 200
        status, out, _ = await ended("sessions", *at, "--state", "blocked")
        assert (status, out.split()[:2]) == (0, [peer.session, "blocked"])
        assert "peer gone (reset)" in out
        status, out, _ = await ended("sessions", *at, "--lift", peer.session, "--json")
        assert (status, json.loads(out)["sessions"][0]["state"]) == (0, "trusted")


async def test_a_prefill_rank_shows_its_own_links() -> None:
    async with fleet() as (_, prefill, _, decode, _):
        prefill.prober.announce(decode.engine.session)
        at = ["--at", prefill.metrics_url.removesuffix("/metrics")]
        status, out, _ = await ended("sessions", *at)
        assert (status, out.split()) == (0, [decode.engine.session, "trusted", "trusted"])
        status, out, _ = await ended("probe", decode.engine.session, *at)
        assert (status, out.startswith(f"{decode.engine.session} works: data (")) == (0, True)
