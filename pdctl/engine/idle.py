"""
Keep-alive for the connections that the engine holds open while nothing is on them.

It sets none by itself (seen in /proc/net/tcp: of 17 connections to a peer the tether alone had a timer). What stands
between two hosts and keeps a table of connections (a NAT, a load balancer) forgets an idle one after minutes, without a
word, and the first block of the next room would find that out: a stall, a failed room, a session on trial. They are
sockets of this process, though, and the option is the connection's, not the descriptor's: it is set on a duplicate.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

_OURS = Path("/proc/self/fd")
# A word a minute: the shortest tables that are common forget after 5 (350 s and more). A peer's host that is not there
# for a minute and a half is; its process may stand still for as long as it likes.
_KEEP_ALIVE = ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 9))


class Idle:
    """The connections of this process, those that have been looked at before left out. For one thread."""

    def __init__(self) -> None:
        self._known: set[str] = set()

    def keep_alive(self, ports: Collection[int]) -> int:
        """Those that lead to one of `ports` and have no keep-alive have one from now on; how many they are."""
        known, n = set(), 0
        for fd in os.listdir(_OURS):
            with suppress(OSError):  # closed meanwhile, or not connected yet: then it is looked at again
                what = os.readlink(_OURS / fd)
                if what.startswith("socket:"):
                    n += what not in self._known and _kept_alive(int(fd), ports)
                    known.add(what)
        self._known = known
        return n


def _kept_alive(fd: int, ports: Collection[int]) -> bool:
    """Raises OSError for one that is no connection."""
    with _duplicate(fd) as it:
        if it.family not in (socket.AF_INET, socket.AF_INET6) or it.getpeername()[1] not in ports:
            return False
        if it.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE):
            return False  # somebody knows better: a tether
        it.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEP_ALIVE:
            it.setsockopt(socket.IPPROTO_TCP, option, value)
        return True


def _duplicate(fd: int) -> socket.socket:
    own = os.dup(fd)
    try:
        return socket.socket(fileno=own)
    except OSError:  # closed meanwhile, and something else is what it was
        os.close(own)
        raise
