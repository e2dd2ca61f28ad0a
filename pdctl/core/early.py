"""
What decode ranks have said about rooms that this engine has not opened yet.

No clock and no loop: `now` is an argument (seconds, monotonic, any zero), and what is over leaves at the next call.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from pdctl.core.address import Endpoint
from pdctl.core.allowance import EarlyLimits
from pdctl.core.wire import Abort, Metadata


@dataclass(slots=True)
class _Early:
    """`aborted`: who gave the room up, by the address it answers at; None for one that did not say."""

    expires: float
    by_session: dict[str, Metadata] = field(default_factory=dict)
    aborted: set[Endpoint | None] = field(default_factory=set)


@dataclass(slots=True)
class _GivenUp:
    """By decode ranks that had named nothing of it, or were not heard to."""

    expires: float
    by: set[Endpoint] = field(default_factory=set)


class EarlyBook:
    """Bounded, expiring; `forgotten` is told of each room that was named and nobody took."""

    def __init__(self, limits: EarlyLimits, ttl_s: float, forgotten: Callable[[int], None]) -> None:
        self._limits = limits
        self._ttl_s = ttl_s
        self._forgotten = forgotten
        self._rooms: OrderedDict[int, _Early] = OrderedDict()  # in the order of expiry
        self._given_up: OrderedDict[int, _GivenUp] = OrderedDict()  # so too
        self._n_pages = 0
        self._named_by: Counter[str] = Counter()  # pages, and one for each room

    def rooms(self, now: float) -> list[int]:
        self._expire(now)
        return list(self._rooms)

    def put(self, named: Metadata, now: float) -> bool:
        """News of a decode rank replaces its older news, an abort included: within a connection ZMQ keeps the order.
        Whether it has said anything of the room before."""
        early = self._pop(named.room) or _Early(now)
        is_known = named.session in early.by_session
        early.by_session[named.session] = named
        early.aborted.discard(named.reply)
        if (given_up := self._given_up.get(named.room)) is not None:
            given_up.by.discard(named.reply)
        early.expires = now + self._ttl_s
        self._rooms[named.room] = early
        self._count(early, 1)
        self._expire(now)
        return is_known

    def abort(self, abort: Abort, now: float, *, is_news: bool) -> None:
        """Remember it for a room that was named, and for one that was not if it `is_news`: an abort of a finished room
        must not reach its id's next use."""
        self._expire(now)
        early = self._rooms.get(abort.room)
        if early is not None:
            early.aborted.add(abort.reply)
        elif is_news and abort.reply is not None:
            given_up = self._given_up.pop(abort.room, None) or _GivenUp(now)
            given_up.by.add(abort.reply)
            given_up.expires = now + self._ttl_s
            self._given_up[abort.room] = given_up
            self._expire(now)

    def drop(self, named: Metadata) -> None:
        """What that decode rank has said of the room."""
        early = self._rooms.get(named.room)
        if early is None or named.session not in early.by_session:
            return
        self._count(early, -1)
        del early.by_session[named.session]
        self._count(early, 1)
        if not early.by_session:
            del self._rooms[named.room]

    def take(self, room: int, now: float) -> tuple[list[Metadata], str | None]:
        self._expire(now)
        early, given_up = self._pop(room) or _Early(now), self._given_up.pop(room, _GivenUp(now))
        named = list(early.by_session.values())
        awaited = len(named) < max((each.required for each in named), default=1)
        gave_up = early.aborted | (given_up.by if awaited else set())
        who = ", ".join(sorted(str(reply or "unknown") for reply in gave_up))
        return named, f"decode rank {who} gave the room up before it was opened here" if who else None

    def _pop(self, room: int) -> _Early | None:
        early = self._rooms.pop(room, None)
        if early is not None:
            self._count(early, -1)
        return early

    def _count(self, early: _Early, sign: int) -> None:
        for session, named in early.by_session.items():
            n = sign * (len(named.pages) + 1)
            self._n_pages += n
            self._named_by[session] += n
            if not self._named_by[session]:
                del self._named_by[session]

    def _expire(self, now: float) -> None:
        while self._rooms and next(iter(self._rooms.values())).expires <= now:
            self._forget(next(iter(self._rooms)))
        while len(self._rooms) > self._limits.max_rooms or self._n_pages > self._limits.max_pages:
            greediest = max(self._named_by, key=self._named_by.__getitem__)
            self._forget(next(room for room, early in self._rooms.items() if greediest in early.by_session))
        given_up = self._given_up
        while given_up and (len(given_up) > self._limits.max_rooms or next(iter(given_up.values())).expires <= now):
            given_up.popitem(last=False)

    def _forget(self, room: int) -> None:
        self._pop(room)
        self._forgotten(room)
