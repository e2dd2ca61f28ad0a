"""
The journal that forgets with the process: `--journal memory:`.

It keeps one record a life, so that the contract can be held against it; it will never touch a disk. Rooms it does not
keep: the registry's own book holds them already, and nobody reads them here again.
"""

from __future__ import annotations

from collections.abc import Sequence

from pdctl.core.lives import Change, Record
from pdctl.persistence.base import Kept, Note, Room


class MemoryJournal:
    """Bounded by the seats there are."""

    trouble: str | None = None

    def __init__(self) -> None:
        self._records: dict[int, Record] = {}
        self._last_epoch = 0
        self._revision = 0
        self._notes: dict[tuple[str, str], bytes] = {}

    async def append(self, changes: Sequence[Change], rooms: Sequence[Room] = ()) -> None:  # noqa: ARG002
        for change in changes:
            self._keep(change)

    async def note(self, notes: Sequence[Note]) -> None:
        for book, key, value in notes:
            self._notes.pop((book, key), None)  # in the order of the last word
            if value is not None:
                self._notes[book, key] = value

    async def load(self) -> Kept:
        records = tuple(self._records[epoch] for epoch in sorted(self._records))
        notes = tuple((book, key, value) for (book, key), value in self._notes.items())
        return Kept(records, (), self._last_epoch, self._revision, notes)

    async def aclose(self) -> None:
        """Nothing is held but memory."""

    def _keep(self, change: Change) -> None:
        if change.before is not None:
            self._records.pop(change.before.epoch, None)
        if change.is_dropped:
            self._records.pop(change.life.epoch, None)
        else:
            self._records[change.life.epoch] = change.record
        self._last_epoch = max(self._last_epoch, change.life.epoch)
        self._revision = max(self._revision, change.revision)
