"""
One answer for all who ask the same at about the same time, never one that was asked for before they did.

64 rooms that begin at one moment ask the registry for the same seats: 128 requests, which were two fifths of a small
room's CPU at its decode (docs/performance.md). Whoever asks while the same question is under way shares the next one,
which begins when that one ends, or after `patience_s` where it hangs. Nothing is kept: an answer is given to those who
have waited for it, and then forgotten.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")

PATIENCE_S = 0.05
"""An answer takes 1 to 5 ms: who waits longer than this for another's may have a better way to the registry."""


@dataclass(slots=True, eq=False)
class _Asking(Generic[T]):
    """`askers`: how many wait for the answer; `context`: of the first of them, whose trace the question carries."""

    question: Callable[[], Awaitable[T]]
    answer: asyncio.Future[T]
    askers: int = 0
    task: asyncio.Task[None] | None = None
    late: asyncio.TimerHandle | None = None
    context: contextvars.Context = field(default_factory=contextvars.copy_context)


class Together(Generic[K, T]):
    """Questions by their keys. Of the same key they must be the same question."""

    def __init__(self, patience_s: float = PATIENCE_S) -> None:
        self._patience_s = patience_s
        self._latest: dict[K, _Asking[T]] = {}
        self._next: dict[K, _Asking[T]] = {}

    def __len__(self) -> int:
        return len(self._latest) + len(self._next)

    async def ask(self, key: K, question: Callable[[], Awaitable[T]]) -> T:
        """What `question` returns or raises, begun no sooner than this was called. Cancelled, the others go on; who
        is the last to go takes the question along."""
        asking = self._join(key, question)
        asking.askers += 1
        try:
            return await asyncio.shield(asking.answer)
        finally:
            asking.askers -= 1
            if not asking.askers:
                self._drop(key, asking)

    def _join(self, key: K, question: Callable[[], Awaitable[T]]) -> _Asking[T]:
        loop = asyncio.get_running_loop()
        if (waiting := self._next.get(key)) is not None:
            return waiting
        asking: _Asking[T] = _Asking(question, loop.create_future())
        if key in self._latest:
            self._next[key] = asking
            asking.late = loop.call_later(self._patience_s, self._begin, key)
        else:
            self._start(key, asking)
        return asking

    def _begin(self, key: K) -> None:
        """With the one that waits, if any does."""
        asking = self._taken_out(key)
        if asking is not None:
            self._start(key, asking)

    def _taken_out(self, key: K) -> _Asking[T] | None:
        asking = self._next.pop(key, None)
        if asking is not None and asking.late is not None:
            asking.late.cancel()
        return asking

    def _start(self, key: K, asking: _Asking[T]) -> None:
        self._latest[key] = asking
        asking.task = asyncio.get_running_loop().create_task(_answered(asking), context=asking.context)
        asking.task.add_done_callback(lambda _: self._ended(key, asking))

    def _ended(self, key: K, asking: _Asking[T]) -> None:
        if self._latest.get(key) is asking:
            del self._latest[key]
            self._begin(key)

    def _drop(self, key: K, asking: _Asking[T]) -> None:
        if asking.task is not None:
            asking.task.cancel()
        else:
            self._taken_out(key)


async def _answered(asking: _Asking[T]) -> None:
    try:
        said = await asking.question()
    except asyncio.CancelledError:
        asking.answer.cancel()
        raise
    except Exception as error:
        asking.answer.set_exception(error)
    else:
        asking.answer.set_result(said)
