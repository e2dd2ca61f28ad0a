"""
Words for what stands and what happens in a fleet, as people type them and as they travel.

Nothing else, and nothing imported for it: the command line offers them before it knows what will be asked.
"""

from __future__ import annotations

from enum import IntEnum, StrEnum


class State(StrEnum):
    """How a session stands."""

    TRUSTED = "trusted"  # transfers may go there
    TRIAL = "trial"  # back, with few transfers at once until one has succeeded
    BLOCKED = "blocked"  # a transfer has failed, and nothing has proved it well since
    DROPPED = "dropped"  # its life is over: only a registration, or a hand, lifts


class Depth(IntEnum):
    """What an answer proves, from least to most.

    HANDSHAKE: somebody answers; an echo server would. It never lifts anything. IDENTITY: what answers shows the life
    that is known. DATA: bytes reached that life's memory.
    """

    HANDSHAKE = 1
    IDENTITY = 2
    DATA = 3


class ChangeKind(StrEnum):
    """What happened to a life. Those in ENDINGS were its end."""

    SEATED = "seated"  # a seat that nobody held has a holder
    REPLACED = "replaced"  # a new life in the seat: another address
    AMENDED = "amended"  # the same life says something else of itself: an HTTP port, labels, a lease
    RESHAPED = "reshaped"  # with this life a new incarnation of the instance, with its own shape, is the one served
    COMPLETED = "completed"  # with this life the instance became ready
    SUSPECTED = "suspected"  # has missed a renewal
    RECOVERED = "recovered"  # has spoken again
    DRAINING = "draining"  # takes nothing new from now on
    FOUND = "found"  # the witness had lost it, and has found it again
    LOST = "lost"  # the witness says it is dead; it may be found again
    DRAINED = "drained"  # its rooms were done, or its grace was over
    EXPIRED = "expired"  # silent for the whole lease
    FORGOTTEN = "forgotten"  # over for long, as its whole instance is: nothing more is known of it
    LEFT = "left"  # said goodbye
    SUPERSEDED = "superseded"  # its incarnation made place for a later one


class Kind(StrEnum):
    """What is no change of a life; those have the names of core.lives.ChangeKind."""

    REFUSED = "refused"  # a claim or a body that was not taken
    DENIED = "denied"  # a request that the door did not let in: its address, its token
    PUT_OFF = "put_off"  # a registration that has to come again, as too many come at once
    EJECTED = "ejected"  # a transfer session is out
    ON_TRIAL = "on_trial"  # it is back, with few transfers at once
    READMITTED = "readmitted"  # it is trusted again
    DROPPED = "dropped"  # its life is over: only a registration lifts
    PANIC = "panic"  # so many of a group are out that all of it is served, or that is over
    DOUBT = "doubt"  # somebody takes the fault for its own, or does not any more
    ROOM_FAILED = "room_failed"
    REPORT_LOST = "report_lost"  # a rank has not told how it is for too long
    JOURNAL_TROUBLE = "journal_trouble"
    JOURNAL_WELL = "journal_well"
