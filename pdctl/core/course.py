"""
How a room has gone: which phases, for how long, how many bytes, for whose request, and why it ended.

Written while the room is open, at a fraction of a microsecond a phase; read once, when it is over, as what one log line
says and what one span shows. Never acts, and keeps nothing of a room whose object is gone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from pdctl.core.trace import Attribute, Event, Span, TraceContext
from pdctl.core.transfer import Event as RoomEvent
from pdctl.core.transfer import Phase, Side

MAX_PEERS = 8  # named in a line; a rank of a large split speaks to dozens


class Course:
    """Of a room that is open. `given`: the caller's trace; `trace`: under which we go on, and what peers are told."""

    __slots__ = ("given", "links", "nbytes", "steps", "trace")

    def __init__(self, phase: Phase, now: float, given: TraceContext | None = None) -> None:
        self.steps: list[tuple[Phase, float]] = [(phase, now)]
        self.given = given
        self.trace: TraceContext | None = given
        self.links: tuple[TraceContext, ...] = ()
        self.nbytes = 0

    def step(self, phase: Phase, now: float) -> None:
        self.steps.append((phase, now))

    @property
    def began(self) -> float:
        return self.steps[0][1]

    @property
    def ended(self) -> float:
        """Of one that goes on: when its phase began."""
        return self.steps[-1][1]


@dataclass(frozen=True, slots=True, eq=False)
class Ended:
    """Of a room that is over, in `phase`: by which event, and, where it failed, for what cause and in which words.

    cause   the engine's or the session table's, where one of them had a word for it; else what ended the room
    peers   addresses of control links, or sessions, with which it was shared
    """

    side: Side
    room: int
    phase: Phase
    ended_by: RoomEvent
    cause: str | None
    reason: str | None
    pages: int
    nbytes: int
    peers: tuple[str, ...]
    course: Course

    @property
    def failed(self) -> bool:
        return self.phase is Phase.FAILED

    @property
    def began(self) -> float:
        return self.course.began

    @property
    def ended(self) -> float:
        return self.course.ended

    @property
    def seconds(self) -> float:
        return self.ended - self.began

    @property
    def last_phase(self) -> Phase:
        """The one that it ended in; where it failed, that is the news."""
        return self.course.steps[-2][0] if len(self.course.steps) > 1 else self.phase

    def by_phase(self) -> Mapping[Phase, float]:
        """How long each took."""
        steps = self.course.steps
        spent: dict[Phase, float] = {}
        for (phase, since), (_, until) in pairwise(steps):
            spent[phase] = spent.get(phase, 0.0) + until - since
        return spent

    def line(self) -> dict[str, object]:
        """What the log says of it."""
        said: dict[str, object] = {"room": self.room, "side": self.side.value, "seconds": round(self.seconds, 6)}
        said |= {f"{phase.name.lower()}_s": round(seconds, 6) for phase, seconds in self.by_phase().items()}
        said |= {"nbytes": self.nbytes, "pages": self.pages, "peers": list(self.peers[:MAX_PEERS])}
        if len(self.peers) > MAX_PEERS:
            said["peers_in_all"] = len(self.peers)
        if self.failed:
            said |= {"phase": self.last_phase.name.lower(), "ended_by": self.ended_by.value}
            said |= {"cause": self.cause or self.ended_by.value, "reason": self.reason}
        trace = self.course.trace
        return said if trace is None else said | {"trace_id": trace.trace_id, "span_id": trace.span_id}

    def span(self, context: TraceContext) -> Span:
        """The room as a span, its phases as events; `context` is its own."""
        attributes: dict[str, Attribute] = {
            "pdctl.room": str(self.room),  # up to 64 bits, where the wire of spans has 63
            "pdctl.side": self.side.value,
            "pdctl.phase": self.last_phase.name.lower(),
            "pdctl.ended_by": self.ended_by.value,
            "pdctl.pages": self.pages,
            "pdctl.nbytes": self.nbytes,
            "pdctl.peers": self.peers[:MAX_PEERS],
        }
        if self.failed:
            attributes["error.type"] = self.cause or self.ended_by.value
        events = tuple(Event(phase.name.lower(), at) for phase, at in self.course.steps[1:])
        return Span(
            f"pdctl.room.{self.side.value}",
            context,
            self.course.given,
            self.began,
            self.ended,
            attributes,
            events,
            self.course.links,
            self.reason if self.failed else None,
        )
