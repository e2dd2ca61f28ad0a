"""
The journal port: where what the registry acknowledged outlives it, or does not.

A journal keeps Records of lives, and rooms; it judges none. There are no times in it: monotonic ones mean nothing to
another process, and the wall clock may be set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

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
        """Keep all of them or none; of two on one key the later holds. Otherwise as Journal.append."""
