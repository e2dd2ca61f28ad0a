"""A real mooncake_master on free ports: it is stopped, killed, started again at the same ones, never left behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path

from tests.engine.processes import die_with_parent

SOON_S = 60.0


def binary() -> str:
    """The program itself: the script of that name is a Python that takes a moment to start."""
    found = find_spec("mooncake")
    assert found is not None
    assert found.submodule_search_locations
    return str(Path(found.submodule_search_locations[0], "mooncake_master"))


def free_ports(n: int) -> list[int]:
    """Different ones, that were free a moment ago."""
    with ExitStack() as held:
        socks = [held.enter_context(socket.socket()) for _ in range(n)]
        for sock in socks:
            sock.bind(("127.0.0.1", 0))
        return [sock.getsockname()[1] for sock in socks]


class Master:
    """Not running until `start`. `rpc` and `http` are its ports, from the beginning to the end."""

    def __init__(self, *flags: str) -> None:
        self.rpc, self.http = free_ports(2)
        self._flags = flags
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.rpc}"

    @property
    def is_running(self) -> bool:
        return self._process is not None

    @property
    def pid(self) -> int:
        assert self._process
        return self._process.pid

    def start(self, *, wait: bool = True) -> Master:
        """Listens at both ports when this returns; `wait=False` returns at once."""
        self._process = subprocess.Popen(
            [
                *(binary(), f"--rpc_port={self.rpc}", "--rpc_address=127.0.0.1"),
                *("--metrics_host=127.0.0.1", f"--metrics_port={self.http}", *self._flags),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=die_with_parent,
        )
        if wait:
            for port in (self.rpc, self.http):
                until_listens(port)
        return self

    def stop(self) -> None:
        """SIGSTOP: it hangs, and its ports still take connections."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def until_listens(port: int) -> None:
    until = time.monotonic() + SOON_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1.0).close()
            return
        except OSError:
            assert time.monotonic() < until, f"nobody listens at {port}"
            time.sleep(0.01)


@contextmanager
def master(*flags: str) -> Iterator[Master]:
    """Running; again at other ports where somebody else has taken these meanwhile."""
    made = Master(*flags)
    try:
        try:
            made.start()
        except AssertionError:
            made.kill()
            made = Master(*flags).start()
        yield made
    finally:
        made.kill()
