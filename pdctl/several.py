"""The same question to many, some of them at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

W = TypeVar("W")
R = TypeVar("R")


async def of_each(ask: Callable[[W], Awaitable[R]], whom: Iterable[W], *, at_once: int) -> list[R]:
    """What each has answered, in the order in which they were named. The first error of any ends the wait."""
    places = asyncio.Semaphore(at_once)

    async def one(who: W) -> R:
        async with places:
            return await ask(who)

    return await asyncio.gather(*map(one, whom))
