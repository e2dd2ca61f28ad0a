"""
One step of one room for each turn of the loop, however many rooms have become ready together.

asyncio runs all that is ready before it looks at timers and sockets again: 64 rooms whose writes had ended together
held it for 13 ms, by which everything else was late. Here they line up.
"""

from __future__ import annotations

import asyncio
from collections import deque


class Pace:
    """Of all rooms of one rank."""

    def __init__(self) -> None:
        self._line: deque[asyncio.Future[None]] = deque()
        self._is_taken = False

    async def step(self) -> None:
        """Return when it is the caller's turn: at once where nobody else has had one in this turn of the loop."""
        loop = asyncio.get_running_loop()
        if not self._is_taken:
            self._is_taken = True
            loop.call_soon(self._next, loop)
            return
        turn = loop.create_future()
        self._line.append(turn)
        await turn

    def _next(self, loop: asyncio.AbstractEventLoop) -> None:
        while self._line:
            turn = self._line.popleft()
            if not turn.done():  # else whoever waited was cancelled
                turn.set_result(None)
                loop.call_soon(self._next, loop)
                return
        self._is_taken = False
