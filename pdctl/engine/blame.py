"""
Which errors of the operating system speak of this process and this host, and not of the peer that was to be reached.

A session is put out by its peer's failures only: a rank that has no descriptor left fails with every peer at once, and
each would be asked, and asked again, for a fault that is here. Only words; whoever catches the error decides.
"""

from __future__ import annotations

import errno

_OURS = {
    errno.EMFILE: "this process has no file descriptor left: raise its limit (ulimit -n)",
    errno.ENFILE: "this host has no file descriptor left: see fs.file-max",
    errno.ENOMEM: "this host has no memory left for a connection",
    errno.ENOBUFS: "this host has no buffers left for a connection",
    errno.EPERM: "this host's own firewall or policy forbids the connection",
    errno.EACCES: "this host's own firewall or policy forbids the connection",
}


def own_fault(error: BaseException) -> str | None:
    """What to say of it; None where it may speak of the peer."""
    return _OURS.get(error.errno or 0) if isinstance(error, OSError) else None
