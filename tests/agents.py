"""`pdctl agent` as operators run it: a process of its own, asked over its socket by whoever a test wants to be."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from pdctl.core.handover import Offer, Role
from pdctl.core.route import Seat
from tests.agent_engine import SHAPE, Memory
from tests.service import DEADLINE_S, until

QUICK = {
    "PDCTL_ROOM__DRAIN_MARGIN_S": "0.05",
    "PDCTL_ENGINE__PROGRESS_TIMEOUT_S": "2",
    "PDCTL_RETRY__FIRST_WAIT_S": "0.05",
    "PDCTL_LOG__LEVEL": "debug",
}


class AgentProcess:
    def __init__(self, child: subprocess.Popen[bytes], socket: Path, log: Path, begin: int) -> None:
        self.process, self.socket, self._log, self._begin = child, socket, log, begin

    def log(self) -> str:
        return self._log.read_bytes()[self._begin :].decode(errors="replace")

    def movers(self) -> list[psutil.Process]:
        """The processes that serve its sockets."""
        return psutil.Process(self.process.pid).children()

    async def ask(self, method: str, path: str, body: object = None, raw: bytes | None = None) -> tuple[int, Any]:
        """One request without a client of ours, as an engine in another language makes it."""
        data = raw if raw is not None else (b"" if body is None else json.dumps(body).encode())
        reader, writer = await asyncio.open_unix_connection(str(self.socket))
        head = f"{method} {path} HTTP/1.1\r\nHost: agent\r\nConnection: close\r\nContent-Length: {len(data)}\r\n\r\n"
        writer.write(head.encode() + data)
        try:
            status = int((await reader.readline()).split()[1])
            while (await reader.readline()).strip():
                pass
            return status, json.loads(await reader.read())
        finally:
            writer.transport.abort()  # of a body that is too large, some was never read


@contextmanager
def agent(at: Path, *args: str, socket: Path | None = None, **environ: str) -> Iterator[AgentProcess]:
    """`pdctl agent --socket AT/run/agent.sock ARGS`; its log goes to a file beside."""
    socket, log = socket or at / "run" / "agent.sock", at / "agent.log"
    at.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "pdctl", "agent", "--socket", str(socket), *args]
    with log.open("ab") as file:
        begin = file.tell()
        child = subprocess.Popen(command, stdout=file, stderr=file, env=os.environ | QUICK | environ)
    running = AgentProcess(child, socket, log, begin)
    try:
        until(lambda: child.poll() is not None or f"serving at unix:{socket}" in running.log(), 60)
        assert child.poll() is None, running.log()
        yield running
    finally:
        child.kill()
        child.wait(DEADLINE_S)


def offer(memory: Memory, role: str = "prefill") -> dict[str, Any]:
    """What an engine says to hand `memory` over."""
    return Offer.of(Role(role), memory.pools, [memory.arena.handed], Seat(0, 0, 0, 0), SHAPE).to_body()
