"""The command line as a person or a pod meets it: real processes, their output, their exit status."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest

SOON_S = 60.0
FIRST_RANK = {"prefill_dp_rank": 0, "prefill_cp_rank": 0, "target_tp_rank": 0, "target_pp_rank": 0}


@asynccontextmanager
async def pdctl(*args: str, **environ: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """`python -m pdctl ...` as a child; killed when the block ends, whatever happened in it."""
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "pdctl", *args),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=os.environ | environ,
    )
    try:
        yield child
    finally:
        if child.returncode is None:
            child.kill()
        await child.communicate()


async def ended(*args: str, **environ: str) -> tuple[int, str, str]:
    """Exit status, standard output, standard error of a command that ends by itself."""
    async with pdctl(*args, **environ) as child:
        out, err = await asyncio.wait_for(child.communicate(), SOON_S)
        assert child.returncode is not None
        return child.returncode, out.decode(), err.decode()


@asynccontextmanager
async def served(*args: str, **environ: str) -> AsyncIterator[tuple[str, asyncio.subprocess.Process]]:
    async with pdctl("serve", "--port", "0", *args, **environ) as child:
        assert child.stdout is not None
        line = (await asyncio.wait_for(child.stdout.readline(), SOON_S)).decode()
        found = re.search(r"serving at (http://\S+)", line)
        assert found, line
        yield found[1], child


async def test_serve_prints_the_address_it_has_bound_and_answers_there() -> None:
    async with served() as (url, _), aiohttp.ClientSession() as http:
        for path in ("/livez", "/readyz", "/metrics", "/docs", "/health"):
            async with http.get(url + path) as answer:
                assert answer.status == 200, path


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT], ids=lambda s: s.name)
async def test_a_signal_ends_the_service_in_order_and_frees_its_port(stop: signal.Signals) -> None:
    async with served() as (url, child):
        child.send_signal(stop)
        await asyncio.wait_for(child.wait(), SOON_S)
        assert child.returncode == {signal.SIGTERM: 0, signal.SIGINT: 130}[stop]
        assert child.stderr is not None
        assert b"Traceback" not in await child.stderr.read()
        with pytest.raises(aiohttp.ClientConnectorError):
            async with aiohttp.ClientSession() as http, http.get(url + "/livez"):
                pass


async def test_work_that_was_cut_short_does_not_pass_for_done() -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        rank = ("register", "--registry", url, "--rank-host", "127.0.0.1", "--rank-port", "40127")
        async with pdctl(*rank) as child:
            assert child.stderr is not None
            await asyncio.wait_for(child.stderr.readline(), SOON_S)  # the first refusal: it is under way
            child.send_signal(signal.SIGTERM)
            assert await asyncio.wait_for(child.wait(), SOON_S) == 143


async def test_a_taken_port_is_an_error_that_names_the_holder() -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        status, _, err = await ended("serve", "--port", str(holder.getsockname()[1]))
    assert status == 69
    assert str(os.getpid()) in err


async def test_a_wrong_setting_starts_nothing_and_exits_2() -> None:
    status, out, err = await ended("serve", "--port", "70000")
    assert (status, out) == (2, "")
    assert "port is 70000" in err
    status, _, err = await ended("serve", PDCTL_PROBE__INTREVAL_S="1")
    assert status == 2
    assert "probe.intreval_s is no setting" in err


async def test_an_agent_without_a_place_for_its_socket_says_how_to_give_one() -> None:
    status, _, err = await ended("agent", XDG_RUNTIME_DIR="", RUNTIME_DIRECTORY="")
    assert status == 2
    assert "give --socket PATH" in err
    status, _, err = await ended("agent", "--socket", "/etc/agent.sock")
    assert status == 2
    assert "is open to others" in err


async def test_register_announces_one_rank_and_ends() -> None:
    async with served() as (url, _), aiohttp.ClientSession() as http:
        status, _, err = await ended(
            *("register", "--registry", url, "--rank-host", "127.0.0.1", "--rank-port", "40123"),
            *("--page-size", "16", "--kv-cache-dtype", "bfloat16"),
        )
        assert status == 0, err
        async with http.get(url + "/route", params=FIRST_RANK) as answer:
            assert await answer.json() == {"rank_ip": "127.0.0.1", "rank_port": 40123}


async def test_register_takes_its_flags_from_the_environment_too() -> None:
    async with served() as (url, _):
        status, _, err = await ended(
            "register",
            PDCTL_NODE__REGISTRY=url,
            PDCTL_RANK__HOST="127.0.0.1",
            PDCTL_RANK__PORT="40124",
        )
        assert status == 0, err


async def test_a_held_registration_heals_a_registry_that_forgot() -> None:
    async with served() as (url, first), aiohttp.ClientSession() as http:
        held = ("register", "--registry", url, "--rank-host", "127.0.0.1", "--rank-port", "40125", "--hold")
        async with pdctl(*held, "--ttl", "0.5", PDCTL_RETRY__FIRST_WAIT_S="0.05"):
            await until_known(http, url)
            first.kill()
            await first.wait()
            port = url.rsplit(":", 1)[1]
            async with pdctl("serve", "--port", port, "--journal", "memory:"):
                await until_known(http, url)


async def test_a_held_registration_is_given_back_at_the_end() -> None:
    async with served() as (url, _), aiohttp.ClientSession() as http:
        rank = ("--rank-host", "127.0.0.1", "--rank-port", "40128", "--instance", "a")
        async with pdctl("register", "--registry", url, *rank, "--hold") as held:
            async with asyncio.timeout(SOON_S):
                assert held.stderr
                while b"event=registered" not in await held.stderr.readline():
                    pass  # the registry knows before the rank does
                assert await alive(http, url, "a")
                held.terminate()
                assert await held.wait() == 0
        assert not await alive(http, url, "a")


async def test_an_unheld_registration_stays_without_a_lease_and_in_its_instance() -> None:
    async with served() as (url, _), aiohttp.ClientSession() as http:
        rank = ("--rank-host", "127.0.0.1", "--rank-port", "40129", "--instance", "a")
        assert (await ended("register", "--registry", url, *rank))[0] == 0
        (row,) = await alive(http, url, "a")
        assert (row["address"], row["ttl_s"]) == ("127.0.0.1:40129", None)


async def alive(http: aiohttp.ClientSession, url: str, instance: str) -> list[dict[str, Any]]:
    async with http.get(f"{url}/v1/instances/{instance}") as answer:
        return list((await answer.json()).get("alive_seats", ()))


async def until_known(http: aiohttp.ClientSession, url: str) -> None:
    async with asyncio.timeout(SOON_S):
        while True:
            try:
                async with http.get(url + "/route", params=FIRST_RANK) as answer:
                    if answer.status == 200:
                        return
            except aiohttp.ClientError:
                await asyncio.sleep(0.02)


async def test_exhaustion_is_never_silent() -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # bound but not listening: refused, and nobody else can take it
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        status, _, err = await ended(
            *("register", "--registry", url, "--rank-host", "127.0.0.1", "--rank-port", "40126", "--max-attempts", "2"),
            PDCTL_RETRY__FIRST_WAIT_S="0.01",
            PDCTL_LOG__FORMAT="json",
        )
    assert status == 69
    warnings = [json.loads(line) for line in err.splitlines() if line.startswith("{")]
    assert "connection refused" in warnings[0]["cause"].lower()


async def test_help_and_version_name_every_command() -> None:
    status, out, _ = await ended("--help")
    assert status == 0
    assert all(command in out for command in ("serve", "register", "demo"))
    assert (await ended("--version"))[1].startswith("pdctl ")
    assert (await ended())[0] == 2
