"""
What a rank tells its registry of itself: how it stands with others, what it has under way, and what has failed.

    PUT    /v1/instances/{instance}/ranks/{seat}/report    Report -> Wanted

Plain dataclasses, as in `core.native`: the dialect reads them strictly, the rank writes them. Everything is bounded, so
that no rank can make a registry remember, or a page show, more than this. No clock in it: only ages, as of the moment
at which it was sent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pdctl.core.kinds import State
from pdctl.core.native import check_name
from pdctl.core.route import Seat, as_object, needed
from pdctl.core.transfer import Phase, Side
from pdctl.core.warmup import StoreState
from pdctl.errors import BadField, Cause, StoreCause

MAX_LINKS = 4096
MAX_OPEN = 256
MAX_FAILED = 64
MAX_REASONS = 16
MAX_GROUPS = 64
MAX_TEXT = 400
"""Characters of a sentence; of a name 255."""

_MAX_NAME = 255
_MAX_COUNT = (1 << 63) - 1
_MAX_ROOM = 10**40  # a room may exceed 64 bits
_MAX_SECONDS = 1e9

_STRICT = {"extra": "forbid"}
_OPEN_PHASES = frozenset(phase.name.lower() for phase in Phase if not phase.is_final)
_SIDES = frozenset(side.value for side in Side)


@dataclass(frozen=True, slots=True)
class LinkSeen:
    """One peer's transfer session, as this rank's own table has it.

    sentence    as the table words it
    again_in_s  when it is asked next, or let back at the earliest; null: not by itself
    since_s     for how long it has been out
    """

    __pydantic_config__ = _STRICT

    session: str
    state: State = State.TRUSTED
    cause: Cause | None = None
    sentence: str = "trusted"
    again_in_s: float | None = None
    since_s: float = 0.0

    def __post_init__(self) -> None:
        _check_text("links.session", self.session, _MAX_NAME)
        if self.state is State.TRUSTED and self.sentence == "trusted" and not self.since_s and self.again_in_s is None:
            return  # as most are, of up to 4,096 in a report
        _check_text("links.sentence", self.sentence)
        _check_seconds("links.since_s", self.since_s)
        _check_seconds("links.again_in_s", self.again_in_s)


@dataclass(frozen=True, slots=True)
class OpenRoom:
    """A room under way. `peer`: whom it waits for, where that is one."""

    __pydantic_config__ = _STRICT

    room: int
    side: Side
    phase: str
    age_s: float
    peer: str | None = None

    def __post_init__(self) -> None:
        _check_count("open.room", self.room, _MAX_ROOM)
        _check_seconds("open.age_s", self.age_s)
        _check_phase("open.phase", self.phase)
        if self.peer is not None:
            _check_text("open.peer", self.peer, _MAX_NAME)


@dataclass(frozen=True, slots=True)
class FailedRoom:
    """A room that has failed `age_s` ago, after `seconds`. `cause`: of the transfer, or how it ended."""

    __pydantic_config__ = _STRICT

    room: int
    side: Side
    age_s: float
    seconds: float
    cause: str
    sentence: str
    peer: str | None = None

    def __post_init__(self) -> None:
        _check_count("failed.room", self.room, _MAX_ROOM)
        _check_seconds("failed.age_s", self.age_s)
        _check_seconds("failed.seconds", self.seconds)
        _check_text("failed.cause", self.cause, 64)
        _check_text("failed.sentence", self.sentence)
        if self.peer is not None:
            _check_text("failed.peer", self.peer, _MAX_NAME)


@dataclass(frozen=True, slots=True)
class Ended:
    """Rooms since the process began."""

    __pydantic_config__ = _STRICT

    success: int = 0
    failed: int = 0

    def __post_init__(self) -> None:
        _check_count("ended.success", self.success)
        _check_count("ended.failed", self.failed)


@dataclass(frozen=True, slots=True)
class StoreSeen:
    """How the shared store stands with this rank.

    attached  whether it is used now
    step      at which it was tried last, or failed
    cause, code  of the last failure; null where there was none, or none with a code
    tries     in vain, since its opening began
    since_s   for how long it stands so
    """

    __pydantic_config__ = _STRICT

    attached: bool
    sentence: str
    state: StoreState | None = None
    step: str | None = None
    cause: StoreCause | None = None
    code: int | None = None
    tries: int = 0
    since_s: float = 0.0

    def __post_init__(self) -> None:
        _check_text("store.sentence", self.sentence)
        if self.step is not None:
            _check_text("store.step", self.step, 64)
        if self.code is not None and abs(self.code) > _MAX_COUNT:
            raise BadField("store.code", "has more than 63 bits: give what the store gave")
        _check_count("store.tries", self.tries)
        _check_seconds("store.since_s", self.since_s)


@dataclass(frozen=True, slots=True)
class Report:
    """ "So it looks from here." Treat the mapping as read-only.

    epoch        of the life that speaks, where the registry gave it one
    session      under which its engine is reached
    unready      the reasons of its /readyz
    links        of the peers that it writes to; those in trouble first
    rooms        open now, by side and phase
    bytes        sent by a prefill, arrived at a decode, since the process began
    open         the oldest
    failed       the last, the newest at the end
    quarantined  pages of finished rooms that somebody may still touch
    doubt        whether the fault may be its own, so that time-outs blame nobody
    panicking    groups of sessions that are served whole
    """

    __pydantic_config__ = _STRICT

    role: str
    epoch: int | None = None
    session: str | None = None
    unready: tuple[str, ...] = ()
    links: tuple[LinkSeen, ...] = ()
    rooms: Mapping[str, Mapping[str, int]] = field(default_factory=dict, hash=False)
    ended: Ended = field(default_factory=Ended)
    bytes: int = 0
    open: tuple[OpenRoom, ...] = ()
    failed: tuple[FailedRoom, ...] = ()
    quarantined: int = 0
    doubt: bool = False
    panicking: tuple[str, ...] = ()
    store: StoreSeen | None = None

    def __post_init__(self) -> None:
        check_name(self.role, "role")
        if self.epoch is not None:
            _check_count("epoch", self.epoch)
        if self.session is not None:
            _check_text("session", self.session, _MAX_NAME)
        _check_count("bytes", self.bytes)
        _check_count("quarantined", self.quarantined)
        _check_rooms(self.rooms)
        for name, said, most in (
            ("links", self.links, MAX_LINKS),
            ("open", self.open, MAX_OPEN),
            ("failed", self.failed, MAX_FAILED),
            ("unready", self.unready, MAX_REASONS),
            ("panicking", self.panicking, MAX_GROUPS),
        ):
            _check_number(name, said, most)
        for reason in self.unready:
            _check_text("unready", reason)
        for group in self.panicking:
            _check_text("panicking", group, _MAX_NAME, empty=True)

    @property
    def n_open(self) -> int:
        return sum(n for phases in self.rooms.values() for n in phases.values())


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the registry answers: in `again_s` seconds at the latest it wants to hear again."""

    again_s: float

    @classmethod
    def from_body(cls, body: object) -> Wanted:
        """Raises BadField."""
        again_s = needed(as_object(body), "again_s")
        if isinstance(again_s, bool) or not isinstance(again_s, int | float) or not 0 < again_s < math.inf:
            raise BadField("again_s", "is no number of seconds above 0: send one")
        return cls(float(again_s))


def short_seat(seat: Seat) -> str:
    """`tp1`, `dp1-tp3`: the axes that are not 0; of the first seat `tp0`."""
    axes = (("dp", seat.dp), ("cp", seat.cp), ("tp", seat.tp), ("pp", seat.pp))
    return "-".join(f"{axis}{number}" for axis, number in axes if number) or "tp0"


def in_a_line(text: str, most: int = MAX_TEXT) -> str:
    """As a report may say it: printable, on one line, not too long; never empty."""
    line = text if text.isprintable() else "".join(each if each.isprintable() else " " for each in text)
    return (line if len(line) <= most else f"{line[: most - 3]}...") or "?"


def _check_text(name: str, text: str, most: int = MAX_TEXT, *, empty: bool = False) -> None:
    if not (len(text) <= most and (text or empty) and text.isprintable()):
        raise BadField(name, f"is empty, not printable or longer than {most}: give one line of text")


def _check_count(name: str, number: int, most: int = _MAX_COUNT) -> None:
    if not 0 <= number <= most:
        raise BadField(name, f"is {str(number)[:60]}: give 0 to {most}")


def _check_seconds(name: str, seconds: float | None) -> None:
    if seconds is not None and not 0 <= seconds <= _MAX_SECONDS:  # NaN included
        raise BadField(name, f"is {seconds:g}: give 0 to {_MAX_SECONDS:g} seconds")


def _check_number(name: str, said: Sequence[object], most: int) -> None:
    if len(said) > most:
        raise BadField(name, f"are {len(said)}: give {most} at most, those that matter most")


def _check_phase(name: str, phase: str) -> None:
    if phase not in _OPEN_PHASES:
        raise BadField(name, f"is {phase[:40]!r}: give one of {', '.join(sorted(_OPEN_PHASES))}")


def _check_rooms(rooms: Mapping[str, Mapping[str, int]]) -> None:
    for side, phases in rooms.items():
        if side not in _SIDES:
            raise BadField("rooms", f"have a side {side[:40]!r}: give {' or '.join(sorted(_SIDES))}")
        for phase, number in phases.items():
            _check_phase(f"rooms.{side}", phase)
            _check_count(f"rooms.{side}.{phase}", number)
