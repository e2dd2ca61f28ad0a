"""
What has happened, in words: of lives, of transfer sessions, of rooms, of requests that were refused.

Values in, a kind and a sentence out ("what happened: what to do"); the log, the chronicle and the counters have one
wording. Nothing is decided here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from enum import StrEnum

from pdctl.core import lives, standing
from pdctl.core.kinds import ChangeKind, Kind, State
from pdctl.core.report import FailedRoom, LinkSeen, short_seat
from pdctl.errors import (
    LimitReached,
    NotNow,
    Occupied,
    PdctlError,
    Refused,
    Superseded,
    TooLarge,
    UnknownLease,
)

Said = tuple[str, str]
"""A kind, and a sentence."""

CROWD = 16
"""More changes of one kind to one instance at a time are one line, and one event: a line costs more than all the rest
of a change, and 10,000 ranks that come would push out all else."""


class Refusal(StrEnum):
    """Why the registry did not do what a request asked."""

    MALFORMED = "malformed"  # a field that cannot be used
    CONTRADICTION = "contradiction"  # a rank that does not fit its instance
    OCCUPIED = "occupied"  # the seat is another host's, who lives
    STALE = "stale"  # a renewal or a goodbye of a life that is over
    LIMIT = "limit"  # a body or a table at its limit
    UNAVAILABLE = "unavailable"  # the body came too slowly, or the journal does not take rows


LIVES = {
    ChangeKind.SEATED: "seat taken",
    ChangeKind.REPLACED: "seat taken by a new life",
    ChangeKind.AMENDED: "seat amended",
    ChangeKind.RESHAPED: "instance restarted with other settings",
    ChangeKind.COMPLETED: "instance complete",
    ChangeKind.SUSPECTED: "rank has missed a renewal",
    ChangeKind.RECOVERED: "rank has spoken again",
    ChangeKind.DRAINING: "rank drains",
    ChangeKind.FOUND: "rank found again by its witness",
    ChangeKind.LOST: "rank lost by its witness",
    ChangeKind.DRAINED: "rank drained",
    ChangeKind.EXPIRED: "lease over",
    ChangeKind.FORGOTTEN: "rank forgotten",
    ChangeKind.LEFT: "rank has left",
    ChangeKind.SUPERSEDED: "rank of an earlier incarnation dropped",
}

_THEN = {
    ChangeKind.SUSPECTED: "half a lease more and it is dropped; see whether its process runs and reaches this registry",
    ChangeKind.LOST: "see whether its process runs, start it again",
    ChangeKind.EXPIRED: "its process has died, stands still or does not reach this registry; see its log",
    ChangeKind.DRAINED: "start it anew to serve again",
    ChangeKind.DRAINING: "it takes nothing new, and goes when its rooms are done",
}

_SESSIONS = {
    standing.ChangeKind.BLOCKED: (Kind.EJECTED, "ejected: requests for it fail at once until it is well"),
    standing.ChangeKind.DROPPED: (Kind.DROPPED, "dropped, the life it stands for is over: it must register anew"),
    standing.ChangeKind.RECOVERED: (Kind.READMITTED, "readmitted: it has proven itself well"),
    standing.ChangeKind.TRIAL_PASSED: (Kind.READMITTED, "readmitted: its trial is over"),
    standing.ChangeKind.LIFTED: (Kind.READMITTED, "readmitted: it has registered anew, or a hand has lifted it"),
    standing.ChangeKind.FORGOTTEN: (Kind.READMITTED, "forgotten while it was out: nobody has asked for it"),
    standing.ChangeKind.PANIC_BEGAN: (Kind.PANIC, "too many are out, all of the group are served: see their hosts"),
    standing.ChangeKind.PANIC_ENDED: (Kind.PANIC, "enough are well again: those that are out are refused"),
    standing.ChangeKind.DOUBT_BEGAN: (Kind.DOUBT, "the fault may be here, time-outs block nobody: see this host"),
    standing.ChangeKind.DOUBT_ENDED: (Kind.DOUBT, "no doubt any more: time-outs speak of the peer again"),
}

_STATES = {
    State.BLOCKED: (Kind.EJECTED, "ejected: see whether that process runs and can be reached from there"),
    State.DROPPED: (Kind.DROPPED, "dropped, its life is over: it must register anew"),
    State.TRIAL: (Kind.ON_TRIAL, "on trial: it is back, with few transfers at once"),
    State.TRUSTED: (Kind.READMITTED, "readmitted"),
}

_INSTANCE = re.compile(r"/v1/instances/([^/?]+)(?:/ranks/([^/?]+))?", re.ASCII)


def crowds(changes: Sequence[lives.Change]) -> Iterable[Sequence[lives.Change]]:
    """By what may be said together."""
    by: dict[tuple[ChangeKind, str], list[lives.Change]] = {}
    for change in changes:
        by.setdefault((change.kind, change.instance), []).append(change)
    return by.values()


def of_life(change: lives.Change, seats: int = 1) -> Said:
    """`seats`: for how many of the instance it stands."""
    who = f"{change.instance} {short_seat(change.seat)}" if seats == 1 else f"{seats} seats of {change.instance}"
    why = "" if change.why is None else f" ({change.why})"
    then = _THEN.get(change.kind)
    return change.kind.value, f"{who}: {LIVES[change.kind]}{why}{'' if then is None else f': {then}'}"


def of_session(change: standing.Change) -> Said:
    kind, words = _SESSIONS[change.kind]
    if change.kind is standing.ChangeKind.RECOVERED and change.state is State.TRIAL:
        kind, words = Kind.ON_TRIAL, "on trial: it is back, with few transfers at once"
    group = f"group {change.group!r}" if change.group else "this service"
    who = f"session {change.session}" if change.session else group
    told = ": ".join(filter(None, (change.cause and standing.words(change.cause), change.detail)))
    return kind, f"{who} {words}" + (f" ({told})" if told and kind in (Kind.EJECTED, Kind.DROPPED) else "")


def of_link(rank: str, was: State, link: LinkSeen) -> Said:
    """What `rank`, an instance and a seat, sees of a peer now."""
    kind, words = _STATES[link.state]
    said = f" ({link.sentence})" if link.state in (State.BLOCKED, State.DROPPED) else f", {was.value} before"
    return kind, f"{rank} sees session {link.session} {words}{said}"


def of_room(rank: str, room: FailedRoom) -> Said:
    with_whom = f" with {room.peer}" if room.peer else ""
    return Kind.ROOM_FAILED, f"room {room.room} failed at {rank}{with_whom}: {room.sentence}"


def of_denial(peer: str, asked: str, text: str) -> str:
    """`asked`: a method and a path; `text`: what whoever asked is told."""
    return f"{peer} was denied {asked}: {text}"


def of_turn(peer: str, wait_s: int) -> str:
    return f"{peer} registers in {wait_s} s, many come at once: nothing, it comes again by itself (docs/outages.md)"


def refusal_of(error: PdctlError) -> Refusal:
    match error:
        case Refused():
            return Refusal.CONTRADICTION
        case Occupied():
            return Refusal.OCCUPIED
        case Superseded() | UnknownLease():
            return Refusal.STALE
        case TooLarge() | LimitReached():
            return Refusal.LIMIT
        case NotNow():
            return Refusal.UNAVAILABLE
    return Refusal.MALFORMED


def place_in(path: str) -> tuple[str | None, str | None]:
    """The instance and the seat that a path of ours names."""
    found = _INSTANCE.match(path)
    return (None, None) if found is None else (found[1], found[2])


def sides_of(error: PdctlError) -> tuple[str | None, str | None]:
    """What is held and what was offered, where the error tells them apart."""
    match error:
        case Refused():
            return str(error.held), str(error.offered)
        case Occupied():
            return error.holder, error.claimant
        case Superseded():
            return str(error.held), str(error.got)
    return None, None
