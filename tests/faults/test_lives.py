"""A port that passes from one life to the next: what was meant for the one is never written into the other.

The lives are real engines that nothing tells apart: same session, same data port, memory at the same address. They are
killed at random moments, some of them stopped before; the next one listens 15 to 120 ms later (lives.py).
"""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path

import pytest

from tests.engine.processes import Child
from tests.engine.test_hazards import QUIET, go_on
from tests.faults.lives import Lineage, soak

KILLS = 15


async def test_the_bare_engine_writes_into_the_life_that_came_after(tmp_path: Path) -> None:
    """Without this the rest shows nothing: the lives really cannot be told apart."""
    async with Lineage.beginning(tmp_path, "stock") as lineage:
        told = json.dumps({"session": lineage.session, "pointer": lineage.at})
        with await asyncio.to_thread(Child, "tests.engine.bare", "writes_to_an_heir", told, environ=QUIET) as writer:
            assert writer.hello["code"] == 0
            lineage.kill()
            await lineage.bear()
            go_on(writer)
            found = await asyncio.to_thread(writer.line)
            assert found["codes"][-1] == 0
            assert found["probe"] == 0


@pytest.mark.parametrize("kind", ["ours", "stock"])
async def test_nothing_is_ever_written_into_a_life_under_the_session_of_another(tmp_path: Path, kind: str) -> None:
    seed = random.randrange(1 << 30)
    tally = await soak(KILLS, kind, seed, tmp_path)
    print(f"seed {seed}: {tally}")
    assert tally.kills == KILLS
    assert tally.foreign == 0, "bytes in a life that they were not meant for"
    assert tally.lies == 0, "writes that were said to have landed in a life that was over"
    assert tally.stuck == 0, "lives that were registered anew and never reached"
