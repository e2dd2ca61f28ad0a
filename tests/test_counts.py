"""What is read at the scrape: how a rank stands with its registry, how long a link is out, how a store comes up."""

from __future__ import annotations

import asyncio
import random
import time

from prometheus_client import CollectorRegistry

from pdctl.core.ejection import ProbePolicy
from pdctl.core.kvstore import StoreRank
from pdctl.core.sessions import SessionTable
from pdctl.core.warmup import Report, Result
from pdctl.engine.asking import Asking
from pdctl.engine.base import PeerCard
from pdctl.errors import Cause
from pdctl.metrics import Metrics
from pdctl.prober import Prober
from tests.conftest import Clock

RANK = StoreRank(tp=3, tp_size=8)


def test_who_registers_nobody_is_not_shown_as_unregistered() -> None:
    registry = CollectorRegistry()
    Metrics(registry)
    assert [sample for family in registry.collect() for sample in family.samples if "registered" in sample.name] == []


def test_a_rank_is_registered_or_not_at_every_scrape() -> None:
    registry, stands = CollectorRegistry(), [False]
    Metrics(registry).registration.follow("prefill", lambda: stands[0])
    assert registry.get_sample_value("pdctl_registered", {"role": "prefill"}) == 0
    stands[0] = True
    assert registry.get_sample_value("pdctl_registered", {"role": "prefill"}) == 1


def test_the_longest_time_out_is_of_a_blocked_session_and_not_of_one_whose_life_is_over(clock: Clock) -> None:
    registry = CollectorRegistry()
    table: SessionTable[PeerCard] = SessionTable(ProbePolicy(), random.Random(1).random)
    prober = Prober(table, Asking(), clock=clock, metrics=Metrics(registry))

    def out_s() -> float | None:
        return registry.get_sample_value("pdctl_session_out_seconds")

    prober.superseded("10.0.0.1:1", "epoch 4 holds its seat")
    clock.forward(100)
    assert out_s() == 0
    for session in ("10.0.0.2:1", "10.0.0.3:1"):
        prober.failed(session, Cause.PEER_GONE, "connection reset")
        clock.forward(5)
    assert out_s() == 10
    prober.registered("10.0.0.2:1")
    assert out_s() == 5


def test_failed_tries_of_a_store_stand_until_it_is_ready() -> None:
    registry = CollectorRegistry()
    store, rank = Metrics(registry).store, {"rank": "dp0/cp0/tp3/pp0"}
    store.begun(RANK)
    assert registry.get_sample_value("pdctl_store_failed_tries", rank) == 0
    for _ in range(3):
        store.failed(RANK)
    store.opened(Report(RANK, Result.NOT_YET, attempts=3, waited_s=1.0))
    assert registry.get_sample_value("pdctl_store_failed_tries", rank) == 3
    store.opened(Report(RANK, Result.READY, attempts=1, waited_s=1.0))
    assert registry.get_sample_value("pdctl_store_failed_tries", rank) == 0
    assert registry.get_sample_value("pdctl_store_openings_total", {**rank, "result": "not_yet"}) == 1


async def test_each_tick_of_the_loop_is_counted_by_how_late_it_came() -> None:
    registry = CollectorRegistry()
    table: SessionTable[PeerCard] = SessionTable(ProbePolicy(), random.Random(1).random)
    prober = Prober(table, Asking(), clock=time.monotonic, metrics=Metrics(registry))
    running = asyncio.create_task(prober.run())

    def ticks(within: str) -> float:
        return registry.get_sample_value("pdctl_loop_lag_seconds_bucket", {"le": within}) or 0.0

    async with asyncio.timeout(60):
        while not ticks("+Inf"):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        time.sleep(0.6)  # noqa: ASYNC251  the loop is held
        while ticks("+Inf") == ticks("0.5"):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
