"""The prober against real sockets: small servers that speak Mooncake's handshake, hang, or are nobody's."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import struct
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace

import pytest
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from pdctl.core.sessions import ProbePolicy, SessionTable
from pdctl.engine import handshake
from pdctl.engine.base import PeerCard
from pdctl.errors import Cause, TransferFailed
from pdctl.metrics import Metrics
from pdctl.prober import Ask, Prober

POLICY = ProbePolicy(interval_s=0.02, max_interval_s=0.08, deadline_s=2.0, jitter=0.0, good_answers=1)


def pinned(session: str) -> PeerCard:
    """The life that transfers are meant for: any process with the usual data port."""
    return PeerCard(session, 15001, ())


@dataclass
class Peer:
    """Listens like one Mooncake engine; `data_port` and `regions` are what tells its life from the next."""

    data_port: int = 15001
    regions: list[int] = field(default_factory=lambda: [0x7F0000000000])
    session: str = ""
    asked: int = 0

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        (length,) = struct.unpack("<Q", await reader.readexactly(8))
        question = await reader.readexactly(length)
        self.asked += 1
        buffers = [{"addr": pointer, "length": 4096, "name": "cpu:0"} for pointer in self.regions]
        body = {"name": self.session, "protocol": "tcp", "tcp_data_port": self.data_port, "buffers": buffers}
        reply = question[:1] + json.dumps(body).encode()
        writer.write(struct.pack("<Q", len(reply)) + reply)
        writer.close()


@asynccontextmanager
async def listening(peer: Peer) -> AsyncIterator[Peer]:
    server = await asyncio.start_server(peer.answer, "127.0.0.1", 0)
    peer.session = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield peer
    finally:
        server.close()


@contextmanager
def hung() -> Iterator[str]:
    """The kernel connects, nobody ever answers: what a stopped process looks like."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


async def ask_who(session: str, *, deadline_s: float) -> PeerCard:
    return (await handshake.metadata(session, deadline_s=deadline_s)).card


@dataclass
class Bench:
    """A running prober, and what it has counted."""

    prober: Prober
    table: SessionTable[PeerCard]
    registry: CollectorRegistry
    loop: asyncio.Task[None]

    def block(self, *sessions: str, cause: Cause = Cause.PEER_GONE) -> None:
        for session in sessions:
            self.prober.failed(session, cause, "connection reset")

    def count(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(name, labels) or 0.0


@asynccontextmanager
async def probing(
    ask: Ask = ask_who,
    policy: ProbePolicy = POLICY,
    clock: Callable[[], float] = time.monotonic,
    known: Callable[[str], PeerCard | None] = pinned,
) -> AsyncIterator[Bench]:
    registry = CollectorRegistry()
    table: SessionTable[PeerCard] = SessionTable(policy, random.Random(1).random)
    prober = Prober(table, ask, clock=clock, metrics=Metrics(registry), known=known)
    task = asyncio.create_task(prober.run(), name="prober under test")
    try:
        yield Bench(prober, table, registry, task)
        assert not task.done() or task.cancelled(), f"the prober's loop has ended: {task}"
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until(true: Callable[[], bool], within_s: float = 5.0) -> None:
    """Wait for the thing itself, with a deadline."""
    async with asyncio.timeout(within_s):
        while not true():  # noqa: ASYNC110
            await asyncio.sleep(0.002)


async def never(session: str, *, deadline_s: float) -> PeerCard:
    await asyncio.Event().wait()
    raise AssertionError


def answers_in_turn(*answers: BaseException | None) -> Ask:
    """One answer after another, the last one for ever; None is a good one."""
    turns = list(answers)

    async def ask(session: str, *, deadline_s: float) -> PeerCard:
        answer = turns.pop(0) if len(turns) > 1 else turns[0]
        if answer is not None:
            raise answer
        return PeerCard(session, 15001, ())

    return ask


# Lifting


async def test_a_blocked_session_comes_back_by_itself_and_is_counted_once() -> None:
    async with listening(Peer()) as peer, probing() as bench:
        with capture_logs() as lines:
            bench.block(peer.session, peer.session, peer.session)
            assert "peer gone (connection reset)" in (bench.prober.reason_blocked(peer.session) or "")
            assert bench.count("pdctl_session_blocked", cause="peer_gone") == 1
            await until(lambda: bench.prober.reason_blocked(peer.session) is None)
        assert peer.asked == 1
        assert [line["log_level"] for line in lines] == ["warning", "info"]
        assert {line["session"] for line in lines} == {peer.session}
        assert bench.count("sglang:failed_session_recoveries_total") == 1
        assert bench.count("pdctl_session_recovery_seconds_count") == 1
        assert bench.count("pdctl_session_probes_total", result="well") == 1
        assert bench.count("pdctl_session_probe_seconds_count") == 1
        assert bench.count("pdctl_session_blocked", cause="peer_gone") == 0


async def test_a_dead_peer_stays_blocked_while_it_is_asked_again_and_again() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        session = f"127.0.0.1:{listener.getsockname()[1]}"
    async with probing() as bench:
        bench.block(session)
        await until(lambda: bench.count("pdctl_session_probes_total", result="refused") >= 4)
        assert "last answer: refused" in (bench.prober.reason_blocked(session) or "")


async def test_a_registration_lifts_at_once_without_a_question() -> None:
    async with probing(never) as bench:
        bench.block("10.0.0.1:15001")
        bench.prober.registered("10.0.0.1:15001")
        assert bench.prober.reason_blocked("10.0.0.1:15001") is None
        assert bench.count("pdctl_session_changes_total", kind="lifted") == 1
        assert bench.count("sglang:failed_session_recoveries_total") == 0


@pytest.mark.parametrize("change", [{"data_port": 15002}, {"regions": [0x7E0000000000]}], ids=["port", "regions"])
async def test_another_process_on_the_same_port_is_not_let_in_until_it_registers(change: dict[str, object]) -> None:
    async with listening(Peer()) as peer, probing(known=lambda _: None) as bench:
        bench.prober.remember(peer.session, await ask_who(peer.session, deadline_s=1.0))
        for name, value in change.items():
            setattr(peer, name, value)
        bench.block(peer.session)
        await until(lambda: bench.count("pdctl_session_probes_total", result="peer_changed") == 1)
        assert (bench.prober.reason_blocked(peer.session) or "").endswith("blocked until the peer registers anew")
        assert bench.count("pdctl_session_blocked", cause="peer_changed") == 1
        assert bench.count("pdctl_session_blocked", cause="peer_gone") == 0
        bench.prober.registered(peer.session, peer.regions)
        bench.block(peer.session)
        await until(lambda: bench.prober.reason_blocked(peer.session) is None)


async def test_an_answer_is_held_against_the_life_that_the_engine_has_pinned() -> None:
    async with listening(Peer()) as peer:
        pinned = PeerCard(peer.session, peer.data_port + 1, ())
        async with probing(known={peer.session: pinned}.get) as bench:
            bench.block(peer.session)
            await until(lambda: bench.count("pdctl_session_changes_total", kind="dropped") == 1)


async def test_a_process_that_has_registered_more_memory_since_is_still_itself() -> None:
    async with listening(Peer()) as peer, probing(known=lambda _: None) as bench:
        bench.prober.remember(peer.session, await ask_who(peer.session, deadline_s=1.0))
        peer.regions.append(0x7E0000000000)
        bench.block(peer.session)
        await until(lambda: bench.prober.reason_blocked(peer.session) is None)


async def test_a_session_nobody_wants_is_forgotten_and_its_questions_end() -> None:
    with hung() as session:
        async with probing(policy=replace(POLICY, idle_timeout_s=0.1, deadline_s=0.01)) as bench:
            bench.block(session)
            await until(lambda: bench.count("pdctl_session_changes_total", kind="forgotten") == 1)
            assert len(bench.table) == 0
            assert bench.table.next_due is None


async def test_a_session_that_requests_still_want_is_not_forgotten() -> None:
    with hung() as wanted, hung() as unwanted:
        async with probing(policy=replace(POLICY, idle_timeout_s=0.2, deadline_s=0.01)) as bench:
            bench.block(wanted, unwanted)
            await until(
                lambda: (
                    bench.prober.reason_blocked(wanted) is None
                    or bench.count("pdctl_session_changes_total", kind="forgotten") == 1
                )
            )
            assert list(bench.table.blocked()) == [wanted]


# Many at once


async def test_hung_peers_delay_nobody() -> None:
    policy = replace(POLICY, interval_s=0.5, max_interval_s=30.0, deadline_s=5.0)
    async with AsyncExitStack() as stack:
        stopped = [stack.enter_context(hung()) for _ in range(8)]
        healthy = [await stack.enter_async_context(listening(Peer())) for _ in range(42)]
        bench = await stack.enter_async_context(probing(policy=policy))
        bench.block(*stopped, *(peer.session for peer in healthy))
        began = time.monotonic()
        await until(lambda: bench.count("sglang:failed_session_recoveries_total") == 42)
        assert time.monotonic() - began < 2 * policy.interval_s
        assert set(bench.table.blocked()) == set(stopped)


async def test_no_more_are_asked_at_once_than_the_policy_allows_and_all_are_asked() -> None:
    at_once, most, asked = 0, 0, Counter[str]()

    async def ask(session: str, *, deadline_s: float) -> PeerCard:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        asked[session] += 1
        await asyncio.sleep(0.005)
        at_once -= 1
        return PeerCard(session, 15001, ())

    async with probing(ask, replace(POLICY, max_concurrent=3)) as bench:
        bench.block(*(f"10.0.0.{i}:1" for i in range(20)))
        await until(lambda: not bench.table.blocked())
    assert most == 3
    assert asked == Counter(f"10.0.0.{i}:1" for i in range(20))


async def test_with_every_place_held_by_hung_questions_the_loop_rests() -> None:
    readings = Counter[str]()

    def clock() -> float:
        readings["clock"] += 1
        return time.monotonic()

    async with probing(never, replace(POLICY, max_concurrent=2, deadline_s=0.2), clock) as bench:
        bench.block("a:1", "b:1", "c:1")
        await until(lambda: bench.count("pdctl_session_probes_total", result="timed_out") >= 2)
        assert readings["clock"] < 40


async def test_a_sleeping_prober_is_woken_by_a_new_failure() -> None:
    with hung() as session:
        policy = replace(POLICY, max_interval_s=30.0, deadline_s=0.01, interval_s=0.05)
        async with listening(Peer()) as peer, probing(policy=policy) as bench:
            bench.block(session)
            await until(lambda: bench.count("pdctl_session_probes_total", result="timed_out") >= 4)
            began = time.monotonic()  # the next one is due in 0.8 s
            bench.block(peer.session)
            await until(lambda: bench.prober.reason_blocked(peer.session) is None)
            assert time.monotonic() - began < 0.4


# Nothing ends the loop but its owner


@pytest.mark.parametrize(
    "trouble", [RuntimeError("a defect"), asyncio.CancelledError("from inside"), KeyError("status")], ids=repr
)
async def test_a_question_that_breaks_is_an_answer_and_the_loop_goes_on(trouble: BaseException) -> None:
    async with probing(answers_in_turn(trouble, None)) as bench:
        with capture_logs() as lines:
            bench.block("a:1")
            await until(lambda: bench.prober.reason_blocked("a:1") is None)
        assert bench.count("pdctl_session_probes_total", result="local") == 1
        assert [line["session"] for line in lines if line["event"] == "question failed on our side"] == ["a:1"]


@pytest.mark.parametrize("cause", list(Cause), ids=str)
async def test_an_engines_verdict_is_counted_under_its_cause(cause: Cause) -> None:
    async with probing(answers_in_turn(TransferFailed(cause, "a:1", "why"))) as bench:
        bench.block("a:1")
        await until(lambda: bench.count("pdctl_session_probes_total", result=cause) >= 1)
        assert bench.prober.reason_blocked("a:1") is not None


async def test_an_engine_that_forgets_its_deadline_is_held_to_it() -> None:
    async with probing(never, replace(POLICY, deadline_s=0.05)) as bench:
        bench.block("a:1")
        await until(lambda: bench.count("pdctl_session_probes_total", result="timed_out") >= 2)


async def test_cancelling_stops_at_once_and_leaves_no_task() -> None:
    before = asyncio.all_tasks()
    with ExitStack() as stack:
        stopped = [stack.enter_context(hung()) for _ in range(10)]
        async with probing(policy=replace(POLICY, deadline_s=60.0)) as bench:
            bench.block(*stopped)
            await until(lambda: len(asyncio.all_tasks() - before) == 11)
            began = time.monotonic()
            bench.loop.cancel()
            with pytest.raises(asyncio.CancelledError):
                await bench.loop
            assert time.monotonic() - began < 0.5
            assert asyncio.all_tasks() == before


async def test_with_probing_off_nobody_is_asked_and_one_warning_says_so() -> None:
    with capture_logs() as lines:
        async with listening(Peer()) as peer, probing(policy=replace(POLICY, enabled=False)) as bench:
            bench.block(peer.session)
            assert bench.table.next_due is None
            await until(lambda: len(lines) == 2)
            assert bench.prober.reason_blocked(peer.session) is not None
            bench.prober.registered(peer.session)
            assert bench.prober.reason_blocked(peer.session) is None
            assert peer.asked == 0
    assert [line["event"] for line in lines if "probing" in line["event"]] == [
        "probing is off: a blocked session stays blocked until its peer registers anew"
    ]
