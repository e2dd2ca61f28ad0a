"""
`python leash.py PARENT_PID COMMAND...`: become COMMAND, tied so that the kernel kills it when its parent dies.

A stopped process is killed like any other. Run by its path before anything of pdctl is imported, and replaced by the
command at once. A `preexec_fn` would do the same between fork and exec, where a process with threads may hang.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(argv: list[str]) -> None:
    parent, command = int(argv[1]), argv[2:]
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0):
        sys.exit(f"prctl(PR_SET_PDEATHSIG) failed: {os.strerror(ctypes.get_errno())}: run on Linux")
    if os.getppid() != parent:
        sys.exit("the parent ended before the leash was tied")
    os.execvp(command[0], command)  # noqa: S606  # the leash survives exec; a shell would only stand between


if __name__ == "__main__":
    main(sys.argv)
