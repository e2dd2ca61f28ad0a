"""Several `pdctl serve` over one etcd, all of them processes, and a rank's side of them by plain HTTP."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.persistence.etcd import Cluster, cluster
from tests.service import Service, service, until

SHAPE = {"attn_cp_size": 1, "dp_size": 1, "pp_size": 1, "page_size": 16, "kv_cache_dtype": "auto"}


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: Any

    @property
    def age_s(self) -> int:
        """As the answer says it; 0 for one that is fresh."""
        return int(self.headers.get("x-pdctl-age", 0))


def call(method: str, url: str, body: object = None, timeout_s: float = 30.0) -> Answer:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            return Answer(answer.status, dict(answer.headers), _read(answer.read()))
    except urllib.error.HTTPError as error:
        with error:
            return Answer(error.code, dict(error.headers), _read(error.read()))


def _read(body: bytes) -> Any:
    try:
        return json.loads(body or b"null")
    except ValueError:
        return body.decode()


def claim(
    at: Service,
    instance: str,
    tp: int = 0,
    *,
    port: int = 0,
    size: int = 2,
    ttl_s: float | None = 60.0,
    timeout_s: float = 30.0,
) -> Answer:
    rank = {"host": "127.0.0.1", "port": port or 4000 + tp, "ttl_s": ttl_s, "role": "prefill"}
    url = f"{at.url}/v1/instances/{instance}/ranks/tp{tp}"
    return call("PUT", url, rank | {"shape": SHAPE | {"attn_tp_size": size}}, timeout_s)


def renew(at: Service, instance: str, tp: int, epoch: int) -> Answer:
    return call("POST", f"{at.url}/v1/instances/{instance}/ranks/tp{tp}/renew", {"epoch": epoch})


def seen(at: Service, instance: str) -> dict[int, str]:
    """Standing by epoch, as this registry tells it."""
    answer = call("GET", f"{at.url}/v1/instances/{instance}")
    return {row["epoch"]: row["standing"] for row in answer.body["alive_seats"]} if answer.status == 200 else {}


@dataclass
class Fleet:
    etcd: Cluster
    replicas: list[Service]

    def agree(self, instance: str, epochs: set[int], within_s: float = 20.0) -> None:
        """Wait until every registry knows these lives of the instance, and no others."""
        until(lambda: all(set(seen(each, instance)) == epochs for each in self.replicas), within_s)


@contextmanager
def fleet(where: Path, n_replicas: int = 2, n_nodes: int = 1) -> Iterator[Fleet]:
    with cluster(where, n_nodes) as etcd, ExitStack() as stack:
        url = etcd.url("fleet")
        opened = [service(where / f"replica{n}.log", "--journal", url) for n in range(n_replicas)]
        yield Fleet(etcd, [stack.enter_context(each) for each in opened])


def signalled(process: Service, how: signal.Signals) -> None:
    os.kill(process.pid, how)


class Relay:
    """A port that leads to another one, until it is cut: then connections hang as they do behind a firewall."""

    def __init__(self, to: int) -> None:
        self._to = to
        self._sock = socket.create_server(("127.0.0.1", 0))
        self._flows = threading.Event()
        self._flows.set()
        self._ends: list[socket.socket] = []
        self.port: int = self._sock.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Nothing passes any more, and nobody is told."""
        self._flows.clear()

    def mend(self) -> None:
        """What was connected is reset; what comes now passes."""
        for end in self._ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self._ends.clear()
        self._flows.set()

    def close(self) -> None:
        self._sock.close()
        self.mend()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                here, _ = self._sock.accept()
                there = socket.create_connection(("127.0.0.1", self._to))
                self._ends += [here, there]
                for one, other in ((here, there), (there, here)):
                    threading.Thread(target=self._carry, args=(one, other), daemon=True).start()

    def _carry(self, one: socket.socket, other: socket.socket) -> None:
        with suppress(OSError):
            while data := one.recv(65536):
                self._flows.wait()
                other.sendall(data)
        for end in (one, other):
            end.close()
