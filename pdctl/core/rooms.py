"""
Bootstrap room -> the DP rank that prefills it: bounded, and forgetful.

No clock and no loop: `now` is an argument (seconds, monotonic, any zero), and whoever owns the book calls `expire`.

A room lives `ttl_s` after it was announced. One that was asked for meanwhile gets another `ttl_s`, EXTENSIONS times
at most: somebody is still waiting for it. Stock drops every room after 120 to 240 s, asked for or not, while its own
prefills wait 300 s.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice, takewhile

from pdctl.errors import LimitReached

EXTENSIONS = 3
_DUE, _DP_RANK, _ASKED, _EXTENSIONS = range(4)

# An exact tuple of atoms: the cyclic collector stops tracking it, so that a million rooms do not cost a pause each pass
Row = tuple[float, int, bool, int]


class RoomBook:
    """At most `limit` rooms. In the dict's order `due` never falls, so that the first row is the next to go."""

    def __init__(self, limit: int = 1_000_000, ttl_s: float = 300.0) -> None:
        self._rows: dict[int, Row] = {}
        self._limit = limit
        self._ttl_s = ttl_s

    def __len__(self) -> int:
        """Rows held, those included that are over and not swept yet."""
        return len(self._rows)

    def put(self, room: int, dp_rank: int, now: float) -> None:
        """Remember; the last announcement wins and starts a new life. Raises LimitReached for a room too many."""
        if self._rows.pop(room, None) is None and len(self._rows) >= self._limit:
            self.expire(now, budget=1000)
            if len(self._rows) >= self._limit:
                raise LimitReached(
                    f"{self._limit} rooms are held, the limit (max_rooms): wait until some are {self._ttl_s:g} s old, "
                    "or raise the limit"
                )
        self._rows[room] = (now + self._ttl_s, dp_rank, False, EXTENSIONS)

    def get(self, rooms: Iterable[int], now: float) -> dict[int, int]:
        """DP rank by room; rooms that are unknown or over are absent."""
        found: dict[int, int] = {}
        for room in rooms:
            row = self._current(room, now)
            if row is not None:
                found[room] = row[_DP_RANK]
                if not row[_ASKED]:  # replaced in place: its turn stays
                    self._rows[room] = (row[_DUE], row[_DP_RANK], True, row[_EXTENSIONS])
        return found

    def expire(self, now: float, budget: int) -> int:
        """Settle `budget` rows that are due, at most; how many there were. Fewer than `budget`: no row is due now."""
        due = list(islice(takewhile(lambda room: self._rows[room][_DUE] <= now, self._rows), budget))
        for room in due:
            self._current(room, now)
        return len(due)

    def _current(self, room: int, now: float) -> Row | None:
        """The room's row; one that is due is extended or dropped first, whether or not a sweep has come by."""
        row = self._rows.get(room)
        if row is None or row[_DUE] > now:
            return row
        del self._rows[room]
        due, dp_rank, asked, extensions = row
        if not (asked and extensions and now < due + self._ttl_s):
            return None
        row = self._rows[room] = (now + self._ttl_s, dp_rank, False, extensions - 1)
        return row
