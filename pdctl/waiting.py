"""
Commands to the registry that wait for their group, and how whoever gave them hears what became of it.

One that awaits an answer, and one that is called with it. Neither decides anything or reaches a journal: the registrar
does, and tells them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from typing import Any, Generic, TypeVar

from pdctl.core.lives import Change
from pdctl.core.registry import Registry
from pdctl.errors import PdctlError

T = TypeVar("T")
Told = Callable[[BaseException | None], None]
"""Called once, maybe at once: with None when what was offered holds and is journalled, or with why it does not."""
Decide = Callable[[Registry, float], tuple[T, list[Change]]]


class Waiting(Generic[T]):
    """A command, and what somebody waits for."""

    __slots__ = ("_future", "decide", "refusal", "result")

    def __init__(self, decide: Decide[T]) -> None:
        self.decide = decide
        self.result: T | None = None
        self.refusal: PdctlError | None = None
        self._future: asyncio.Future[T | None] = asyncio.get_running_loop().create_future()

    def __await__(self) -> Generator[Any, None, T]:
        return self._future.__await__()  # type: ignore[return-value]  # None only where T has it

    def done(self) -> bool:
        return self._future.done()

    def tell(self) -> None:
        """What was decided."""
        if self.refusal is not None:
            self.fail(self.refusal)
        elif not self._future.done():
            self._future.set_result(self.result)

    def fail(self, error: BaseException) -> None:
        """What was decided has not happened."""
        if not self._future.done():
            self._future.set_exception(error) if isinstance(error, Exception) else self._future.cancel()


class Offered:
    """A command of somebody who does not wait: `told` is called."""

    __slots__ = ("_told", "decide", "refusal", "result")

    def __init__(self, decide: Decide[Any], told: Told) -> None:
        self.decide = decide
        self.result: Any = None
        self.refusal: PdctlError | None = None
        self._told = told

    def done(self) -> bool:
        return False

    def tell(self) -> None:
        self._told(self.refusal)

    def fail(self, error: BaseException) -> None:
        self._told(error)


Command = Waiting[Any] | Offered


def settle(done: asyncio.Future[None], error: BaseException | None) -> None:
    if done.done():  # whoever waited has gone
        return
    if error is None:
        done.set_result(None)
    else:
        done.set_exception(error) if isinstance(error, Exception) else done.cancel()


def decided(waiting: Command, registry: Registry, now: float) -> list[Change]:
    """What it changes; nothing when whoever asked has gone, or is refused."""
    if waiting.done():
        return []
    try:
        waiting.result, changes = waiting.decide(registry, now)
    except PdctlError as error:
        waiting.refusal = error
        return []
    return changes
