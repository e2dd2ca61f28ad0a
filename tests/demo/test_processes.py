"""No child outlives the demo, and a child that hangs costs a deadline, never more. Real processes."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import textwrap
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from pdctl.demo.processes import Child, Family, Goodbye, family
from pdctl.errors import Unreachable

ECHO = """
import json, sys
print(json.dumps({"event": "ready", "port": 7}), flush=True)
print("log line", file=sys.stderr, flush=True)
for line in sys.stdin:
    told = json.loads(line)
    if told["op"] == "swallow":
        continue
    print(json.dumps({"event": "progress", "of": told["id"]}), flush=True)
    print(json.dumps({"answers": told["id"], "said": told.get("say")}), flush=True)
print(json.dumps({"event": "bye"}), flush=True)
"""
DEAF = """
import signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print('{"event": "ready"}', flush=True)
while True: time.sleep(1)
"""


@pytest.fixture
async def members() -> AsyncIterator[Family]:
    async with family(os.environ) as made:
        yield made


async def start(members: Family, program: str, goodbye: Goodbye = Goodbye.END_OF_INPUT) -> Child:
    child = await members.start_command("child", [sys.executable, "-c", program], goodbye)
    await child.event("ready")
    return child


def gone(pid: int) -> bool:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    return True


async def until_gone(pid: int) -> None:
    async with asyncio.timeout(60):
        while not gone(pid):  # noqa: ASYNC110  # another process's child: only the kernel's table tells
            await asyncio.sleep(0.01)


async def test_answers_find_their_questions_and_the_rest_is_news(members: Family) -> None:
    child = await start(members, ECHO)
    first, second = child.asked("echo", say="one"), child.asked("echo", say="two")
    assert (await second.within(10))["said"] == "two"
    assert (await first.within(10))["said"] == "one"
    assert [event["event"] for event in child.events] == ["ready", "progress", "progress"]
    assert (await child.event("progress", of=2))["of"] == 2


async def test_news_is_heard_as_it_comes(members: Family) -> None:
    child = await start(members, ECHO)
    heard: list[object] = []
    child.hear = lambda event: heard.append(event["of"])
    await child.ask("echo")
    await child.ask("echo")
    assert heard == [1, 2]


async def test_a_child_told_to_end_says_goodbye_and_is_gone(members: Family) -> None:
    child = await start(members, ECHO)
    ending = await members.end(child)
    assert (ending.status, ending.forced) == (0, False)
    assert child.events[-1] == {"event": "bye"}
    assert child.log_tail() == ["log line"]
    assert gone(child.pid)


async def test_a_child_that_ignores_sigterm_is_killed_when_the_grace_is_over(members: Family) -> None:
    child = await start(members, DEAF, Goodbye.SIGTERM)
    ending = await child.close(grace_s=0.2)
    assert (ending.status, ending.forced) == (-signal.SIGKILL, True)
    assert ending.took_s < 5


async def test_a_stopped_child_still_hears_that_it_is_over(members: Family) -> None:
    child = await start(members, ECHO)
    child.pause()
    ending = await child.close()
    assert (ending.status, ending.forced) == (0, False)


async def test_a_paused_child_costs_its_deadline_and_answers_after_it_goes_on(members: Family) -> None:
    child = await start(members, ECHO)
    child.pause()
    question = child.asked("echo", say="late")
    with pytest.raises(Unreachable, match=r"not answered echo within 0\.1 s"):
        await question.within(0.1)
    child.resume()
    assert (await question.within(10))["said"] == "late"


async def test_whoever_waits_for_a_killed_child_is_told_at_once(members: Family) -> None:
    child = await start(members, ECHO)
    question, waiting = child.asked("swallow"), asyncio.create_task(child.event("never", deadline_s=60))
    await members.end(child, Child.kill)
    for waiter in (question.within(60), waiting, child.ask("echo", deadline_s=60)):
        with pytest.raises(Unreachable, match="has ended"):
            await waiter
    assert members.endings[0].status == -signal.SIGKILL


async def test_an_event_that_never_comes_costs_its_deadline(members: Family) -> None:
    child = await start(members, ECHO)
    with pytest.raises(Unreachable, match="has not said never"):
        await child.event("never", deadline_s=0.05)


async def test_all_are_gone_when_the_block_is_left_by_an_error() -> None:
    pids: list[int] = []

    async def fail() -> None:
        async with family(os.environ) as members:
            pids.extend([(await start(members, program)).pid for program in (ECHO, ECHO)])
            members.children[0].pause()
            raise ValueError("the story broke")

    with pytest.raises(ValueError, match="the story broke"):
        await fail()
    assert len(pids) == 2
    assert all(map(gone, pids))


async def test_all_are_gone_when_even_the_farewell_is_cancelled() -> None:
    started = asyncio.get_running_loop().create_future()

    async def live() -> None:
        async with family(os.environ) as members:
            started.set_result(await start(members, DEAF, Goodbye.SIGTERM))

    task = asyncio.create_task(live())
    child = await started
    async with asyncio.timeout(60):
        while not task.done():
            task.cancel()
            await asyncio.sleep(0)
        while child.alive:  # noqa: ASYNC110  # killed without waiting: only the loop's own bookkeeping tells
            await asyncio.sleep(0.01)
    assert gone(child.pid)


async def test_a_child_dies_with_its_parent_even_when_it_is_stopped(tmp_path: Path) -> None:
    program = tmp_path / "parent.py"
    program.write_text(
        textwrap.dedent("""
            import asyncio, os, sys
            from pdctl.demo.processes import Goodbye, family
            async def main():
                async with family(os.environ) as members:
                    child = await members.start_command("c", [sys.executable, "-c", sys.argv[1]], Goodbye.SIGTERM)
                    await child.event("ready")
                    child.pause()
                    print(child.pid, flush=True)
                    await asyncio.Event().wait()
            asyncio.run(main())
        """)
    )
    parent = await asyncio.create_subprocess_exec(
        sys.executable, str(program), DEAF, stdout=asyncio.subprocess.PIPE, cwd=Path.cwd()
    )
    assert parent.stdout is not None
    pid = int(await parent.stdout.readline())
    assert not gone(pid)
    parent.kill()
    await parent.wait()
    await until_gone(pid)


async def test_ctrl_c_reaches_the_parent_only(members: Family) -> None:
    child = await start(members, ECHO)
    assert os.getsid(child.pid) == child.pid != os.getsid(0)


async def test_the_ports_that_a_child_listens_at_are_known(members: Family) -> None:
    program = (
        "import json, socket, sys; s = socket.create_server(('127.0.0.1', 0)); silent = socket.socket();"
        "silent.bind(('127.0.0.1', 0));"
        "print(json.dumps({'event': 'ready', 'port': s.getsockname()[1]}), flush=True); sys.stdin.read()"
    )
    child = await start(members, program)
    assert child.listening_ports() == [(await child.event("ready"))["port"]]


async def test_a_leash_without_its_parent_runs_nothing() -> None:
    leash = Path(sys.modules[family.__module__].__file__ or "").with_name("leash.py")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(leash), "1", "echo", "ran"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert (out, process.returncode) == (b"", 1)
    assert b"before the leash was tied" in err
