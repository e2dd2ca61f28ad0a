"""
2,000 real clients lose a real registry at one moment, by SIGKILL, and find it again two seconds later.

How many times the mean the fullest 100 ms hold, wherever they begin, until the last client has its lease again:
beside 3, the promise. `knock`: a question is put that will be answered; `back`: a client has its lease again. With its
journal the registry knows the leases, and they are renewed; without one every client is told 404 and registers anew,
at the turnstile's pace. Times are the clients' own, all in one process: two idle cores are needed, or what is measured
is how that process stands still.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pdctl import logs
from pdctl.client import RegistryClient
from pdctl.core.address import Endpoint
from pdctl.core.exchange import Exchange, T
from pdctl.core.route import Announcement, Seat, Shape
from pdctl.errors import PutOff, RegistryRefused
from pdctl.lease import Lease, LeaseTerms
from pdctl.logs import LogSettings
from pdctl.retry import RetryPolicy
from tests.bench.rivals import Row
from tests.service import Service, service
from tests.test_herd import unevenness

ROUNDS = 7
CLIENTS = 2000
SEATS = 100
OUTAGE_S = 2.0
TTL_S = 30.0
ARRIVAL_S = 15.0
PATIENCE_S = 120.0
SHAPE = Shape(attn_tp_size=SEATS, attn_cp_size=1, dp_size=1, pp_size=1, page_size=16, kv_cache_dtype="auto")


@dataclass(slots=True)
class Return:
    """One return of all clients: when they were answered, and when each was back."""

    knocked: list[float] = field(default_factory=list)
    back: dict[int, float] = field(default_factory=dict)
    complete: asyncio.Event = field(default_factory=asyncio.Event)

    def answered(self, client: int, asked_at: float, well: bool) -> None:
        if client in self.back:
            return
        self.knocked.append(asked_at)
        if well:
            self.back[client] = time.monotonic()
            if len(self.back) == CLIENTS:
                self.complete.set()

    def ratios(self) -> tuple[float, float]:
        """Of the knocks, and of those who are back."""
        began = min(self.knocked)
        return tuple(unevenness([at - began for at in times]) for times in (self.knocked, self.back.values()))  # type: ignore[return-value]


class Herd:
    """All clients, each with its own connection and its own lease."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.now = Return()

    async def hold(self, number: int) -> None:
        announcement = Announcement(
            Seat(0, 0, number % SEATS, 0), SHAPE, Endpoint("127.0.0.1", 20_000 + number), prefill_http_port=None
        )
        terms = LeaseTerms(f"herd-{number // SEATS}", announcement, TTL_S)
        await asyncio.sleep(number / CLIENTS * ARRIVAL_S)
        async with RegistryClient(self._url, attempt_timeout_s=30.0) as client:

            async def tell(exchange: Exchange[T]) -> T:
                asked_at = time.monotonic()
                try:
                    said = await client.tell(exchange)
                except (PutOff, RegistryRefused):
                    self.now.answered(number, asked_at, well=False)
                    raise
                self.now.answered(number, asked_at, well=True)
                return said

            insist = functools.partial(client.insist, announcement)
            await Lease(tell, insist, terms, RetryPolicy()).hold()


def bench() -> list[Row]:
    logs.configure(LogSettings(level="error"))
    return [row for kept in (True, False) for row in asyncio.run(rounds(kept))]


async def rounds(kept: bool) -> list[Row]:
    ratios: list[tuple[float, float]] = []
    gc.disable()  # a full collection stops all 2,000 clients at one moment, which 2,000 processes would not
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        where = f"sqlite:{Path(folder, 'journal')}" if kept else "memory:"
        registry = stack.enter_context(running(folder, where, 0))
        port, herd = registry.port, Herd(registry.url)
        tasks = [asyncio.create_task(herd.hold(number)) for number in range(CLIENTS)]
        for number in range(ROUNDS + 1):
            async with asyncio.timeout(PATIENCE_S):
                await herd.now.complete.wait()
            if number:  # the first is how they came
                ratios.append(herd.now.ratios())
            await asyncio.to_thread(stack.close)
            herd.now = Return()  # from here on nobody answers but the next registry
            if number < ROUNDS:
                await asyncio.sleep(OUTAGE_S)
                await asyncio.to_thread(
                    stack.enter_context, running(folder, where, port)
                )  # the clients go on meanwhile
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
    knew = "journal kept" if kept else "all forgotten"
    promise = (3.0,) * ROUNDS
    return [
        Row(f"{CLIENTS} return, {knew}: {what}", "fullest 100 ms", "promise", tuple(column), promise, "x the mean")
        for what, column in zip(("knock", "back"), zip(*ratios, strict=True), strict=True)
    ]


@contextlib.contextmanager
def running(folder: str, journal: str, port: int) -> Iterator[Service]:
    with service(Path(folder, "log"), "--journal", journal, "--port", str(port)) as registry:
        yield registry
