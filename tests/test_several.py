"""Many are asked, few at a time, and nobody's answer is taken for another's."""

from __future__ import annotations

import asyncio

import pytest

from pdctl.several import of_each


async def test_answers_keep_the_order_and_no_more_are_asked_at_once_than_may_be() -> None:
    under_way, most = 0, 0

    async def ask(who: int) -> str:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        for _ in range(9 - who):  # the first to be asked is the last to answer
            await asyncio.sleep(0)
        under_way -= 1
        return str(who)

    assert await of_each(ask, range(9), at_once=3) == [str(who) for who in range(9)]
    assert most == 3


async def test_an_error_is_told_as_it_came() -> None:
    async def ask(who: int) -> int:
        return 1 // who

    with pytest.raises(ZeroDivisionError):
        await of_each(ask, [1, 0], at_once=2)
