"""
A room's phases, as both sides see them, and what may be said when one of them takes too long.

No sockets, no clock, no logging. The table is the machine: an event that a phase's row does not have is illegal and
changes nothing; a finished room stays as it is whatever comes late.

    sender    BOOTSTRAPPING --all decode ranks named their pages--> WAITING_FOR_INPUT --a chunk--> TRANSFERRING --all
              landed--> SUCCESS
    receiver  BOOTSTRAPPING --buffers registered--> WAITING_FOR_INPUT --pages named--> TRANSFERRING --all answered-->
              SUCCESS
    both      any phase --an ending--> FAILED
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import TYPE_CHECKING

from pdctl.core.comparing import Checksum
from pdctl.core.seconds import check_seconds
from pdctl.errors import ConfigError, IllegalEvent

if TYPE_CHECKING:  # a registry hears of phases and has no arrays
    import numpy as np
    import numpy.typing as npt


class Phase(IntEnum):
    """The numbers are SGLang's, and travel."""

    FAILED = 0
    BOOTSTRAPPING = 1
    WAITING_FOR_INPUT = 2
    TRANSFERRING = 3
    SUCCESS = 4

    @property
    def is_final(self) -> bool:
        return self in (Phase.FAILED, Phase.SUCCESS)


class Side(StrEnum):
    """Whose view it is."""

    SENDER = "sender"
    RECEIVER = "receiver"


class Word(StrEnum):
    """What one side has said of a room and the other not heard: the connection broke that had taken it."""

    REGISTRATION = "registration"  # of decode's memory
    PAGES = "pages"  # that decode named
    STATUS = "status"  # prefill's last
    MATCH = "match"  # decode's, of what it compared


class Event(StrEnum):
    """Things that happened to a room."""

    PEER_NAMED_PAGES = "peer_named_pages"  # sender: one decode rank's metadata came, others are missing
    ALL_NAMED_PAGES = "all_named_pages"  # sender: the last one's came
    CHUNK_QUEUED = "chunk_queued"  # sender: pages or an aux row were given to the engine
    CHUNK_LANDED = "chunk_landed"  # sender: at every decode rank, and there is more to come
    LAST_CHUNK_LANDED = "last_chunk_landed"  # sender: pages and aux are at every decode rank, and whole where compared
    BUFFERS_REGISTERED = "buffers_registered"  # receiver: the prefill ranks have been told of our memory
    METADATA_SENT = "metadata_sent"  # receiver: the prefill ranks have been told of the pages
    PREFILL_ANSWERED = "prefill_answered"  # receiver: one prefill rank has finished, others are missing
    ALL_ANSWERED = "all_answered"  # receiver: the last one has
    TRANSFER_FAILED = "transfer_failed"  # the engine says so, or the plan cannot be made
    PEER_FAILED = "peer_failed"  # the other side gave the room up
    PEER_UNREACHABLE = "peer_unreachable"  # the other side cannot be told
    ABORTED = "aborted"  # this side gave the room up
    TIMED_OUT = "timed_out"  # see OVERDUE


Table = Mapping[Phase, Mapping[Event, Phase]]

ENDINGS: Mapping[Event, Phase] = {
    Event.TRANSFER_FAILED: Phase.FAILED,
    Event.PEER_FAILED: Phase.FAILED,
    Event.PEER_UNREACHABLE: Phase.FAILED,
    Event.ABORTED: Phase.FAILED,
    Event.TIMED_OUT: Phase.FAILED,
}

SENDER: Table = {
    Phase.BOOTSTRAPPING: {
        Event.PEER_NAMED_PAGES: Phase.BOOTSTRAPPING,
        Event.ALL_NAMED_PAGES: Phase.WAITING_FOR_INPUT,
        **ENDINGS,
    },
    Phase.WAITING_FOR_INPUT: {
        Event.CHUNK_QUEUED: Phase.TRANSFERRING,
        **ENDINGS,
    },
    Phase.TRANSFERRING: {
        Event.CHUNK_QUEUED: Phase.TRANSFERRING,
        Event.CHUNK_LANDED: Phase.TRANSFERRING,
        Event.LAST_CHUNK_LANDED: Phase.SUCCESS,
        **ENDINGS,
    },
    Phase.SUCCESS: {},
    Phase.FAILED: {},
}

RECEIVER: Table = {
    Phase.BOOTSTRAPPING: {
        Event.BUFFERS_REGISTERED: Phase.WAITING_FOR_INPUT,
        **ENDINGS,
    },
    Phase.WAITING_FOR_INPUT: {
        # a quick prefill rank answers while a slower one has not yet been told
        Event.PREFILL_ANSWERED: Phase.WAITING_FOR_INPUT,
        Event.ALL_ANSWERED: Phase.SUCCESS,
        Event.METADATA_SENT: Phase.TRANSFERRING,
        **ENDINGS,
    },
    Phase.TRANSFERRING: {
        Event.PREFILL_ANSWERED: Phase.TRANSFERRING,
        Event.ALL_ANSWERED: Phase.SUCCESS,
        **ENDINGS,
    },
    Phase.SUCCESS: {},
    Phase.FAILED: {},
}


def step(table: Table, phase: Phase, event: Event) -> Phase:
    """The phase after `event`. Raises IllegalEvent where the row has no such event and the room is not finished."""
    if phase.is_final:
        return phase  # late news about a finished room is not news
    after = table[phase].get(event)
    if after is None:
        known = ", ".join(sorted(table[phase]))
        raise IllegalEvent(f"a room in {phase.name} knows no {event}: it knows {known}")
    return after


@dataclass(frozen=True, slots=True)
class RoomTimeouts:
    """How long each wait of a room may take, in seconds, and whether its bytes are checked.

    bootstrap_s: sender: from opening the room to the last decode rank's metadata; receiver: from opening it to the last
        prefill rank told. 300 s as in stock SGLang: the request may still queue at the other side.
    waiting_s: sender: for the next chunk of our own engine; receiver: from metadata to the last answer. Also 300 s.
    transfer_s: one turn of a chunk to one decode rank, of `SenderLimits.turn_nbytes` at most. 60 s is 6 GiB at the
        0.1 GB/s of the slowest block size measured (MOONCAKE_FACTS 3.4); a peer that stops is found by the engine's own
        inactivity limit (5 s), not by this. Its turn a chunk awaits for waiting_s.
    remind_s: from naming a room's pages to a prefill rank until they are named once more, with the registration of our
        memory; each further wait is twice the one before, and four times this at most: what is lost late is found as
        soon. What a connection had taken when it broke is lost, and nobody else says it again. Also from a prefill's
        sums until they are given once more. A stock prefill is reminded of a room that has waited for 30 s, no sooner,
        and then for twice as long each time: one that has ended there would be taken up again, and kept.
    release_s: how often a prefill that has not confirmed an abort is asked again, and warned about. It frees nothing:
        stock frees after 30 s without an answer, while a write may still be under way.
    drain_margin_s: from the confirmation of an abort to the reuse of its pages. Bytes that the prefill's kernel had
        taken are written even after the prefill's engine is at rest (4 to 64 MiB seen, MOONCAKE_FACTS H12); they need
        0.1 s at the measured 1 GB/s, 2 s allow a link at 256 Mbit/s. Slower links need more.
    checksum: off, offered or required. Where both sides say one of the latter, prefill sums each page as it sends it
        (CRC-32), and decode sums what has arrived before the room succeeds; a difference fails the room on both sides
        and names the pages. What each side has to hear of the other for it, it hears within transfer_s. Required: a
        room whose peer sums nothing (a stock one, or one of ours that is told not to) is refused before a byte moves.
        Off: it costs half a second of a core for each GB and side. For pools in the host's memory only.
    """

    bootstrap_s: float = 300.0
    waiting_s: float = 300.0
    transfer_s: float = 60.0
    remind_s: float = 2.0
    release_s: float = 30.0
    drain_margin_s: float = 2.0
    checksum: Checksum = Checksum.OFF

    def __post_init__(self) -> None:
        check_seconds(self, "room", or_zero=("drain_margin_s",))
        if not isinstance(self.checksum, Checksum):
            raise ConfigError(f"room checksum is {self.checksum!r}: give {', '.join(Checksum)}")


@dataclass(frozen=True, slots=True, eq=False)
class Quarantined:
    """Pages of a finished room that a peer or an engine may still touch; `pages` has shape (n,).

    `since`: by the clock of the side that holds them; `waiting_for`: whose word would let them go.
    """

    room: int
    pages: npt.NDArray[np.int64]
    since: float
    reason: str
    waiting_for: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Overdue:
    """What to say of a phase that took too long: `setting` is the field of RoomTimeouts that bounds it."""

    setting: str
    missing: str
    look_at: str

    def limit_s(self, timeouts: RoomTimeouts) -> float:
        return float(getattr(timeouts, self.setting))

    def sentence(self, timeouts: RoomTimeouts, who: str) -> str:
        """`who`: the peers that were waited for."""
        limit_s = self.limit_s(timeouts)
        return (
            f"{self.missing} from {who} within {limit_s:g} s: {self.look_at}, or raise {self.setting} if that is normal"
        )


OVERDUE: Mapping[tuple[Side, Phase], Overdue] = {
    (Side.SENDER, Phase.BOOTSTRAPPING): Overdue(
        "bootstrap_s",
        "no destination pages",
        "see whether the router gave the request to a decode rank and whether that rank can reach this control port",
    ),
    (Side.SENDER, Phase.WAITING_FOR_INPUT): Overdue(
        "waiting_s",
        "no first chunk",
        "see whether the prefill queue is longer than decode is willing to wait",
    ),
    (Side.SENDER, Phase.TRANSFERRING): Overdue(
        "waiting_s",
        "no further chunk",
        "see whether the prefill engine still computes this request",
    ),
    (Side.RECEIVER, Phase.BOOTSTRAPPING): Overdue(
        "bootstrap_s",
        "no connection for the buffer registration",
        "see whether the prefill rank runs and whether its announced control port can be reached from here",
    ),
    (Side.RECEIVER, Phase.WAITING_FOR_INPUT): Overdue(
        "bootstrap_s",
        "no connection for the destination pages",
        "see whether the prefill rank runs and whether its announced control port can be reached from here",
    ),
    (Side.RECEIVER, Phase.TRANSFERRING): Overdue(
        "waiting_s",
        "no final status",
        "see the prefill rank's log for this room and whether it can reach this control port",
    ),
}
