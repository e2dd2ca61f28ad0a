"""
Who is to be looked at when: one moment for each name, moved or struck out for next to nothing.

A heap whose entries are void once their name has moved on. They leave when they come to the top, or all at once when
they are the greater part: what it holds is bounded by twice the names. No clock; a moment is any float.
"""

from __future__ import annotations

import heapq

_SLACK = 64


class Due:
    """The moments; `first` is the next one."""

    def __init__(self) -> None:
        self._at: dict[str, float] = {}
        self._heap: list[tuple[float, str]] = []

    def __len__(self) -> int:
        """How many entries are held, the void ones too."""
        return len(self._heap)

    def at(self, name: str) -> float | None:
        return self._at.get(name)

    def put(self, name: str, at: float) -> None:
        """Look at `name` at `at`, and not when it was to be looked at before."""
        self._at[name] = at
        heapq.heappush(self._heap, (at, name))
        if len(self._heap) > 2 * len(self._at) + _SLACK:
            self._heap = [(at, name) for name, at in self._at.items()]
            heapq.heapify(self._heap)

    def strike(self, name: str) -> None:
        self._at.pop(name, None)

    @property
    def first(self) -> tuple[float, str] | None:
        """The earliest moment and its name."""
        while self._heap:
            at, name = self._heap[0]
            if self._at.get(name) == at:
                return at, name
            heapq.heappop(self._heap)
        return None

    def take(self, now: float) -> str | None:
        """Strike out and give the first that is due, None if none is."""
        first = self.first
        if first is None or first[0] > now:
            return None
        heapq.heappop(self._heap)
        del self._at[first[1]]
        return first[1]
