"""
Loops that stand beside a body, and end it when one of them dies: what every service and node of ours is made of.

Starts nothing of its own and repeats nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any


class LoopEnded(RuntimeError):
    """A loop that must run as long as the service has returned; `name` says which."""

    def __init__(self, name: str) -> None:
        super().__init__(f"the {name} loop has ended although nobody stopped it: this is a defect, please report it")
        self.name = name


@asynccontextmanager
async def beside(**loops: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run `loops` beside the body, each as a task of its name; cancel them and wait for them when the body ends.

    A loop that dies, or returns, ends the body: a service must not outlive its own heart. The first error comes out
    bare, and the body's own before that of any loop.
    """
    body: BaseException | None = None
    ending = False

    async def guard(name: str, loop: Coroutine[Any, Any, None]) -> None:
        await loop
        if not ending:
            raise LoopEnded(name)

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(guard(name, loop), name=name) for name, loop in loops.items()]
            try:
                yield
            except BaseException as error:
                body = error
                raise
            finally:
                ending = True
                for task in tasks:
                    task.cancel()
    except BaseExceptionGroup as errors:
        if body is not None and not isinstance(body, asyncio.CancelledError):
            raise body from None
        raise errors.exceptions[0] from None
    finally:
        for loop in loops.values():
            loop.close()  # one that was cancelled before its first step has never been awaited
