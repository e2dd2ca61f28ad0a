"""What every node is made of: loops that live and die with the body beside which they stand."""

from __future__ import annotations

import asyncio

import pytest

from pdctl.node import LoopEnded, beside


async def forever() -> None:
    await asyncio.Event().wait()


async def test_the_loops_run_while_the_body_does_and_are_gone_after_it() -> None:
    async with beside(heart=forever()):
        assert "heart" in {task.get_name() for task in asyncio.all_tasks()}
    assert "heart" not in {task.get_name() for task in asyncio.all_tasks()}


async def test_a_loop_that_dies_ends_the_body_with_its_own_error() -> None:
    async def dies() -> None:
        raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        async with beside(journal=dies(), heart=forever()):
            await forever()


async def test_a_loop_that_returns_ends_the_body_too() -> None:
    async def returns() -> None:
        return

    with pytest.raises(LoopEnded, match="prober") as caught:
        async with beside(prober=returns()):
            await forever()
    assert caught.value.name == "prober"


async def test_the_bodys_own_error_comes_out_bare_and_first() -> None:
    async def fails_when_stopped() -> None:
        try:
            await forever()
        finally:
            raise OSError("late symptom")

    error = ValueError("the first cause")

    async def body() -> None:
        async with beside(link=fails_when_stopped()):
            await asyncio.sleep(0)
            raise error

    with pytest.raises(ValueError, match="the first cause") as caught:
        await body()
    assert caught.value is error


async def test_cancelling_the_body_cancels_the_loops_and_nothing_else() -> None:
    running, cleaned = asyncio.Event(), asyncio.Event()

    async def loop() -> None:
        try:
            running.set()
            await forever()
        finally:
            cleaned.set()

    async def body() -> None:
        async with beside(loop=loop()):
            await forever()

    task = asyncio.create_task(body())
    await running.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert cleaned.is_set()
