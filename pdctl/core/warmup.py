"""
Evidence that a store works: which answers mean "not yet", which mean "never", and what to look at.

    put a fresh key -> exists -> get -> compare -> remove

No I/O and no clock: a shell performs the steps, this says what to make of them.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from pdctl.core.kvstore import StoreRank
from pdctl.errors import StoreCause, StoreFailed

NBYTES: Final = 4096
NEVER: Final = frozenset(
    {
        *(StoreCause.BAD_ARGUMENT, StoreCause.NO_OFFLOAD, StoreCause.WRONG_DATA, StoreCause.CLOSED),
        StoreCause.SET_UP_REFUSED,
    }
)
"""The rest may pass: a segment not mounted yet, an owner not reached, a master late or slow, a code nobody knows."""


class Step(StrEnum):
    """Where the chain from nothing to a store that works can break."""

    MASTER = "master"
    SET_UP = "set-up"
    PUT = "put"
    EXISTS = "exists"
    GET = "get"
    COMPARE = "compare"
    REMOVE = "remove"


class StoreState(StrEnum):
    """How a store stands with the process that opens it."""

    WARMING = "warming"  # it has not shown yet that it works
    READY = "ready"
    AWAY = "away"  # it worked, and is left alone until it does again
    FAILED = "failed"  # nobody tries any more
    CLOSED = "closed"


class Result(StrEnum):
    """How the chain ended, for metrics."""

    READY = "ready"
    NOT_YET = "not_yet"
    NEVER = "never"


@dataclass(frozen=True, slots=True)
class Report:
    """How a store came up, or why it did not: to be printed whole.

    attempts   of the warm-up; 0 where it did not come so far
    waited_s   from the first question to the end
    step, cause, code, detail  of the last failure; None and empty where there was none at all
    """

    rank: StoreRank
    result: Result
    attempts: int
    waited_s: float
    step: str | None = None
    cause: StoreCause | None = None
    code: int | None = None
    detail: str = ""
    likely: str = ""
    removed: bool = False
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def ready(self) -> bool:
        return self.result is Result.READY

    def __str__(self) -> str:
        if self.ready:
            return f"rank {self.rank} is ready: {self.attempts} attempts, {self.waited_s:.1f} s"
        code = "" if self.code is None else f", code {self.code}"
        tries = f" and {self.attempts} attempts" if self.attempts else ""
        return (
            f"rank {self.rank} has no store after {self.waited_s:.1f} s{tries}: "
            f"{self.step} failed ({self.cause}{code}): {self.detail}; likely: {self.likely}"
        )


def key_of(nonce: str) -> str:
    """A key that nobody else has; who meets it in a listing of the store can see what left it."""
    return f"pdctl_warmup_{nonce}"


def value_of(nonce: str) -> bytes:
    """4 KiB that no other attempt of anybody has put: zeros could come back from memory that nobody has written."""
    return hashlib.shake_256(nonce.encode()).digest(NBYTES)


def is_never(error: Exception) -> bool:
    """Whether another attempt would only repeat it."""
    return not isinstance(error, StoreFailed) or error.cause in NEVER


def likely(error: StoreFailed, protocol: str, device: str) -> str:
    """What an operator looks at first."""
    if error.cause is StoreCause.OTHER and error.step == Step.SET_UP:
        return _of_set_up(protocol, device)
    return _LIKELY[error.cause].format(protocol=protocol, device=device or "any")


def _of_set_up(protocol: str, device: str) -> str:
    if protocol == "tcp":
        return "the local host name or the metadata server is wrong, or the master went away meanwhile"
    return f"protocol {protocol} with device {device or '(any)'} is not what this host has: try protocol tcp"


_LIKELY: Final = {
    StoreCause.MISSING: "the segment that took the key is gone again, or is so full that it was evicted at once",
    StoreCause.LEASED: "the key was read a moment ago: it goes by itself",
    StoreCause.NO_SPACE: "no segment is mounted: global_segment_size is 0 on every rank so far, or all are full",
    StoreCause.BAD_ARGUMENT: "local_buffer_size or global_segment_size is below the 4 KiB that were put",
    StoreCause.OWNER_UNREACHABLE: (
        "the rank that owns the segment cannot be reached: its local_hostname, protocol {protocol}, device {device}, "
        "or a firewall between the ranks"
    ),
    StoreCause.MASTER_UNREACHABLE: "the master is not there: master_server_address, or a firewall",
    StoreCause.TIMED_OUT: "the master hangs, or a firewall drops what is sent to it",
    StoreCause.NO_OFFLOAD: "the master was started without --enable_offload=true",
    StoreCause.SET_UP_REFUSED: "the arguments of the set-up, named in the text",
    StoreCause.WRONG_DATA: "two processes have one address: two ranks with one local_hostname, or a stale segment",
    StoreCause.CLOSED: "the store was closed meanwhile",
    StoreCause.OTHER: "a code of the installed wheel that pdctl does not know",
}
