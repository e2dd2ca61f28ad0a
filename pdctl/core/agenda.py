"""
What falls due when, by epoch: a heap that forgets.

An entry is put once for each life and moved seldom: a life that speaks is only looked at when its old hour comes, so
that a renewal costs nothing here. Entries that were moved or forgotten are dropped when they come up, or all at once
when they are the greater part.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator

from pdctl.core.route import Seat

Entry = tuple[float, int, str, Seat]  # when, epoch, instance, seat: epochs are unique, so that no more is compared

_SLACK = 1000


class Agenda:
    """One entry an epoch at most."""

    def __init__(self) -> None:
        self._heap: list[Entry] = []
        self._valid: dict[int, Entry] = {}

    def __len__(self) -> int:
        return len(self._valid)

    @property
    def next_at(self) -> float:
        """When the next entry is due; an entry that was moved may say so too early."""
        return self._heap[0][0] if self._heap else math.inf

    def put(self, at: float, instance: str, seat: Seat, epoch: int) -> None:
        """Look at this life at `at`, or when it was to be looked at anyway if that is sooner; never, for inf."""
        known = self._valid.get(epoch)
        if at == math.inf or (known is not None and known[0] <= at):
            return
        entry = self._valid[epoch] = (at, epoch, instance, seat)
        heapq.heappush(self._heap, entry)
        if len(self._heap) > 2 * len(self._valid) + _SLACK:
            self._heap = list(self._valid.values())
            heapq.heapify(self._heap)

    def forget(self, epoch: int) -> None:
        self._valid.pop(epoch, None)

    def due(self, now: float, budget: int) -> Iterator[tuple[str, Seat, int]]:
        """Take out what is due, `budget` entries at most: (instance, seat, epoch)."""
        for _ in range(budget):
            if not self._heap or self._heap[0][0] > now:
                return
            entry = heapq.heappop(self._heap)
            _, epoch, instance, seat = entry
            if self._valid.get(epoch) is entry:
                del self._valid[epoch]
                yield instance, seat, epoch

    def take(self, other: Agenda) -> None:
        """What another one has, as if it had been put here."""
        for at, epoch, instance, seat in other._valid.values():
            self.put(at, instance, seat, epoch)
