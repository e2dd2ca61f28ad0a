"""Rooms that are ready together take turns of the loop, and everything else comes in between."""

from __future__ import annotations

import asyncio
from itertools import pairwise

from pdctl.pace import Pace


async def test_between_two_steps_whatever_else_is_ready_has_its_turn() -> None:
    pace, order = Pace(), list[str]()

    async def room(name: str) -> None:
        await pace.step()
        order.append(name)

    def others() -> None:
        order.append(".")
        if len(order) < 20:
            asyncio.get_running_loop().call_soon(others)

    asyncio.get_running_loop().call_soon(others)
    await asyncio.gather(*(room(name) for name in "abcd"))
    said = "".join(order)
    assert [each for each in said if each != "."] == list("abcd")
    assert all(not (one.isalpha() and other.isalpha()) for one, other in pairwise(said)), said


async def test_who_is_alone_does_not_wait() -> None:
    pace = Pace()
    step = asyncio.ensure_future(pace.step())
    await asyncio.sleep(0)
    assert step.done()
    await asyncio.sleep(0)
    await pace.step()


async def test_who_gives_up_in_the_line_holds_up_nobody() -> None:
    pace = Pace()
    steps = [asyncio.ensure_future(pace.step()) for _ in range(4)]
    await asyncio.sleep(0)
    steps[1].cancel()
    steps[2].cancel()
    async with asyncio.timeout(5.0):
        await steps[3]
