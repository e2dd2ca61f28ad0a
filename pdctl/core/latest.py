"""
What has changed since when, of things of which only the last state matters.

No clock, no states, no readers: a reader is a number, and is told the names of all that has changed since; however slow
it is, nothing is kept for it. Contrast `core.feed`, where every change counts.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

KeyT = TypeVar("KeyT", bound=Hashable)


class Latest(Generic[KeyT]):
    """Names of at most `max_keys` things; who has not seen the last change of one that was let go must look at all."""

    def __init__(self, max_keys: int = 65_536) -> None:
        self._max_keys = max_keys
        self._changed: OrderedDict[KeyT, int] = OrderedDict()
        self._number = 0
        self._floor = 0

    @property
    def number(self) -> int:
        """Of the last change."""
        return self._number

    def touch(self, key: KeyT) -> None:
        """It is otherwise now, or gone."""
        self._number += 1
        self._changed[key] = self._number
        self._changed.move_to_end(key)
        if len(self._changed) > self._max_keys:
            _, self._floor = self._changed.popitem(last=False)

    def since(self, number: int) -> list[KeyT] | None:
        """What has changed after `number`, in the order of its last change; None where that is not known any more."""
        if number < self._floor:
            return None
        found = []
        for key in reversed(self._changed):
            if self._changed[key] <= number:
                break
            found.append(key)
        return found[::-1]
