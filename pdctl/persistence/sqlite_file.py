"""
One SQLite file of ours: made, opened, found sound, read, set aside. What its rows mean is not known here.

A file that is not sound is moved to another name and never deleted; a sound one of another program, or of a newer
pdctl, is not touched at all. Nothing here is tried again: that is the journal's business.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import aiosqlite

from pdctl.errors import JournalUnusable
from pdctl.persistence.base import Room
from pdctl.persistence.rows import NoteRow, Row, Unsound, another_version

VERSION: Final = 1
_APPLICATION: Final = 0x70646374  # "pdct": `file` and we can tell our journals from other databases
_FILES: Final = ("-wal", "-shm", "")  # the main file last: while it is there, the next try finds what is left to do
_BUSY_S: Final = 1.0

_SCHEMA: Final = f"""
BEGIN;
CREATE TABLE lives (epoch INTEGER PRIMARY KEY, checksum INTEGER NOT NULL, row TEXT NOT NULL);
CREATE TABLE counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE rooms (number INTEGER PRIMARY KEY, room NOT NULL, dp_rank INTEGER NOT NULL);
CREATE TABLE notes (book TEXT, key TEXT, checksum INTEGER NOT NULL, value BLOB NOT NULL, PRIMARY KEY (book, key));
PRAGMA application_id = {_APPLICATION};
PRAGMA user_version = {VERSION};
COMMIT;
"""


Statement = tuple[str, tuple[Any, ...]]
"""SQL, and the values of its question marks."""


@dataclass(frozen=True, slots=True)
class Stored:
    """All that a file holds, rooms and notes in the order in which they came."""

    lives: list[Row]
    counters: dict[str, int]
    rooms: list[Room]
    notes: list[NoteRow]


def check_place(path: Path) -> None:
    """Raise JournalUnusable for a path at which no file can ever be."""
    if path.is_dir():
        raise JournalUnusable(f"journal {path} is a directory: give the path of a file in it")
    if not path.parent.is_dir():
        raise JournalUnusable(f"journal {path}: there is no directory {path.parent}: make it, or give another path")


async def open_file(path: Path) -> aiosqlite.Connection:
    """The file, made where it is missing, sound, of our version, and ours alone.

    Raises JournalUnusable, Unsound, and what SQLite says where the disk does not let it (sqlite3.Error).
    """
    db = await aiosqlite.connect(path, timeout=_BUSY_S)
    try:
        await _take(db, path)
    except BaseException as error:
        await db.close()
        if _is_corruption(error):
            raise Unsound(str(error)) from error
        raise
    return db


async def _take(db: aiosqlite.Connection, path: Path) -> None:
    # Ours alone: whatever does not ask for the lock file is kept out too, and the index of the WAL lives in memory and
    # not in a file beside it, which a full disk could not give to a registry that restarts.
    await db.execute("PRAGMA locking_mode = EXCLUSIVE")
    tables = await _number(db, "SELECT count(*) FROM sqlite_master")
    if tables:
        await _check_ours(db, path)
    await db.execute("PRAGMA journal_mode = WAL")
    await db.execute("PRAGMA synchronous = FULL")  # NORMAL would leave the last commits to a power cut
    if not tables:
        await db.executescript(_SCHEMA)
    findings = await db.execute_fetchall("PRAGMA quick_check(1)")
    if (said := next(iter(findings))[0]) != "ok":
        raise Unsound(" ".join(said.split()))


async def _check_ours(db: aiosqlite.Connection, path: Path) -> None:
    if await _number(db, "PRAGMA application_id") != _APPLICATION:
        raise JournalUnusable(f"journal {path} is another program's database: give a path of its own")
    version = await _number(db, "PRAGMA user_version")
    if version != VERSION:
        raise another_version(path, f"its schema is {version}, this one knows {VERSION}")


async def read(db: aiosqlite.Connection) -> Stored:
    """Everything. Raises Unsound."""
    try:
        lives = await db.execute_fetchall("SELECT epoch, checksum, row FROM lives ORDER BY epoch")
        counters = await db.execute_fetchall("SELECT name, value FROM counters")
        rooms = await db.execute_fetchall("SELECT room, dp_rank FROM rooms ORDER BY number")
        notes = await db.execute_fetchall("SELECT book, key, checksum, value FROM notes ORDER BY rowid")
        return Stored(
            [(epoch, checksum, text) for epoch, checksum, text in lives],
            {name: value for name, value in counters},  # noqa: C416 - sqlite3's rows are not typed
            [(int(room), dp_rank) for room, dp_rank in rooms],
            [(book, key, checksum, value) for book, key, checksum, value in notes],
        )
    except sqlite3.DatabaseError as error:
        if _is_corruption(error):
            raise Unsound(str(error)) from error
        raise


async def read_copy(path: Path) -> Stored:
    """What a file holds that can be read and not written, the tail in its WAL included.

    On a read-only file system SQLite can make no index for a WAL, and without one it would leave the tail out: rows
    that were acknowledged. Raises JournalUnusable, Unsound, sqlite3.Error, OSError.
    """
    with tempfile.TemporaryDirectory(prefix="pdctl-journal-") as scratch:
        copy = Path(scratch, path.name)
        for suffix in ("", "-wal"):
            if (part := beside(path, suffix)).exists():
                shutil.copyfile(part, beside(copy, suffix))  # before the service serves: nobody waits for this loop
        db = await open_file(copy)
        try:
            return await read(db)
        finally:
            await db.close()


def set_aside(path: Path, now: datetime) -> Path:
    """Move the file, and what belongs to it, to a name that is free; which."""
    stem = f"{path.name}.corrupt-{now:%Y%m%dT%H%M%SZ}"
    names = (stem if n == 0 else f"{stem}-{n}" for n in range(1000))
    target = next(free for name in names if not (free := path.with_name(name)).exists())
    for suffix in _FILES:
        if (part := beside(path, suffix)).exists():
            os.rename(part, beside(target, suffix))
    return target


def beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


async def transaction(db: aiosqlite.Connection, statements: Iterable[Statement]) -> None:
    """All of them, committed. Raises what SQLite says; then `rollback` is still to be called."""
    # In one visit to the thread: each is 50 us of two threads that wake each other, and waits for a loop that is busy.
    # aiosqlite (0.21, 0.22) has no public name for that: all that it offers is one statement a visit, executemany one
    # statement many times, executescript no values. Going round by a factory of sqlite3's that performs what it holds
    # when it is told to commit is public throughout, and hides a transaction in a side effect.
    in_the_thread: Any = db._execute
    await in_the_thread(_run, db._conn, statements)


def _run(db: sqlite3.Connection, statements: Iterable[Statement]) -> None:
    for sql, values in statements:
        db.execute(sql, values)
    db.commit()


async def last_room(db: aiosqlite.Connection) -> int:
    """The number of the room that came last; 0 where there is none."""
    return await _number(db, "SELECT coalesce(max(number), 0) FROM rooms")


async def _number(db: aiosqlite.Connection, sql: str) -> int:
    (row,) = await db.execute_fetchall(sql)
    return int(row[0])


def _primary_code(error: BaseException) -> int:
    """SQLite's own number, without the half that says where; 0 for errors of another origin."""
    return (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF


def _is_corruption(error: BaseException) -> bool:
    return _primary_code(error) in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


_WORDS: Final = {
    sqlite3.SQLITE_FULL: "no space is left: free some",
    sqlite3.SQLITE_READONLY: "it is read-only: make file, directory and file system writable",
    sqlite3.SQLITE_CANTOPEN: "it cannot be opened: check that directory and file can be written and space is left",
    sqlite3.SQLITE_PERM: "access is denied: check the permissions of file and directory",
    sqlite3.SQLITE_BUSY: "another program has it open: close that",
    sqlite3.SQLITE_CORRUPT: "it is corrupt: restart, which sets the file aside",
    sqlite3.SQLITE_NOTADB: "it is no database any more: restart, which sets the file aside",
}


def in_words(error: Exception) -> str:
    """What is the matter and what mends it."""
    name = getattr(error, "sqlite_errorname", None)
    if name:
        return f"{_WORDS.get(_primary_code(error), f'{error}: check the disk')} ({name})"
    if isinstance(error, OSError) and error.errno:
        return f"{os.strerror(error.errno).lower()}: check directory, file and disk"
    return str(error) or type(error).__name__
