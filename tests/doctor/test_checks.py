"""Each check of `pdctl doctor` against a host that is well, and against what is wrong with one."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from pdctl.config import Settings
from pdctl.doctor import host, names, network, software
from pdctl.doctor.base import Checked, Result, Said, checked, ok
from pdctl.doctor.rounds import CHECKS, rounds
from pdctl.engine.settings import MooncakeSettings
from pdctl.errors import BadField
from pdctl.sections import NodeSettings, ServeSettings
from tests.explain.planted import LISTENS, outer_address, program
from tests.ports import free_port
from tests.small_server import listening

NOBODY = "http://127.0.0.1:1"


def settings(registry: str = NOBODY, *, host: str = "127.0.0.1", **more: Any) -> Settings:
    return Settings(node=NodeSettings(registry=registry, host=host), **more)


async def said(name: str, given: Settings | None = None) -> Checked:
    [found] = await rounds(given or settings(), [name])
    return found


def test_the_command_line_names_every_check_that_there_is() -> None:
    assert tuple(CHECKS) == names.CHECKS


async def test_a_host_that_is_well_fails_no_check_but_those_that_need_a_registry(tmp_path: Path) -> None:
    serve = ServeSettings(port=free_port(), journal=f"sqlite:{tmp_path / 'j'}")
    found = {each.name: each for each in await rounds(settings(serve=serve), [*set(CHECKS) - {"engine", "registry"}])}
    assert {name for name, each in found.items() if each.result is Result.FAIL} == set()
    assert all(each.fix for each in found.values() if each.result is not Result.OK)
    assert all(each.evidence for each in found.values())


async def test_a_check_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(BadField, match="python, packages, wheel"):
        await rounds(settings(), ["weather"])


async def test_a_check_that_breaks_or_hangs_has_said_so() -> None:
    async def hangs(_: Settings) -> Said:
        await asyncio.Event().wait()
        return ok("")

    def breaks(_: Settings) -> Said:
        raise ZeroDivisionError("no reason")

    hung = await checked("it", hangs, settings(), deadline_s=0.01)
    broken = await checked("it", breaks, settings())
    assert (hung.result, broken.result) == (Result.FAIL, Result.FAIL)
    assert "ZeroDivisionError: no reason" in broken.evidence


# --- software


def test_a_package_that_is_too_old_or_missing_is_named() -> None:
    assert software._lacks("aiohttp>=3.11") is None
    assert software._lacks("aiohttp>=99.1") == f"aiohttp is {metadata.version('aiohttp')}, below 99.1"
    assert software._lacks("not-there-at-all>=1") == "not-there-at-all is not installed"


async def test_an_accelerator_without_a_driver_fails_with_what_to_install() -> None:
    if software.driver_cuda() is not None:
        pytest.skip("this host has a driver")
    found = await said("device", Settings(node=NodeSettings(accelerator="cuda:0")))
    assert (found.result, "libcuda.so.1" in found.evidence) == (Result.FAIL, True)


async def test_rdma_without_an_adapter_fails() -> None:
    if software._adapters():
        pytest.skip("this host has an adapter")
    rdma = settings(engine=MooncakeSettings(protocol="rdma"))
    assert (await said("device", rdma)).result is Result.FAIL


# --- addresses


async def test_the_announced_address_must_be_this_hosts_and_lead_back() -> None:
    wildcard, far, nameless = [
        await said("address", settings(host=at)) for at in ("0.0.0.0", "203.0.113.7", "nowhere.invalid")
    ]
    assert {each.result for each in (wildcard, far, nameless)} == {Result.FAIL}
    assert "every interface" in wildcard.evidence
    assert "no address of this host" in far.evidence
    assert "leads nowhere" in nameless.evidence
    assert (await said("address")).result is Result.WARN  # loopback: fine on one host
    if (outer := outer_address()) is not None:
        assert (await said("address", settings(host=outer))).result is Result.OK
        assert outer in wildcard.fix


# --- ports


async def test_free_ports_are_free_and_one_that_is_taken_is_told_with_its_holder() -> None:
    port = free_port()
    assert (await said("ports", settings(serve=ServeSettings(port=port)))).result is Result.OK
    with program(LISTENS, str(port)) as other:
        taken = await said("ports", settings(serve=ServeSettings(port=0, listen=(f"a=127.0.0.1:{port}",))))
    assert (taken.result, f"pid {other.pid}" in taken.evidence) == (Result.FAIL, True)


async def test_an_engine_needs_two_free_ports_in_its_range(monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = str(taken.getsockname()[1])
        monkeypatch.setenv("MC_MIN_RPC_PORT", port)
        monkeypatch.setenv("MC_MAX_RPC_PORT", port)
        found = await said("ports", settings(serve=ServeSettings(port=0)))
    assert (found.result, "0 of 1 ports are free" in found.evidence) == (Result.FAIL, True)


# --- the registry


@asynccontextmanager
async def answering(*routes: web.RouteDef, date: str | None = None) -> AsyncIterator[str]:
    app = web.Application()
    app.add_routes(routes)

    async def dated(_: web.Request, response: web.StreamResponse) -> None:
        if date is not None:
            response.headers["Date"] = date

    app.on_response_prepare.append(dated)
    async with listening(web.AppRunner(app)) as url:
        yield url


async def listed(_: web.Request) -> web.Response:
    return web.json_response({"instances": [], "revision": 1})


async def unready(_: web.Request) -> web.Response:
    return web.json_response({"ready": False, "reasons": ["the journal is full"]}, status=503)


async def test_a_registry_that_is_not_ready_fails_with_its_reason() -> None:
    async with answering(web.get("/v1/instances", listed), web.get("/readyz", unready)) as url:
        found = await said("registry", settings(url))
    assert (found.result, "the journal is full" in found.evidence) == (Result.FAIL, True)


async def test_stocks_own_server_and_any_other_program_are_told_from_a_registry() -> None:
    async def stock(_: web.Request) -> web.Response:
        return web.Response(status=503, text="Prefill server not fully registered yet (0 workers registered).")

    async def models(_: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": []})

    async with answering(web.get("/route", stock)) as url:
        found = await said("registry", settings(url))
        assert (found.result, "SGLang's own bootstrap server" in found.evidence) == (Result.WARN, True)
    async with answering(web.get("/v1/models", models)) as url:
        found = await said("registry", settings(url))
        assert (found.result, "an engine's API" in found.evidence) == (Result.FAIL, True)
    async with answering() as url:
        found = await said("registry", settings(url))
        assert (found.result, "another HTTP service" in found.evidence) == (Result.FAIL, True)


async def test_a_service_that_wants_a_token_is_not_taken_for_a_wrong_one() -> None:
    async def locked(_: web.Request) -> web.Response:
        return web.json_response({"error": {"message": "show a token"}}, status=401)

    async with answering(web.get("/v1/instances", locked)) as url:
        found = await said("registry", settings(url))
    assert (found.result, "access_refused" in found.evidence) == (Result.FAIL, True)
    assert "--token-file" in found.fix


@pytest.mark.parametrize(
    ("date", "result"),
    [("Sat, 01 Jan 2000 00:00:00 GMT", Result.FAIL), (None, Result.OK), ("no date", Result.OK)],
    ids=["decades off", "right", "unreadable"],
)
async def test_the_time_of_day_is_compared_with_the_registrys(date: str | None, result: Result) -> None:
    async with answering(web.get("/v1/instances", listed), date=date) as url:
        assert (await said("clocks", settings(url))).result is result


# --- limits and places


@contextmanager
def limited(which: int, soft: int) -> Iterator[None]:
    before = resource.getrlimit(which)
    resource.setrlimit(which, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(which, before)


def test_few_open_files_are_told_by_what_they_are_enough_for() -> None:
    with limited(resource.RLIMIT_NOFILE, 1024):
        few = host.open_files(settings())
    with limited(resource.RLIMIT_NOFILE, 280):
        none = host.open_files(settings())
    assert (few.result, none.result) == (Result.WARN, Result.FAIL)
    assert "12 peers" in few.evidence


def test_locked_memory_matters_to_rdma_alone() -> None:
    with limited(resource.RLIMIT_MEMLOCK, 65536):
        tcp, rdma = (host.locked_memory(settings(engine=MooncakeSettings(protocol=each))) for each in ("tcp", "rdma"))
    assert (tcp.result, rdma.result) == (Result.OK, Result.FAIL)


def test_shared_memory_of_a_containers_size_is_told(tmp_path: Path) -> None:
    assert host.shared_memory(settings(), tmp_path / "none").result is Result.FAIL
    mounted = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=64m tmpfs "$1" && "$2" -c "$3" "$1"', "sh"]
    look = (
        "import sys, pathlib; from pdctl.config import Settings; from pdctl.doctor import host; "
        "print(host.shared_memory(Settings(), pathlib.Path(sys.argv[1])).result)"
    )
    done = subprocess.run([*mounted, str(tmp_path), sys.executable, look], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("no file system can be mounted here")
    assert done.stdout.strip() == "warn"


def test_a_journals_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    well = host._place(tmp_path / "new" / "journal")
    assert (well.result, os.listdir(tmp_path)) == (Result.OK, [])  # nothing stays behind
    assert host._place(Path("/dev/null/journal")).result is Result.FAIL
    assert host._place(Path("/proc/journal")).result is Result.FAIL
    other = tmp_path / "other"
    other.write_text("a shopping list, which is no journal at all\n" * 40)
    assert host._place(other).result is Result.FAIL


async def test_an_etcd_of_which_most_are_gone_fails() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as there:
        alive, dead = f"127.0.0.1:{there.getsockname()[1]}", f"127.0.0.1:{free_port()}"
        few = settings(serve=ServeSettings(journal=f"etcd://{alive},{alive},{dead}"))
        most = settings(serve=ServeSettings(journal=f"etcd://{alive},{dead},{dead}"))
        assert (await said("journal", few)).result is Result.WARN
        assert (await said("journal", most)).result is Result.FAIL


# --- the store


async def test_without_a_store_there_is_nothing_to_check() -> None:
    found = await network.store(settings())
    assert (found.result, found.evidence) == (Result.OK, "no shared store is configured")
