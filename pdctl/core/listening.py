"""
Was anybody listened to? A loop that was stopped, swapped out or starved has heard nobody meanwhile, and must not take
their silence for death.

Pure: it is told when the loop goes to rest and for how long; what it wakes too late by, nobody was heard. How much of
that matters is a question of the lease: one renewed every third is in danger when two thirds of it go unheard.

    renewed       |<-- a third -->|
    stopped                      |<----- a third -------->|  heard again, a third of the lease before its end
"""

from __future__ import annotations

import math

SHARE = 6
"""A lease of at most so many times the silence begins anew, and the loop looks up so often within the shortest one.

A stop is seen but for one rest: one of a third of a lease is noticed wherever it begins, and a shorter one leaves the
renewal that it has held up another third to be heard in.
"""
LOOK_UP_EVERY_S = 0.5


def rest_s(shortest_ttl_s: float) -> float:
    """How long to rest between two looks."""
    return min(LOOK_UP_EVERY_S, shortest_ttl_s / SHARE)


class Attention:
    """Of one loop."""

    def __init__(self) -> None:
        self._awake_at = math.inf

    def rests(self, now: float, for_s: float) -> None:
        self._awake_at = now + for_s

    def ends(self) -> None:
        """It is not asked to keep its time any more."""
        self._awake_at = math.inf

    def missed_s(self, now: float) -> float:
        """For how long nobody has been heard; 0 while the loop keeps its time, or has not been asked to."""
        return max(0.0, now - self._awake_at)
