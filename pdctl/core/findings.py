"""
What keeps an instance, a pair, a rank or a room from serving: the words in which it is said.

Values only: who may be asked about (`Scope`), what was found (`Finding`), and by what name (`Culprit`). `core.explain`
finds, `explaining` asks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from pdctl.core.native import check_name, read_seat, seat_name
from pdctl.core.route import Seat, as_integer
from pdctl.errors import BadField


class Culprit(StrEnum):
    """Who is to blame, causes before what they cause: findings are told in this order."""

    REGISTRY_DOWN = "registry_down"  # nothing answers at the registry's address
    WRONG_BOOTSTRAP_PORT = "wrong_bootstrap_port"  # what is there is no registry, or it is asked for at another port
    ACCESS_REFUSED = "access_refused"  # it answers, and not us: no token, a wrong one, a network it does not trust
    JOURNAL_TROUBLE = "journal_trouble"  # it cannot write, or answers from an old copy
    WILDCARD_ADDRESS = "wildcard_address"  # a rank announces 0.0.0.0 or ::
    LOOPBACK_ADDRESS = "loopback_address"  # a rank announces an address that only its own host reaches
    PAGE_SIZE_MISMATCH = "page_size_mismatch"
    TP_MISMATCH = "tp_mismatch"
    LAYOUT_MISMATCH = "layout_mismatch"  # any other field of the shape
    SEAT_OCCUPIED = "seat_occupied"  # two processes claim one seat
    CLAIM_REFUSED = "claim_refused"  # a registration that cannot be meant
    NEVER_REGISTERED = "never_registered"
    STALE_REGISTRATION = "stale_registration"  # listed, and nothing listens there any more
    PORT_TAKEN = "port_taken"  # listed, and another program listens there
    UNREACHABLE_ADDRESS = "unreachable_address"  # listed, and no way leads there from here
    LEASE_LAPSED = "lease_lapsed"
    RANK_MISSING = "rank_missing"
    DRAINING = "draining"
    EJECTED_LINK = "ejected_link"
    OWN_FAULT = "own_fault"  # a rank doubts itself, or half of its peers fail at once
    HANGS = "hangs"  # it takes connections and says nothing
    STORE_NOT_READY = "store_not_ready"
    RANK_UNREADY = "rank_unready"
    REPORT_LOST = "report_lost"
    REPLICA_SILENT = "replica_silent"  # another registry of the fleet does not say what its ranks tell it
    ROOM_FAILED = "room_failed"
    ROOM_STUCK = "room_stuck"
    ROOM_UNKNOWN = "room_unknown"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong. `who` it is about, `why` it matters, how that is known, and what to `do`."""

    what: Culprit
    who: str
    why: str
    do: str
    evidence: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Place:
    """An instance, or one rank of it."""

    instance: str
    seat: Seat | None = None

    @classmethod
    def parse(cls, text: str) -> Place:
        """From `prefill` or `prefill/tp1`. Raises BadField."""
        instance, slash, seat = text.partition("/")
        name = instance.removeprefix("vllm:")
        check_name(name, "instance")
        return cls(instance, read_seat(seat.replace("/", "-")) if slash else None)

    def __str__(self) -> str:
        return self.instance if self.seat is None else rank_name(self.instance, self.seat)


@dataclass(frozen=True, slots=True)
class Scope:
    """What is asked about: nothing in particular, one place, a pair of them, or a room."""

    places: tuple[Place, ...] = ()
    room: int | None = None

    @classmethod
    def parse(cls, words: Sequence[str], room: str | None = None) -> Scope:
        """From what a person writes: `P`, `P/tp1`, `P tp1`, `P D`, `room 7`. Raises BadField."""
        if len(words) == 2 and words[0] == "room" and words[1].isdigit():
            return cls(room=as_integer(words[1], "room"))
        number = None if room is None else as_integer(room, "room")
        if len(words) > 2:
            raise BadField("what", f"is {' '.join(words)[:80]!r}: name an instance, a rank, two of them, or a room")
        if len(words) == 2 and (seat := _seat(words[1])) is not None:
            return cls((Place(Place.parse(words[0]).instance, seat),), number)
        return cls(tuple(map(Place.parse, words)), number)

    def covers(self, instance: str | None, seat: Seat | None = None) -> bool:
        """Whether it is about this one; where nothing in particular is asked about, about everybody."""
        if not self.places:
            return True
        return any(
            place.instance == instance and (place.seat is None or seat is None or place.seat == seat)
            for place in self.places
        )

    def __str__(self) -> str:
        if self.room is not None:
            return f"room {self.room}"
        return " and ".join(map(str, self.places)) or "the fleet"


def rank_name(instance: str, seat: Seat) -> str:
    """`prefill/tp1`: without the axes that are 0, and never without any."""
    axes = [axis for axis in seat_name(seat).split("-") if not axis.endswith("0") or axis[2:] != "0"]
    return f"{instance}/{'-'.join(axes) or 'tp0'}"


def in_order(findings: Iterable[Finding]) -> list[Finding]:
    """Causes first, each once."""
    order = list(Culprit)
    return sorted(dict.fromkeys(findings), key=lambda finding: order.index(finding.what))


def _seat(text: str) -> Seat | None:
    try:
        return read_seat(text.replace("/", "-"))
    except BadField:
        return None
