"""
What a process of ours has loaded when its work is done, by names: a command waits for what it uses, and for no more.

Each is a new interpreter that does the real thing and then says what it has loaded. Held by names because times are
the machine's: each name here is a room, or a package, whose load was seen in a command that has no use for it.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.service import service

ROOT = Path(__file__).parent.parent

SERVERS = {"fastapi", "starlette", "uvicorn", "pdctl.server", "pdctl.dialects", "pdctl.metrics", "prometheus_client"}
REGISTRY = {"pdctl.serving", "pdctl.registrar", "pdctl.persistence.sqlite", "aiosqlite", "pdctl.dialects.sglang"}
ENGINES = {"mooncake", "pdctl.engine.mooncake", "pdctl.engine.promises", "pdctl.store.mooncake", "pdctl.kvstore"}
RANKS = {"numpy", "zmq", "pdctl.node", "pdctl.sender", "pdctl.receiver", "pdctl.peer", "pdctl.memory", "pdctl.handed"}
TYPED = {"pdctl.cli", "pdctl.flags", "pdctl.commands"}
SETTINGS = {"pdctl.config", "pydantic", "pydantic_settings"}
ANYTHING = {*SERVERS, *REGISTRY, *ENGINES, *RANKS, *SETTINGS, "aiohttp", "structlog", "rich", "asyncio", "pdctl.errors"}

AND_SAY = """
import json, sys
{deed}
print(json.dumps(sorted(sys.modules)), flush=True)
"""
RUN = AND_SAY.format(
    deed="""
from pdctl.cli import run
try:
    run(sys.argv[1:])
except SystemExit as end:  # argparse's own way to end: --help, --version
    assert not end.code
"""
)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with service(tmp_path_factory.mktemp("registry") / "log", "--journal", "memory:") as running:
        yield running.url


def said(program: str, *words: str) -> set[str]:
    """Every module that a new interpreter has loaded at the end of `program`: its last line says them."""
    done = subprocess.run([sys.executable, "-c", program, *words], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def said_when_stopped(*words: str) -> set[str]:
    """The same of a service: stopped when it has said where it is."""
    command = [sys.executable, "-c", RUN, *words]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as child:
        try:
            assert child.stdout
            assert "serving at" in child.stdout.readline()
            child.send_signal(signal.SIGTERM)
            return set(json.loads(child.stdout.read().splitlines()[-1]))
        finally:
            child.kill()


@pytest.mark.parametrize(
    "words", [["--version"], ["--help"], ["drain", "--help"], ["completion", "bash"]], ids=" ".join
)
def test_what_only_prints_loads_nothing_that_works(words: list[str]) -> None:
    loaded = said(RUN, *words)
    assert {"pdctl.cli", "pdctl.flags.serve"} <= loaded
    assert loaded & ANYTHING == set()


ASKING = ["status", "sessions", "explain", "drain nobody", "probe 127.0.0.1:1"]
TRYING = "conformance --idle 0.1"


@pytest.mark.parametrize("words", [*(f"{words} --at" for words in ASKING), TRYING])
def test_who_asks_a_registry_loads_no_server_and_no_engine(words: str, url: str) -> None:
    loaded = said(RUN, *words.split(), url)
    assert {"pdctl.config", "aiohttp"} <= loaded
    assert loaded & {*SERVERS, *REGISTRY, *ENGINES, *RANKS} == set()


def test_who_registers_a_rank_for_another_loads_neither(url: str) -> None:
    loaded = said(RUN, "register", "--registry", url, "--rank-host", "127.0.0.1", "--rank-port", "40130")
    assert "pdctl.holding" in loaded
    assert loaded & {*SERVERS, *REGISTRY, *ENGINES, *RANKS} == set()


def test_a_registry_loads_no_engine_and_no_arrays() -> None:
    loaded = said_when_stopped("serve", "--port", "0", "--journal", "memory:")
    assert {"pdctl.serving", "pdctl.dialects.sglang", "uvicorn"} <= loaded
    assert loaded & {*ENGINES, *RANKS} == set()


def test_who_keeps_the_processes_of_an_agent_has_nothing_of_what_they_do(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir(mode=0o700)
    loaded = said_when_stopped("agent", "--socket", str(tmp_path / "run/agent.sock"))
    assert "pdctl.succession" in loaded
    assert loaded & {*SERVERS, *REGISTRY, *ENGINES, *RANKS} == set()


def test_a_rank_loads_no_command_line_and_no_registry() -> None:
    loaded = said(AND_SAY.format(deed="from pdctl import prefill_node, decode_node"))
    assert {"pdctl.node", "pdctl.sender"} <= loaded
    assert loaded & {*TYPED, *REGISTRY} == set()


@pytest.mark.parametrize("name", ["RegistryClient", "Settings", "MooncakeSettings"])
def test_an_engine_that_wants_a_client_or_a_setting_gets_that_alone(name: str) -> None:
    loaded = said(AND_SAY.format(deed=f"from pdctl import {name}"))
    assert loaded & {*TYPED, *SERVERS, *REGISTRY, *ENGINES, *RANKS} == set()


def test_the_processes_that_tests_start_load_no_test_and_no_pytest() -> None:
    modules = ("engine.peer", "e2e.rank", "e2e.instance", "faults.room_rank", "faults.agent_rank", "faults.cradle")
    more = ("agent_engine", "monitoring.node", "explain.moving_rank", "store.rank", "store.offload")
    deed = "\n".join(f"import tests.{name}" for name in (*modules, *more))
    loaded = said(AND_SAY.format(deed=deed))
    assert loaded & {"pytest", "_pytest", "hypothesis", *TYPED} == set()
    assert [name for name in loaded if name.rpartition(".")[2].startswith("test_")] == []


def test_a_name_that_is_looked_for_here_is_one_that_there_is() -> None:
    """A room that was renamed would be absent from every command for ever."""
    rooms = {name for name in ANYTHING | TYPED if name.startswith("pdctl.")}
    there = [(ROOT / name.replace(".", "/")) for name in rooms]
    assert [at for at in there if not at.is_dir() and not at.with_suffix(".py").is_file()] == []
