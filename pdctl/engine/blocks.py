"""
A transfer as blocks on their way, shared between the loop that waits for it and whoever carries it.

No thread, no clock; the loop and the carrier each write their own fields.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any, Protocol

from pdctl.core.plan import CopyPlan
from pdctl.errors import Cause

Verdict = tuple[Cause, str]
AT_ONCE = 1024


class Source(Protocol):
    """Bytes of ours that lie in several places."""

    def into(self, stage: Any) -> int:
        """Put them together in a buffer of its kind; the address of the first. Raises OSError."""


Block = tuple[int | Source, int, int]
"""Local, remote, nbytes."""


class Direction(Enum):
    WRITE = auto()
    READ = auto()


@dataclass(slots=True, eq=False)
class Way:
    """What one block at a time goes by: a name under which the engine knows the peer.

    `sure`: a connection stands behind it, and to the life that is meant. `stage`: what its block was put together in,
    where it lies in several places: nothing else is, while it is on its way.
    """

    name: str
    sure: bool
    stage: Any = None


@dataclass(slots=True, eq=False)
class Lane:
    """One life of a peer, as the carrier knows it, and alone writes it.

    `most`: ways at once. `failures` counts failed blocks; `proven`: a block has landed since the last of them.
    `engine`: by which of the carrier's engine objects; 0 is the one that peers know. `idle`: ways that no block is on;
    `names`: for more of them, without end. `greets`: a new way is tried by reading one byte, before a block may go by
    it. `over`: how the life ended, in words, None while it has not; `was_cut`: whether it may live on all the same.
    """

    names: Iterator[str]
    engine: int = 0
    most: int = 1024
    failures: int = 0
    proven: bool = False
    greets: bool = False
    idle: list[Way] = field(default_factory=list)
    over: Callable[[], str | None] = field(default=lambda: None)
    was_cut: Callable[[], bool] = field(default=lambda: False)
    close: Callable[[], None] = field(default=lambda: None)

    def way(self) -> Way:
        return self.idle.pop() if self.idle else Way(next(self.names), sure=not self.greets)


@dataclass(slots=True, eq=False)
class Transfer:
    """Blocks to or from one peer. `verdict`: the first cause to stop; None while all is well.

    `faith`: what `lane.failures` was when the peer was last proven well. `rest` is resolved, with the verdict, when no
    block is in the carrier's hands and none will be.
    `nbytes`: of all its blocks.
    """

    lane: Lane
    faith: int
    direction: Direction
    blocks: Iterator[Block]
    total: int
    nbytes: int
    rest: asyncio.Future[Verdict | None]
    verdict: Verdict | None = None
    by_another: bool = False
    submitted: int = 0
    in_flight: int = 0

    def stop(self, cause: Cause, detail: str, *, by_another: bool = False) -> None:
        """Submit no more of it; from any thread. `by_another`: none of its own blocks has failed, one beside it has."""
        if self.verdict is None:
            self.verdict, self.by_another = (cause, detail), by_another

    @property
    def exhausted(self) -> bool:
        return self.verdict is not None or self.submitted == self.total

    @property
    def at_rest(self) -> bool:
        return self.exhausted and not self.in_flight

    def settle(self) -> None:
        """On the loop's thread: tell who waits."""
        if not self.rest.done():
            self.rest.set_result(self.verdict)


def blocks(plan: CopyPlan) -> Iterator[Block]:
    """Numbers are made as they are needed, by the thread that needs them: half a million at once take 0.1 s."""
    for first in range(0, len(plan), AT_ONCE):
        part = slice(first, first + AT_ONCE)
        yield from zip(plan.src[part].tolist(), plan.dst[part].tolist(), plan.nbytes[part].tolist(), strict=True)
