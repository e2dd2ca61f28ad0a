"""
The journal port: where what the registry acknowledged outlives it, or does not.

A journal keeps Records of lives, and rooms; it judges none. There are no times in it: monotonic ones mean nothing to
another process, and the wall clock may be set.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from pdctl.core.lives import Change, Record

Room = tuple[int, int]
"""A bootstrap room (it may exceed 64 bits) and its DP rank."""

Note = tuple[str, str, bytes | None]
"""A row that a wire's own book keeps: which book, the key, the value; None for one that is gone."""


@dataclass(frozen=True, slots=True)
class Kept:
    """What a journal has kept: `records` by rising epoch, `rooms` and `notes` in the order of the last word on each."""

    records: Sequence[Record] = ()
    rooms: Sequence[Room] = ()
    last_epoch: int = 0
    revision: int = 0
    notes: Sequence[Note] = ()


@dataclass(frozen=True, slots=True)
class Word:
    """What a writer says of one change of its: `kind` as in ChangeKind, of the life with that epoch."""

    kind: str
    epoch: int
    before: int | None = None
    why: str | None = None


@dataclass(frozen=True, slots=True)
class Learned:
    """What another writer has put into a shared journal.

    records      all that is kept now of each instance that it touched; nothing for one that is gone
    words        what it says of its changes, in order; empty where all was read anew and only the outcome is known
    rooms, notes what is new in them
    last_epoch   no epoch up to this one may be given out again
    """

    records: Mapping[str, Sequence[Record]] = field(default_factory=dict)
    words: Sequence[Word] = ()
    rooms: Sequence[Room] = ()
    notes: Sequence[Note] = ()
    last_epoch: int = 0


class Journal(Protocol):
    """Open already; one writer."""

    async def append(self, changes: Sequence[Change], rooms: Sequence[Room] = ()) -> None:
        """Keep all of it or nothing, and return when it is as safe as this journal makes it.

        For each change in order: a `before` is dropped (by its epoch); then `life` is dropped when `is_dropped`, else
        `record` is kept, by its epoch, instead of what was kept of that epoch. The highest epoch and the highest
        revision seen are kept for good. Of a room the last DP rank counts; rooms
        that are over may go, by the journal's own monotonic time. Raises JournalUnavailable with the cause;
        then nothing was kept.
        """

    async def load(self) -> Kept:
        """What was kept."""

    @property
    def trouble(self) -> str | None:
        """Why it takes no rows at present, as far as the last attempt tells; None while it does."""

    async def aclose(self) -> None:
        """Let go of whatever is held; once closed, closing again does nothing."""


class Notebook(Protocol):
    """The same journal for the books of the other wires: what they acknowledge is to outlive them as well."""

    async def note(self, notes: Sequence[Note]) -> None:
        """Keep all of them or none; of two on one key the later holds. Otherwise as Journal.append, Behind included."""


@runtime_checkable
class Shared(Protocol):
    """A journal with other writers: a group of changes is taken if it was decided on all that they have written.

    `append` raises Behind where another was faster: what that one has written has been told then, so decide again.
    """

    @property
    def group_limit(self) -> int:
        """Instances that one `append` may touch."""

    def subscribe(self, hear: Callable[[Learned], None], pulse: Callable[[Record, float | None], None]) -> None:
        """Call `hear` with what others have written, in the order in which it holds, as soon as it is known here.

        Call `pulse` with each life that no writer has heard for its lease, and the seconds after which it may be given
        up; None for one that has been heard. It is called at once for all leases that there are.
        """

    def heard(self, epoch: int) -> None:
        """The holder of this lease has spoken here."""

    def is_held(self, epoch: int) -> bool:
        """Whether the holder of this lease has spoken to any writer, as far as is known, or nothing can be known."""

    @property
    def writer(self) -> str:
        """By which the others know this one; another one after each start."""

    def announce(self, url: str) -> None:
        """Let the other writers know where this one serves, for as long as it does."""

    @property
    def others(self) -> Mapping[str, str]:
        """Where the other writers serve that have said so, by their names: URLs."""

    @property
    def age_s(self) -> float:
        """How old what is known here may be, at most: since when a majority has not confirmed it."""
