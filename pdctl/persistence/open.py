"""
Which journal an operator means: `memory:` or `sqlite:PATH`.

The only place that knows both. Opens; what a journal promises stands in `base`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from pdctl.errors import ConfigError
from pdctl.metrics import JournalMetrics
from pdctl.persistence.memory import MemoryJournal
from pdctl.persistence.sqlite import ROOMS_KEPT_S, SqliteJournal, open_sqlite

MEMORY: Final = "memory:"
SQLITE: Final = "sqlite:"


@asynccontextmanager
async def open_journal(
    url: str, *, rooms_kept_s: float = ROOMS_KEPT_S, metrics: JournalMetrics | None = None
) -> AsyncIterator[MemoryJournal | SqliteJournal]:
    """The journal at `url`, closed at the end of the block. Raises ConfigError, and JournalUnusable.

    rooms_kept_s: for how long a room may be asked for, at the longest.
    """
    path = path_in(url)
    if path is None:
        yield MemoryJournal()
        return
    async with open_sqlite(path, rooms_kept_s=rooms_kept_s, metrics=metrics) as journal:
        yield journal


def path_in(url: str) -> Path | None:
    """The file that `url` names, None for `memory:`. Raises ConfigError."""
    if url == MEMORY:
        return None
    scheme, path = url[: len(SQLITE)], url[len(SQLITE) :]
    if scheme != SQLITE or not path.strip() or "\0" in path:
        raise ConfigError(f"journal is {url!r}: give sqlite:PATH, or memory: which forgets with the process")
    return Path(path)
