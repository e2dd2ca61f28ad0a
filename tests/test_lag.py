"""How late a loop is, measured on one that is truly held."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import pytest

from pdctl.lag import LATE_S, Alarm, LoopLag, done_within, patience, watched
from tests.patience import until


@asynccontextmanager
async def ticking(lag: LoopLag, heard: list[float]) -> AsyncIterator[asyncio.Task[Any]]:
    task = asyncio.create_task(lag.run(heard.append))
    await asyncio.sleep(0)
    yield task
    task.cancel()
    await asyncio.wait([task])


def hold_the_loop(seconds: float) -> None:
    time.sleep(seconds)


async def test_a_loop_that_was_held_is_late_before_and_at_its_next_tick() -> None:
    heard: list[float] = []
    lag = LoopLag(time.monotonic, 0.01)
    async with ticking(lag, heard):
        hold_the_loop(0.2)
        assert lag.late_s >= 0.18
        async with asyncio.timeout(60):
            while not heard:  # noqa: ASYNC110
                await asyncio.sleep(0)
        assert heard[0] >= 0.18
        await until(lambda: lag.late_s < 0.1)


async def test_a_loop_that_keeps_up_is_not_late() -> None:
    heard: list[float] = []
    async with ticking(LoopLag(time.monotonic, 0.005), heard):
        async with asyncio.timeout(60):
            while len(heard) < 10:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
    assert min(heard) < 0.05  # the best: a busy machine makes every loop late


async def test_nothing_is_late_before_it_runs_or_after_it_was_cancelled() -> None:
    lag = LoopLag(time.monotonic, 0.001)
    assert lag.late_s == 0
    async with ticking(lag, []):
        pass
    hold_the_loop(0.01)
    assert lag.late_s == 0


async def test_what_is_watched_is_told_its_worst_stall_and_none_from_before() -> None:
    time.sleep(1.0)  # noqa: ASYNC251
    async with watched(time.monotonic, 0.005) as late_s:
        await asyncio.sleep(0.02)
        before = late_s()
        time.sleep(0.2)  # noqa: ASYNC251
        assert late_s() >= 0.18, "before the tick that is late"
        await asyncio.sleep(0.05)
        assert late_s() >= 0.18, "and after ticks that were not"
    assert before < 0.9
    assert [task.get_name() for task in asyncio.all_tasks() if "lag" in task.get_name()] == []


async def test_an_alarm_rings_once_and_not_when_it_was_cancelled() -> None:
    rung: list[str] = []
    Alarm(0.01, lambda: rung.append("rung"))
    Alarm(0.01, lambda: rung.append("cancelled")).cancel()
    await until(lambda: rung)
    await asyncio.sleep(0.05)
    assert rung == ["rung"]


async def test_who_stood_still_past_its_alarm_hears_first_what_was_said_meanwhile() -> None:
    ours, theirs = socket.socketpair()
    heard: list[str] = []

    async def listen() -> None:
        heard.append((await asyncio.get_running_loop().sock_recv(ours, 8)).decode())

    with ours, theirs:
        ours.setblocking(False)
        listening = asyncio.create_task(listen())
        await asyncio.sleep(0)
        Alarm(0.01, lambda: heard.append("rung"))
        theirs.send(b"said")
        hold_the_loop(LATE_S + 0.1)  # as a process that is stopped
        async with asyncio.timeout(60):
            while "rung" not in heard:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        await listening
        assert heard == ["said", "rung"]


@asynccontextmanager
async def a_port() -> AsyncIterator[int]:
    """The kernel takes connections there, whoever sleeps."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening.getsockname()[1]


async def connected(port: int, within: AbstractAsyncContextManager[object]) -> None:
    """By a loop that is held as soon as it has asked."""
    async with within:
        connecting = asyncio.create_task(asyncio.open_connection("127.0.0.1", port))
        await asyncio.sleep(0)
        hold_the_loop(LATE_S + 0.2)
        _, writer = await connecting
    writer.close()
    await writer.wait_closed()


async def test_what_was_done_while_the_loop_was_held_is_in_time() -> None:
    async with a_port() as port:
        with pytest.raises(TimeoutError):  # what this is about: the connection stood long before
            await connected(port, asyncio.timeout(0.05))
        await connected(port, patience(0.05))


async def nothing(held_s: float) -> None:
    async with patience(0.05):
        hold_the_loop(held_s)
        await asyncio.Event().wait()


@pytest.mark.parametrize("held_s", [0.0, LATE_S + 0.2], ids=["loop keeps up", "loop was held"])
async def test_patience_ends_where_nothing_comes(held_s: float) -> None:
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        await nothing(held_s)
    assert time.monotonic() - began >= max(0.05, held_s)


async def read(sock: socket.socket) -> str:
    return (await asyncio.get_running_loop().sock_recv(sock, 8)).decode()


@pytest.mark.parametrize("held_s", [0.0, LATE_S + 0.2], ids=["loop keeps up", "loop was held"])
async def test_what_lies_there_when_a_held_loop_goes_on_is_done_within(held_s: float) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        reading = asyncio.ensure_future(read(ours))
        within = asyncio.ensure_future(done_within(reading, 0.05))
        await asyncio.sleep(0)
        theirs.send(b"said")
        hold_the_loop(held_s)
        assert await within
        assert await reading == "said"


async def test_what_does_not_come_is_not_done_within_and_not_cancelled() -> None:
    coming: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    assert not await done_within(coming, 0.01)
    assert not coming.done()


async def test_patience_that_was_not_needed_rings_no_more() -> None:
    async with patience(0.01):
        pass
    await asyncio.sleep(0.05)


async def test_who_is_cancelled_within_patience_is_cancelled() -> None:
    async def wait() -> None:
        async with patience(5):
            await asyncio.Event().wait()

    waiting = asyncio.create_task(wait())
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
