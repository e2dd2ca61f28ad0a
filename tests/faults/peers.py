"""
A process with several real engines, each with memory to write to: `python -m tests.faults.peers N`.

Says {"session": the first one, "sessions": [...], "pointers": [...], "canaries": [...]} once they listen, then answers
nothing more and ends with its stdin. MC_MIN_RPC_PORT and MC_MAX_RPC_PORT, which the engine reads, choose the port of a
single one.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from contextlib import AsyncExitStack

from pdctl.device.cpu import Cpu
from pdctl.engine.mooncake import open_mooncake
from pdctl.engine.settings import MooncakeSettings
from pdctl.memory import Arena
from tests.engine.processes import die_with_parent

NBYTES = 1 << 16


async def main(n: int) -> None:
    async with AsyncExitStack() as stack:
        engines = [await stack.enter_async_context(open_mooncake(MooncakeSettings(), Cpu())) for _ in range(n)]
        arenas = [stack.enter_context(Arena(NBYTES)) for _ in engines]
        for engine, arena in zip(engines, arenas, strict=True):
            await engine.register(arena.region)
        sessions = [engine.session for engine in engines]
        pointers = [arena.region.pointer for arena in arenas]
        canaries = [engine.canary.region.pointer for engine in engines]  # type: ignore[attr-defined]
        hello = {"session": sessions[0], "sessions": sessions, "pointers": pointers, "canaries": canaries}
        print(json.dumps(hello), flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    die_with_parent()
    asyncio.run(main(int(sys.argv[1])))
    os._exit(0)
