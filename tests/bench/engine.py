"""A write through the port beside the bare engine driven by hand: submit each block, poll each, between two processes.

The rival does what ours does without its promises: no peer asked, no address checked, a spin instead of a sleep.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

import numpy as np

from pdctl.core.plan import CopyPlan
from pdctl.device.cpu import Cpu
from pdctl.engine import wheel
from pdctl.engine.base import Engine
from pdctl.engine.mooncake import open_mooncake
from pdctl.engine.settings import MooncakeSettings
from pdctl.memory import Arena
from tests.bench.rivals import Row, race
from tests.engine.processes import peer

BLOCKS = {4 << 10: 256, 64 << 10: 256, 1 << 20: 64}
WINDOW = 16
ARENA = 64 << 20


def bench() -> list[Row]:
    return asyncio.run(rows())


async def rows() -> list[Row]:
    """Our engine runs on this loop; the race is in a thread beside it, as the engine's callers are tasks beside it."""
    made: list[Any] = []
    with peer() as far, Arena(ARENA) as arena:
        pointer = far.ask_now("register", nbytes=ARENA)["pointer"]
        async with open_mooncake(MooncakeSettings(), Cpu(), factory=lambda: bare(made)) as engine:
            await engine.register(arena.region)
            found = []
            for nbytes, blocks in BLOCKS.items():
                at = np.arange(blocks, dtype=np.int64) * nbytes
                plan = CopyPlan(arena.region.pointer + at, pointer + at, np.full(blocks, nbytes, np.int64))
                loop = asyncio.get_running_loop()
                found.append(await asyncio.to_thread(one, engine, made[0], loop, far.session, plan))
            return found


def bare(made: list[Any]) -> Any:
    import mooncake.engine

    wheel.silence(mooncake.engine)
    made.append(mooncake.engine.TransferEngine())
    return made[0]


def one(engine: Engine, raw: Any, loop: asyncio.AbstractEventLoop, session: str, plan: CopyPlan) -> Row:
    def ours() -> None:
        asyncio.run_coroutine_threadsafe(engine.write(session, plan, deadline_s=30), loop).result()

    def theirs() -> None:
        by_hand(raw, session, plan)

    return race(
        f"{len(plan)} blocks of {int(plan.nbytes[0]) >> 10} KiB, {plan.total / 1e9:.3f} GB",
        ("port", ours),
        ("by hand", theirs),
        round_s=0.2,
    )


def by_hand(raw: Any, session: str, plan: CopyPlan) -> None:
    waiting = deque(zip(plan.src.tolist(), plan.dst.tolist(), plan.nbytes.tolist(), strict=True))
    flying: list[int] = []
    while waiting or flying:
        while waiting and len(flying) < WINDOW:
            ticket = raw.transfer_submit_write(session, *waiting.popleft())
            if ticket == 0:
                raise AssertionError("the engine took no block: nothing here is worth timing")
            flying.append(ticket)
        flying = [ticket for ticket in flying if raw.transfer_check_status(ticket) == 0]
