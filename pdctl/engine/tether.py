"""
One idle connection to a peer's data port, held for as long as its process is meant: it ends when that process does.

An engine keeps an idle connection for ever, stopped or not (watched for 45 minutes; no timer of its closes one), and
the kernel closes it when the process dies, together with the port. So a tether that is whole says that no other process
has taken the port since it was tied, and a look at it costs about what submitting a block does.

Never says a word on the connection, never waits except to tie it.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import os
import select
import socket

from pdctl.engine.blame import own_fault
from pdctl.errors import Cause, TransferFailed
from pdctl.lag import patience

# A host that went down without a word says nothing on an idle connection until it is asked; back again, it denies it.
# Shorter than it takes to start a process there. Fifteen unanswered questions are a cut way, not a new process.
_KEEP_ALIVE = ((socket.TCP_KEEPIDLE, 1), (socket.TCP_KEEPINTVL, 1), (socket.TCP_KEEPCNT, 15))
_CUT = {errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN, errno.EHOSTDOWN}
_ANYTHING = select.POLLIN | select.POLLRDHUP


class _Polled(ctypes.Structure):
    _fields_ = (("fd", ctypes.c_int), ("events", ctypes.c_short), ("revents", ctypes.c_short))


# Through ctypes because it keeps the interpreter: select.poll and recv let go of it, and to get it back beside one busy
# thread took 270 us each (6 us this way; 1.6 us and 0.7 us on a quiet machine).
_poll = ctypes.PyDLL(None).poll
_poll.argtypes = (ctypes.POINTER(_Polled), ctypes.c_ulong, ctypes.c_int)


class Tether:
    """Made by `tie` or around a connected socket. `over` may be asked from any thread."""

    def __init__(self, connected: socket.socket) -> None:
        connected.setblocking(False)
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEP_ALIVE:
            connected.setsockopt(socket.IPPROTO_TCP, option, value)
        self._socket = connected
        self._polled = _Polled(connected.fileno(), _ANYTHING, 0)
        self._at = ctypes.byref(self._polled)
        self._end: str | None = None
        self.was_cut = False

    @classmethod
    async def tie(cls, session: str, host: str, port: int, *, deadline_s: float) -> Tether:
        """Raises NO_DATA when the port cannot be reached."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        connecting = socket.socket(family, socket.SOCK_STREAM)
        connecting.setblocking(False)
        try:
            async with patience(deadline_s):
                await asyncio.get_running_loop().sock_connect(connecting, (host, port))
            return cls(connecting)
        except BaseException as cause:
            connecting.close()
            raise _unreached(session, port, deadline_s, cause) from cause

    @property
    def over(self) -> str | None:
        """How it ended, in words; None while it holds. `was_cut` then says that the way ended, not the process."""
        if self._end is None and _poll(self._at, 1, 0):
            self._end = self._find_out()
        return self._end

    def close(self) -> None:
        self._end = self._end or "that life is not meant any more"
        self._socket.close()

    def _find_out(self) -> str:
        code = errno.EBADF
        with contextlib.suppress(OSError):
            code = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        self.was_cut = code in _CUT
        if self.was_cut:
            return f"the way to it was cut for longer than it is waited for ({os.strerror(code)})"
        return "its process has ended: the kernel has closed what was connected to it"


def _unreached(session: str, port: int, deadline_s: float, cause: BaseException) -> BaseException:
    if (ours := own_fault(cause)) is not None:
        return TransferFailed(Cause.LOCAL, session, ours)
    if isinstance(cause, TimeoutError) and not cause.errno:
        detail = f"its data port {port} does not answer within {deadline_s:.2g} s: is it firewalled?"
    elif isinstance(cause, OSError):
        detail = f"its data port {port} cannot be reached: {os.strerror(cause.errno) if cause.errno else cause}"
    else:
        return cause
    return TransferFailed(Cause.NO_DATA, session, detail)
