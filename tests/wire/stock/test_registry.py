"""Stock ranks and clients of SGLang 0.5.23, the real classes in a process of their own, against our registry."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator

import pytest

from pdctl.dialects import sglang
from pdctl.metrics import Metrics
from pdctl.registrar import Registrar
from pdctl.server import app, bind, bound, serve
from tests.wire.stock.conftest import Stock


@pytest.fixture
def address(registry_url: str) -> str:
    return registry_url.removeprefix("http://")


def is_ready(registrar: Registrar) -> bool:
    view = registrar.view("default")
    return view is not None and view.ready


async def four_ranks(stock: Stock, address: str) -> AsyncIterator[tuple[int, int]]:
    """TP 2 x DP 2, announcing themselves one after the other."""
    for dp in range(2):
        for tp in range(2):
            await stock(
                "rank", name=f"p{dp}{tp}", role="prefill", registry=address,
                attn_tp_size=2, attn_tp_rank=tp, attn_dp_size=2, attn_dp_rank=dp, num_dp_ranks=2,
                load_balance_method="round_robin",
            )  # fmt: skip
            yield dp, tp


async def decode_rank(stock: Stock, address: str, **parallel: int) -> None:
    await stock("rank", name="d", role="decode", registry=address, **parallel)


async def test_four_stock_ranks_are_ready_with_the_fourth(stock: Stock, address: str, registrar: Registrar) -> None:
    was_ready = [is_ready(registrar) async for _ in four_ranks(stock, address)]
    assert was_ready == [False, False, False, True]


async def test_one_stock_rank_four_times_is_not_four(stock: Stock, address: str, registrar: Registrar) -> None:
    for name in ("a", "b", "c", "d"):
        await stock("rank", name=name, role="prefill", registry=address, attn_tp_size=2, attn_tp_rank=0)
    view = registrar.view("default")
    assert view is not None
    assert not view.ready
    assert [str(seat) for seat in view.missing] == ["dp0/cp0/tp1/pp0"]


async def test_a_stock_decode_knows_the_instance_only_when_it_is_complete(stock: Stock, address: str) -> None:
    await decode_rank(stock, address, attn_tp_size=2, attn_tp_rank=1)
    assert await stock("topology", name="d", address=address) is None
    async for _ in four_ranks(stock, address):
        pass
    known = await stock("topology", name="d", address=address)
    assert (known["attn_tp_size"], known["dp_size"], known["page_size"]) == (2, 2, 16)
    assert known["follow_bootstrap_room"] is False
    assert (known["target_tp_ranks"], known["required_prefill_response_num"]) == ([1], 1)


async def test_a_stock_decode_finds_every_rank_where_it_listens(stock: Stock, address: str) -> None:
    await decode_rank(stock, address)
    assert await stock("lookup", name="d", address=address, dp=0, cp=0, tp=0, pp=0) is None
    async for _ in four_ranks(stock, address):
        pass
    found = [await stock("lookup", name="d", address=address, dp=d, cp=0, tp=t, pp=0) for d in (0, 1) for t in (0, 1)]
    assert {each["rank_ip"] for each in found} == {"127.0.0.1"}
    assert len({each["rank_port"] for each in found}) == 4
    assert await stock("lookup", name="d", address=address, dp=2, cp=0, tp=0, pp=0) is None


async def test_a_stock_decode_refuses_a_prefill_with_other_pages(stock: Stock, address: str) -> None:
    """The value that we pass on is the one that stock compares: its own refusal comes."""
    await decode_rank(stock, address)
    await stock("rank", name="p", role="prefill", registry=address)
    await stock("change_args", name="d", page_size=64)
    with pytest.raises(RuntimeError, match="page_size=16"):
        await stock("topology", name="d", address=address)


async def test_a_room_that_a_stock_sender_announces_is_found_by_a_stock_decode(stock: Stock, address: str) -> None:
    async for _ in four_ranks(stock, address):
        pass
    room = 2**62 + 1
    await stock("open_sender", name="p10", room=room, address=address, pages=1, row=0)
    assert await stock("query_rooms", address=address, rooms=[room, 5]) == {str(room): 1}


class Server:
    """The registry of the fixtures behind a server that this test can end and start again at one address."""

    def __init__(self, registrar: Registrar, metrics: Metrics) -> None:
        self.service = app([sglang.router(registrar)], metrics, unready=list)
        self.port = 0
        self.task: asyncio.Task[None] | None = None

    def start(self) -> str:
        sock = bind("127.0.0.1", self.port)
        self.port = bound(sock).port
        self.task = asyncio.create_task(serve(self.service, sock, grace_s=0.1))
        return f"127.0.0.1:{self.port}"

    async def end(self) -> None:
        if self.task is not None:
            self.task.cancel()
            await asyncio.wait({self.task})


@pytest.fixture
async def server(registrar: Registrar, metrics: Metrics) -> AsyncIterator[Server]:
    one = Server(registrar, metrics)
    yield one
    await one.end()


async def test_a_stock_heartbeat_hears_us_and_gives_up_when_we_are_gone(stock: Stock, server: Server) -> None:
    address = server.start()
    await stock("rank", name="p", role="prefill", registry=address)
    await decode_rank(stock, address)
    assert await stock("topology", name="d", address=address) is not None
    alive = await stock("beats", name="d", address=address, until="alive")
    assert alive == {"known": [address], "misses": {address: 0}}
    await server.end()
    gone = await stock("beats", name="d", address=address, until="gone")
    assert gone["known"] == []


def bound_and_free() -> int:
    with bind("127.0.0.1", 0) as sock:
        return bound(sock).port


async def refuse_one(port: int) -> None:
    """Take one connection at `port` and drop it, as a registry that is just going down."""
    dropped = asyncio.Event()

    async def drop(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()
        dropped.set()

    async with await asyncio.start_server(drop, "127.0.0.1", port):
        await asyncio.wait_for(dropped.wait(), 60)


async def test_a_stock_rank_registers_once_the_registry_is_up(stock: Stock, server: Server) -> None:
    """Stock tries five times in about 12 s; a registry that comes up meanwhile is found."""
    server.port = bound_and_free()
    address = f"127.0.0.1:{server.port}"
    registering = asyncio.create_task(stock("rank", name="p", role="prefill", registry=address))
    await refuse_one(server.port)
    server.start()
    await registering
    await decode_rank(stock, address)
    assert await stock("topology", name="d", address=address) is not None


async def serving(process: asyncio.subprocess.Process) -> str:
    """The address that `pdctl serve` prints when it is bound."""
    assert process.stdout is not None
    line = (await asyncio.wait_for(process.stdout.readline(), 60)).decode()
    assert line.startswith("serving at http://"), line
    return line.split("http://")[1].strip().rstrip("/")


async def test_stock_ranks_find_each_other_through_pdctl_serve(stock: Stock) -> None:
    command = (sys.executable, "-m", "pdctl", "serve", "--host", "127.0.0.1", "--port", "0")
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    try:
        address = await serving(process)
        async for _ in four_ranks(stock, address):
            pass
        await decode_rank(stock, address, attn_tp_size=2)
        assert (await stock("topology", name="d", address=address))["dp_size"] == 2
        found = await stock("lookup", name="d", address=address, dp=1, cp=0, tp=1, pp=0)
        assert found["rank_ip"] == "127.0.0.1"
        process.terminate()
        assert await asyncio.wait_for(process.wait(), 60) == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
