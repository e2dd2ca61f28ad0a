"""
The misconfigurations that the field knows, each planted for real, and the first finding of `explain` or `doctor` that
names it. docs/explain.md has the table.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from pdctl.cli import parser
from pdctl.core.findings import Culprit
from pdctl.core.route import Seat, Shape
from pdctl.doctor.base import Result
from pdctl.doctor.rounds import rounds
from pdctl.sections import ServeSettings, StoreSettings
from tests.explain.planted import (
    LISTENS,
    WAITS,
    Ranks,
    blackhole,
    culprits,
    delete,
    explained,
    outer_address,
    post,
    program,
    put,
    ranks,
    settings,
)
from tests.ports import free_port
from tests.service import Service, service
from tests.store.master import Master

TP0, TP1 = Seat(0, 0, 0, 0), Seat(0, 0, 1, 0)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    log = tmp_path_factory.mktemp("explain") / "serve.log"
    with service(log, "--host", "0.0.0.0", "--trust", "any", "--journal", "memory:") as it:
        yield it


@pytest.fixture(scope="module")
def registry(running: Service) -> str:
    return f"http://127.0.0.1:{running.port}"


@pytest.fixture(scope="module")
def engine(registry: str) -> Iterator[Ranks]:
    """Ranks that stay."""
    with ranks(registry) as it:
        yield it


# --- 1. the wrong bootstrap port


async def test_a_port_where_another_program_listens_is_named_with_the_registrys(engine: Ranks, registry: str) -> None:
    engine.register("port-a", TP0, TP1)
    port = free_port()
    with program(LISTENS, str(port)) as other:
        told = await explained(f"http://127.0.0.1:{port}", "port-a")
    assert (told.reached, told.findings[0].what) == (False, Culprit.WRONG_BOOTSTRAP_PORT)
    assert registry in told.findings[0].do
    assert any(f"pid {other.pid}" in fact for fact in told.findings[0].evidence)


async def test_a_port_where_nobody_listens_is_the_wrong_one_if_a_registry_beside_it_has_the_instance(
    engine: Ranks, registry: str
) -> None:
    engine.register("port-b", TP0, TP1)
    told = await explained(f"http://127.0.0.1:{free_port()}", "port-b")
    assert told.findings[0].what is Culprit.WRONG_BOOTSTRAP_PORT
    assert registry in told.findings[0].why


async def test_an_engine_that_was_told_of_another_port_is_named_where_its_instance_never_came(registry: str) -> None:
    with program(WAITS, "--disaggregation-bootstrap-port", str(free_port())) as astray:
        told = await explained(registry, "port-c")
    assert told.findings[0].what is Culprit.WRONG_BOOTSTRAP_PORT
    assert any(f"pid {astray.pid}" in fact for fact in told.findings[0].evidence)


async def test_one_that_was_told_by_its_environment_is_named_too(registry: str) -> None:
    with program(WAITS, PDCTL_NODE__REGISTRY=f"http://127.0.0.1:{free_port()}") as astray:
        told = await explained(registry, "port-d")
    assert any(f"pid {astray.pid}" in fact for fact in told.findings[0].evidence)


# --- 2. a rank is missing


async def test_a_rank_that_never_came_is_named(engine: Ranks, registry: str) -> None:
    engine.register("short", TP0)
    told = await explained(registry, "short")
    assert [(finding.what, finding.who) for finding in told.findings] == [(Culprit.RANK_MISSING, "short/tp1")]


async def test_one_whose_lease_has_lapsed_is_told_from_one_that_never_came(engine: Ranks, registry: str) -> None:
    engine.register("lapsed", TP0)
    engine.register("lapsed", TP1, ttl_s=0.5)
    async with asyncio.timeout(60):
        while (told := await culprits(registry, "lapsed")) == []:  # noqa: ASYNC110 - another process's lease
            await asyncio.sleep(0.1)
    assert told == ["lease_lapsed"]


# --- 3, 4. addresses


async def test_a_wildcard_address_is_named(engine: Ranks, registry: str) -> None:
    [(status, _, _)] = engine.register("everywhere", TP0, host="0.0.0.0")
    told = await explained(registry, "everywhere")
    assert (status, told.findings[0].what) == (400, Culprit.WILDCARD_ADDRESS)
    assert "SGLANG_HOST_IP" in told.findings[0].do


async def test_a_loopback_address_from_another_host_is_named(engine: Ranks, running: Service, registry: str) -> None:
    outer = outer_address()
    if outer is None:
        pytest.skip("this host has no address but loopback: nothing comes from elsewhere")
    elsewhere = f"http://{outer}:{running.port}"  # who asks there comes from there
    [(status, _, _)] = engine.register("nowhere", TP0, registry=elsewhere)
    told = await explained(registry, "nowhere")
    assert (status, told.findings[0].what) == (400, Culprit.LOOPBACK_ADDRESS)


async def test_a_loopback_address_that_was_taken_is_named_when_there_are_ranks_elsewhere(
    engine: Ranks, registry: str
) -> None:
    engine.register("inside", TP0, TP1)
    outside = Shape(1, 1, 1, 1, 64, "bfloat16")
    engine.register("outside", TP0, shape=outside, host="198.51.100.7", role="decode")  # TEST-NET: nobody is there
    assert await culprits(registry, "inside") == ["loopback_address"] * 2
    assert await delete(f"{registry}/v1/instances/outside/ranks/tp0") == 200  # the other tests' fleet is on one host


async def test_an_address_without_a_way_is_told_from_a_dead_rank(engine: Ranks, registry: str) -> None:
    with blackhole() as port:
        engine.register("far", TP0, shape=Shape(1, 1, 1, 1, 64, "bfloat16"), port=port)
        assert await culprits(registry, "far") == ["unreachable_address"]


# --- 5, 6. layouts: of one instance first, as it is held against a decode where one is known; a worker keeps the order


async def test_a_rank_of_another_page_size_is_named_with_both(engine: Ranks, registry: str) -> None:
    engine.register("pages", TP0)
    [(status, _, _)] = engine.register("pages", TP1, shape=Shape(2, 1, 1, 1, 16, "bfloat16"))
    told = await explained(registry, "pages")
    assert (status, told.findings[0].what) == (400, Culprit.PAGE_SIZE_MISMATCH)
    assert "64" in told.findings[0].why
    assert "16" in told.findings[0].why


async def test_a_rank_of_another_tp_size_is_named(engine: Ranks, registry: str) -> None:
    engine.register("tp", TP0)
    engine.register("tp", TP1, shape=Shape(4, 1, 1, 1, 64, "bfloat16"))
    assert (await culprits(registry, "tp"))[0] == "tp_mismatch"


async def test_a_refusal_that_was_put_right_is_no_news(engine: Ranks, registry: str) -> None:
    engine.register("mended", TP0)
    engine.register("mended", TP1, shape=Shape(2, 1, 1, 1, 16, "bfloat16"))
    assert (await culprits(registry, "mended"))[0] == "page_size_mismatch"
    engine.register("mended", TP1)
    assert await culprits(registry, "mended") == []


async def test_a_pair_of_other_page_sizes_is_named(engine: Ranks, registry: str) -> None:
    engine.register("pages-p", TP0, TP1)
    engine.register("pages-d", TP0, TP1, shape=Shape(2, 1, 1, 1, 16, "bfloat16"), role="decode")
    assert (await culprits(registry, "pages-p", "pages-d"))[0] == "page_size_mismatch"
    assert (await culprits(registry, "pages-d", "pages-p"))[0] == "page_size_mismatch"
    await gone(registry, "pages-d", TP0, TP1)


async def test_tp_sizes_that_do_not_divide_each_other_are_named(engine: Ranks, registry: str) -> None:
    engine.register("tp-p", TP0, TP1)
    three = Shape(3, 1, 1, 1, 64, "bfloat16")
    engine.register("tp-d", TP0, TP1, Seat(0, 0, 2, 0), shape=three, role="decode")
    assert (await culprits(registry, "tp-p", "tp-d"))[0] == "tp_mismatch"
    await gone(registry, "tp-d", TP0, TP1, Seat(0, 0, 2, 0))


async def gone(registry: str, instance: str, *seats: Seat) -> None:
    """Tests come in any order, and a decode that fits nobody is held against every prefill while it is the only one."""
    for seat in seats:
        assert await delete(f"{registry}/v1/instances/{instance}/ranks/{str(seat).replace('/', '-')}") == 200


# --- 7. a port is taken


async def test_the_holder_of_the_registrys_port_is_named() -> None:
    port = free_port()
    with program(LISTENS, str(port)) as other:
        [said] = await rounds(settings("http://127.0.0.1:1", serve=ServeSettings(port=port)), ["ports"])
    assert said.result is Result.FAIL
    assert f"pid {other.pid}" in said.evidence
    assert str(port) in said.fix


async def test_a_registry_that_serves_there_is_no_trouble(running: Service, registry: str) -> None:
    [said] = await rounds(settings(registry, serve=ServeSettings(port=running.port)), ["ports"])
    assert (said.result, "a pdctl registry" in said.evidence) == (Result.OK, True)


async def test_a_program_that_has_a_dead_ranks_port_is_told_from_the_rank(engine: Ranks, registry: str) -> None:
    with ranks(registry) as gone:
        [(_, _, port)] = gone.register("usurped", TP0, shape=Shape(1, 1, 1, 1, 64, "bfloat16"))
    with program(LISTENS, str(port)):
        assert await culprits(registry, "usurped") == ["port_taken"]


# --- 8, 9. who is not there


async def test_a_registry_that_is_down_is_named() -> None:
    told = await explained(f"http://127.0.0.1:{free_port()}", "of-nobody")
    assert (told.reached, told.findings[0].what) == (False, Culprit.REGISTRY_DOWN)
    assert "refused" in told.findings[0].why


async def test_a_rank_that_died_without_a_word_is_named(registry: str) -> None:
    with ranks(registry) as gone:
        gone.register("stale", TP0, shape=Shape(1, 1, 1, 1, 64, "bfloat16"))
        assert await culprits(registry, "stale") == []
    told = await explained(registry, "stale")
    assert [(finding.what, finding.who) for finding in told.findings] == [(Culprit.STALE_REGISTRATION, "stale/tp0")]


async def test_a_rank_that_stands_still_is_told_from_a_dead_one(registry: str) -> None:
    with ranks(registry) as hung:
        hung.register("hung", TP0, shape=Shape(1, 1, 1, 1, 64, "bfloat16"))
        hung.child.stop()
        assert await culprits(registry, "hung") == ["hangs"]
        hung.child.resume()


# --- 10. an ejected link: test_links.py has one with real ranks


async def test_a_session_that_the_service_itself_has_put_out_is_named(registry: str) -> None:
    told = {"cause": "timed_out", "detail": "64 blocks"}
    assert await post(f"{registry}/v1/sessions/127.0.0.1:1/failures", told) == 200
    ejected = [each for each in (await explained(registry)).findings if each.what is Culprit.EJECTED_LINK]
    assert [each.who for each in ejected] == [f"the service at {registry} -> 127.0.0.1:1"]


async def test_a_room_that_only_the_registry_has_heard_of_is_told_so(registry: str) -> None:
    assert await post(f"{registry}/register_dp_rank", {"bootstrap_room": 4711, "dp_rank": 3}) == 200
    [unknown] = [each for each in (await explained(registry, "room", "4711")).findings if each.who == "room 4711"]
    assert unknown.what is Culprit.ROOM_UNKNOWN
    assert "DP rank 3 has it" in unknown.evidence[-1]


# --- 11. the store's master


async def test_a_store_master_that_is_down_is_named() -> None:
    master = Master()
    extra = {"master_server_address": master.address, "master_metrics_port": master.http, "protocol": "tcp"}
    configured = settings("http://127.0.0.1:1", store=StoreSettings(extra=json.dumps(extra)))
    [down] = await rounds(configured, ["store"])
    assert down.result is Result.FAIL
    assert master.address in down.evidence
    master.start()
    try:
        [up] = await rounds(configured, ["store"])
    finally:
        master.kill()
    assert (up.result, up.fix) == (Result.OK, "")


async def test_a_rank_without_its_store_is_named(engine: Ranks, registry: str) -> None:
    engine.register("storeless", TP0, shape=Shape(1, 1, 1, 1, 64, "bfloat16"))
    report = {"role": "prefill", "store": {"attached": False, "sentence": "the master refuses connections"}}
    assert await put(f"{registry}/v1/instances/storeless/ranks/tp0/report", report) == 200
    assert await culprits(registry, "storeless") == ["store_not_ready"]


# --- 12. a library


@pytest.fixture
def lacking(tmp_path: Path) -> Path:
    """The installed wheel, whose engine wants what the CUDA one wants: names of one length, so nothing else moves."""
    [name] = [each for each in ("mooncake-transfer-engine-non-cuda",) if metadata.version(each)]
    files = metadata.files(name) or ()
    package = Path(str(next(each for each in files if each.name == "engine.so").locate())).parent
    for beside in package.parent.glob("mooncake_transfer_engine*"):
        (tmp_path / beside.name).symlink_to(beside)
    shutil.copytree(package, tmp_path / "mooncake", copy_function=os.symlink)
    engine = tmp_path / "mooncake" / "engine.so"
    code = engine.read_bytes().replace(b"libibverbs.so.1\0", b"libcudart.so.12\0")
    engine.unlink()
    engine.write_bytes(code)
    return tmp_path


def doctor(*arguments: str, **environ: str) -> tuple[int, dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-m", "pdctl", "doctor", "--json", *arguments],
        env=os.environ | environ,
        capture_output=True,
        check=False,
    )
    return done.returncode, {each["name"]: each for each in json.loads(done.stdout)["checks"]}


def test_a_library_that_is_missing_is_named_with_what_brings_it(lacking: Path) -> None:
    status, said = doctor("--only", "libraries", "--only", "engine", PYTHONPATH=str(lacking))
    assert (status, said["libraries"]["result"], said["engine"]["result"]) == (1, "fail", "fail")
    assert "engine.so need libcudart.so.12, which is not found" in said["libraries"]["evidence"]
    assert "nvidia-cuda-runtime-cu12" in said["libraries"]["fix"]
    assert "libcudart.so.12" in said["engine"]["evidence"]


async def test_without_that_both_are_well() -> None:
    said = await rounds(settings("http://127.0.0.1:1"), ["libraries", "engine"])
    assert {each.result for each in said} == {Result.OK}


# --- what a shell gets


def pdctl(*arguments: str) -> tuple[int, str]:
    done = subprocess.run([sys.executable, "-m", "pdctl", "explain", *arguments], capture_output=True, check=False)
    return done.returncode, done.stdout.decode()


def test_the_exit_status_tells_found_from_no_registry(engine: Ranks, registry: str) -> None:
    engine.register("ill", TP0)
    status, said = pdctl("ill", "--json", "--at", registry)
    assert (status, json.loads(said)["findings"][0]["what"]) == (1, "rank_missing")
    status, said = pdctl("of-nobody", "--at", f"http://127.0.0.1:{free_port()}")
    assert status == 69
    assert said.startswith("1. registry_down")
    assert "\x1b" not in said


async def test_nothing_found_is_0_and_says_how_much_was_looked_at(
    engine: Ranks, registry: str, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.register("well", TP0, TP1)
    args = parser().parse_args(["explain", "well", "--at", registry])
    assert await args.run(settings(registry), args) == 0
    assert "nothing is known to be wrong with well" in capsys.readouterr().out
