"""
Which processes of this host listen where, and what they were told: read from /proc as far as it shows them to us.

Looks and says; starts, stops and asks nobody. Of a command line only words that name a program, and the values of those
options and variables that somebody asked for, are ever given away: the rest may be a secret.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

_LISTEN = "0A"  # TCP_LISTEN as /proc/net/tcp writes it
_PROC = Path("/proc")
_TABLES = ("tcp", "tcp6")


@dataclass(frozen=True, slots=True)
class Process:
    pid: int
    command: str

    def __str__(self) -> str:
        return f"pid {self.pid} ({self.command})"


def holders(port: int) -> Iterator[Process]:
    """Each process of this network namespace that listens at `port`."""
    yield from (process for process, ports in listening() if port in ports)


def ports() -> frozenset[int]:
    """Every port that somebody listens at, whoever it is."""
    return frozenset(port for table in _TABLES for port, _ in _listening(table))


def listening() -> Iterator[tuple[Process, frozenset[int]]]:
    """Each process that listens somewhere, and at which ports."""
    at = {f"socket:[{inode}]": port for table in _TABLES for port, inode in _listening(table)}
    for path in _processes():
        found = frozenset(at[name] for name in _open_files(path) if name in at)
        if found:
            yield Process(int(path.name), _command(path)), found


def options(names: Collection[str]) -> Iterator[tuple[Process, str, str]]:
    """(process, option, value) of each process that was started with one of `names`, as `--name value` or `=value`."""
    for path in _processes():
        words = _words(path)
        for word, following in itertools.pairwise([*words, ""]):
            name, equals, value = word.partition("=")
            if name in names and (value if equals else following):
                yield Process(int(path.name), _command(path)), name, value if equals else following


def variables(names: Collection[str]) -> Iterator[tuple[Process, str, str]]:
    """The same of environment variables, as each process was given them."""
    for path in _processes():
        for word in _split(path / "environ"):
            name, _, value = word.partition("=")
            if name in names and value:
                yield Process(int(path.name), _command(path)), name, value


def _processes() -> list[Path]:
    return sorted(_PROC.glob("[0-9]*"), key=lambda path: int(path.name))


def _listening(table: str) -> Iterator[tuple[int, str]]:
    """(port, inode). A line is: slot, local address, remote address, state, six more, inode, ..."""
    try:
        lines = (_PROC / "net" / table).read_text().splitlines()[1:]
    except OSError:
        return
    for line in lines:
        columns = line.split()
        if columns[3] == _LISTEN:
            yield int(columns[1].rpartition(":")[2], 16), columns[9]


def _open_files(process: Path) -> Iterator[str]:
    with contextlib.suppress(OSError):  # gone meanwhile, or another user's
        for descriptor in (process / "fd").iterdir():
            with contextlib.suppress(OSError):
                yield str(descriptor.readlink())


def _command(process: Path) -> str:
    """The command up to its first option: what follows may be a secret."""
    words = _words(process)
    shown = itertools.takewhile(lambda word: word == "-m" or not word.startswith("-"), words)
    return " ".join(shown)[:120] or ("unknown" if words else "gone meanwhile")


def _words(process: Path) -> list[str]:
    return _split(process / "cmdline")


def _split(file: Path) -> list[str]:
    try:
        return [*filter(None, file.read_bytes().decode(errors="replace").split("\0"))]
    except OSError:  # gone meanwhile, or another user's
        return []
