"""
What is known of a fleet at one moment: what its registry tells, and what was found out by asking.

Values and readers of them; the rows are JSON as `GET /v1/overview` and `GET /v1/events` have it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from functools import cached_property
from typing import Any

from pdctl.core.address import Endpoint
from pdctl.core.findings import rank_name
from pdctl.core.naming import SESSION_KEY
from pdctl.core.native import read_seat
from pdctl.core.route import Seat, Shape, shape_from_topology
from pdctl.errors import BadField

Row = Mapping[str, Any]

SHOWN = 16
"""Of many of a kind, so many are named."""

LEFT = frozenset({"expired", "lost", "left", "drained"})
CAME = frozenset({"seated", "replaced", "reshaped", "completed", "recovered", "found"})


class Door(StrEnum):
    """What is behind an address, as far as it can be seen from where it was asked."""

    ANSWERS = "answers"  # as what it is meant to be
    SILENT = "silent"  # takes connections and says nothing: the process hangs, or stands still
    ANOTHER = "another"  # says something that what was registered would not say
    REFUSED = "refused"  # nobody listens
    NO_WAY = "no_way"  # no answer at all, no route, no such name


@dataclass(frozen=True, slots=True)
class Knock:
    """What came of one question, in words."""

    door: Door
    detail: str


@dataclass(frozen=True, slots=True)
class Astray:
    """A process of this host that was told of another registry: `flag` of process `who` says `url_or_port`."""

    who: str
    flag: str
    value: str


@dataclass(frozen=True)
class Seen:
    """Everything that is known.

    overview  as GET /v1/overview
    events    as GET /v1/events, oldest first
    knocks    by address, of control links and of engines' sessions
    now       by the registry's clock, which dates the events
    registry  where it was asked; `here`: from which host
    astray    processes of this host that look for a registry elsewhere
    """

    overview: Row
    events: Sequence[Row] = ()
    knocks: Mapping[str, Knock] = field(default_factory=dict)
    now: datetime | None = None
    registry: str = ""
    here: str = "here"
    astray: Sequence[Astray] = ()

    @cached_property
    def instances(self) -> dict[str, Row]:
        return {str(row["name"]): row for row in self.overview.get("instances", ())}

    @cached_property
    def reports(self) -> dict[tuple[str, Seat], Row]:
        rows = ((row, seat_of(row)) for row in self.overview.get("reports", ()))
        return {(str(row.get("instance")), seat): row for row, seat in rows if seat is not None}

    @cached_property
    def ranks(self) -> dict[tuple[str, Seat], Row]:
        """Everybody who is alive, by name and seat."""
        found = {}
        for name, instance in self.instances.items():
            for row in instance.get("alive_seats", ()):
                if (seat := seat_of(row)) is not None:
                    found[name, seat] = row
        return found

    @cached_property
    def by_session(self) -> dict[str, str]:
        """Whose engine a session is, as `decode/tp0`."""
        ranks = {
            str(row.get("metadata", {}).get(SESSION_KEY)): rank_name(name, seat)
            for (name, seat), row in self.ranks.items()
        }
        reported = {str(row.get("session")): rank_name(name, seat) for (name, seat), row in self.reports.items()}
        return ranks | reported

    @cached_property
    def by_address(self) -> dict[str, str]:
        """Whose control link an address is, or was until it ended."""
        past = {
            str(event.get("peer")): rank_name(str(event.get("instance")), seat)
            for event in self.events
            if event.get("kind") in LEFT | CAME and (seat := seat_of(event)) is not None
        }
        return past | {str(row.get("address")): rank_name(*key) for key, row in self.ranks.items()}

    @cached_property
    def last(self) -> dict[tuple[str, Seat | None], Row]:
        """What last happened to each seat; under None to many of an instance at once, of whom no one is named."""
        found: dict[tuple[str, Seat | None], Row] = {}
        for event in self.events:
            if event.get("kind") in LEFT | CAME:
                found[str(event.get("instance")), seat_of(event)] = event
        return found

    @cached_property
    def came(self) -> dict[str, list[tuple[int, Seat | None, str]]]:
        """Who has come to each instance: the event's number, the seat, from which host."""
        found: dict[str, list[tuple[int, Seat | None, str]]] = {}
        for event in self.events:
            if event.get("kind") in CAME:
                who = (int(event.get("id", 0)), seat_of(event), host_of(event))
                found.setdefault(str(event.get("instance")), []).append(who)
        return found

    def age_s(self, event: Row) -> float | None:
        """How long ago, if that can be told."""
        try:
            then = datetime.fromisoformat(str(event.get("at", "")).replace("Z", "+00:00"))
        except ValueError:
            return None
        return None if self.now is None or then.tzinfo is None else (self.now - then).total_seconds()


def seat_of(row: Row) -> Seat | None:
    """Of a rank's row, a report or an event; None where none is named."""
    said = row.get("seat") or row.get("rank")
    if not isinstance(said, str):
        return None
    try:
        return read_seat(said.replace("/", "-"))
    except BadField:
        return None


def said(event: Row) -> str:
    return str(event.get("sentence", ""))


def host_of(event: Row) -> str:
    """Of a peer, `10.0.0.9:5555` or a host alone; the port is another each time."""
    peer = str(event.get("peer") or "")
    try:
        return Endpoint.parse(peer).host
    except BadField:
        return peer


def missing_seats(instance: Row) -> list[Seat]:
    return [seat for row in instance.get("missing_seats", ()) if (seat := seat_of(row)) is not None]


def endpoint_of(row: Row) -> Endpoint | None:
    try:
        return Endpoint.parse(str(row.get("address", "")))
    except BadField:
        return None


def role_of(seen: Seen, name: str) -> str:
    return str(seen.instances[name].get("role", "prefill"))


def shape_of(instance: Row) -> Shape:
    return shape_from_topology(instance.get("shape"))


def sizes(shape: Row) -> str:
    names = (("dp", "dp_size"), ("cp", "attn_cp_size"), ("tp", "attn_tp_size"), ("pp", "pp_size"))
    sizes = [f"{short} {shape[name]}" for short, name in names if shape.get(name, 1) != 1 or short == "tp"]
    return ", ".join([*sizes, f"page_size {shape.get('page_size')}", f"{shape.get('kv_cache_dtype')}"])


def ago(seconds: float) -> str:
    return f"{seconds:.0f} s ago" if seconds < 120 else f"{seconds / 60:.0f} min ago"
