"""
How late this process's event loop comes to what it wants to do.

A loop that was held (a long callback, a lock of the interpreter, a stopped process, a host without CPU) finds every
deadline of its own gone by when it wakes, and would blame whoever it was waiting for. So lateness can be asked for at
any moment, also by code that runs before the tick that is late. Decides nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

EVERY_S = 0.05
"""A stall is measured to within this much, and 20 ticks a second cost 0.05 % of a core."""


class LoopLag:
    """Measures while `run` runs, and knows of no lag before."""

    def __init__(self, clock: Callable[[], float], every_s: float = EVERY_S) -> None:
        self._clock = clock
        self._every_s = every_s
        self._due: float | None = None

    @property
    def late_s(self) -> float:
        """By how much the next tick is overdue."""
        return 0.0 if self._due is None else max(0.0, self._clock() - self._due)

    async def run(self, tell: Callable[[float], None]) -> None:
        """Tick until cancelled; `tell` hears how late each tick came."""
        try:
            while True:
                self._due = self._clock() + self._every_s
                await asyncio.sleep(self._every_s)
                tell(self.late_s)
        finally:
            self._due = None
