"""
One process after another at one socket: who listens stays, who serves is new for each rank.

The process that has served an engine ends with it (agent.py says why); the next one takes the socket over, and whoever
connects in between waits in the socket's queue. Never reads a request, and starts nobody again that could not start.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import socket
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import structlog

from pdctl.errors import AddressTaken, ConfigError, EngineUnavailable

log = structlog.get_logger(__name__)

_PR_SET_PDEATHSIG = 1
_LONGEST_PATH = 107  # sockaddr_un
_BACKLOG = 128
_STOP_S = 3.0
READY = b"ready\n"


@contextmanager
def listening(path: Path, *, for_others: bool) -> Iterator[socket.socket]:
    """A socket at `path` that only this user can reach; `for_others`: whoever may reach its directory, and the kernel
    says who connects. Raises ConfigError for a place that is not safe, AddressTaken where another listens."""
    if len(os.fsencode(path)) > _LONGEST_PATH:
        raise ConfigError(f"socket {path} is longer than {_LONGEST_PATH} bytes: give a shorter path")
    _make_directory(path.parent, for_others)
    _remove_a_dead_ones(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with contextlib.closing(sock):
        sock.bind(str(path))
        try:
            path.chmod(0o666 if for_others else 0o600)
            sock.listen(_BACKLOG)
            sock.setblocking(False)
            yield sock
        finally:
            path.unlink(missing_ok=True)


def _make_directory(at: Path, for_others: bool) -> None:
    try:
        at.mkdir(parents=True, exist_ok=True, mode=0o711 if for_others else 0o700)
        found = at.stat()
    except OSError as error:
        raise ConfigError(f"directory {at} cannot be used ({error.strerror}): give --socket another place") from error
    if found.st_uid not in (os.geteuid(), 0):
        raise ConfigError(f"directory {at} belongs to user {found.st_uid}: give --socket a place of your own")
    too_wide = 0o022 if for_others else 0o077
    if mode := stat.S_IMODE(found.st_mode) & too_wide:
        raise ConfigError(
            f"directory {at} is open to others (mode {stat.S_IMODE(found.st_mode):o}, {mode:o} too much): "
            "give the socket a directory of its own, of mode 700; with --user, one that others cannot write"
        )


def _remove_a_dead_ones(path: Path) -> None:
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise ConfigError(f"{path} is there and no socket: remove it, or give --socket another path")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as knock:
        try:
            knock.setblocking(False)
            knock.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
        except BlockingIOError as error:  # its queue is full
            raise _taken(path) from error
        else:
            raise _taken(path)


def _taken(path: Path) -> AddressTaken:
    return AddressTaken(f"another process listens at {path}: stop it, or give --socket another path")


async def keep(sock: socket.socket, path: Path, command: Sequence[str], serving: Callable[[Path], None]) -> None:
    """Keep one process at `sock`: `command --inherited FD:PID`. Raises EngineUnavailable when one cannot start."""
    first = True
    while True:
        child = await asyncio.create_subprocess_exec(
            *(*command, "--inherited", f"{sock.fileno()}:{os.getpid()}"),
            pass_fds=(sock.fileno(),),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
        )
        try:
            assert child.stdout  # noqa: S101  it was asked for
            is_ready = await child.stdout.readline() == READY
            if is_ready and first:
                serving(path)
                first = False
            status = await child.wait()
        finally:
            await _stop(child)
        if not is_ready:
            raise EngineUnavailable(f"the agent's process at {path} has ended with {status}: it has said why above")
        log.info("agent begins anew", socket=str(path), ended_with=status)


async def _stop(child: asyncio.subprocess.Process) -> None:
    """SIGTERM, a while to tell its engine, SIGKILL."""
    if child.returncode is not None:
        return
    child.terminate()
    try:
        await asyncio.wait_for(child.wait(), _STOP_S)
    except TimeoutError:
        child.kill()
        await child.wait()


def inherited(text: str) -> socket.socket:
    """The socket that `keep` has passed on. This process ends with the one that did. Raises ConfigError."""
    try:
        number, parent = map(int, text.split(":"))
        _end_with(parent)
        sock = socket.socket(fileno=number)
    except (ValueError, OSError) as error:
        raise ConfigError(f"--inherited {text}: only pdctl agent gives it ({error})") from error
    sock.setblocking(False)
    return sock


def _end_with(parent: int) -> None:
    """Asked before, for it is a parent's wish and nobody else's; and after, for it may have ended in between."""
    for wish in (lambda: None, lambda: ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)):
        wish()
        if os.getppid() != parent:
            raise ConfigError(f"process {parent}, which keeps the socket, is not our parent: start pdctl agent again")
