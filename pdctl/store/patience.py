"""How long each link of the chain to a store may take. Values only: nothing of a store is loaded for them."""

from __future__ import annotations

from dataclasses import dataclass

from pdctl.core.offload import OffloadPatience
from pdctl.core.seconds import check_seconds
from pdctl.retry import RetryPolicy

UNTIL_READY = RetryPolicy(first_wait_s=0.5, multiplier=1.5, max_wait_s=2.0, give_up_after_s=60.0)
WARM_UP = RetryPolicy(first_wait_s=1.0, multiplier=1.25, max_wait_s=4.0, even=True, max_attempts=10)
OFFLOAD = OffloadPatience()


@dataclass(frozen=True, slots=True)
class StorePatience:
    """How long each link of the chain may take.

    ask_s        for each of two questions to the master; a healthy one answers in a millisecond
    rehearsal_s  for a set-up in a process of its own: 0.5 s where all is well, 5 s where a busy host starts eight;
                 0: none is made
    until_ready  how often master and set-up are tried; 60 s: a pod of a master that is scheduled anew needs that
    warm_up      how often a key is put and read back: 10 times, 1 s apart at first and up to 4 s later, 23 s in all.
                 Engines of the field stop after 9 s, which a segment that mounts late on a busy host has missed
    """

    ask_s: float = 1.0
    rehearsal_s: float = 30.0
    until_ready: RetryPolicy = UNTIL_READY
    warm_up: RetryPolicy = WARM_UP
    offload: OffloadPatience = OFFLOAD

    def __post_init__(self) -> None:
        check_seconds(self, "store", or_zero=("rehearsal_s",))
