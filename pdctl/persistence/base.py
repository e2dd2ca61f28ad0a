"""
The journal port: where what the registry acknowledged outlives it, or does not.

A journal keeps Changes and hands them back; it judges none. Times in them are monotonic and mean nothing to another
process: whoever restores sets them anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from pdctl.core.registry import Change


class Journal(Protocol):
    """Open already; one writer."""

    async def append(self, changes: Sequence[Change]) -> None:
        """Return when the changes are as safe as this journal makes them. Raises NotNow when they are not."""

    async def load(self) -> list[Change]:
        """For each seat the last change kept, such that restoring them in this order gives the registry back."""

    async def aclose(self) -> None:
        """Let go of whatever is held; once closed, closing again does nothing."""
