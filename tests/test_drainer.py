"""The drain of a stock engine, which says nothing by itself: against `pdctl serve`, and an engine that is asked."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from pdctl.core.address import Endpoint
from pdctl.core.route import Announcement, Seat, Shape
from tests.core.test_draining import body, load
from tests.service import Service, service
from tests.small_server import listening

SHAPE = Shape(attn_tp_size=1, attn_cp_size=1, dp_size=1, pp_size=1, page_size=16, kv_cache_dtype="bfloat16")
QUICK = {"PDCTL_DRAIN__EVERY_S": "0.1", "PDCTL_DRAIN__QUIET_S": "0.6", "PDCTL_DRAIN__DEADLINE_S": "2.0"}
SOON_S = 60.0
A_WHILE_S = 2.0
"""Of three quiet times and more."""


class Engine:
    """A stock engine's API: what it says of its load, which goes on being made unless it hangs."""

    def __init__(self) -> None:
        self.port = 0
        self.busy: dict[int, int] = {0: 0}
        self.status = 200
        self.hangs = False
        self.made_at: float | None = None
        self.asked = 0

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        assert request.path == "/v1/loads"
        self.asked += 1
        if self.hangs:
            await asyncio.sleep(60.0)
        at = self.made_at or time.time()
        rows = [load(dp, at, num_running_reqs=n) for dp, n in self.busy.items()]
        return web.json_response(body(*rows), status=self.status)


@pytest.fixture
async def engine() -> AsyncIterator[Engine]:
    made = Engine()
    server = web.Server(made.answer, handler_cancellation=True)
    async with listening(web.ServerRunner(server, shutdown_timeout=0.1)) as url:
        made.port = int(url.rpartition(":")[2])
        yield made


@contextmanager
def serving(tmp_path: Path, *args: str, name: str = "log", **more: str) -> Iterator[Service]:
    asked = {"PDCTL_DRAIN__LOADS_URL": "http://{host}:{http_port}/v1/loads", **QUICK, **more}
    with service(tmp_path / name, *args, **asked) as running:
        yield running


class Operator:
    def __init__(self, url: str, http: aiohttp.ClientSession) -> None:
        self.url = url
        self._http = http

    async def register(self, engine: Engine, shape: Shape = SHAPE) -> None:
        """As a stock prefill does, on SGLang's wire."""
        for dp in range(shape.dp_size):
            row = Announcement(Seat(dp, 0, 0, 0), shape, Endpoint("127.0.0.1", 40000 + dp), engine.port)
            async with self._http.put(f"{self.url}/route", json=row.to_body()) as answer:
                assert answer.status == 200, await answer.text()

    async def drain(self, below: str = "", grace_s: float = 300.0) -> None:
        url = f"{self.url}/v1/instances/default{below}/drain"
        async with self._http.post(url, json={"grace_s": grace_s}) as answer:
            assert answer.status == 200, await answer.text()

    async def alive(self) -> int:
        async with self._http.get(f"{self.url}/v1/instances/default") as answer:
            return int((await answer.json())["alive"])

    async def until_alive(self, n: int) -> None:
        async with asyncio.timeout(SOON_S):
            while await self.alive() != n:  # noqa: ASYNC110  another process, which can only be looked at
                await asyncio.sleep(0.05)


@asynccontextmanager
async def operator(running: Service) -> AsyncIterator[Operator]:
    async with aiohttp.ClientSession() as http:
        yield Operator(running.url, http)


async def test_a_drained_engine_is_gone_when_it_has_nothing_under_way_and_not_before(
    tmp_path: Path, engine: Engine
) -> None:
    with serving(tmp_path) as running:
        async with operator(running) as it:
            await it.register(engine)
            engine.busy = {0: 3}
            await it.drain()
            await asyncio.sleep(A_WHILE_S)
            assert await it.alive() == 1
            engine.busy = {0: 0}
            await it.until_alive(0)
        assert "its engine has nothing under way" in running.log()
        assert running.complaints() == []


async def test_nobody_is_asked_who_does_not_drain(tmp_path: Path, engine: Engine) -> None:
    with serving(tmp_path) as running:
        async with operator(running) as it:
            await it.register(engine)
            await asyncio.sleep(0.5)
            assert (engine.asked, await it.alive()) == (0, 1)


@pytest.mark.parametrize("trouble", ["fails", "hangs", "stands still", "is gone"])
async def test_an_engine_that_does_not_say_keeps_its_grace(tmp_path: Path, engine: Engine, trouble: str) -> None:
    engine.status = 503 if trouble == "fails" else 200
    engine.hangs = trouble == "hangs"
    engine.made_at = 5.0 if trouble == "stands still" else None
    with serving(tmp_path) as running:
        async with operator(running) as it:
            if trouble == "is gone":
                engine.port = 1
            await it.register(engine)
            started = time.monotonic()
            await it.drain(grace_s=6.0)
            await asyncio.sleep(A_WHILE_S)
            assert await it.alive() == 1
            await it.until_alive(0)
            assert time.monotonic() - started >= 6.0
        said = running.log().count("engine that drains does not say what is under way")
        assert said == (0 if trouble == "stands still" else 1)


async def test_each_dp_rank_is_judged_by_its_own_load(tmp_path: Path, engine: Engine) -> None:
    engine.busy = {0: 0, 1: 2}
    shape = replace(SHAPE, dp_size=2)
    with serving(tmp_path) as running:
        async with operator(running) as it:
            await it.register(engine, shape)
            await it.drain("/ranks/dp1")
            await asyncio.sleep(A_WHILE_S)
            assert await it.alive() == 2
            await it.drain("/ranks/dp0")
            await it.until_alive(1)
            engine.busy = {0: 5, 1: 0}
            await it.until_alive(0)


async def test_a_drain_that_a_restart_has_interrupted_is_looked_after_again(tmp_path: Path, engine: Engine) -> None:
    engine.busy = {0: 1}
    journal = ("--journal", f"sqlite:{tmp_path}/rows")
    with serving(tmp_path, *journal) as running:
        async with operator(running) as it:
            await it.register(engine)
            await it.drain()
        running.kill()
    engine.busy = {0: 0}
    with serving(tmp_path, *journal, name="again") as running:
        async with operator(running) as it:
            await it.until_alive(0)


async def test_unless_said_otherwise_nobody_is_asked(tmp_path: Path, engine: Engine) -> None:
    with serving(tmp_path, PDCTL_DRAIN__LOADS_URL="") as running:
        async with operator(running) as it:
            await it.register(engine)
            await it.drain(grace_s=5.0)
            await asyncio.sleep(1.0)
            assert (engine.asked, await it.alive()) == (0, 1)
            await it.until_alive(0)
