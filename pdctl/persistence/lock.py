"""
One process at a file: a lock that the kernel lets go of however its holder ends.

Never waits for the lock, and never takes a dead holder's word for a living one: what is written inside is for people.
"""

from __future__ import annotations

import fcntl
import os
import socket
from dataclasses import dataclass
from pathlib import Path

from pdctl.errors import JournalUnusable

_LONGEST_NOTE = 300


@dataclass(frozen=True, slots=True)
class FileLock:
    """Held while `fd` is open. The file stays: removing it would let two hold two files of one name."""

    fd: int

    def release(self) -> None:
        os.close(self.fd)


def hold(path: Path) -> FileLock:
    """Lock `PATH.lock` beside `path`. Raises JournalUnusable naming the holder, OSError where no file can be made."""
    lock = take(path.with_name(path.name + ".lock"))
    if isinstance(lock, FileLock):
        return lock
    raise JournalUnusable(
        f"journal {path} is held by {lock}: stop that process, or give each registry a journal of its own"
    )


def take(file: Path) -> FileLock | str:
    """The lock, or who holds it. Raises OSError where no file can be made."""
    fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _sign(fd)
    except BlockingIOError:
        holder = _plain(os.pread(fd, _LONGEST_NOTE, 0)) or "another process"
        os.close(fd)
        return holder
    except BaseException:
        os.close(fd)
        raise
    return FileLock(fd)


def _sign(fd: int) -> None:
    """Say who holds it. On a full disk nobody can be told: the lock is good without."""
    note = f"process {os.getpid()} on {socket.gethostname()}\n".encode()
    try:
        os.ftruncate(fd, 0)
        os.pwrite(fd, note, 0)
    except OSError:
        return


def _plain(note: bytes) -> str:
    return "".join(c for c in note.decode("ascii", "replace").strip() if c.isprintable())
