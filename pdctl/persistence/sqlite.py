"""
The journal in one SQLite file: `--journal sqlite:PATH`. What `append` has returned for is on the disk.

    append ─┐
    append ─┼─> one transaction, one fsync ─> all of them return
    append ─┘   (whoever comes meanwhile is in the next)

One process at a time: a lock file names the holder to whoever comes second. Trouble with the disk is an answer, never
an end: every append is refused at once with the cause, nothing is half-written, and every `retry_every_s` the writer
tries whether a row is taken again.

Rooms come by the thousand and are never taken back one by one: they are a log in the order in which they came, and what
is older than `rooms_kept_s` of this process's own time is cut off its end. No time is written down, so that no clock
that jumps can drop a row.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, Final
from zlib import crc32

import aiosqlite
import structlog

from pdctl.core.lives import Change
from pdctl.counts.registry import JournalMetrics
from pdctl.errors import JournalUnavailable, JournalUnusable
from pdctl.persistence import sqlite_file as files
from pdctl.persistence.base import Kept, Note, Room
from pdctl.persistence.lock import FileLock, hold
from pdctl.persistence.rows import Rows, Unsound, decoded, noted

RETRY_EVERY_S = 1.0
STALLED_AFTER_S = 5.0
ROOMS_KEPT_S = 1200.0
"""A room's longest life in the RoomBook: 300 s, extended three times."""

_MARK_EVERY_S: Final = 10.0
_CUT_AT_ONCE: Final = 2000  # old rooms dropped with one transaction: a few ms at most
_TROUBLE: Final = (sqlite3.Error, OSError, Unsound, JournalUnusable)

# What is said of many rows at once: the statement, how it has one row, and its end
_PUT_LIVES: Final = ("INSERT OR REPLACE INTO lives VALUES ", "(?, ?, ?)", "")
_DROP_LIVES: Final = ("DELETE FROM lives WHERE epoch IN (", "?", ")")
_PUT_COUNTERS: Final = (
    "INSERT INTO counters VALUES ",
    "(?, ?)",
    " ON CONFLICT (name) DO UPDATE SET value = max(value, excluded.value)",
)
_TRY: Final = "INSERT INTO counters VALUES ('tries', 1) ON CONFLICT (name) DO UPDATE SET value = value + 1"
_PUT_NOTES: Final = ("INSERT OR REPLACE INTO notes VALUES ", "(?, ?, ?, ?)", "")
_DROP_NOTE: Final = "DELETE FROM notes WHERE book = ? AND key = ?"
_PUT_ROOMS: Final = ("INSERT INTO rooms VALUES ", "(?, ?, ?)", "")
_ROWS_AT_ONCE: Final = 128
_CUT_ROOMS: Final = (
    "DELETE FROM rooms WHERE number IN (SELECT number FROM rooms WHERE number <= ? ORDER BY number LIMIT ?)"
)

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class _Batch:
    """What the next transaction writes, and who waits for it."""

    rows: Rows = field(default_factory=Rows)
    rooms: list[Room] = field(default_factory=list)
    notes: dict[tuple[str, str], bytes | None] = field(default_factory=dict)
    waiting: list[asyncio.Future[None]] = field(default_factory=list)


@asynccontextmanager
async def open_sqlite(
    path: Path, *, rooms_kept_s: float = ROOMS_KEPT_S, metrics: JournalMetrics | None = None
) -> AsyncIterator[SqliteJournal]:
    """The journal at `path`, closed at the end of the block. Raises JournalUnusable."""
    journal = SqliteJournal(path, rooms_kept_s=rooms_kept_s, metrics=metrics)
    await journal.start()
    try:
        yield journal
    finally:
        await journal.aclose()


class SqliteJournal:
    """One writer, one file. `start` before anything else."""

    def __init__(
        self,
        path: Path,
        *,
        rooms_kept_s: float = ROOMS_KEPT_S,
        retry_every_s: float = RETRY_EVERY_S,
        clock: Callable[[], float] = time.monotonic,
        metrics: JournalMetrics | None = None,
    ) -> None:
        self._path = path.absolute()
        self._rooms_kept_s = rooms_kept_s
        self._retry_every_s = retry_every_s
        self._clock = clock
        self._counts = metrics
        self._lock: FileLock | None = None
        self._db: aiosqlite.Connection | None = None
        self._inode: tuple[int, int] | None = None
        self._batch = _Batch()
        self._news = asyncio.Event()
        self._cause: str | None = None
        self._since: float | None = None  # when the transaction under way began
        self._closing = False
        self._writer: asyncio.Task[None] | None = None
        self._number = 0  # of the room that came last
        self._marks: deque[tuple[float, int]] = deque()  # (when, the last room's number then)

    async def start(self) -> None:
        """Take the file. Raises JournalUnusable; a disk that takes no rows now is trouble, and no reason to end."""
        files.check_place(self._path)
        try:
            await self._open()
        except Unsound as error:
            await self._start_anew(str(error))
        except (sqlite3.Error, OSError) as error:
            if not self._path.exists():
                await self._let_go()
                raise JournalUnusable(f"journal {self._path} cannot be made: {files.in_words(error)}") from error
            self._in_trouble(files.in_words(error))
        except BaseException:
            await self._let_go()
            raise
        self._writer = asyncio.create_task(self._write(), name="journal writer")
        self._writer.add_done_callback(self._writer_ended)
        if self._counts is not None:
            self._counts.follow(lambda: self.trouble is not None)

    @property
    def trouble(self) -> str | None:
        """Why no rows are taken now, and what mends it; None while they are."""
        if self._cause is not None:
            return f"{self._path}: {self._cause}"
        if self._since is not None and (stalled_s := self._clock() - self._since) > STALLED_AFTER_S:
            return f"{self._path}: the disk has not answered for {stalled_s:.0f} s: check it"
        return None

    async def append(self, changes: Sequence[Change], rooms: Sequence[Room] = ()) -> None:
        if not changes and not rooms:
            return
        self._refuse_in_trouble()
        self._batch.rows.take(changes)
        self._batch.rooms.extend(rooms)
        await self._written()

    async def note(self, notes: Sequence[Note]) -> None:
        if not notes:
            return
        self._refuse_in_trouble()
        for book, key, value in notes:
            self._batch.notes.pop((book, key), None)  # in the order of the last word
            self._batch.notes[book, key] = value
        await self._written()

    async def _written(self) -> None:
        """Return when the batch that gathers now is on the disk."""
        done = asyncio.get_running_loop().create_future()
        self._batch.waiting.append(done)
        self._news.set()
        await done

    async def load(self) -> Kept:
        try:
            stored = await self._stored()
            records, notes = decoded(stored.lives, self._path), noted(stored.notes)
        except Unsound as error:
            await self._start_anew(str(error))
            return Kept()
        last_epoch, revision = (stored.counters.get(name, 0) for name in ("epoch", "revision"))
        return Kept(tuple(records), tuple(stored.rooms), last_epoch, revision, tuple(notes))

    async def aclose(self) -> None:
        """Write what was appended, and let go of the file."""
        self._closing = True
        self._news.set()
        if self._writer is not None:
            await asyncio.wait({self._writer})
        await self._let_go()

    # --- the writer

    async def _write(self) -> None:
        while not self._closing or self._batch.waiting:
            await self._next()
            batch, self._batch = self._batch, _Batch()
            cause = await self._attempt(batch)
            self._settle(batch, cause)

    async def _next(self) -> None:
        """Wait for rows; in trouble, where none are taken, for the next try."""
        with suppress(TimeoutError):
            async with asyncio.timeout(None if self._cause is None else self._retry_every_s):
                await self._news.wait()
        if not self._closing:
            self._news.clear()

    async def _attempt(self, batch: _Batch) -> str | None:
        """Write it all, or nothing and say why."""
        self._since = began = self._clock()
        try:
            await self._commit(batch)
        except _TROUBLE as error:
            await self._roll_back()
            if self._counts is not None:
                self._counts.failed()
            return files.in_words(error)
        finally:
            self._since = None
        if self._counts is not None:
            self._counts.committed(self._clock() - began)
        return None

    def _settle(self, batch: _Batch, cause: str | None) -> None:
        if cause is not None:
            self._in_trouble(cause)
        elif self._cause is not None:
            self._cause = None
            log.info("the journal takes rows again", path=str(self._path))
        for done in batch.waiting:
            if done.done():  # whoever waited was cancelled
                continue
            if cause is None:
                done.set_result(None)
            else:
                done.set_exception(self._unavailable())

    async def _commit(self, batch: _Batch) -> None:
        db = await self._connected()
        kept_notes = [(*key, crc32(value), value) for key, value in batch.notes.items() if value is not None]
        statements = [
            *_statements(_PUT_LIVES, batch.rows.kept()),
            *_statements(_DROP_LIVES, batch.rows.dropped()),
            *_statements(_PUT_COUNTERS, _counters(batch.rows)),
            *_statements(_PUT_NOTES, kept_notes),
            *((_DROP_NOTE, key) for key, value in batch.notes.items() if value is None),
            *_statements(_PUT_ROOMS, self._numbered(batch.rooms)),
            *((_CUT_ROOMS, outlived) for outlived in self._outlived()),
        ]
        if not batch.waiting:
            statements.append((_TRY, ()))  # something that has to be written and synced
        await files.transaction(db, statements)
        if batch.rooms:
            self._mark()

    async def _roll_back(self) -> None:
        # On the connection that failed: it knows which frames of the WAL do not count and writes over them. One that
        # is opened anew may find a commit there whose fsync has failed, and that was refused, and bring it back.
        if self._db is not None:
            with suppress(sqlite3.Error):
                await self._db.rollback()

    def _writer_ended(self, writer: asyncio.Task[None]) -> None:
        """Unless it was told to, a defect: nobody may wait for it any more."""
        if not self._closing or self._batch.waiting:
            error = None if writer.cancelled() else writer.exception()
            self._in_trouble(f"its writer has ended ({error!r}): this is a defect, restart and report it")
            batch, self._batch = self._batch, _Batch()
            self._settle(batch, self._cause)

    # --- trouble

    def _in_trouble(self, cause: str) -> None:
        if cause != self._cause:
            log.error("the journal takes no rows", path=str(self._path), cause=cause)
        self._cause = cause

    def _refuse_in_trouble(self) -> None:
        if self._closing:
            raise JournalUnavailable("the journal is closing: ask again", cause="closing")
        if self.trouble is not None:
            raise self._unavailable()

    def _unavailable(self) -> JournalUnavailable:
        trouble = self.trouble or "its last transaction failed"
        return JournalUnavailable(
            f"the journal takes no rows ({trouble}): nothing was changed, ask again", cause=self._cause or trouble
        )

    # --- the file

    async def _open(self) -> None:
        self._lock = self._lock or hold(self._path)
        self._db = await files.open_file(self._path)
        self._inode = self._inode_now()
        self._number = max(self._number, await files.last_room(self._db))
        self._mark()

    async def _connected(self) -> aiosqlite.Connection:
        if self._db is None:
            await self._open()
            assert self._db is not None  # noqa: S101 - _open has set it, or raised
        elif self._inode_now() != self._inode:
            raise Unsound("the file was moved, replaced or deleted: put it back, or restart")
        return self._db

    def _inode_now(self) -> tuple[int, int]:
        status = os.stat(self._path)  # one look-up of a name that the kernel has at hand, 2 us
        return status.st_dev, status.st_ino

    async def _stored(self) -> files.Stored:
        if self._db is not None:
            return await files.read(self._db)
        try:
            return await files.read_copy(self._path)
        except (sqlite3.Error, OSError) as error:
            raise JournalUnusable(f"journal {self._path} cannot be read: {files.in_words(error)}") from error

    async def _start_anew(self, finding: str) -> None:
        """Set aside what cannot be ours any more, and begin with nothing."""
        if self._db is not None:
            await self._db.close()
            self._db = None
        try:
            aside = files.set_aside(self._path, datetime.now(UTC))
            await self._open()
        except (sqlite3.Error, OSError) as error:
            await self._let_go()
            raise JournalUnusable(
                f"journal {self._path} is corrupt ({finding}) and cannot be set aside ({files.in_words(error)})"
            ) from error
        log.error(
            "THE JOURNAL WAS CORRUPT AND IS SET ASIDE: ranks that register once are unknown until they restart",
            path=str(self._path),
            aside=str(aside),
            finding=finding,
        )

    async def _let_go(self) -> None:
        if self._db is not None:
            db, self._db = self._db, None
            with suppress(sqlite3.Error):
                await db.close()
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    # --- rooms, a log that is cut

    def _numbered(self, rooms: Sequence[Room]) -> list[tuple[int, int | str, int]]:
        first = self._number + 1
        self._number += len(rooms)
        return [(n, _fitting(room), dp_rank) for n, (room, dp_rank) in enumerate(rooms, first)]

    def _mark(self) -> None:
        now = self._clock()
        if not self._marks or now - self._marks[-1][0] >= _MARK_EVERY_S:
            self._marks.append((now, self._number))

    def _outlived(self) -> list[tuple[int, int]]:
        """Up to which number all rooms are too old, as the statement wants it; nothing where none are."""
        oldest = self._clock() - self._rooms_kept_s
        while len(self._marks) > 1 and self._marks[1][0] <= oldest:
            self._marks.popleft()
        if not self._marks or self._marks[0][0] > oldest:
            return []
        return [(self._marks[0][1], _CUT_AT_ONCE)]


def _statements(sql: tuple[str, str, str], rows: Sequence[Sequence[Any]]) -> Iterator[files.Statement]:
    """`sql` for all rows, in few statements.

    Between the rows of one statement the interpreter is not asked for. For each statement it is, and a loop that is
    busy gives it away every 5 ms: 64 claims took as long as 128 of those.
    """
    done = 0
    while done < len(rows):
        n = min(_ROWS_AT_ONCE, 1 << (len(rows) - done).bit_length() - 1)  # few lengths, so that SQLite knows them all
        yield _for_rows(sql, n), tuple(chain.from_iterable(rows[done : done + n]))
        done += n


@lru_cache(maxsize=64)
def _for_rows(sql: tuple[str, str, str], n: int) -> str:
    before, row, after = sql
    return f"{before}{', '.join([row] * n)}{after}"


def _counters(rows: Rows) -> list[tuple[str, int]]:
    high = {"epoch": rows.last_epoch, "revision": rows.revision}
    return [(name, value) for name, value in high.items() if value]


def _fitting(room: int) -> int | str:
    """SQLite's integers have 64 bits; rooms on the wire may have more."""
    return room if -(2**63) <= room < 2**63 else str(room)
