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
from math import ceil
from typing import Final

from pdctl.errors import LimitReached

EXTENSIONS = 3

# An exact tuple of atoms: the cyclic collector stops tracking it, so that a million rooms do not cost a pause each pass
# Rooms of one DP rank that came within the same quarter of a second share one: 87 bytes a room and not 200.
Row = tuple[float, int, bool, int]
_DUE: Final = 0
_DP_RANK: Final = 1
_ASKED: Final = 2
_EXTENSIONS: Final = 3

# One dict of a million rows stands still for 140 ms whenever it is resized; one of a 128th does for about 1 ms.
_SHARDS: Final = 128

_PER_S: Final = 4
_SHARED_ROWS: Final = 4096


class RoomBook:
    """At most `limit` rooms. In a shard's order `due` never falls, so that its first row is the next to go."""

    def __init__(self, limit: int = 1_000_000, ttl_s: float = 300.0) -> None:
        self._shards: list[dict[int, Row]] = [{} for _ in range(_SHARDS)]
        self._shared: dict[Row, Row] = {}
        self._next_shard = 0
        self._size = 0
        self._limit = limit
        self._ttl_s = ttl_s

    def __len__(self) -> int:
        """Rows held, those included that are over and not swept yet."""
        return self._size

    def put(self, room: int, dp_rank: int, now: float) -> None:
        """Remember; the last announcement wins and starts a new life. Raises LimitReached for a room too many."""
        shard = self._shards[room % _SHARDS]
        if shard.pop(room, None) is None:
            self._make_place(now)
            self._size += 1
        shard[room] = self._row(now, dp_rank, EXTENSIONS)

    def check_place(self, room: int, now: float) -> None:
        """Raise LimitReached if `put` would."""
        if room not in self._shards[room % _SHARDS]:
            self._make_place(now)

    def get(self, rooms: Iterable[int], now: float) -> dict[int, int]:
        """DP rank by room; rooms that are unknown or over are absent."""
        found: dict[int, int] = {}
        for room in rooms:
            shard = self._shards[room % _SHARDS]
            row = shard.get(room)
            if row is not None and row[_DUE] <= now:  # no sweep has come by yet
                row = self._settle(shard, room, now)
            if row is not None:
                found[room] = row[_DP_RANK]
                if not row[_ASKED]:  # in place: its turn stays
                    shard[room] = self._same((row[_DUE], row[_DP_RANK], True, row[_EXTENSIONS]))
        return found

    def expire(self, now: float, budget: int) -> int:
        """Settle at most `budget` rows that are due; how many there were. Fewer than `budget`: no row is due now."""
        settled = 0
        for _ in range(_SHARDS):
            shard = self._shards[self._next_shard]
            due = list(islice(takewhile(lambda room: shard[room][_DUE] <= now, shard), budget - settled))  # noqa: B023
            for room in due:
                self._settle(shard, room, now)
            settled += len(due)
            if settled == budget:
                break
            self._next_shard = (self._next_shard + 1) % _SHARDS
        return settled

    def _make_place(self, now: float) -> None:
        if self._size < self._limit or (self.expire(now, budget=1000) and self._size < self._limit):
            return
        raise LimitReached(
            f"{self._limit} rooms are held, the limit (max_rooms): try again when some are over ({self._ttl_s:g} s "
            "after they were announced), or raise the limit"
        )

    def _settle(self, shard: dict[int, Row], room: int, now: float) -> Row | None:
        """Extend or drop a row that is due."""
        due, dp_rank, asked, extensions = shard.pop(room)
        if not (asked and extensions and now < due + self._ttl_s):
            self._size -= 1
            return None
        row = shard[room] = self._row(now, dp_rank, extensions - 1)
        return row

    def _row(self, now: float, dp_rank: int, extensions: int) -> Row:
        """A new term, which ends with a quarter of a second."""
        return self._same((ceil((now + self._ttl_s) * _PER_S) / _PER_S, dp_rank, False, extensions))

    def _same(self, row: Row) -> Row:
        """The one of those that are equal that everybody has. Forgotten ones only cost their memory again."""
        if len(self._shared) >= _SHARED_ROWS:
            self._shared = {}
        return self._shared.setdefault(row, row)
