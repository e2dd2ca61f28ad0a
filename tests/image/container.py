"""
A container of an image's tree, as a runtime makes one that is told to be strict: namespaces of its own, a read-only
root, no capabilities and no way to gain any, the image's user, environment and folder.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.image.building import Image

DEADLINE_S = 60.0
# $1 the image's tree, $2 what is written to, $3 where that is in the image; the rest is run
_SETUP = """
set -e
tree=$1 volume=$2 place=$3
shift 3
mount --make-rprivate /
mount --bind "$tree" "$tree"
mount -o remount,bind,ro "$tree"
mount --bind "$volume" "$tree$place"
mount -t tmpfs -o nosuid,nodev tmp "$tree/tmp"
mount -t tmpfs -o nosuid,noexec dev "$tree/dev"
mkdir "$tree/dev/shm"
mount -t tmpfs -o nosuid,nodev,noexec shm "$tree/dev/shm"
mknod -m 666 "$tree/dev/null" c 1 3
mknod -m 444 "$tree/dev/urandom" c 1 9
mount -o remount,ro "$tree/dev"
mount -t proc proc "$tree/proc"
ip link set lo up
exec chroot "$tree" "$@"
"""


@dataclass(frozen=True, slots=True)
class Container:
    """`pid` is this machine's name for the container's process 1."""

    image: Image
    process: subprocess.Popen[str]
    pid: int

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """As `docker exec`: beside process 1, as the same user."""
        entered = ("nsenter", f"--target={self.pid}", "--mount", "--pid", "--net", "--ipc", "--uts", "--root", "--wd=/")
        return subprocess.run(
            (*entered, *_as_user(self.image), *command),
            capture_output=True, text=True, check=False, timeout=DEADLINE_S, stdin=subprocess.DEVNULL,
        )  # fmt: skip

    def health(self) -> subprocess.CompletedProcess[str]:
        kind, *command = _config(self.image)["Healthcheck"]["Test"]
        assert kind == "CMD"
        return self.run(*command)

    def until_healthy(self) -> None:
        ends = time.monotonic() + DEADLINE_S
        while self.health().returncode:
            assert time.monotonic() < ends, self.health().stderr
            assert self.process.poll() is None, self.process.stdout and self.process.stdout.read()


@contextmanager
def running(image: Image, volume: Path, command: Sequence[str] | None = None) -> Iterator[Container]:
    """`command` stands for the image's CMD; the entry point stays."""
    config = _config(image)
    (place,) = config["Volumes"]
    os.chown(volume, *_user(image))
    words = [*config["Entrypoint"], *(config["Cmd"] if command is None else command)]
    namespaces = ("unshare", "--mount", "--pid", "--net", "--ipc", "--uts", "--fork")
    setup = ("bash", "-c", _SETUP, "container", str(image.root), str(volume), place)
    process = subprocess.Popen(
        (*namespaces, *setup, *_as_user(image), *words),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    container = Container(image, process, _child(process.pid))
    try:
        yield container
    finally:
        if process.poll() is None:
            os.kill(container.pid, signal.SIGKILL)  # not unshare, which it no longer dies with: it became another user
        process.communicate(timeout=DEADLINE_S)


def _as_user(image: Image) -> tuple[str, ...]:
    config = _config(image)
    user, group = _user(image)
    rights = (f"--reuid={user}", f"--regid={group}", "--clear-groups", "--inh-caps=-all", "--bounding-set=-all")
    return ("setpriv", *rights, "--no-new-privs", "env", "-i", "-C", config["WorkingDir"], *config["Env"])


def _user(image: Image) -> tuple[int, int]:
    user, _, group = str(_config(image)["User"]).partition(":")
    return int(user), int(group)


def _config(image: Image) -> dict[str, Any]:
    return dict(image.config)


def _child(pid: int) -> int:
    """unshare forks once: the child is process 1 of the container, from its first moment on."""
    ends = time.monotonic() + DEADLINE_S
    while time.monotonic() < ends:
        if children := Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            return int(children[0])
    raise AssertionError("unshare has not forked")
