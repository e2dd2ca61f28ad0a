"""Links to real engines that are stopped, continued, killed and replaced, and the prober that watches over them."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace

import psutil
import pytest
from prometheus_client import CollectorRegistry

from pdctl.core.ejection import ProbePolicy
from pdctl.core.kinds import Depth
from pdctl.core.layout import Region
from pdctl.core.plan import CopyPlan
from pdctl.core.sessions import SessionTable
from pdctl.device.cpu import Cpu
from pdctl.engine.asking import Asking
from pdctl.engine.base import Engine, PeerCard
from pdctl.engine.canary import NBYTES as CANARY_NBYTES
from pdctl.engine.mooncake import open_mooncake
from pdctl.engine.settings import MooncakeSettings
from pdctl.errors import Cause, TransferFailed
from pdctl.memory import Arena
from pdctl.metrics import Metrics
from pdctl.prober import Prober
from tests.engine.cable import Cable
from tests.engine.processes import Child
from tests.faults.peers import NBYTES

QUICK = ProbePolicy(interval_s=0.1, max_interval_s=0.4, deadline_s=0.5)


@pytest.fixture
def arena() -> Iterator[Arena]:
    with Arena(NBYTES) as arena:
        yield arena


@pytest.fixture
async def engine(arena: Arena) -> AsyncIterator[Engine]:
    async with open_mooncake(MooncakeSettings(), Cpu()) as engine:
        await engine.register(arena.region)
        yield engine


@dataclass
class Watch:
    """A running prober, and what it has counted."""

    prober: Prober
    table: SessionTable[PeerCard]
    registry: CollectorRegistry

    def count(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(name, labels) or 0.0

    def unwell(self, cause: Cause) -> float:
        """Questions that ended so."""
        return self.count("pdctl_session_probes_total", depth="none", result=cause)

    def well(self, session: str) -> bool:
        return self.prober.reason_blocked(session) is None


@asynccontextmanager
async def watching(engine: Engine, policy: ProbePolicy = QUICK) -> AsyncIterator[Watch]:
    registry = CollectorRegistry()
    table: SessionTable[PeerCard] = SessionTable(policy, random.Random(1).random)
    prober = Prober(table, Asking(engine), clock=time.monotonic, metrics=Metrics(registry), known=engine.card)
    task = asyncio.create_task(prober.run(), name="prober under test")
    try:
        yield Watch(prober, table, registry)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until(true: Callable[[], bool], within_s: float) -> float:
    """Wait for the thing itself, with a deadline; how long it took."""
    began = time.monotonic()
    async with asyncio.timeout(within_s):
        while not true():  # noqa: ASYNC110
            await asyncio.sleep(0.002)
    return time.monotonic() - began


def peers(n: int, environ: Mapping[str, str] | None = None) -> Child:
    return Child("tests.faults.peers", str(n), environ=environ)


def card_of(peer: Child) -> PeerCard:
    """What its handshake would show, without asking: a question would leave its port in TIME_WAIT, and no successor
    could have it for a minute. An engine listens on two ports, both over IPv4 or one over both families."""
    listening = {c.laddr.port for c in psutil.Process(peer.pid).net_connections() if c.status == psutil.CONN_LISTEN}
    (data_port,) = listening - {port_of(peer)}
    regions = Region(peer.hello["canaries"][0], CANARY_NBYTES), Region(peer.hello["pointers"][0], NBYTES)
    return PeerCard(peer.session, data_port, regions)


def port_of(peer: Child) -> int:
    return int(peer.session.rpartition(":")[2])


def successor(of: Child) -> Child:
    """A new process under the session of a dead one. An engine takes two ports of a range, in an order of its own."""
    port = port_of(of)
    for first in [port, port - 1] * 10:
        with suppress(EOFError):  # the neighbour is taken
            new = peers(1, {"MC_MIN_RPC_PORT": str(first), "MC_MAX_RPC_PORT": str(first + 1)})
            if new.session == of.session:
                return new
            new.kill()
    raise AssertionError("no process got the port of the dead one")


async def write(engine: Engine, arena: Arena, peer: Child, *, deadline_s: float) -> None:
    plan = CopyPlan.of((arena.region.pointer, peer.hello["pointers"][0], NBYTES))
    await engine.write(peer.session, plan, deadline_s=deadline_s)


async def test_a_stopped_peer_is_blocked_by_its_failed_transfer_and_back_when_it_continues(
    engine: Engine, arena: Arena
) -> None:
    with peers(1) as peer:
        async with watching(engine) as watch:
            await write(engine, arena, peer, deadline_s=30.0)
            peer.stop()
            with pytest.raises(TransferFailed) as failure:
                await write(engine, arena, peer, deadline_s=0.3)
            watch.prober.failed(peer.session, failure.value.cause, failure.value.detail)
            await until(lambda: watch.unwell(Cause.TIMED_OUT) >= 2, 60.0)
            assert "timed out" in (watch.prober.reason_blocked(peer.session) or "")
            peer.resume()
            await until(lambda: watch.well(peer.session), 20.0)
            await write(engine, arena, peer, deadline_s=30.0)


async def test_fifty_blocked_and_eight_of_them_stopped_no_healthy_one_waits_for_a_stopped_one(engine: Engine) -> None:
    """How soon they are back is measured in `./dev bench links`; stock's single thread takes eight minutes."""
    policy = replace(QUICK, deadline_s=120.0)
    with peers(42) as healthy, peers(8) as stopped:
        async with watching(engine, policy) as watch:
            for group in (healthy, stopped):
                for session, pointer in zip(group.hello["sessions"], group.hello["pointers"], strict=True):
                    watch.prober.registered(session, [pointer])
            stopped.stop()
            for session in [*stopped.hello["sessions"], *healthy.hello["sessions"]]:
                watch.prober.failed(session, Cause.PEER_GONE, "connection reset")
            await until(lambda: watch.count("sglang:failed_session_recoveries_total") == 42, 60.0)
            assert set(watch.table.blocked()) == set(stopped.hello["sessions"])
            assert watch.unwell(Cause.TIMED_OUT) == 0, "the first question to a stopped one is not even over"
            stopped.resume()
            await until(lambda: not watch.table.blocked(), 60.0)


async def test_a_killed_peer_stays_blocked_while_wanted_and_is_forgotten_when_idle(engine: Engine) -> None:
    policy = replace(QUICK, idle_timeout_s=1.0)
    with peers(1) as peer:
        async with watching(engine, policy) as watch:
            peer.kill()
            watch.prober.failed(peer.session, Cause.PEER_GONE, "connection reset")
            await until(
                lambda: watch.well(peer.session) or watch.unwell(Cause.REFUSED) >= 5,
                60.0,
            )
            assert not watch.well(peer.session)
            await until(lambda: not watch.table.blocked(), 60.0)
            assert watch.count("pdctl_session_changes_total", kind="forgotten") == 1


async def test_a_peer_restarted_under_the_same_session_is_not_lifted_until_it_registers(engine: Engine) -> None:
    with peers(1) as old:
        async with watching(engine) as watch:
            card = card_of(old)
            old.kill()
            with successor(old) as new:
                watch.prober.remember(new.session, card)
                watch.prober.failed(new.session, Cause.PEER_GONE, "connection reset")
                await until(lambda: watch.count("pdctl_session_changes_total", kind="dropped") == 1, 60.0)
                assert watch.table.blocked() == {new.session: Cause.PEER_CHANGED}
                watch.prober.registered(new.session)
                assert watch.well(new.session)


async def test_what_listens_is_what_the_handshake_shows(engine: Engine) -> None:
    with peers(1) as peer:
        shown = await engine.probe(peer.session, deadline_s=30.0)
        assert shown == card_of(peer)


# A peer behind a cable: its handshake always answers, its data port does what the test wants


async def test_a_peer_whose_handshake_answers_and_whose_data_port_is_dead_stays_out(engine: Engine) -> None:
    with peers(1) as peer:
        async with Cable.to(peer.session) as cable, watching(engine) as watch:
            watch.prober.registered(cable.session, peer.hello["pointers"])
            await cable.cut()
            watch.prober.failed(cable.session, Cause.PEER_GONE, "connection reset")
            await until(lambda: watch.unwell(Cause.NO_DATA) >= 4, 60.0)
            assert "last answer: no data" in (watch.prober.reason_blocked(cable.session) or "")
            await cable.mend()
            await until(lambda: watch.well(cable.session), 60.0)
            assert watch.prober.standing(cable.session).depth is Depth.DATA


async def test_a_peer_whose_data_works_and_whose_way_was_slow_comes_back(engine: Engine, arena: Arena) -> None:
    with peers(1) as peer:
        async with Cable.to(peer.session) as cable, watching(engine) as watch:
            plan = CopyPlan.of((arena.region.pointer, peer.hello["pointers"][0], NBYTES))
            await engine.write(cable.session, plan, deadline_s=30.0)
            cable.hold()
            with pytest.raises(TransferFailed) as failure:
                await engine.write(cable.session, plan, deadline_s=0.3)
            watch.prober.failed(cable.session, failure.value.cause, failure.value.detail)
            await until(lambda: watch.unwell(Cause.NO_DATA) >= 2, 60.0)
            cable.release()
            await until(lambda: watch.well(cable.session), 60.0)
            await engine.write(cable.session, plan, deadline_s=30.0)
            assert watch.count("sglang:failed_session_recoveries_total") == 1
