"""vLLM's bootstrap server: the stock answers, several prefills, restarts, and no map that is not whole."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import pytest

from pdctl.core.address import Endpoint
from pdctl.core.fleet import Fleet, FleetPolicy, Place, Row, Worker
from pdctl.dialects import engines, vllm
from pdctl.errors import JournalUnavailable, PdctlError
from pdctl.metrics import Metrics
from pdctl.roster import Presence, Roster
from pdctl.server import app, bind, bound, serve
from tests.conftest import Clock

Answer = tuple[int, Any]


def body(tp: int = 0, *, dp: int = 0, port: int = 0, engine: str = "p", **more: object) -> dict[str, object]:
    """As a stock worker sends it."""
    addr = f"tcp://127.0.0.1:{port or 4000 + 10 * dp + tp}"
    return {"engine_id": engine, "dp_rank": dp, "tp_rank": tp, "pp_rank": 0, "addr": addr, **more}


@dataclass
class Stage:
    """A bootstrap server; `presence` is what asking a port finds, there unless said otherwise."""

    url: str
    session: aiohttp.ClientSession
    roster: Roster
    presence: dict[int, Presence]
    journal: list[Row] = field(default_factory=list)
    refused: list[PdctlError] = field(default_factory=list)
    full: bool = False

    async def register(self, *args: Any, **more: Any) -> Answer:
        async with self.session.post(f"{self.url}/register", json=body(*args, **more)) as answer:
            return answer.status, await answer.json()

    async def get(self, path: str = "/query") -> Answer:
        async with self.session.get(self.url + path) as answer:
            return answer.status, await answer.json()

    async def keep(self, rows: Sequence[Row]) -> None:
        if self.full:
            raise JournalUnavailable("the disk is full: make room", cause="disk full")
        self.journal += rows


@asynccontextmanager
async def staged(metrics: Metrics, clock: Clock, **policy: Any) -> AsyncIterator[Stage]:
    presence: dict[int, Presence] = {}

    async def look(address: Endpoint) -> Presence:
        return presence.get(address.port, Presence.THERE)

    async def keep(rows: Sequence[Row]) -> None:
        await made.keep(rows)

    roster = Roster(Fleet(FleetPolicy(**policy)), keep, look, metrics, clock)
    operators = engines.operators_router(roster, lambda error, *_: error)
    routers = [vllm.router(roster, lambda error, *_: made.refused.append(error)), operators]
    with bind("127.0.0.1", 0) as sock:
        async with aiohttp.ClientSession() as session:
            made = Stage(f"http://{bound(sock)}", session, roster, presence)
            server = asyncio.create_task(serve(app(routers, metrics, unready=list), sock, grace_s=1.0))
            yield made
            server.cancel()
            await asyncio.wait({server})


@pytest.fixture
async def stage(metrics: Metrics, clock: Clock) -> AsyncIterator[Stage]:
    """Every prefill here has two TP ranks."""
    async with staged(metrics, clock, sizes="dp=1,tp=2,pp=1") as made:
        yield made


OK = (200, {"status": "ok"})


def whole(port: int = 4000, engine: str = "p") -> dict[str, Any]:
    addr = {str(tp): {"0": f"tcp://127.0.0.1:{port + tp}"} for tp in range(2)}
    return {"engine_id": engine, "worker_addr": addr}


async def test_the_stock_answers(stage: Stage) -> None:
    assert await stage.get() == (200, {})
    assert await stage.register(0) == OK
    assert await stage.register(0) == OK
    assert await stage.register(1) == OK
    assert await stage.get() == (200, {"0": whole()})


@pytest.mark.parametrize("path", ["/query", "/e/p/query"])
async def test_a_partial_map_is_never_shown(stage: Stage, path: str) -> None:
    await stage.register(1)
    status, answer = await stage.get(path)
    assert status == 503
    assert "missing dp0/tp0/pp0" in answer["detail"]
    await stage.register(0)
    assert await stage.get(path) == (200, {"0": whole()})


async def test_without_sizes_the_map_is_shown_when_nobody_joins_any_more(metrics: Metrics, clock: Clock) -> None:
    async with staged(metrics, clock, settle_s=5) as stage:
        await stage.register(0)
        clock.forward(4)
        await stage.register(1)
        clock.forward(4.9)
        assert (await stage.get())[0] == 503
        clock.forward(0.1)
        assert await stage.get() == (200, {"0": whole()})


async def test_a_complete_prefill_is_shown_beside_one_that_is_coming_up(stage: Stage) -> None:
    for tp in range(2):
        await stage.register(tp)
    await stage.register(0, engine="q", port=5000)
    assert await stage.get() == (200, {"0": whole()})
    assert (await stage.get("/e/q/query"))[0] == 503
    await stage.register(1, engine="q", port=5001)
    assert await stage.get() == (200, {"0": whole(), "1": whole(5000, "q")})
    assert await stage.get("/e/q/query") == (200, {"0": whole(5000, "q")})


async def test_data_parallel_engines_are_one_prefill_under_their_common_id(metrics: Metrics, clock: Clock) -> None:
    async with staged(metrics, clock, sizes="dp=2,tp=1,pp=1") as stage:
        await stage.register(0, dp=1, engine="p_dp1")
        assert (await stage.get())[0] == 503
        await stage.register(0, dp=0, engine="p_dp0")
        expected = {
            "0": {"engine_id": "p_dp0", "worker_addr": {"0": {"0": "tcp://127.0.0.1:4000"}}},
            "1": {"engine_id": "p_dp1", "worker_addr": {"0": {"0": "tcp://127.0.0.1:4010"}}},
        }
        for path in ("/query", "/e/p/query", "/e/p_dp1/query"):
            assert await stage.get(path) == (200, expected)


async def test_a_restart_is_accepted_and_its_halves_are_never_mixed(stage: Stage) -> None:
    """The stock server answers 400, for ever."""
    for tp in range(2):
        await stage.register(tp)
    stage.presence.update({4000: Presence.REFUSED, 4001: Presence.REFUSED})
    assert await stage.register(1, port=5001) == OK
    assert (await stage.get())[0] == 503
    assert await stage.register(0, port=5000) == OK
    assert await stage.get() == (200, {"0": whole(5000)})


@pytest.mark.parametrize(
    ("ask_others", "presence", "is_kept"),
    [
        (True, Presence.REFUSED, False),
        (True, Presence.SILENT, True),  # it would never register again, and may serve others well
        (True, Presence.THERE, True),
        (False, Presence.REFUSED, True),
    ],
)
async def test_a_restart_under_a_new_id_leaves_no_ghost_where_that_is_wanted(
    metrics: Metrics, clock: Clock, ask_others: bool, presence: Presence, is_kept: bool
) -> None:
    """vLLM makes up a new ID at each start, unless it is told one."""
    async with staged(metrics, clock, sizes="dp=1,tp=2,pp=1", ask_others=ask_others) as stage:
        for tp in range(2):
            await stage.register(tp, engine="old")
        stage.presence[4000] = presence
        for tp in range(2):
            await stage.register(tp, engine="new", port=5000 + tp)
        assert await stage.get("/e/new/query") == (200, {"0": whole(5000, "new")})
        assert (await stage.get("/e/old/query"))[0] == (200 if is_kept else 503)
        assert len((await stage.get())[1]) == (2 if is_kept else 1)


async def test_who_answers_keeps_its_seat_against_another_host(stage: Stage) -> None:
    theirs = Worker("p", Place(0, 0, 0), "tcp://10.0.0.9:4000", "10.0.0.9")
    stage.roster.restore([Row("p", theirs.place, theirs)])
    status, answer = await stage.register(0)
    assert status == 409
    assert "10.0.0.9" in answer["detail"]
    assert "127.0.0.1" in answer["detail"]
    assert [str(error) for error in stage.refused] == [answer["detail"]]
    stage.presence[4000] = Presence.SILENT
    assert await stage.register(0) == OK


async def test_what_the_journal_refuses_has_not_happened(stage: Stage) -> None:
    await stage.register(0)
    stage.full = True
    assert (await stage.register(1))[0] == 503
    assert (await stage.get())[0] == 503
    stage.full = False
    assert await stage.register(1) == OK
    assert [row.place.tp for row in stage.journal] == [0, 1]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"engine_id": None}, "engine_id"),
        ({"engine_id": 7}, "engine_id"),
        ({"tp_rank": "x"}, "tp_rank"),
        ({"tp_rank": 2}, "tp_rank"),
        ({"dp_rank": -1}, "dp_rank"),
        ({"pp_rank": 1.5}, "pp_rank"),
        ({"addr": "127.0.0.1:1"}, "addr"),
        ({"addr": "tcp://0.0.0.0:1"}, "addr"),
        ({"tp_size": 0}, "tp_size"),
    ],
)
async def test_a_field_that_cannot_be_used_is_422_and_named(
    stage: Stage, changes: dict[str, object], field: str
) -> None:
    async with stage.session.post(f"{stage.url}/register", json={**body(), **changes}) as answer:
        assert answer.status == 422
        assert (await answer.json())["detail"].startswith(f"{field}: ")
    assert await stage.get() == (200, {})


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"\xff", b"[" * 100_000])
async def test_what_is_no_object_is_422(stage: Stage, raw: bytes) -> None:
    async with stage.session.post(f"{stage.url}/register", data=raw) as answer:
        assert answer.status == 422


async def test_an_operator_sees_who_is_missing_and_can_say_goodbye_for_a_prefill(stage: Stage) -> None:
    await stage.register(0)
    shown = {"engine_id": "p", "place": "dp0/tp0/pp0", "addr": "tcp://127.0.0.1:4000", "host": "127.0.0.1"}
    expected = {"name": "p", "instance": "default", "complete": False, "workers": [shown], "missing": ["dp0/tp1/pp0"]}
    assert await stage.get("/v1/engines") == (200, {"prefills": [expected]})
    for status in (200, 404):
        async with stage.session.delete(f"{stage.url}/v1/engines/p") as answer:
            assert answer.status == status
    assert await stage.get() == (200, {})


async def test_nobody_else_says_goodbye_for_an_engine_that_lives(stage: Stage) -> None:
    theirs = Worker("p", Place(0, 0, 0), "tcp://10.0.0.9:4000", "10.0.0.9")
    stage.roster.restore([Row("p", theirs.place, theirs)])
    async with stage.session.delete(f"{stage.url}/v1/engines/p") as answer:
        assert answer.status == 409
        assert "10.0.0.9" in await answer.text()
    stage.presence[4000] = Presence.SILENT
    async with stage.session.delete(f"{stage.url}/v1/engines/p") as answer:
        assert answer.status == 200


async def test_what_is_held_is_counted(stage: Stage, metrics: Metrics) -> None:
    await stage.register(0)
    lines = metrics.exposition()[0].decode().splitlines()
    assert {"pdctl_vllm_workers 1.0", 'pdctl_vllm_prefills{complete="false"} 1.0'} <= set(lines)


async def test_a_workers_address_is_asked_over_tcp() -> None:
    with bind("127.0.0.1", 0) as sock:
        address = bound(sock)
        assert await vllm.look(address) is Presence.THERE
    assert await vllm.look(address) is Presence.REFUSED
    assert await vllm.look(Endpoint("no-such-host.invalid", 1)) is Presence.SILENT


async def test_vllms_own_reading_of_the_map(stage: Stage) -> None:
    """As the example proxy and the decode worker read it."""
    for tp in range(2):
        await stage.register(tp, engine="q_dp0")
    _, data = await stage.get("/e/q_dp0/query")
    assert len(data) == 1
    assert [int(key) for key in data] == [0]
    entry = next(entry for entry in data.values() if entry["engine_id"] == "q_dp0")
    assert len(entry["worker_addr"]) == 2
    assert json.dumps(entry["worker_addr"]["1"]) == '{"0": "tcp://127.0.0.1:4001"}'
