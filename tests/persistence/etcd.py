"""
A real etcd, one node or several, on free ports of this machine; each test takes a prefix of its own.

    with cluster(directory) as etcd:          with cluster(directory, 3) as etcd:
        etcd.url("name")                          etcd.nodes[0].kill()

`flags` are etcd's own, for a node that wants certificates: it then speaks TLS to clients.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

UP_S = 60.0
BINARY = Path(__file__).parents[2] / ".cache" / "servers" / "usr" / "bin" / "etcd"  # where `./dev` puts it


def binary() -> str:
    found = shutil.which("etcd") or (str(BINARY) if BINARY.exists() else None)
    assert found is not None, "there is no etcd: ./dev test fetches it"
    return found


@dataclass
class Node:
    """One member. Killed and started again it has its ports, and its rows unless they are wiped."""

    name: str
    directory: Path
    client: int
    peer: int
    health: int
    members: str
    flags: tuple[str, ...] = ()
    process: subprocess.Popen[Any] | None = field(default=None, repr=False)

    def start(self) -> None:
        scheme = "https" if self.flags else "http"
        mine, peers = f"{scheme}://127.0.0.1:{self.client}", f"http://127.0.0.1:{self.peer}"
        words = [
            *(binary(), "--name", self.name, "--data-dir", str(self.directory)),
            *("--listen-client-urls", mine, "--advertise-client-urls", mine),
            *("--listen-peer-urls", peers, "--initial-advertise-peer-urls", peers),
            *("--initial-cluster", self.members, "--heartbeat-interval", "50", "--election-timeout", "500"),
            *("--listen-metrics-urls", f"http://127.0.0.1:{self.health}"),
            *("--logger", "zap", "--log-outputs", "stderr", *self.flags),
        ]
        with (self.directory.parent / f"{self.name}.log").open("ab") as log:
            self.process = subprocess.Popen(words, stdout=log, stderr=log)

    def kill(self) -> None:
        self.stopped(signal.SIGKILL)

    def stopped(self, how: signal.Signals) -> None:
        """Sends `how`; waits for the end of one that dies of it."""
        assert self.process is not None
        os.kill(self.process.pid, how)
        if how is signal.SIGKILL:
            self.process.wait()
            self.process = None

    def wipe(self) -> None:
        shutil.rmtree(self.directory)

    @property
    def is_healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.health}/health", timeout=10) as answer:
                return b'"true"' in answer.read()
        except OSError:
            return False


@dataclass
class Cluster:
    nodes: list[Node]

    def url(self, prefix: str) -> str:
        return f"etcd://{','.join(f'127.0.0.1:{node.client}' for node in self.nodes)}?prefix={prefix}"

    def wait(self) -> None:
        """Until each node that runs serves."""
        deadline = time.monotonic() + UP_S
        while not all(node.is_healthy for node in self.nodes if node.process is not None):
            assert time.monotonic() < deadline, "etcd does not come up"
            time.sleep(0.05)


@contextmanager
def cluster(directory: Path, n: int = 1, flags: tuple[str, ...] = ()) -> Iterator[Cluster]:
    ports = _free_ports(3 * n)
    members = ",".join(f"n{k}=http://127.0.0.1:{ports[n + k]}" for k in range(n))
    nodes = [
        Node(f"n{k}", directory / f"n{k}", ports[k], ports[n + k], ports[2 * n + k], members, flags) for k in range(n)
    ]
    with ExitStack() as stack:
        for node in nodes:
            node.start()
            stack.callback(_end, node)
        made = Cluster(nodes)
        made.wait()
        yield made


def _end(node: Node) -> None:
    if node.process is not None:
        node.process.kill()
        node.process.wait()


def _free_ports(n: int) -> list[int]:
    with ExitStack() as stack:
        socks = [stack.enter_context(socket.socket()) for _ in range(n)]
        for sock in socks:
            sock.bind(("127.0.0.1", 0))
        return [sock.getsockname()[1] for sock in socks]
