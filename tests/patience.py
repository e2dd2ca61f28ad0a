"""How a test waits for what sets no event of its own: by looking at the thing itself, with a bound that a busy machine
keeps too. What a promise says of time is measured where it is promised, and not by these bounds."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from pdctl.lag import LoopLag

WITHIN_S = 60.0
_EVERY_S = 0.002
_TICK_S = 0.005


async def until(true: Callable[[], object], within_s: float = WITHIN_S) -> None:
    async with asyncio.timeout(within_s):
        while not true():  # noqa: ASYNC110
            await asyncio.sleep(_EVERY_S)


async def until_told(so: Callable[[], Awaitable[object]], within_s: float = WITHIN_S) -> None:
    """The same of what has to be asked."""
    async with asyncio.timeout(within_s):
        while not await so():  # noqa: ASYNC110
            await asyncio.sleep(_EVERY_S)


@asynccontextmanager
async def unhindered() -> AsyncIterator[Callable[[], float]]:
    """Gives what tells how long the block has taken, without the time by which this process's loop came late to its
    ticks: a busy machine's share. So not for what may itself hold the loop."""
    began, late_s = time.monotonic(), list[float]()
    lag = LoopLag(time.monotonic, _TICK_S)
    ticking = asyncio.create_task(lag.run(late_s.append), name="what the machine's business takes")
    try:
        yield lambda: time.monotonic() - began - sum(late_s) - lag.late_s
    finally:
        ticking.cancel()
        await asyncio.wait([ticking])
