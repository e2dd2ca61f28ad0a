"""
How a store stands with the process that opens it, from the first question on: for reports, metrics and people.

    WARMING --it works--> READY --it is left alone--> AWAY --a fresh key comes back--> READY
    WARMING --time is up, or waiting would not help--> FAILED               READY, AWAY --the block ends--> CLOSED

Opens nothing and asks nothing. One watch is given to `open_store`, which tells it, and to the node that reports it;
which of the two is opened first does not matter.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from pdctl.core.kvstore import StoreRank
from pdctl.core.report import StoreSeen, in_a_line
from pdctl.core.warmup import Report, StoreState
from pdctl.counts.store import StoreCounts
from pdctl.errors import PdctlError, StoreFailed

Hear = Callable[[], None]


class StoreWatch:
    """Of one store. `counts` are of this store too, whichever service shows them."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.counts = StoreCounts()
        self._clock = clock
        self._hearers: list[Hear] = []
        self._state: StoreState | None = None
        self._since = clock()
        self._sentence = ""
        self._step: str | None = None
        self._failure: StoreFailed | None = None
        self._tries = 0

    @property
    def state(self) -> StoreState | None:
        """None: nobody has begun to open it."""
        return self._state

    def seen(self) -> StoreSeen | None:
        """As a report tells it."""
        if self._state is None:
            return None
        failure = self._failure
        return StoreSeen(
            self._state is StoreState.READY,
            in_a_line(self._sentence),
            self._state,
            self._step,
            None if failure is None else failure.cause,
            None if failure is None else failure.code,
            self._tries,
            round(max(0.0, self._clock() - self._since), 3),
        )

    def subscribe(self, hear: Hear) -> None:
        """Call `hear` whenever it stands otherwise, or has been tried in vain once more."""
        self._hearers.append(hear)

    # What open_store tells

    def began(self, rank: StoreRank) -> None:
        self._step, self._failure, self._tries = None, None, 0
        self._turn(StoreState.WARMING, f"rank {rank} has begun to open it: wait")

    def at(self, step: str) -> None:
        """It is being tried. Nobody is told: most steps take a millisecond."""
        if self._state is StoreState.WARMING and self._failure is None:
            self._step, self._sentence = step, f"warming up, at {step}: wait"

    def tried(self, failure: StoreFailed, next_in_s: float) -> None:
        """In vain, and it is tried again."""
        self._step, self._failure = failure.step, failure
        self._tries += 1
        again = f"it is tried again in {next_in_s:.1f} s"
        self._turn(StoreState.WARMING, f"not warm after {self._tries} tries, {_words(failure)}: {again}")

    def ended(self, report: Report, failure: StoreFailed | None) -> None:
        self._step, self._failure = report.step, failure
        if report.ready:
            self._tries = 0
        self._turn(StoreState.READY if report.ready else StoreState.FAILED, str(report))

    def broke(self, error: PdctlError) -> None:
        """It cannot be opened as it is configured."""
        self._turn(StoreState.FAILED, str(error))

    def turned(self, away: StoreFailed | None) -> None:
        """It is left alone, or is back."""
        self._failure, self._step = away, None if away is None else away.step
        if away is None:
            self._turn(StoreState.READY, "it is back, and works")
        else:
            self._turn(StoreState.AWAY, f"left alone, {_words(away)}: it comes back by itself")

    def closed(self) -> None:
        if self._state in (StoreState.READY, StoreState.AWAY):
            self._step = self._failure = None
            self._turn(StoreState.CLOSED, "this process has closed it")

    def _turn(self, state: StoreState, sentence: str) -> None:
        if state is not self._state:
            self._state, self._since = state, self._clock()
        self._sentence = sentence
        for hear in self._hearers:
            hear()


def _words(failure: StoreFailed) -> str:
    code = "" if failure.code is None else f", code {failure.code}"
    return f"{failure.step} failed ({failure.cause}{code}): {failure.detail}"
