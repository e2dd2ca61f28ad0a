"""Ranks that hold their registration while a real `pdctl serve` is killed, stopped, late, or restarted empty."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from random import Random
from typing import Any

import pytest
import structlog

from pdctl.client import RegistryClient
from pdctl.core.address import Endpoint
from pdctl.core.route import Announcement, Seat, Shape
from pdctl.retry import RetryPolicy
from tests.patience import until
from tests.scripted import reserve_port

RANKS = 40
SHAPE = Shape(attn_tp_size=RANKS, attn_cp_size=1, dp_size=1, pp_size=1, page_size=16, kv_cache_dtype="bfloat16")
ROWS = [Announcement(Seat(0, 0, tp, 0), SHAPE, Endpoint(f"10.0.0.{tp}", 40000 + tp)) for tp in range(RANKS)]
QUICK = RetryPolicy(first_wait_s=0.05, max_wait_s=0.4)
EVERY_S = 0.5
DEADLINE_S = 60.0


class Registry:
    """A `pdctl serve` process on one port, through all its lives."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._port = port
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "pdctl", "serve", "--host", "127.0.0.1", "--port", str(self._port), "--journal", "memory:"),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        assert self._process.stdout is not None
        line = await asyncio.wait_for(self._process.stdout.readline(), DEADLINE_S)
        assert line.decode().strip() == f"serving at {self.url}"

    def send(self, what: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(what)

    async def kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.communicate()


@pytest.fixture
def port() -> Iterator[socket.socket]:
    with reserve_port() as sock:
        yield sock


@pytest.fixture
async def registry(port: socket.socket) -> AsyncIterator[Registry]:
    """Not started yet; gone after the test, whatever happened."""
    process = Registry(port.getsockname()[1])
    try:
        yield process
    finally:
        await process.kill()


@pytest.fixture
def lines() -> Iterator[list[Any]]:
    with structlog.testing.capture_logs() as captured:
        yield captured


@contextlib.asynccontextmanager
async def holding(url: str, rows: list[Announcement]) -> AsyncIterator[list[RegistryClient]]:
    """One client for each of `rows`, all holding."""
    async with contextlib.AsyncExitStack() as stack:
        ranks = [
            await stack.enter_async_context(
                RegistryClient(url, policy=QUICK, attempt_timeout_s=1.0, random=Random(seed))
            )
            for seed in range(len(rows))
        ]
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(rank.hold(row, EVERY_S)) for rank, row in zip(ranks, rows, strict=True)]
            yield ranks
            for task in tasks:
                task.cancel()


async def test_a_registry_that_forgets_learns_every_held_rank_again(registry: Registry) -> None:
    await registry.start()
    async with holding(registry.url, ROWS) as ranks, RegistryClient(registry.url) as decode:
        for _life in range(2):
            assert await decode.await_topology(DEADLINE_S) == SHAPE
            assert [await decode.rank(row.seat) for row in ROWS] == [row.address for row in ROWS]
            await until(lambda: all(rank.registered for rank in ranks))
            await registry.kill()
            await until(lambda: not any(rank.registered for rank in ranks))
            await registry.start()
        assert await decode.await_topology(DEADLINE_S) == SHAPE


async def test_ranks_that_start_first_are_all_there_when_the_registry_comes(
    registry: Registry, lines: list[Any]
) -> None:
    async with holding(registry.url, ROWS) as ranks, RegistryClient(registry.url) as decode:
        await until(lambda: len(lines) >= 2 * RANKS)
        assert not any(rank.registered for rank in ranks)
        assert {line["cause"] for line in lines} == {"connection refused"}
        await registry.start()
        assert await decode.await_topology(DEADLINE_S) == SHAPE
        await until(lambda: all(rank.registered for rank in ranks))


async def test_a_stopped_registry_is_a_time_out_and_no_hang(registry: Registry, lines: list[Any]) -> None:
    await registry.start()
    row = replace(ROWS[0], shape=replace(SHAPE, attn_tp_size=1))
    async with holding(registry.url, [row]) as (rank,):
        await until(lambda: rank.registered)
        registry.send(signal.SIGSTOP)
        await until(lambda: not rank.registered)
        assert not await rank.healthy()
        registry.send(signal.SIGCONT)
        await until(lambda: rank.registered)
    assert {line["cause"] for line in lines if line["log_level"] == "warning"} == {"timed out after 1 s"}


async def test_a_rank_that_moved_is_found_where_it_is_now(registry: Registry) -> None:
    """A restarted prefill rank takes its seat again from another address; nobody has to restart for it."""
    await registry.start()
    row = replace(ROWS[0], shape=replace(SHAPE, attn_tp_size=1))
    moved = replace(row, address=Endpoint("10.0.9.9", 41000))
    async with RegistryClient(registry.url) as decode:
        async with holding(registry.url, [row]):
            await decode.await_topology(DEADLINE_S)
            assert await decode.rank(row.seat) == row.address
        async with holding(registry.url, [moved]) as (rank,):
            await until(lambda: rank.registered)
            assert await decode.rank(row.seat) == moved.address
