"""Where the stock wheel comes from, and the child process that speaks for stock SGLang."""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TextIO

import pytest

from tests.engine.processes import Child
from tests.wire.stock.across import StockInstance

ROOT = Path(__file__).parents[3]
CACHE = ROOT / ".cache"
LOCK = ROOT / "deploy" / "lock" / "stock.txt"
INSTALL_S = 120
START_S, ANSWER_S = 60.0, 60.0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.stock)


def pip_install(folder: Path) -> None:
    # no dependencies: torch alone is gigabytes, and what the parts under test import is in .venv already
    words = ["install", "--disable-pip-version-check", "--no-input", "--retries", "1", "--timeout", "15"]
    what = ["--no-deps", "--no-compile", "--require-hashes", "--target", str(folder), "-r", str(LOCK)]
    command = [sys.executable, "-m", "pip", *words, *what]
    done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_S, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "pip said nothing")


def stamp() -> str:
    return hashlib.sha256(LOCK.read_bytes() + sys.version.encode()).hexdigest()


def installed() -> Path:
    """`.cache/stock` as the lock wants it: installed once, by one of the workers that ask at the same time."""
    folder, mark = CACHE / "stock", CACHE / "stock" / ".stamp"
    CACHE.mkdir(exist_ok=True)
    with (CACHE / "stock.lock").open("a+") as gate:
        fcntl.flock(gate, fcntl.LOCK_EX)
        if mark.exists() and mark.read_text() == stamp():
            return folder
        check_not_tried(gate)
        shutil.rmtree(folder, ignore_errors=True)
        scratch = Path(tempfile.mkdtemp(dir=CACHE))
        try:
            pip_install(scratch)
            (scratch / ".stamp").write_text(stamp())
            scratch.rename(folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return folder


def check_not_tried(gate: TextIO) -> None:
    """Of the workers of one run the first one tries: without a network each try takes as long as pip's time-outs."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
    gate.seek(0)
    if gate.read() == run:
        raise RuntimeError("another worker has tried, see its report")
    gate.truncate(0)
    gate.write(run)
    gate.flush()


@pytest.fixture(scope="session")
def stock_folder() -> Path:
    """A folder with the stock wheel. Without it these tests skip, or fail where REQUIRE_STOCK=1 asks for that."""
    try:
        return installed()
    except (OSError, RuntimeError, subprocess.TimeoutExpired) as error:
        said = f"stock SGLang cannot be installed from {LOCK.name}: {error}"
        if os.environ.get("REQUIRE_STOCK") == "1":
            pytest.fail(said)
        pytest.skip(said)


class Stock:
    """`await stock("topology", name="d0", address=...)` asks the child; what stock code raised is raised here."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def __call__(self, do: str, **given: Any) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **given}).encode() + b"\n")
        return await self.answer(ANSWER_S)

    async def answer(self, within_s: float) -> Any:
        assert self.process.stdout is not None
        line = await asyncio.wait_for(self.process.stdout.readline(), within_s)
        if not line:
            raise RuntimeError("the stock child ended: its own words are in the captured stderr")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["result"]


def environment(folder: Path) -> dict[str, str]:
    """What a stock rank on one machine without RDMA is given, and nothing of this process's own SGLang settings."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SGLANG_", "MC_", "MOONCAKE_"))}
    ours = {
        "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}",
        "SGLANG_HOST_IP": "127.0.0.1",
        "SGLANG_FAILED_SESSION_PROBE_INTERVAL_S": "0.2",
        "MOONCAKE_PROTOCOL": "tcp",
        "MC_FORCE_TCP": "1",
        "MC_LOG_LEVEL": "ERROR",
        "MC_TCP_PROGRESS_TIMEOUT_SEC": "5",
        "MC_TCP_STATUS_TIMEOUT_SEC": "5",
    }
    return kept | ours


@asynccontextmanager
async def running(folder: Path) -> AsyncIterator[Stock]:
    command = (sys.executable, "-u", "-m", "tests.wire.stock.child")
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        *command, cwd=ROOT, env=environment(folder), stdin=pipe, stdout=pipe, limit=1 << 24
    )
    try:
        stock = Stock(process)
        await stock.answer(START_S)
        yield stock
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@pytest.fixture(scope="module")
def stock_child(stock_folder: Path) -> Iterator[Child]:
    """One process for all tests of a module: starting one takes longer than most of them."""
    with Child("tests.wire.stock.child", environ=environment(stock_folder)) as one:
        yield one


@pytest.fixture
def stock_instance(stock_child: Child) -> StockInstance:
    return StockInstance(stock_child)


@pytest.fixture
async def stock(stock_folder: Path) -> AsyncIterator[Stock]:
    async with running(stock_folder) as child:
        yield child
