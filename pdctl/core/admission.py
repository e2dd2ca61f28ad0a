"""
How many registrations are let in at a time, and when those come again who are put off.

No sockets, no clock, no logging: `now` comes in (seconds, monotonic, any zero), a number of seconds goes out.

    leased  a client that renews: let in at `per_s`; beyond that it is given a place in time, and told to come then
    stock   an engine that registers once: always let in, and what it takes is missing for the leased ones

Why stock clients go before and are never put off: a stock rank tries five times in 11 to 15 s, on any status but 200,
and then goes on unregistered for good, silently; and it reads no Retry-After. Ranks that start together draw the same
jitter, so that each of the five comes as one spike, and a limit that holds a spike down spends one of the five for
everybody in it. A refusal costs the loop about a third of what taking the row costs: there is little to be saved by
losing a rank. A leased client asks until it is in, obeys Retry-After, and loses nothing by seconds: what it had before
the outage is in the journal, and a renewal is no registration and is never asked to wait.

Why the leased ones are not starved by them: of the places of a second at most `STOCK_SHARE` are charged to stock
clients, however many come.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from pdctl.errors import ConfigError

STOCK_SHARE = 0.75
BOOKED_SHARE = 0.8
"""Of the places of a second so many are promised to those who were put off; the rest is for those who come new, and for
the unevenness of those who come back. Promising all of them puts one in five off again (simulated; at 0.8 hardly any).
"""
_ROUNDING = 1e-9


class Lane(StrEnum):
    """Who asks to be let in."""

    LEASED = "leased"
    STOCK = "stock"


@dataclass(frozen=True, slots=True)
class AdmissionPolicy:
    """How fast registrations are let in.

    per_s: 400. A registration costs 0.2 to 0.4 ms of the one loop, so this is an eighth of it, and decodes' look-ups do
        not notice the herd. 2,000 clients that come at once are in after 8 s. 0 lets everybody in.
    burst: how many may come in together after a quiet time. 12: with what comes in meanwhile no 100 ms hold more than
        52 registrations, 2.6 times the mean of 2,000 clients who come back within a renewal interval of 10 s.
    longest_s: nobody is told to wait longer. 60 s: half of what our client obeys (RetryPolicy.max_retry_after_s). When
        more wait than come in within it, places are given out twice, and who finds his taken is given another.
    """

    per_s: float = 400.0
    burst: int = 12
    longest_s: float = 60.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.per_s) and self.per_s >= 0):
            raise ConfigError(f"admission per_s is {self.per_s}: give registrations a second, or 0 for no limit")
        if self.burst < 1:
            raise ConfigError(f"admission burst is {self.burst}: give at least 1")
        if not (math.isfinite(self.longest_s) and self.longest_s >= 1):
            raise ConfigError(f"admission longest_s is {self.longest_s}: give at least 1 s, what Retry-After can say")


class Admission:
    """The door of one registry. Three numbers, whoever and however many come."""

    def __init__(self, policy: AdmissionPolicy) -> None:
        self.policy = policy
        # Each is the time up to which places are taken; what lies in the past is free (a token bucket, kept as a date).
        self._taken_until = -math.inf
        self._stock_until = -math.inf
        self._booked_until = -math.inf

    def ask(self, lane: Lane, now: float) -> int | None:
        """None: come in. Otherwise the whole seconds, at least 1, after which to come again."""
        if not self.policy.per_s:
            return None
        if lane is Lane.STOCK:
            self._charge_stock(now)
            return None
        if self._is_free(now):
            self._take(now)
            return None
        return self._book(now)

    def _is_free(self, now: float) -> bool:
        return self._taken_until - now <= (self.policy.burst - 1) / self.policy.per_s + _ROUNDING

    def _take(self, now: float) -> None:
        self._taken_until = max(self._taken_until, now) + 1 / self.policy.per_s

    def _charge_stock(self, now: float) -> None:
        if self._stock_until <= now and self._is_free(now):
            each_s = 1 / (STOCK_SHARE * self.policy.per_s)
            self._stock_until = max(self._stock_until, now - each_s) + each_s
            self._take(now)

    def _book(self, now: float) -> int:
        each_s = 1 / (BOOKED_SHARE * self.policy.per_s)
        self._booked_until = max(self._booked_until, now) + each_s
        if self._booked_until > now + self.policy.longest_s:
            self._booked_until = now + each_s
        return math.ceil(self._booked_until - now - _ROUNDING)
