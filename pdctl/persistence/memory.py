"""
The journal that forgets with the process: `--journal memory:`.

It keeps one row a seat, so that the contract can be held against it; it will never touch a disk.
"""

from __future__ import annotations

from collections.abc import Sequence

from pdctl.core.registry import Change
from pdctl.core.route import Seat


class MemoryJournal:
    """Bounded by the seats there are."""

    def __init__(self) -> None:
        self._rows: dict[tuple[str, Seat], Change] = {}

    async def append(self, changes: Sequence[Change]) -> None:
        for change in changes:
            key = (change.instance, change.seat)
            self._rows.pop(key, None)  # restored in the order of what came last
            self._rows[key] = change

    async def load(self) -> list[Change]:
        return list(self._rows.values())

    async def aclose(self) -> None:
        """Nothing is held but memory."""
