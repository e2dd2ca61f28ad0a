"""A small file system of one's own, to fill and to make read-only; where the kernel lets us."""

from __future__ import annotations

import functools
import os
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType


class Tmpfs:
    """Mounted at `path` within the block."""

    def __init__(self, path: Path, size: str = "1m") -> None:
        self.path = path
        self._size = size

    def __enter__(self) -> Tmpfs:
        self.path.mkdir()
        _run("mount", "-t", "tmpfs", "-o", f"size={self._size}", "none", str(self.path))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        _run("umount", "-l", str(self.path))

    def resize(self, size: str) -> None:
        self.remount(f"size={size}")

    def remount(self, options: str) -> None:
        """Raises CalledProcessError for "ro" while somebody has a file open to write."""
        _run("mount", "-o", f"remount,{options}", str(self.path))

    def fill(self) -> Path:
        """Take all the space there is; the file that holds it."""
        stuffing = self.path / "stuffing"
        with stuffing.open("wb", buffering=0) as file:
            for nbytes in (65536, 4096, 512):
                while _took(file.fileno(), nbytes):
                    pass
        return stuffing


def _took(fd: int, nbytes: int) -> bool:
    try:
        return os.write(fd, b"x" * nbytes) > 0
    except OSError:
        return False


@functools.cache
def can_mount() -> bool:
    """Root in a container may well be forbidden to."""
    if os.geteuid() != 0:
        return False
    with tempfile.TemporaryDirectory() as scratch:
        try:
            with Tmpfs(Path(scratch, "mounted")):
                return True
        except (OSError, subprocess.CalledProcessError):
            return False


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
