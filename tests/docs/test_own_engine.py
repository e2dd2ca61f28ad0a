"""
The two engines of docs/own_engine.md, taken out of the page and run as a reader would: real registry, agent, bytes.

Both are run for a caller that records, with a collector, which has to find the caller's whole trace afterwards.
"""

from __future__ import annotations

import asyncio
import os
import re
import sys
from pathlib import Path

from pdctl.core.trace import TraceContext
from tests.agents import agent
from tests.collector import Collector, Taken, collector
from tests.service import service

PAGE = Path(__file__).parents[2] / "docs" / "own_engine.md"
SCRIPTS = dict(re.findall(r'```python title="(\w+\.py)"\n(.*?)```', PAGE.read_text(), re.DOTALL))
SAID = "pages [42, 42, 42, 42] first token 99\n"
CALLER = TraceContext("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7", state="vendor=1")
WITHIN_S = 60


def test_the_page_has_both_of_them_and_says_what_they_print() -> None:
    assert set(SCRIPTS) == {"own_engine.py", "through_agent.py"}
    assert PAGE.read_text().count(SAID) == 2


def test_they_are_as_short_as_is_claimed() -> None:
    """Imports, blank lines and the call at the end left out."""
    for script in SCRIPTS.values():
        lines = [line for line in script.splitlines() if line.startswith(" ")]
        assert len(lines) <= 31


async def run(at: Path, script: str, *args: str, **environ: str) -> str:
    """What it prints; a script that fails says why."""
    file = at / script
    file.write_text(SCRIPTS[script])
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        str(file),
        *args,
        cwd=at,
        env=os.environ | {"TRACEPARENT": CALLER.traceparent} | environ,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(WITHIN_S):
            out, log = await child.communicate()
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
    assert child.returncode == 0, log.decode()
    return "".join(line for line in out.decode().splitlines(keepends=True) if line.startswith("pages"))


def told(at: Collector) -> dict[str, str]:
    return {"OTEL_EXPORTER_OTLP_ENDPOINT": at.url, "OTEL_BSP_SCHEDULE_DELAY": "100"}


def both_rooms(spans: list[Taken]) -> bool:
    return {"pdctl.room.sender", "pdctl.room.receiver"} <= {span.name for span in spans}


def check_trace(at: Collector) -> None:
    (sent,), (arrived,) = at.named("pdctl.room.sender"), at.named("pdctl.room.receiver")
    for room in (sent, arrived):
        assert (room.trace_id, room.parent, room.error) == (CALLER.trace_id, CALLER.span_id, None)
        assert room.attributes["pdctl.nbytes"] == 2 * 4 * (16 << 10) + 64
        assert [name for name, _ in room.events][-1] == "success"
    assert {room.about["pdctl.role"] for room in (sent, arrived)} == {"prefill", "decode"}
    assert sent.links == [(CALLER.trace_id, arrived.span_id)]


async def test_an_engine_in_process_moves_its_pages_and_both_sides_are_in_its_callers_trace(tmp_path: Path) -> None:
    async with collector() as at:
        with service(tmp_path / "registry.log", "--journal", "memory:") as registry:
            sides = [
                run(tmp_path, "own_engine.py", side, registry.url, "7", **told(at)) for side in ("prefill", "decode")
            ]
            printed = await asyncio.gather(*sides)
            await at.until(both_rooms)
        check_trace(at)
        (registration,) = at.named("pdctl.registration")
        assert registration.attributes["pdctl.registry"] == registry.url
    assert printed == ["", SAID]


async def test_an_engine_through_the_agent_moves_its_pages_and_the_agents_say_so_to_its_callers_trace(
    tmp_path: Path,
) -> None:
    async with collector() as at:
        with service(tmp_path / "registry.log", "--journal", "memory:", **told(at)) as registry:
            other = tmp_path / "run" / "other.sock"
            args = ("--registry", registry.url, "--socket", str(other))
            with agent(tmp_path, *args, socket=None, **told(at)) as movers:
                sockets = {"prefill": movers.socket, "decode": other}
                sides = [
                    run(tmp_path, "through_agent.py", side, str(socket), str(tmp_path / f"pool-{side}"), "8")
                    for side, socket in sockets.items()
                ]
                printed = await asyncio.gather(*sides)
                await at.until(both_rooms)
                lines = [line for line in movers.log().splitlines() if "room succeeded" in line]
        check_trace(at)
    assert printed == ["", SAID]
    assert len(lines) == 2
    assert all(f"trace_id={CALLER.trace_id}" in line for line in lines)
    asked = {
        span.name for span in at.spans if span.trace_id == CALLER.trace_id and span.about["pdctl.role"] == "registry"
    }
    assert asked == {"GET /route"}  # the decode's look-ups, for this request
