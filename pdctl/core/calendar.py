"""
Who is to be looked at when: one moment for each, moved or struck out for next to nothing.

A heap whose entries are void once their owner has moved on. They leave when they come to the top, or all at once when
they are the greater part: what it holds is bounded by twice the owners. No clock; a moment is any float, and of equal
ones the first that was put comes first.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

_SLACK = 64

K = TypeVar("K", bound=Hashable)


class Calendar(Generic[K]):
    """The moments; infinity is none."""

    def __init__(self) -> None:
        self._entries: dict[K, tuple[float, int, K]] = {}
        self._heap: list[tuple[float, int, K]] = []
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def n_held(self) -> int:
        """The void ones too."""
        return len(self._heap)

    def at(self, who: K) -> float | None:
        entry = self._entries.get(who)
        return None if entry is None else entry[0]

    def put(self, who: K, at: float) -> None:
        """Look at `who` at `at`, and not when it was to be looked at before."""
        if at == math.inf:
            self.strike(who)
            return
        entry = self._entries[who] = (at, next(self._numbers), who)
        heapq.heappush(self._heap, entry)
        if len(self._heap) > 2 * len(self._entries) + _SLACK:
            self._heap = list(self._entries.values())
            heapq.heapify(self._heap)

    def put_sooner(self, who: K, at: float) -> None:
        """The same, unless it is looked at before that anyway."""
        known = self._entries.get(who)
        if known is None or at < known[0]:
            self.put(who, at)

    def strike(self, who: K) -> None:
        self._entries.pop(who, None)

    @property
    def next_at(self) -> float:
        """The earliest moment, infinity where there is none."""
        while self._heap:
            entry = self._heap[0]
            if self._entries.get(entry[2]) is entry:
                return entry[0]
            heapq.heappop(self._heap)
        return math.inf

    def due(self, now: float, limit: int | None = None) -> Iterator[K]:
        """Strike out and give who is due, `limit` at most, the most overdue first. Whoever is put meanwhile counts."""
        for _ in itertools.count() if limit is None else range(limit):
            if self.next_at > now:
                return
            who = heapq.heappop(self._heap)[2]
            del self._entries[who]
            yield who

    def take(self, other: Calendar[K]) -> None:
        """What another one has, as if it had been put here, where it is sooner."""
        for at, _, who in other._entries.values():
            self.put_sooner(who, at)
