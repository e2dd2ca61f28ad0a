"""
The journal that forgets with the process: `--journal memory:`.

It keeps one row a seat, so that the contract can be held against it; it will never touch a disk.
"""

from __future__ import annotations

from collections.abc import Sequence

from pdctl.core.registry import Change, ChangeKind
from pdctl.core.route import Seat


class MemoryJournal:
    """Bounded by the seats there are."""

    def __init__(self) -> None:
        self._rows: dict[tuple[str, Seat], Change] = {}

    async def append(self, changes: Sequence[Change]) -> None:
        for change in changes:
            self._keep(change)

    async def load(self) -> list[Change]:
        return list(self._rows.values())

    async def aclose(self) -> None:
        """Nothing is held but memory."""

    def _keep(self, change: Change) -> None:
        if change.kind is ChangeKind.COMPLETED:  # follows from the seats
            return
        if change.kind is ChangeKind.RESHAPED:  # the seats of the old shape are void
            self._rows = {key: row for key, row in self._rows.items() if key[0] != change.instance}
        key = (change.instance, change.seat)
        self._rows.pop(key, None)
        self._rows[key] = change
