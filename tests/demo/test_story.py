"""The whole story, for real: what it proves, how it fails, and that nothing outlives it, however it ends."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import uuid
from collections.abc import Sequence
from contextlib import suppress

import psutil
import pytest
from rich.console import Console

from pdctl.demo.prompts import Prompt
from pdctl.demo.screen import Screen
from pdctl.demo.stage import Finished
from pdctl.demo.story import ACTS, Show, _judge_tokens
from pdctl.demo.toy import ToyConfig

MARK = "DEMO_TEST_MARK"


class Demo:
    """`pdctl demo` in a process of its own; its children are known by a mark in their environment."""

    def __init__(self, *args: str, **environment: str) -> None:
        self.mark = str(uuid.uuid4())
        self._args = args
        self._environment = {**os.environ, **environment, MARK: self.mark}

    async def start(self) -> asyncio.subprocess.Process:
        pipe = asyncio.subprocess.PIPE
        command = (sys.executable, "-m", "pdctl", "demo", *self._args)
        self.process = await asyncio.create_subprocess_exec(
            *command, stdout=pipe, stderr=pipe, env=self._environment, limit=1 << 22
        )
        return self.process

    async def run(self) -> tuple[int, str, str]:
        process = await self.start()
        out, err = await process.communicate()
        return process.returncode or 0, out.decode(), err.decode()

    def alive(self) -> list[psutil.Process]:
        return [process for process in psutil.process_iter() if self._is_ours(process)]

    def _is_ours(self, process: psutil.Process) -> bool:
        with suppress(psutil.Error):
            return process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == self.mark
        return False

    async def until(self, n_alive: range) -> None:
        async with asyncio.timeout(60):
            while len(self.alive()) not in n_alive:  # noqa: ASYNC110  # only the kernel's table tells
                await asyncio.sleep(0.05)


async def test_the_demo_proves_all_that_it_claims_and_leaves_nothing() -> None:
    demo = Demo("--json")
    status, out, err = await demo.run()
    told = json.loads(out)
    failed = [check for check in told["checks"] if not check["ok"]]
    assert (status, failed, told["ok"]) == (0, [], True), err
    assert {check["act"] for check in told["checks"]} == set(range(1, len(ACTS) + 1))
    assert all({"name", "ok", "measured", "expected"} <= check.keys() for check in told["checks"])
    assert told["moved"]["nbytes"] == told["moved"]["pages"] * ToyConfig().page_nbytes > 0
    assert any(line.startswith("sglang:failed_session_recoveries_total 0.0 -> 1.0") for line in told["metrics"])
    assert demo.alive() == []


async def test_a_demo_whose_ranks_cannot_open_fails_with_their_logs() -> None:
    demo = Demo("--json", MC_TCP_PROTO="1")
    status, out, _ = await demo.run()
    (check,) = json.loads(out)["checks"]
    assert status == 1
    assert "has ended" in check["measured"]
    assert any("MC_TCP_PROTO=1" in line for line in check["evidence"])
    assert demo.alive() == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
async def test_no_child_outlives_a_demo_that_is_ended_in_the_middle(number: signal.Signals) -> None:
    demo = Demo()
    process = await demo.start()
    await demo.until(range(4, 9))
    process.send_signal(number)
    await process.communicate()
    await demo.until(range(1))
    assert process.returncode != 0 or number is signal.SIGTERM


async def test_a_trace_that_cannot_be_read_is_wrong_usage_and_starts_nothing() -> None:
    status, out, err = await Demo("--trace", "/nonexistent.jsonl").run()
    assert (status, out) == (2, "")
    assert "nonexistent.jsonl cannot be read" in err


def finished(tokens: Sequence[int], **decoded: object) -> Finished:
    prompt = Prompt("one", (1, 2), 3)
    return Finished(prompt, {"digest": "a"}, {"tokens": list(tokens), "digest": "a", **decoded}, [7, 8, 9])


@pytest.mark.parametrize(
    ("outcome", "status"),
    [
        (finished([7, 8, 9]), 0),
        (finished([7, 8, 1]), 1),
        (finished([7, 8]), 1),
        (finished([], error="room 5 failed: broken"), 1),
    ],
    ids=["equal", "one token differs", "one is missing", "failed"],
)
def test_one_wrong_token_makes_exit_status_1(outcome: Finished, status: int) -> None:
    show = Show(Screen(Console(quiet=True)), ToyConfig(), ())
    _judge_tokens(show, "tokens", [finished([7, 8, 9]), outcome])
    assert show.report.exit_status == status


def test_pages_that_differ_are_seen_even_where_the_tokens_are_equal() -> None:
    assert finished([7, 8, 9]).same_bytes
    assert not finished([7, 8, 9], digest="b").same_bytes
