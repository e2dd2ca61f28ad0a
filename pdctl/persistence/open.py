"""
Which journal an operator means: `memory:`, `sqlite:PATH` or `etcd://HOST:PORT`.

The only place that knows them all by their work. Opens; what a journal promises stands in `base`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from pdctl.counts.registry import JournalMetrics
from pdctl.errors import ConfigError
from pdctl.persistence.etcd_place import ETCD, EtcdSettings
from pdctl.persistence.memory import MemoryJournal
from pdctl.persistence.place import path_in
from pdctl.persistence.sqlite import ROOMS_KEPT_S, SqliteJournal, open_sqlite

if TYPE_CHECKING:
    from pdctl.persistence.etcd import EtcdJournal


@asynccontextmanager
async def open_journal(
    url: str,
    *,
    rooms_kept_s: float = ROOMS_KEPT_S,
    metrics: JournalMetrics | None = None,
    etcd: EtcdSettings | None = None,
) -> AsyncIterator[MemoryJournal | SqliteJournal | EtcdJournal]:
    """The journal at `url`, closed at the end of the block. Raises ConfigError, and JournalUnusable.

    rooms_kept_s: for how long a room may be asked for, at the longest.
    """
    if url.startswith(ETCD):
        try:
            from pdctl.persistence.etcd import open_etcd_journal  # who has a journal in a file needs none of it
        except ModuleNotFoundError as error:
            raise ConfigError(f"journal {url} needs {error.name}, which is not here: install pdctl[etcd]") from error
        opening = open_etcd_journal(url, etcd or EtcdSettings(), rooms_kept_s=rooms_kept_s, metrics=metrics)
        async with opening as shared:
            yield shared
        return
    path = path_in(url)
    if path is None:
        yield MemoryJournal()
        return
    async with open_sqlite(path, rooms_kept_s=rooms_kept_s, metrics=metrics) as journal:
        yield journal
