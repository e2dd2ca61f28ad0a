"""
How soon a link that works is used again, beside stock SGLang's pass; what the table and a proof cost.

`./dev bench links` takes a minute or two. `LINKS_WITH_STOPPED=1 ./dev bench links` lets stock's pass go over eight
stopped peers too, which holds its one thread for a minute each.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from prometheus_client import CollectorRegistry
from rich.console import Console

from pdctl import logs
from pdctl.core.ejection import ProbePolicy
from pdctl.core.kinds import Depth
from pdctl.core.plan import CopyPlan
from pdctl.core.sessions import SessionTable
from pdctl.core.standing import Well
from pdctl.device.cpu import Cpu
from pdctl.engine.asking import Asking
from pdctl.engine.base import Engine, PeerCard
from pdctl.engine.mooncake import open_mooncake
from pdctl.engine.settings import MooncakeSettings
from pdctl.errors import Cause, TransferFailed
from pdctl.logs import LogSettings
from pdctl.memory import Arena
from pdctl.metrics import Metrics
from pdctl.prober import Prober
from tests.bench.rivals import Row
from tests.engine.processes import Child
from tests.faults.peers import NBYTES
from tests.wire.stock.conftest import ROOT, installed

ROUNDS = 7
N_PEERS, N_STOPPED = 50, 8
N_STOPS = 20
SOON_S = 60.0


def bench() -> list[Row]:
    logs.configure(LogSettings(level="error"))
    say = Console(width=None if sys.stdout.isatty() else 150).print
    with _peers(N_PEERS - N_STOPPED) as healthy, _peers(N_STOPPED) as stopped:
        sessions = _sessions(healthy)
        ours, stock = _races(healthy, sessions)
        say(
            f"{len(sessions)} healthy peers back from the failure on, median of {ROUNDS}: ours {_ms(ours)}, two proofs "
            f"by data each; stock's pass takes {_ms(stock)}, one handshake each, and begins within 30 s"
        )
        stopped.stop()
        ours_s = asyncio.run(_recovered([healthy, stopped], sessions))
        say(f"{len(sessions)} healthy of {N_PEERS}, {N_STOPPED} stopped: ours have them back after {ours_s:.2f} s")
        if os.environ.get("LINKS_WITH_STOPPED"):
            mixed = [*sessions, *_sessions(stopped)]
            random.Random(1).shuffle(mixed)
            lifted, pass_s = _stock(mixed, deadline_s=700)
            last = max(lifted.get(each, pass_s) for each in sessions)
            say(f"the same with stock's pass: the last healthy one after {last:.1f} s, the pass took {pass_s:.1f} s")
        stopped.resume()
    times_s = asyncio.run(_stops())
    median_s, worst_s = statistics.median(times_s), max(times_s)
    say(f"SIGCONT to trusted, {N_STOPS} peers stopped for 0.5 to 5 s: median {median_s:.3f} s, worst {worst_s:.3f} s")
    passes_s = [_pass() for _ in range(ROUNDS)]
    say(f"a pass over 100 due of 10,000 sessions holds the loop for {_ms(passes_s)} in all")
    return []


def _ms(seconds: Sequence[float]) -> str:
    return f"{statistics.median(seconds) * 1e3:.2f} ms"


def _races(healthy: Child, sessions: Sequence[str]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    ours: list[float] = []
    stock: list[float] = []
    for _ in range(ROUNDS):
        ours.append(asyncio.run(_recovered([healthy], sessions)))
        stock.append(_stock(sessions, deadline_s=SOON_S)[1])
    return tuple(ours), tuple(stock)


async def _recovered(children: Sequence[Child], wanted: Sequence[str]) -> float:
    """Seconds from the failure of all peers until those `wanted` are trusted."""
    async with _probing() as (_, prober):
        for child in children:
            for session, pointer in zip(_sessions(child), child.hello["pointers"], strict=True):
                prober.registered(session, [pointer])
        began = time.monotonic()
        for session in (session for child in children for session in _sessions(child)):
            prober.failed(session, Cause.PEER_GONE, "connection reset")
        await _until(lambda: all(not prober.standing(each).cause for each in wanted))
        return time.monotonic() - began


def _stock(sessions: Sequence[str], deadline_s: float) -> tuple[dict[str, float], float]:
    """One pass of stock's over `sessions`: when each was lifted, and how long it took, in seconds."""
    environment = {**os.environ, "PYTHONPATH": f"{installed()}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "tests.bench.stock_probe"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, text=True
    ) as child:
        assert child.stdin
        assert child.stdout
        print(json.dumps({"sessions": list(sessions)}), file=child.stdin, flush=True)
        child.stdout.readline()
        told = child.communicate("go\n", timeout=deadline_s)[0]
        said = json.loads(told)
        return said["lifted"], said["pass_s"]


async def _stops() -> list[float]:
    """Seconds from SIGCONT until the session of a peer that was stopped in use is trusted. A peer each, at once: one
    that is stopped again and again flaps, and is held."""
    chances = random.Random(3)
    return await asyncio.gather(*(_stop(number, chances.uniform(0.5, 5.0)) for number in range(N_STOPS)))


async def _stop(number: int, for_s: float) -> float:
    await asyncio.sleep(0.5 * number)  # not all at once: 20 processes that start would be the thing measured
    with Arena(NBYTES) as arena, await asyncio.to_thread(_peers, 1) as peer:
        async with _probing(arena) as (engine, prober):
            plan = CopyPlan.of((arena.region.pointer, peer.hello["pointers"][0], NBYTES))
            prober.registered(peer.session, peer.hello["pointers"])
            await engine.write(peer.session, plan, deadline_s=5.0)
            peer.stop()
            stopped_at = time.monotonic()
            with contextlib.suppress(TransferFailed):
                async with prober.passing(peer.session):
                    await engine.write(peer.session, plan, deadline_s=0.2)
            await asyncio.sleep(max(0.0, stopped_at + for_s - time.monotonic()))
            assert prober.reason_blocked(peer.session), "it was never out"
            began = time.monotonic()
            peer.resume()
            await _until(lambda: prober.reason_blocked(peer.session) is None)
            return time.monotonic() - began


def _pass() -> float:
    """Seconds that 100 due questions of 10,000 sessions, put and answered, take of a thread."""
    now, table = 1000.0, SessionTable[PeerCard](ProbePolicy(), random.Random(1).random)
    cards = {f"10.0.{n // 250}.{n % 250}:16000": PeerCard(str(n), 1, ()) for n in range(10_000)}
    for session, card in cards.items():
        table.remember(session, card, now)
    for session in list(cards)[::100]:
        table.fail(session, Cause.PEER_GONE, "connection reset", now)
    began = time.perf_counter()
    table.tick(now + 0.2)
    while questions := table.ask_due(now + 0.2, 4):
        for question in questions:
            table.answered(question, Well(cards[question.session], Depth.DATA), now + 0.2)
    return time.perf_counter() - began


@asynccontextmanager
async def _probing(arena: Arena | None = None) -> AsyncIterator[tuple[Engine, Prober]]:
    async with open_mooncake(MooncakeSettings(progress_timeout_s=1), Cpu()) as engine:
        if arena is not None:
            await engine.register(arena.region)
        table: SessionTable[PeerCard] = SessionTable(ProbePolicy(), random.Random(1).random)
        metrics = Metrics(CollectorRegistry())
        prober = Prober(table, Asking(engine), clock=time.monotonic, metrics=metrics, known=engine.card)
        running = asyncio.create_task(prober.run())
        try:
            yield engine, prober
        finally:
            running.cancel()
            await asyncio.wait({running})


async def _until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(SOON_S):
        while not true():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


def _peers(n: int) -> Child:
    return Child("tests.faults.peers", str(n))


def _sessions(child: Child) -> list[str]:
    return [str(session) for session in child.hello["sessions"]]
