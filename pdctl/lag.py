"""
How late this process's event loop comes to what it wants to do.

A loop that was held (a long callback, a lock of the interpreter, a stopped process, a host without CPU) finds every
deadline of its own gone by when it wakes, and would blame whoever it was waiting for. So lateness, as core/listening.py
has it, can be asked for at any moment, also by code that runs before the tick that is late. Decides nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from pdctl.core.listening import Attention

EVERY_S = 0.05
"""A stall is measured to within this much, and 20 ticks a second cost 0.05 % of a core."""
LATE_S, HEAR_S = 0.25, 0.25
"""What an alarm calls late, and how long it listens then: messages that lie there take milliseconds."""


class LoopLag:
    """Measures while `run` runs, and knows of no lag before."""

    def __init__(self, clock: Callable[[], float], every_s: float = EVERY_S) -> None:
        self._clock = clock
        self._every_s = every_s
        self._attention = Attention()

    @property
    def late_s(self) -> float:
        """By how much the next tick is overdue."""
        return self._attention.missed_s(self._clock())

    async def run(self, tell: Callable[[float], None]) -> None:
        """Tick until cancelled; `tell` hears how late each tick came."""
        try:
            while True:
                self._attention.rests(self._clock(), self._every_s)
                await asyncio.sleep(self._every_s)
                tell(self.late_s)
        finally:
            self._attention.ends()


class Alarm:
    """Rings once, `wait_s` from now, unless it is cancelled.

    Where the loop comes late to it, this process may have stood still. What others said meanwhile lies in its sockets,
    and is heard before anybody is blamed for silence: a decode rank that was stopped for longer than it waits for a
    status called a room late whose success had come (tests/faults/rooms.py).
    """

    def __init__(self, wait_s: float, ring: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._ring = ring
        self._attention, now = Attention(), self._loop.time()
        self._attention.rests(now, wait_s)
        self._handle = self._loop.call_at(now + wait_s, self._wake)

    def cancel(self) -> None:
        self._handle.cancel()

    def _wake(self) -> None:
        if self._attention.missed_s(self._loop.time()) < LATE_S:
            self._ring()
        else:
            self._handle = self._loop.call_later(HEAR_S, self._ring)


@asynccontextmanager
async def patience(wait_s: float) -> AsyncIterator[None]:
    """`asyncio.timeout` of one who does not blame another for its own sleep: after a loop that was held it hears first
    what lies there. Raises TimeoutError."""
    async with asyncio.timeout(None) as limit:
        alarm = Alarm(wait_s, lambda: limit.reschedule(0.0))
        try:
            yield
        finally:
            alarm.cancel()


async def done_within(what: asyncio.Future[Any], wait_s: float) -> bool:
    """Whether it is done by then, or was while the loop was held. Unlike `patience` it cancels nothing, so that what is
    done in that very moment counts."""
    if what.done():  # as a message mostly is that a socket takes
        return True
    loop = asyncio.get_running_loop()
    until = loop.time() + wait_s
    await asyncio.wait({what}, timeout=wait_s)
    if not what.done() and loop.time() - until >= LATE_S:
        await asyncio.wait({what}, timeout=HEAR_S)
    return what.done()


@asynccontextmanager
async def watched(clock: Callable[[], float], every_s: float = EVERY_S) -> AsyncIterator[Callable[[], float]]:
    """Gives what tells by how much the loop came late at worst, since the block was entered."""
    lag, worst = LoopLag(clock, every_s), [0.0]

    def tell(late_s: float) -> None:
        worst[0] = max(worst[0], late_s)

    ticking = asyncio.create_task(lag.run(tell), name="loop lag while something is judged")
    try:
        yield lambda: max(worst[0], lag.late_s)
    finally:
        ticking.cancel()
        await asyncio.wait([ticking])
