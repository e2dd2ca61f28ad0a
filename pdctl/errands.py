"""
Small tasks that run beside the work: a status to send, an engine to wait for.

Bounded in number, each named, none forgotten: one that fails says so, and closing waits a moment for the rest. It
starts nothing by itself and repeats nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import structlog

log = structlog.get_logger(__name__)


class Errands:
    """`limit`: how many may run at once, so that a flood that wants answers stops there; None: no limit."""

    def __init__(self, limit: int | None = 4096) -> None:
        self._limit = limit
        self._tasks: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._tasks)

    def spawn(self, name: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None] | None:
        """None where it was dropped."""
        if self._limit is not None and len(self._tasks) >= self._limit:
            work.close()
            log.error("errand dropped", errand=name, running=len(self._tasks))
            return None
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    async def aclose(self, flush_s: float) -> None:
        """Give what runs `flush_s` to end by itself, then cancel it and wait for it."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=flush_s)
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("errand failed", errand=task.get_name(), exc_info=error)
