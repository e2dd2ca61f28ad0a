"""Faults, planted with real processes and sockets: ranks of a stock kind, and programs that are in the way."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from typing import Any

import aiohttp

from pdctl.config import Settings
from pdctl.core.findings import Scope
from pdctl.core.route import Seat, Shape
from pdctl.explaining import Explained, why
from pdctl.sections import NodeSettings
from tests.engine.processes import Child

SHAPE = Shape(2, 1, 1, 1, 64, "bfloat16")


class Ranks:
    """A process that holds control sockets and has registered them once, as a stock engine does."""

    def __init__(self, child: Child, registry: str) -> None:
        self.child, self.registry = child, registry

    def register(self, instance: str, *seats: Seat, shape: Shape = SHAPE, **more: Any) -> list[tuple[int, str, int]]:
        """Each answer's status and words, and at which port the rank listens."""
        return [self._register(instance, seat, shape, **more) for seat in seats]

    def _register(self, instance: str, seat: Seat, shape: Shape, **more: Any) -> tuple[int, str, int]:
        registry = more.pop("registry", self.registry)
        body = {"host": "127.0.0.1", "shape": asdict(shape), "ttl_s": None, **more}
        path = f"/v1/instances/{instance}/ranks/{str(seat).replace('/', '-')}"
        told = self.child.ask_now("register", registry=registry, path=path, body=body)
        return told["status"], told["words"], told["port"]


@contextmanager
def ranks(registry: str) -> Iterator[Ranks]:
    with Child("tests.explain.engine_rank") as child:
        yield Ranks(child, registry)


@contextmanager
def program(source: str, *arguments: str, **environ: str) -> Iterator[subprocess.Popen[bytes]]:
    """Another program, that has printed a line."""
    command = [sys.executable, "-c", source, *arguments]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | environ)
    try:
        assert child.stdout
        child.stdout.readline()
        yield child
    finally:
        child.kill()
        child.wait()
        assert child.stdout
        child.stdout.close()


LISTENS = """
import http.server, sys
server = http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), http.server.SimpleHTTPRequestHandler)
print(flush=True)
server.serve_forever()
"""
WAITS = "import signal; print(flush=True); signal.pause()"


@contextmanager
def blackhole() -> Iterator[int]:
    """A port where connections are neither taken nor refused: its queue is full, and the kernel drops what comes."""
    with socket.socket() as sock, ExitStack() as held:
        sock.bind(("127.0.0.1", 0))
        sock.listen(0)
        for _ in range(4):
            waiting = held.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(sock.getsockname())
        yield int(sock.getsockname()[1])


def settings(registry: str, **more: Any) -> Settings:
    return Settings(node=NodeSettings(registry=registry), **more)


async def explained(registry: str, *words: str) -> Explained:
    return await why(settings(registry), Scope.parse(words))


async def culprits(registry: str, *words: str) -> list[str]:
    return [finding.what.value for finding in (await explained(registry, *words)).findings]


def outer_address() -> str | None:
    """This host's address for others, if it has one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(("198.51.100.1", 9))
        except OSError:
            return None
        host = str(sock.getsockname()[0])
    return None if host.startswith("127.") else host


async def put(url: str, body: object) -> int:
    return await _ask("PUT", url, body)


async def post(url: str, body: object) -> int:
    return await _ask("POST", url, body)


async def delete(url: str) -> int:
    return await _ask("DELETE", url)


async def _ask(method: str, url: str, body: object = None) -> int:
    async with aiohttp.ClientSession() as http, http.request(method, url, json=body) as answer:
        await answer.read()
        return answer.status
