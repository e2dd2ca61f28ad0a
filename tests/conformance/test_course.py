"""What `pdctl conformance` finds: nothing in ours, each planted breach by name, no registry where none is."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
import trustme
from aiohttp import web

from pdctl import config, serving
from pdctl.conformance import course
from pdctl.conformance.course import Course, Report
from pdctl.conformance.promises import Promise, Verdict
from pdctl.core.registry import Registry
from pdctl.core.rooms import RoomBook
from pdctl.credentials import Credentials
from pdctl.dialects import native, sglang
from pdctl.errors import ConfigError, Unreachable
from pdctl.metrics import Metrics
from pdctl.persistence.memory import MemoryJournal
from pdctl.registrar import Registrar
from pdctl.server import app, bind, bound, serve
from tests.conformance.altered import Alter, Told, altered
from tests.conftest import Clock
from tests.small_server import listening
from tests.wire.http_pairs import rank

QUICK = Course(idle_s=0.05)


async def run(url: str, how: Course = QUICK) -> Report:
    return await course.run(url, Credentials(), how)


def named(report: Report, verdict: Verdict) -> set[str]:
    return {promise.name for promise, finding in report.findings if finding.verdict is verdict}


def found(report: Report, name: str) -> str:
    return next(finding.found for promise, finding in report.findings if promise.name == name)


async def alive(url: str) -> int:
    async with aiohttp.ClientSession() as http, http.get(f"{url}/v1/instances") as answer:
        return sum(row["alive"] for row in (await answer.json())["instances"])


@asynccontextmanager
async def with_rooms(limit: int) -> AsyncIterator[str]:
    metrics = Metrics()
    registrar = Registrar(Registry(), RoomBook(limit), MemoryJournal(), metrics, Clock())
    plain = sglang.Plain(registrar)
    service = sglang.in_front(plain, app([plain.router(), native.router(registrar)], metrics, unready=list))
    with bind("127.0.0.1", 0) as sock:
        server = asyncio.create_task(serve(service, sock, grace_s=1.0))
        yield f"http://{bound(sock)}"
        server.cancel()
        await asyncio.wait({server})


async def test_ours_keeps_all_promises_and_nothing_is_left_in_it(registry_url: str) -> None:
    report = await run(registry_url)
    assert named(report, Verdict.BROKEN) == set()
    assert named(report, Verdict.UNTRIED) == {"many-rooms"}
    assert report.ok
    assert (report.server, await alive(registry_url)) == ("pdctl", 0)
    assert [each for each in report.left if "rank" in each] == []


async def test_a_second_run_finds_the_same_as_the_first(registry_url: str) -> None:
    await run(registry_url)
    assert named(await run(registry_url), Verdict.BROKEN) == set()


async def test_that_rooms_are_bounded_is_seen_by_the_room_too_many() -> None:
    async with with_rooms(limit=100) as url:
        report = await run(url, Course(idle_s=0.0, rooms=200))
    assert "many-rooms" in named(report, Verdict.KEPT)
    assert "429" in found(report, "many-rooms")
    async with with_rooms(limit=1000) as url:
        report = await run(url, Course(idle_s=0.0, rooms=200))
    assert "many-rooms" in named(report, Verdict.BROKEN)


TOPOLOGY = {
    **dict.fromkeys(("attn_tp_size", "attn_cp_size", "dp_size", "pp_size", "page_size"), 1),
    "kv_cache_dtype": "auto",
    "follow_bootstrap_room": True,
}


def finds_nobody(told: Told) -> Told:
    return told.says(200, {}) if told.is_look_up and b"(0 workers" in told.body else told


def ready_with_one(told: Told) -> Told:
    return told.says(200, TOPOLOGY) if told.is_topology and b"(1 workers" in told.body else told


def one_key_too_many(told: Told) -> Told:
    return (
        told.says(200, json.loads(told.body) | {"colour": "red"}) if told.is_topology and told.status == 200 else told
    )


def forgets_rooms(told: Told) -> Told:
    return told.says(200, {}) if told.path == "/query_dp_ranks" and told.status == 200 else told


def finds_anything(told: Told) -> Told:
    return told.says(200, {"rank_ip": "10.0.0.1", "rank_port": 1}) if told.status == 404 and told.is_look_up else told


def ill(told: Told) -> Told:
    return told.says(503, "ill") if told.method == "HEAD" else told


def takes_anything(told: Told) -> Told:
    return told.says(200) if told.method == "PUT" and told.path == "/route" and told.status == 400 else told


def hangs_up(told: Told) -> Told | None:
    return None if told.method == "PUT" and told.status == 400 and b"kv_cache_dtype" not in told.asked else told


def no_goodbye(told: Told) -> Told:
    return told.says(405, "no") if told.method == "DELETE" else told


def remembers_the_first() -> Alter:
    first: dict[str, Told] = {}
    return lambda told: first.setdefault(told.query, told) if told.is_look_up and told.status == 200 else told


BREACHES: dict[str, tuple[Alter, set[str]]] = {
    "with nobody there somebody is found": (finds_nobody, {"empty"}),
    "one rank is enough": (ready_with_one, {"partial", "retry"}),
    "a key that stock does not know": (one_key_too_many, {"complete"}),
    "rooms are forgotten": (forgets_rooms, {"rooms"}),
    "any rank is found": (finds_anything, {"unknown"}),
    "ill for HEAD": (ill, {"health"}),
    "bad input is taken": (takes_anything, {"malformed", "impossible", "undialable", "contradiction", "bounds"}),
    "bad input ends the connection": (hangs_up, {"malformed"}),
    "nobody can leave": (no_goodbye, {"goodbye"}),
    "the first address is kept": (remembers_the_first(), {"restart"}),
}


@pytest.mark.parametrize(("alter", "names"), BREACHES.values(), ids=BREACHES)
async def test_a_planted_breach_is_found_and_named(registry_url: str, alter: Alter, names: set[str]) -> None:
    async with altered(registry_url, alter) as url:
        report = await run(url, Course(force=True, idle_s=0.0))
    assert named(report, Verdict.BROKEN) >= names
    assert not report.ok


async def test_a_server_that_closes_connections_is_told_from_one_that_keeps_them(registry_url: str) -> None:
    async with altered(registry_url, lambda told: told) as url:
        assert "keep-alive" in named(await run(url), Verdict.KEPT)
    async with altered(registry_url, lambda told: told, close=True) as url:
        assert "keep-alive" in named(await run(url), Verdict.BROKEN)


async def test_without_a_second_address_the_overwriting_is_not_tried(registry_url: str) -> None:
    report = await run(registry_url.replace("127.0.0.1", "localhost"), Course(idle_s=0.0, from_address="127.0.0.1"))
    assert "overwrite" in named(report, Verdict.BROKEN), (
        "from the holder's own host it is a restart: the test's own probe"
    )


async def test_where_a_token_is_wanted_leases_are_tried_with_it_and_not_without(tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("ops:admin:0123456789abcdef-0123\n")
    (tmp_path / "own").write_text("0123456789abcdef-0123\n")
    settings = config.load({"serve.port": 0, "serve.journal": "memory:", "access.token_file": tmp_path / "tokens"})
    async with serving.sidecar(settings) as sidecar:
        with_token = Credentials(token_file=tmp_path / "own")
        assert named(await course.run(sidecar.url, with_token, QUICK), Verdict.UNTRIED) == {"many-rooms"}
        report = await run(sidecar.url)
        assert named(report, Verdict.BROKEN) == set()
        assert named(report, Verdict.UNTRIED) == {"many-rooms", "overwrite", "goodbye"}
        assert any("wants a token, restart it" in each for each in report.left)


async def test_over_tls_it_is_all_the_same_and_who_is_not_believed_is_not_asked(tmp_path: Path) -> None:
    authority = trustme.CA()
    pair, ca = tmp_path / "pair.pem", tmp_path / "ca.pem"
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(str(pair))
    authority.cert_pem.write_to_path(str(ca))
    settings = config.load({"serve.port": 0, "serve.journal": "memory:", "access.tls_cert": pair})
    async with serving.sidecar(settings) as sidecar:
        report = await course.run(sidecar.url, Credentials(tls_ca=ca), QUICK)
        assert (named(report, Verdict.BROKEN), named(report, Verdict.UNTRIED)) == (set(), {"many-rooms"})
        with pytest.raises(Unreachable, match="certificate"):
            await run(sidecar.url)


async def test_a_server_with_a_fleet_is_left_alone_unless_that_is_wanted(registry_url: str) -> None:
    async with aiohttp.ClientSession() as http:
        body = rank(attn_tp_size=2)
        async with http.put(f"{registry_url}/route", json=body) as taken:
            assert taken.status == 200
        with pytest.raises(ConfigError, match=r"1 ranks are registered .* --force"):
            await run(registry_url)
        body["attn_tp_rank"], body["rank_port"] = 1, 40001
        async with http.put(f"{registry_url}/route", json=body) as taken:
            assert taken.status == 200
        with pytest.raises(ConfigError, match="an instance is served"):
            await run(registry_url)
        async with http.get(f"{registry_url}/v1/instances") as answer:
            assert (await answer.json())["revision"] == 3, "nothing was asked of it that changes anything"
    await run(registry_url, Course(force=True, idle_s=0.0))


async def test_what_is_no_registry_is_told_so_and_is_asked_for_nothing_else() -> None:
    asked: list[str] = []

    async def anything(request: web.Request) -> web.Response:
        asked.append(request.method)
        if request.path == "/query":
            return web.json_response({"0": {"engine_id": "e", "worker_addr": {}}})
        return web.Response(status=404 if request.path != "/health" else 200)

    async with listening(web.AppRunner(_everything(anything))) as url:
        with pytest.raises(Unreachable, match="no bootstrap registry on SGLang's wire: it is vLLM's"):
            await run(url)
    assert set(asked) == {"GET"}


def _everything(handler: object) -> web.Application:
    application = web.Application()
    application.router.add_route("*", "/{path:.*}", handler)  # type: ignore[arg-type]
    return application


async def test_nobody_there_is_unreachable() -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        with pytest.raises(Unreachable, match="connection refused"):
            await run(f"http://127.0.0.1:{nobody.getsockname()[1]}")


async def test_a_run_that_is_cut_short_takes_its_ranks_out_again(registry_url: str) -> None:
    begun = asyncio.Event()

    def tell(promise: Promise) -> None:
        if promise.name == "keep-alive":
            begun.set()

    task = asyncio.create_task(course.run(registry_url, Credentials(), Course(idle_s=60.0), tell))
    await asyncio.wait_for(begun.wait(), 60)
    assert await alive(registry_url) == 16
    task.cancel()
    await asyncio.wait({task})
    assert task.cancelled()
    assert await alive(registry_url) == 0


async def test_a_server_that_goes_meanwhile_breaks_one_promise_and_no_more(registry_url: str) -> None:
    dead = False

    def dies(told: Told) -> Told | None:
        nonlocal dead
        dead = dead or told.path == "/query_dp_ranks"
        return None if dead else told

    async with altered(registry_url, dies) as url:
        report = await run(url)
    assert named(report, Verdict.BROKEN) == set()
    assert named(report, Verdict.UNTRIED) >= {"bad-rooms", "rooms", "complete", "goodbye"}
    assert "the server is gone" in found(report, "rooms")
