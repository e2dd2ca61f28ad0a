"""
Which request a piece of work belongs to: W3C's trace context, read and written; and a span, as a value.

What cannot be read is no context at all, never half of one: a caller's mistake may not follow a request through the
house, and may not fail it either. Draws no numbers itself and knows no exporter.

    traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01
                 version, trace, the caller's span, flags (1: it is recorded)
    tracestate:  vendor1=opaque,vendor2=opaque
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from pdctl.errors import BadField

TRACEPARENT, TRACESTATE = "traceparent", "tracestate"

MAX_STATE = 512  # what W3C asks everybody to hand on at least; more of a stranger's text is not remembered here
_MAX_MEMBERS = 32
_SAMPLED, _RANDOM = 0x01, 0x02

_PARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.ASCII)
_DIGITS = re.compile(r"[0-9a-f]+", re.ASCII)
_MEMBER = re.compile(
    r"(?:[a-z][_0-9a-z\-*/]{0,255}|[a-z0-9][_0-9a-z\-*/]{0,240}@[a-z][_0-9a-z\-*/]{0,13})"
    r"=[\x20-\x2b\x2d-\x3c\x3e-\x7e]{0,255}[\x21-\x2b\x2d-\x3c\x3e-\x7e]"
)

Bits: TypeAlias = Callable[[int], int]
"""So many random bits: `Random.getrandbits`."""


@dataclass(frozen=True, slots=True)
class TraceContext:
    """One span of one trace, as whoever works for it is told: `trace_id` is 32 digits, `span_id` 16, `state` vendors'.

    `parse` and `from_headers` make one of what a caller says.
    """

    trace_id: str
    span_id: str
    flags: int = _SAMPLED
    state: str = ""

    def __post_init__(self) -> None:
        """Raises BadField: what stands here is put into headers and log lines as it is."""
        for name, value, size in (("trace_id", self.trace_id, 32), ("span_id", self.span_id, 16)):
            if len(value) != size or not _DIGITS.fullmatch(value) or not value.strip("0"):
                raise BadField(name, f"is {value[:64]!r}: give {size} digits of 0 to 9 and a to f, not all of them 0")
        if self.state and self.state != _state(self.state):
            raise BadField("state", f"is {self.state[:64]!r}: give what a tracestate header may hold")

    @property
    def is_sampled(self) -> bool:
        """Whether the caller records it, and wants to find our spans beside its own."""
        return bool(self.flags & _SAMPLED)

    @property
    def traceparent(self) -> str:
        return f"00-{self.trace_id}-{self.span_id}-{self.flags:02x}"

    def headers(self) -> dict[str, str]:
        """What an HTTP request carries."""
        headers = {TRACEPARENT: self.traceparent}
        return headers | {TRACESTATE: self.state} if self.state else headers

    def below(self, bits: Bits) -> TraceContext:
        """A new span of the same trace."""
        return replace(self, span_id=f"{_not_zero(bits, 64):016x}")

    @classmethod
    def begun(cls, bits: Bits, ratio: float = 1.0) -> TraceContext:
        """A trace of our own; of many, `ratio` are sampled, and whoever sees the id decides alike."""
        trace_id = _not_zero(bits, 128)
        sampled = _SAMPLED if (trace_id & (1 << 56) - 1) < ratio * (1 << 56) else 0
        return cls(f"{trace_id:032x}", f"{_not_zero(bits, 64):016x}", sampled | _RANDOM)

    @classmethod
    def parse(cls, traceparent: str | None, tracestate: str | None = None) -> TraceContext | None:
        """None for what is none. A `tracestate` that cannot be read costs only itself."""
        found = None if traceparent is None else _PARENT.fullmatch(traceparent.strip(" \t"))
        if found is None:
            return None
        version, trace_id, span_id, flags, more = found.groups()
        if version == "ff" or (version == "00" and more is not None) or not trace_id.strip("0"):
            return None
        # of a later version only these bits are known to mean what they say
        known = int(flags, 16) & (_SAMPLED | _RANDOM)
        return cls(trace_id, span_id, known, _state(tracestate)) if span_id.strip("0") else None

    @classmethod
    def from_headers(cls, headers: Mapping[str, str]) -> TraceContext | None:
        """Of a request, whose names are in lower case or do not care."""
        return cls.parse(headers.get(TRACEPARENT), headers.get(TRACESTATE))


Trace: TypeAlias = TraceContext | str | None
"""What a caller may give: a context, a `traceparent`, or nothing."""


def trace_of(given: Trace) -> TraceContext | None:
    return TraceContext.parse(given) if isinstance(given, str) else given


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened within a span; `at` by the clock of the span's ends."""

    name: str
    at: float
    attributes: Mapping[str, Attribute] = field(default_factory=dict)


Attribute: TypeAlias = str | int | float | bool | tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Span:
    """A piece of work that is over. `began` and `ended` are monotonic seconds; `error`: why it failed, in words.

    parent  whose work it was part of; links: other traces that it served as well
    """

    name: str
    context: TraceContext
    parent: TraceContext | None
    began: float
    ended: float
    attributes: Mapping[str, Attribute] = field(default_factory=dict)
    events: tuple[Event, ...] = ()
    links: tuple[TraceContext, ...] = ()
    error: str | None = None
    serves: bool = False  # a request that came from outside


def _not_zero(bits: Bits, size: int) -> int:
    """Nothing but zeros is no id."""
    return bits(size) or 1


def _state(text: str | None) -> str:
    """Members as they came, without empty ones; nothing of a list with a member that is none, or one twice."""
    members = [member.strip(" \t") for member in (text or "").split(",")]
    kept = [member for member in members if member]
    keys = {member.partition("=")[0] for member in kept}
    if len(kept) > _MAX_MEMBERS or len(keys) < len(kept) or not all(map(_MEMBER.fullmatch, kept)):
        return ""
    joined = ",".join(kept)
    return joined if len(joined) <= MAX_STATE else ""
