"""
What has happened, one event after the other, for whoever asks afterwards: the last few thousand of them.

No clock, no readers: a reader is a number, the `id` of the next event that it wants. Wall time arrives as `at_s`, for
it is only shown; monotonic time as `now`. Nothing is decided by what stands here.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import islice
from typing import Any

from pdctl.core.kinds import Kind
from pdctl.core.report import in_a_line

MAX_EVENTS = 4096
SAME_WITHIN_S = 10.0
"""A refusal that is said again so soon is the same event, counted: a rank tries every few seconds, for ever."""
CROWD = 16
"""Peers that have an event of a kind to themselves within that time, where anybody can cause one: thousands that come
in vain would push out all else."""

MAX_SENTENCE = 800
_MAX_REMEMBERED = 1024
_MAX_VALUE = 200
_TEXTS = ("instance", "rank", "session", "peer", "cause", "reason", "field", "held", "offered")


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that has happened, to what is named. `rank`: of `instance`, and who saw it where it is of a session.

    count               how often, where one event stands for several
    reason, field, held, offered   of a refusal
    registry            which of several has seen it, by its URL; None: this one
    """

    id: int
    at: str
    kind: str
    sentence: str
    instance: str | None = None
    rank: str | None = None
    session: str | None = None
    peer: str | None = None
    cause: str | None = None
    room: int | None = None
    count: int = 1
    reason: str | None = None
    field: str | None = None
    held: str | None = None
    offered: str | None = None
    registry: str | None = None


class Chronicle:
    """The last `max_events`."""

    def __init__(self, max_events: int = MAX_EVENTS) -> None:
        self._events: deque[Event] = deque(maxlen=max_events)
        self._next = 1
        self._said: OrderedDict[tuple[str | None, ...], tuple[int, float]] = OrderedDict()
        self._crowds: dict[str, tuple[int, float]] = {}  # by kind: how many peers, until when

    @property
    def next(self) -> int:
        """The id that the next event will have."""
        return self._next

    @property
    def oldest(self) -> int:
        return self._next - len(self._events)

    def add(self, kind: str, sentence: str, at_s: float, **about: Any) -> Event:
        event = Event(self._next, wall(at_s), kind, in_a_line(sentence, MAX_SENTENCE), **about)
        self._events.append(event)
        self._next += 1
        return event

    def copied(self, registry: str, row: Mapping[str, Any]) -> Event:
        """An event of another registry's, under a number of ours. Raises KeyError, TypeError, ValueError."""
        said = {name: None if row.get(name) is None else in_a_line(str(row[name]), _MAX_VALUE) for name in _TEXTS}
        room, count = row.get("room"), int(row.get("count", 1))
        at, kind, sentence = (in_a_line(str(row[name]), MAX_SENTENCE) for name in ("at", "kind", "sentence"))
        room = None if room is None else int(room)
        event = Event(self._next, at, kind, sentence, room=room, count=count, registry=registry, **said)
        self._events.append(event)
        self._next += 1
        return event

    def refused(self, sentence: str, at_s: float, now: float, **about: Any) -> Event:
        """As `add`; the same to the same within SAME_WITHIN_S is one event, that is counted."""
        return self._counted(Kind.REFUSED, sentence, at_s, now, about)

    def kept_out(self, kind: Kind, sentence: str, others: str, at_s: float, now: float, **about: Any) -> Event:
        """As `refused`, of one kind: of CROWD peers at a time; `others` is what is said of all beyond them together."""
        same = self._same(kind, about)
        n, until = self._crowds.get(kind, (0, now))
        if self._again(same, now) is None:
            n, until = (n, until) if now < until else (0, now + SAME_WITHIN_S)
            if n >= CROWD:
                return self._counted(kind, others, at_s, now, {"reason": about.get("reason")})
            self._crowds[kind] = n + 1, until
        return self._counted(kind, sentence, at_s, now, about)

    def _counted(self, kind: Kind, sentence: str, at_s: float, now: float, about: dict[str, Any]) -> Event:
        same = self._same(kind, about)
        event = self._again(same, now)
        if event is not None:
            return self._replaced(replace(event, count=event.count + 1))
        for name in ("held", "offered"):
            if about.get(name) is not None:
                about[name] = in_a_line(str(about[name]), _MAX_VALUE)
        event = self.add(kind, sentence, at_s, **about)
        self._said[same] = event.id, now + SAME_WITHIN_S
        self._said.move_to_end(same)
        while len(self._said) > _MAX_REMEMBERED:
            self._said.popitem(last=False)
        return event

    def _same(self, kind: Kind, about: Mapping[str, Any]) -> tuple[str | None, ...]:
        return kind, *(about.get(name) for name in ("peer", "instance", "reason", "field"))

    def _again(self, same: tuple[str | None, ...], now: float) -> Event | None:
        """The event that says it already."""
        number, until = self._said.get(same, (0, now))
        return self.get(number) if now < until else None

    def since(
        self, number: int, limit: int, kind: str | None = None, instance: str | None = None
    ) -> tuple[list[Event], int]:
        """At most `limit` events from `number` on, oldest first, and where to go on.

        A number that is none of ours yet is another chronicle's: the registry has begun anew, and so does its reader.
        """
        start = self.oldest if number > self._next else max(number, self.oldest)
        found = [
            event
            for event in islice(self._events, start - self.oldest, None)
            if (kind is None or event.kind == kind) and (instance is None or event.instance == instance)
        ]
        if len(found) > limit:
            return found[:limit], found[limit - 1].id + 1
        return found, self._next

    def get(self, number: int) -> Event | None:
        """None where it is not kept any more."""
        return self._events[number - self.oldest] if self.oldest <= number < self._next else None

    def _replaced(self, event: Event) -> Event:
        self._events[event.id - self.oldest] = event
        return event


def wall(at_s: float) -> str:
    """Seconds since 1970 as `2026-11-21T23:59:01.123Z`."""
    return datetime.fromtimestamp(at_s, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
