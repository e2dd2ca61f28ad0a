"""`pdctl store` as a person or a pod meets it: real processes, a real master, exit statuses."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.store.master import Master, master
from tests.test_cli import pdctl

VARIABLES = {"MOONCAKE_PROTOCOL": "tcp", "MOONCAKE_LOCAL_HOSTNAME": "127.0.0.1"}


@pytest.fixture(scope="module")
def running() -> Iterator[Master]:
    with master() as started:
        yield started


async def ended(*arguments: str, **environ: str) -> tuple[int, str, str]:
    """As in test_cli, for commands that start a process of their own and end with Mooncake's."""
    async with pdctl(*arguments, **environ) as child:
        out, err = await asyncio.wait_for(child.communicate(), 90.0)
        return child.returncode or 0, out.decode(), err.decode()


def told(at: Master) -> dict[str, str]:
    return {**VARIABLES, "MOONCAKE_MASTER": at.address, "MOONCAKE_MASTER_METRICS_PORT": str(at.http)}


async def test_config_prints_each_value_and_where_it_came_from(tmp_path: Path) -> None:
    file = tmp_path / "mooncake.json"
    file.write_text(json.dumps({"master_server_address": "10.0.0.9:50051", "global_segment_size": "8gb"}))
    environ = {**VARIABLES, "SGLANG_HICACHE_MOONCAKE_CONFIG_PATH": str(file), "MOONCAKE_TENANT_ID": "not-taken"}
    status, out, _ = await ended("store", "config", "--tp-size", "8", "--tp-rank", "3", **environ)
    assert status == 0
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert f"10.0.0.9:50051           file {file}" in lines["master_server_address"]
    assert "MOONCAKE_PROTOCOL in the environment" in lines["protocol"]
    assert lines["tenant_id"].split() == ["tenant_id", "default", "default"]
    assert "1073741824 bytes for dp0/cp0/tp3/pp0" in lines["of"]


async def test_config_of_flags_stands_above_the_rest_and_speaks_json() -> None:
    extra = json.dumps({"master_server_address": "h:1", "protocol": "tcp", "prefetch_threshold": 5})
    status, out, _ = await ended("store", "config", "--json", "--extra-config", extra, MOONCAKE_MASTER="other:1")
    found = json.loads(out)
    assert status == 0
    assert found["master_server_address"] == {"value": "h:1", "source": "extra config"}
    assert found["local_hostname"] == {"value": "localhost", "source": "default"}


CANNOT_BE_USED: list[tuple[list[str], dict[str, str], str]] = [
    ([], {}, "MOONCAKE_MASTER in the environment is not given"),
    (["--extra-config", "{"], {}, "extra config is no JSON"),
    (["--extra-config", "@/nowhere.json"], {}, "extra config /nowhere.json cannot be read"),
    (["--store-config", "/nowhere.json"], {}, "/nowhere.json cannot be read"),
    ([], {"MOONCAKE_MASTER": "h:1", "MOONCAKE_GLOBAL_SEGMENT_SIZE": "4x"}, "MOONCAKE_GLOBAL_SEGMENT_SIZE"),
    (["--tp-rank", "8", "--tp-size", "8"], {"MOONCAKE_MASTER": "h:1"}, "ranks count from 0"),
]
ONE_AFTER_THE_OTHER = """
import contextlib, io, json, os, sys
from pdctl.cli import run

for arguments, environ, _ in json.loads(sys.argv[1]):
    os.environ.update(environ)
    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()) as out:
        status = run(["store", "config", *arguments])
    for name in environ:
        del os.environ[name]
    print(json.dumps([status, out.getvalue(), said.getvalue()]))
"""


async def test_what_cannot_be_used_is_status_2_and_one_sentence() -> None:
    """All in one process: to start one takes longer than all of them."""
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", ONE_AFTER_THE_OTHER, json.dumps(CANNOT_BE_USED)), stdout=asyncio.subprocess.PIPE
    )
    answers = (await child.communicate())[0].decode().splitlines()
    for (_, _, expected), answer in zip(CANNOT_BE_USED, answers, strict=True):
        status, out, err = json.loads(answer)
        assert (status, out) == (2, "")
        assert expected in err
        assert "Traceback" not in err


async def test_check_and_warmup_are_0_beside_a_master_that_works(running: Master) -> None:
    status, out, err = await ended("store", "check", **told(running))
    assert (status, f"{running.address} answers, and a set-up works" in out) == (0, True), err
    status, out, err = await ended("store", "warmup", "--json", "--tp-rank", "1", "--tp-size", "2", **told(running))
    assert status == 0, err
    report = json.loads(out)
    assert (report["ready"], report["attempts"], report["removed"]) == (True, 1, True)
    assert report["rank"]["tp"] == 1


@pytest.mark.parametrize("command", ["check", "warmup"])
async def test_without_a_master_it_is_69_after_the_wait_and_the_reason(command: str) -> None:
    status, out, err = await ended("store", command, "--wait", "0.5", "--json", **told(Master()))
    assert status == 69
    report = json.loads(out)
    assert (report["ready"], report["step"], report["cause"]) == (False, "master", "master_unreachable")
    assert "rank dp0/cp0/tp0/pp0 has no store after" in err
    assert "likely: the master is not there" in err
