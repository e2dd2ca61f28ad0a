"""
What decode ranks have said about rooms that this engine has not opened yet.

No clock and no loop: `now` is an argument (seconds, monotonic, any zero), and what is over leaves at the next call.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from pdctl.core.address import Endpoint
from pdctl.core.wire import Abort, Metadata


@dataclass(frozen=True, slots=True)
class EarlyLimits:
    """Rooms, and pages named in them, that strangers can make this side remember; the oldest room goes first."""

    max_rooms: int = 4096
    max_pages: int = 16 << 20


@dataclass(slots=True)
class _Early:
    """`aborted`: who gave the room up, by the address it answers at; None for one that did not say."""

    expires: float
    by_session: dict[str, Metadata] = field(default_factory=dict)
    aborted: set[Endpoint | None] = field(default_factory=set)


class EarlyBook:
    """Bounded, expiring, oldest first out; `forgotten` is told of each room that nobody took."""

    def __init__(self, limits: EarlyLimits, ttl_s: float, forgotten: Callable[[int], None]) -> None:
        self._limits = limits
        self._ttl_s = ttl_s
        self._forgotten = forgotten
        self._rooms: OrderedDict[int, _Early] = OrderedDict()  # in the order of expiry
        self._n_pages = 0

    def rooms(self, now: float) -> list[int]:
        self._expire(now)
        return list(self._rooms)

    def put(self, named: Metadata, now: float) -> None:
        """News of a decode rank replaces its older news, an abort included: within a connection ZMQ keeps the order."""
        early = self._pop(named.room) or _Early(now)
        early.by_session[named.session] = named
        early.aborted.discard(named.reply)
        early.expires = now + self._ttl_s
        self._rooms[named.room] = early
        self._n_pages += _n_pages(early)
        self._expire(now)

    def abort(self, abort: Abort, now: float) -> None:
        """Remember it only for a room that was named: an abort of a finished room must not reach its id's next use."""
        self._expire(now)
        early = self._rooms.get(abort.room)
        if early is not None:
            early.aborted.add(abort.reply)

    def take(self, room: int, now: float) -> tuple[list[Metadata], str | None]:
        self._expire(now)
        early = self._pop(room)
        if early is None:
            return [], None
        who = ", ".join(sorted(str(reply or "unknown") for reply in early.aborted))
        over = f"decode rank {who} gave the room up before it was opened here" if who else None
        return list(early.by_session.values()), over

    def _pop(self, room: int) -> _Early | None:
        early = self._rooms.pop(room, None)
        self._n_pages -= 0 if early is None else _n_pages(early)
        return early

    def _expire(self, now: float) -> None:
        while self._rooms and self._is_over(now):
            room = next(iter(self._rooms))
            self._pop(room)
            self._forgotten(room)

    def _is_over(self, now: float) -> bool:
        oldest = next(iter(self._rooms.values()))
        too_many = len(self._rooms) > self._limits.max_rooms or self._n_pages > self._limits.max_pages
        return too_many or oldest.expires <= now


def _n_pages(early: _Early) -> int:
    return sum(len(named.pages) + 1 for named in early.by_session.values())
