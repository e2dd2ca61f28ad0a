"""
Whose registry a stock prefill uses where pdctl holds its bootstrap port: what the sidecar of deploy/ rests on.

The service is started by SGLang's own `start_disagg_service`, as a prefill's tokenizer process starts it; then ranks of
that prefill register. Each row of the table in docs/sglang.md is a test here.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from pdctl.dialects import sglang
from pdctl.errors import AddressTaken
from pdctl.metrics import Metrics
from pdctl.registrar import Registrar
from pdctl.server import app, bind, bound, serve
from tests.wire.stock.conftest import Stock

TAKEN, SERVES = "address already in use", "started successfully"


@asynccontextmanager
async def ours(host: str, registrar: Registrar, port: int = 0) -> AsyncIterator[int]:
    """Our registry at `host`; the port that it has."""
    sock = bind(host, port)
    task = asyncio.create_task(serve(app([sglang.router(registrar)], Metrics(), unready=list), sock, grace_s=0.1))
    try:
        yield bound(sock).port
    finally:
        task.cancel()
        await asyncio.wait({task})


async def two_ranks(stock: Stock, host: str, port: int) -> None:
    """TP 2, which register where stock looks for their registry: at the API's host, or loopback for a wildcard."""
    at = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    for tp in range(2):
        await stock("rank", name=f"p{tp}", role="prefill", registry=at, attn_tp_size=2, attn_tp_rank=tp)


def is_ready(registrar: Registrar) -> bool:
    view = registrar.view("default")
    return view is not None and view.ready


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")


@pytest.mark.parametrize(
    ("our_host", "engine_host"),
    [
        pytest.param("0.0.0.0", "0.0.0.0", id="both everywhere"),
        pytest.param("0.0.0.0", "127.0.0.1", id="ours everywhere, the engine at one address"),
        pytest.param("127.0.0.1", "0.0.0.0", id="ours on loopback, the engine everywhere"),
        pytest.param("::", "0.0.0.0", id="ours with both families, the engine with IPv4", marks=needs_ipv6),
        pytest.param("::", "::", id="both with IPv6", marks=needs_ipv6),
    ],
)
async def test_a_stock_prefill_that_finds_its_port_taken_goes_on_and_registers_with_us(
    stock: Stock, registrar: Registrar, our_host: str, engine_host: str
) -> None:
    async with ours(our_host, registrar) as port:
        came_of_it = await stock("serve", host=engine_host, port=port)
        assert TAKEN in came_of_it["said"]
        assert not await stock("serves")
        await two_ranks(stock, engine_host, port)
    assert is_ready(registrar)


@pytest.mark.parametrize(
    ("our_host", "engine_host"),
    [
        pytest.param("127.0.0.1", "127.0.0.2", id="the engine at another address"),
        pytest.param("0.0.0.0", "::", id="ours with IPv4, the engine with IPv6", marks=needs_ipv6),
    ],
)
async def test_a_stock_prefill_at_another_address_serves_itself_and_we_hear_nothing(
    stock: Stock, registrar: Registrar, our_host: str, engine_host: str
) -> None:
    """The trap: nothing fails, nothing is logged, and everything that pdctl is for is not there."""
    async with ours(our_host, registrar) as port:
        came_of_it = await stock("serve", host=engine_host, port=port)
        assert SERVES in came_of_it["said"]
        await two_ranks(stock, engine_host, port)
    assert registrar.view("default") is None


async def test_a_stock_prefill_that_was_first_keeps_the_port_and_we_say_who_has_it(stock: Stock) -> None:
    with bind("0.0.0.0", 0) as sock:
        port = bound(sock).port
    assert SERVES in (await stock("serve", host="0.0.0.0", port=port))["said"]
    with pytest.raises(AddressTaken, match=r"pid \d+"):
        bind("0.0.0.0", port)


async def test_a_stock_prefill_does_not_take_the_port_while_we_restart(stock: Stock, registrar: Registrar) -> None:
    """Its service has ended for good: who comes back to the port finds it free, and still has the ranks."""
    async with ours("0.0.0.0", registrar) as port:
        await stock("serve", host="0.0.0.0", port=port)
        await two_ranks(stock, "0.0.0.0", port)
    assert not await stock("serves")
    async with ours("0.0.0.0", registrar, port) as again:
        assert again == port
        await stock("rank", name="d", role="decode", registry=f"127.0.0.1:{port}", attn_tp_size=2)
        assert await stock("topology", name="d", address=f"127.0.0.1:{port}") is not None
