"""How a test waits for what sets no event of its own: by looking at the thing itself, with a bound that a busy machine
keeps too. What a promise says of time is measured where it is promised, and not by these bounds."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

WITHIN_S = 60.0
_EVERY_S = 0.002


async def until(true: Callable[[], object], within_s: float = WITHIN_S) -> None:
    async with asyncio.timeout(within_s):
        while not true():  # noqa: ASYNC110
            await asyncio.sleep(_EVERY_S)


async def until_told(so: Callable[[], Awaitable[object]], within_s: float = WITHIN_S) -> None:
    """The same of what has to be asked."""
    async with asyncio.timeout(within_s):
        while not await so():  # noqa: ASYNC110
            await asyncio.sleep(_EVERY_S)
