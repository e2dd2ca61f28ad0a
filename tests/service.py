"""`pdctl serve` as operators run it: a process of its own that the tests see from outside only."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

DEADLINE_S = 60.0
LEAKS = re.compile(rb'Traceback|File "|\.py\b|site-packages| object at 0x|\bpdctl[./]\w|/usr/lib')
"""What no answer may say: where our code lies and how it is made."""


class Service:
    """A service that has said where it listens. Its log goes to a file, both outputs in one."""

    def __init__(self, child: subprocess.Popen[bytes], log: Path) -> None:
        self._child = child
        self._log = log
        self._seen = psutil.Process(child.pid)
        self.urls: list[str] = []

    @property
    def url(self) -> str:
        return self.urls[0]

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self._child.kill()
        self._child.wait(DEADLINE_S)

    def lives(self) -> bool:
        return self._child.poll() is None

    def connections(self) -> int:
        return len(self._seen.net_connections(kind="tcp"))

    def resident_nbytes(self) -> int:
        return int(self._seen.memory_info().rss)

    def complaints(self) -> list[str]:
        """What the log tells of defects: tracebacks, errors, lines that nobody of ours has begun."""
        lines = self.log().splitlines()
        return [line for line in lines if "Traceback" in line or "level=error" in line or "level=critical" in line]

    def await_urls(self) -> None:
        until(lambda: not self.lives() or "serving at " in self.log())
        self.urls = re.findall(r"serving at (http\S+)", self.log())
        assert self.urls, f"it did not start: {self.log()}"


@contextmanager
def service(log: Path, *args: str, preload: str = "", **environ: str) -> Iterator[Service]:
    """`pdctl serve ARGS`; any free port unless one is given. `preload` is Python that runs in the process first."""
    port = () if "--port" in args else ("--port", "0")
    start = f"{preload}\nfrom pdctl.cli import main\nmain()"
    with log.open("wb") as file:
        child = subprocess.Popen(
            [sys.executable, "-c", start, "serve", *port, *args], stdout=file, stderr=file, env=os.environ | environ
        )
    try:
        running = Service(child, log)
        running.await_urls()
        yield running
    finally:
        child.kill()
        child.wait(DEADLINE_S)


def until(what: Callable[[], bool], deadline_s: float = DEADLINE_S, *, title: str = "it did not come") -> None:
    """Wait for something in another process, which can only be looked at."""
    end = time.monotonic() + deadline_s
    while not what():
        assert time.monotonic() < end, f"{title}: not within {deadline_s:g} s"
        time.sleep(0.01)
