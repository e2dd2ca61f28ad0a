"""The prober against real sockets: small servers that speak Mooncake's handshake, hang, or are nobody's."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Protocol

import pytest
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from pdctl.core.ejection import ProbePolicy
from pdctl.core.kinds import Depth, State
from pdctl.core.layout import Region
from pdctl.core.sessions import SessionTable
from pdctl.core.standing import ChangeKind
from pdctl.engine import handshake
from pdctl.engine.asking import Asking
from pdctl.engine.base import PeerCard, Proof
from pdctl.errors import Cause, LimitReached, SessionBlocked, TransferFailed
from pdctl.lag import LoopLag
from pdctl.metrics import Metrics
from pdctl.prober import Prober
from tests.conftest import Clock
from tests.patience import until


class Ask(Protocol):
    """One way to ask, as a function."""

    def __call__(self, session: str, *, deadline_s: float) -> Awaitable[PeerCard | Proof]: ...


POLICY = ProbePolicy(interval_s=0.02, max_interval_s=0.08, deadline_s=2.0, jitter=0.0, good_answers=1, trial_s=600.0)


def pinned(session: str, data_port: int = 15001) -> PeerCard:
    """The life that transfers are meant for: what a `Peer` shows unless told otherwise."""
    return PeerCard(session, data_port, (Region(0x7F0000000000, 4096),))


@dataclass
class Peer:
    """Listens like one Mooncake engine; `data_port` and `regions` are what tells its life from the next."""

    data_port: int = 15001
    regions: list[int] = field(default_factory=lambda: [0x7F0000000000])
    session: str = ""
    asked: int = 0
    hold: asyncio.Event | None = None

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        (length,) = struct.unpack("<Q", await reader.readexactly(8))
        question = await reader.readexactly(length)
        self.asked += 1
        if self.hold is not None:
            await self.hold.wait()
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

    def probes(self, result: str) -> float:
        """Questions that ended so, at whatever depth."""
        depths = ["none", *(depth.name.lower() for depth in Depth)]
        return sum(self.count("pdctl_session_probes_total", depth=depth, result=result) for depth in depths)


@dataclass
class By:
    """Asks through one function; a bare card is a proof of identity."""

    ask: Ask
    held: tuple[str, ...] = ()

    async def prove(self, session: str, *, deadline_s: float) -> Proof:
        said = await self.ask(session, deadline_s=deadline_s)
        return said if isinstance(said, Proof) else Proof(said, Depth.IDENTITY, "descriptor compared")

    async def card(self, session: str, *, deadline_s: float) -> PeerCard | None:
        return (await self.prove(session, deadline_s=deadline_s)).card


class Late(LoopLag):
    """A meter whose next tick is overdue by so much, and has not come yet."""

    late_s = 0.5

    async def run(self, tell: Callable[[float], None]) -> None:
        await asyncio.Event().wait()


@asynccontextmanager
async def probing(
    ask: Ask | Asking = ask_who,
    policy: ProbePolicy = POLICY,
    clock: Callable[[], float] = time.monotonic,
    known: Callable[[str], PeerCard | None] = pinned,
    lag: LoopLag | None = None,
) -> AsyncIterator[Bench]:
    """Without `lag` our own loop is never late, however busy the host is."""
    on_time = Late(clock)
    on_time.late_s = 0.0
    registry = CollectorRegistry()
    table: SessionTable[PeerCard] = SessionTable(policy, random.Random(1).random)
    asks = ask if isinstance(ask, Asking) else By(ask)
    prober = Prober(table, asks, clock=clock, metrics=Metrics(registry), known=known, lag=lag or on_time)
    task = asyncio.create_task(prober.run(), name="prober under test")
    try:
        yield Bench(prober, table, registry, task)
        assert not task.done() or task.cancelled(), f"the prober's loop has ended: {task}"
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


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
        return pinned(session)

    return ask


# Lifting


async def test_a_blocked_session_comes_back_by_itself_and_is_counted_once() -> None:
    async with listening(Peer()) as peer, probing(policy=replace(POLICY, deadline_s=30.0)) as bench:
        with capture_logs() as lines:
            bench.block(peer.session, peer.session, peer.session)
            assert "peer gone (connection reset)" in (bench.prober.reason_blocked(peer.session) or "")
            assert bench.count("pdctl_session_blocked", cause="peer_gone") == 1
            await until(lambda: bench.prober.reason_blocked(peer.session) is None)
        assert peer.asked == 1
        assert [line["log_level"] for line in lines] == ["warning", "info", "debug"]
        assert {line["session"] for line in lines} == {peer.session}
        assert bench.count("sglang:failed_session_recoveries_total") == 1
        assert bench.count("pdctl_session_recovery_seconds_count") == 1
        assert bench.probes("well") == 1
        assert bench.count("pdctl_session_probe_seconds_count") == 1
        assert bench.count("pdctl_session_blocked", cause="peer_gone") == 0


async def test_a_dead_peer_stays_blocked_while_it_is_asked_again_and_again() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        session = f"127.0.0.1:{listener.getsockname()[1]}"
    async with probing() as bench:
        bench.block(session)
        await until(lambda: bench.probes("refused") >= 4)
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
        await until(lambda: bench.probes("peer_changed") == 1)
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
    clock = Clock()

    def wanted_again(session: str) -> bool:
        clock.forward(0.01)
        return bench.prober.reason_blocked(session) is not None

    with hung() as wanted, hung() as unwanted:
        async with probing(policy=replace(POLICY, idle_timeout_s=0.2, deadline_s=0.01), clock=clock) as bench:
            bench.block(wanted, unwanted)
            await until(
                lambda: not wanted_again(wanted) or bench.count("pdctl_session_changes_total", kind="forgotten") == 1
            )
            assert list(bench.table.blocked()) == [wanted]


# What an answer proves


def proofs(depth: Depth, *, data_port: int = 15001, cured: str | None = None) -> Ask:
    async def ask(session: str, *, deadline_s: float) -> Proof:
        return Proof(pinned(session, data_port), depth, "as told", cured)

    return ask


async def test_bytes_that_came_back_are_trust_and_identity_alone_is_a_trial() -> None:
    for depth, state in ((Depth.DATA, State.TRUSTED), (Depth.IDENTITY, State.TRIAL)):
        async with probing(proofs(depth)) as bench:
            bench.block("a:1")
            await until(lambda bench=bench: bench.count("sglang:failed_session_recoveries_total") == 1)  # type: ignore[misc]
            assert bench.prober.standing("a:1").state is state
            assert bench.count("pdctl_session_probes_total", depth=depth.name.lower(), result="well") == 1
            assert bench.count("pdctl_sessions", state=state) == 1
            assert bench.count("pdctl_sessions", state="blocked") == 0


async def test_somebody_who_merely_answers_is_counted_and_lifts_nothing() -> None:
    async def ask(session: str, *, deadline_s: float) -> Proof:
        return Proof(PeerCard(session, 0, ()), Depth.HANDSHAKE, "send_probe answered")

    async with probing(ask) as bench:
        bench.block("node-b")
        await until(lambda: bench.count("pdctl_session_probes_total", depth="handshake", result="well") >= 3)
        standing = bench.prober.standing("node-b")
        assert standing.state is State.BLOCKED
        assert "nothing shows that it is the same life" in (standing.last_answer or "")


async def test_a_link_mended_on_this_side_is_counted_and_said() -> None:
    async with probing(proofs(Depth.DATA, cured="wedged lane: moved to a fresh engine")) as bench:
        with capture_logs() as lines:
            bench.block("a:1")
            await until(lambda: bench.prober.reason_blocked("a:1") is None)
        assert bench.count("pdctl_session_cures_total") == 1
        assert [line["cured"] for line in lines if "mended" in line["event"]] == [
            "wedged lane: moved to a fresh engine"
        ]


# First looks


async def test_whoever_registers_is_looked_at_once_and_another_process_is_then_known() -> None:
    """No engine here has pinned a life: what holds the door is the first look alone."""
    async with listening(Peer(regions=[4096])) as peer, probing(known=lambda _: None) as bench:
        bench.prober.registered(peer.session, [4096, 4100])
        await until(lambda: peer.asked == 1)
        await until(lambda: not asking_for("first look at"))
        peer.data_port += 1
        bench.block(peer.session)
        await until(lambda: bench.prober.standing(peer.session).state is State.DROPPED)
        assert peer.asked == 2


async def test_without_a_look_that_was_answered_the_announced_pointers_hold_the_door() -> None:
    async with listening(Peer(regions=[4096])) as peer, probing(known=lambda _: None) as bench:
        bench.prober.registered(peer.session, [0x5000_0000])
        await until(lambda: bench.prober.standing(peer.session).state is State.DROPPED)
        assert bench.count("pdctl_session_blocked", cause="peer_changed") == 1


async def test_a_look_at_the_life_before_says_nothing_of_the_one_that_registered_since() -> None:
    looks: list[asyncio.Future[PeerCard]] = []

    async def ask(session: str, *, deadline_s: float) -> PeerCard:
        looks.append(asyncio.get_running_loop().create_future())
        return await looks[-1]

    async with probing(ask, replace(POLICY, max_concurrent=2), known=lambda _: None) as bench:
        bench.prober.registered("a:1")
        await until(lambda: len(looks) == 1)
        bench.prober.registered("a:1")
        looks[0].set_result(PeerCard("a:1", 15001, ()))
        await until(lambda: len(looks) == 2)
        looks[1].set_result(PeerCard("a:1", 15002, ()))
        await until(lambda: not asking_for("first look at"))
        bench.block("a:1")
        await until(lambda: len(looks) == 3)
        looks[2].set_result(PeerCard("a:1", 15002, ()))
        await until(lambda: bench.prober.reason_blocked("a:1") is None)
        assert bench.count("pdctl_session_changes_total", kind="dropped") == 0


async def test_a_look_that_comes_to_nothing_costs_nothing() -> None:
    with hung() as session:
        async with probing(policy=replace(POLICY, deadline_s=0.02), known=lambda _: None) as bench:
            bench.prober.registered(session)
            await until(lambda: session in asking_for("first look at"))
            await until(lambda: session not in asking_for("first look at"))
            assert bench.prober.reason_blocked(session) is None


def asking_for(what: str) -> set[str]:
    names = [task.get_name() for task in asyncio.all_tasks()]
    return {name.removeprefix(f"{what} ") for name in names if name.startswith(what)}


async def test_hung_newcomers_leave_half_of_the_places_to_the_blocked() -> None:
    async def ask(session: str, *, deadline_s: float) -> PeerCard:
        return await never(session, deadline_s=deadline_s) if session != "well:1" else pinned(session)

    async with probing(ask, replace(POLICY, max_concurrent=4, deadline_s=60.0)) as bench:
        for i in range(20):
            bench.prober.registered(f"10.0.0.{i}:1")
        await until(lambda: len(asking_for("first look at")) == 2)
        bench.block("well:1")
        await until(lambda: bench.prober.reason_blocked("well:1") is None)
        assert len(asking_for("first look at")) == 2


# Transfers, and trials


async def failing(bench: Bench, session: str, cause: Cause) -> None:
    with pytest.raises(TransferFailed):
        async with bench.prober.passing(session):
            raise TransferFailed(cause, session, "connection reset")


async def on_trial(bench: Bench, session: str) -> None:
    await failing(bench, session, Cause.PEER_GONE)
    await until(lambda: bench.prober.standing(session).state is State.TRIAL)


@dataclass
class Transfer:
    """One transfer that a test begins, sees wait, and ends."""

    task: asyncio.Task[None]
    moving: asyncio.Event
    end: asyncio.Future[None]

    @classmethod
    def start(cls, bench: Bench, session: str) -> Transfer:
        moving, end = asyncio.Event(), asyncio.get_running_loop().create_future()

        async def move() -> None:
            async with bench.prober.passing(session):
                moving.set()
                await end

        return cls(asyncio.create_task(move()), moving, end)


async def some_time() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_a_failed_transfer_blocks_and_the_next_is_refused_at_once_with_the_reason() -> None:
    async with probing(never) as bench:
        await failing(bench, "a:1", Cause.TIMED_OUT)
        with pytest.raises(SessionBlocked, match=r"session a:1 is blocked: timed out \(connection reset\)"):
            async with bench.prober.passing("a:1"):
                raise AssertionError


@pytest.mark.parametrize("cause", [Cause.LOCAL, Cause.REJECTED_ADDRESS, Cause.LAYOUT])
async def test_what_does_not_speak_of_the_peer_does_not_block_it(cause: Cause) -> None:
    async with probing(never) as bench:
        await failing(bench, "a:1", cause)
        assert bench.prober.reason_blocked("a:1") is None


async def test_on_trial_one_goes_the_others_wait_and_its_success_lets_all_of_them_go() -> None:
    async with probing() as bench, listening(Peer()) as peer:
        await on_trial(bench, peer.session)
        first, *others = [Transfer.start(bench, peer.session) for _ in range(5)]
        await first.moving.wait()
        await some_time()
        assert not any(other.moving.is_set() for other in others)
        first.end.set_result(None)
        await asyncio.gather(*(other.moving.wait() for other in others))
        for other in others:
            other.end.set_result(None)
        await asyncio.gather(*(each.task for each in (first, *others)))
        assert bench.count("pdctl_session_changes_total", kind="trial_passed") == 1


async def test_on_trial_a_failure_ends_the_wait_of_all_who_wait() -> None:
    async with probing(policy=replace(POLICY, hold_s=60.0)) as bench, listening(Peer()) as peer:
        await on_trial(bench, peer.session)
        first, *others = [Transfer.start(bench, peer.session) for _ in range(3)]
        await first.moving.wait()
        first.end.set_exception(TransferFailed(Cause.PEER_GONE, peer.session, "again"))
        said = await asyncio.gather(*(each.task for each in others), return_exceptions=True)
        assert [type(each) for each in said] == [SessionBlocked, SessionBlocked]
        assert "out 2 times of late" in str(said[0])
        await asyncio.gather(first.task, return_exceptions=True)


async def test_on_trial_a_cancelled_transfer_gives_its_place_to_the_next() -> None:
    async with probing() as bench, listening(Peer()) as peer:
        await on_trial(bench, peer.session)
        first, second = Transfer.start(bench, peer.session), Transfer.start(bench, peer.session)
        await first.moving.wait()
        await some_time()
        first.task.cancel()
        await second.moving.wait()
        assert bench.prober.standing(peer.session).state is State.TRIAL
        second.end.set_result(None)
        await second.task


async def test_on_trial_time_without_a_failure_is_enough() -> None:
    async with probing(policy=replace(POLICY, trial_s=0.1)) as bench, listening(Peer()) as peer:
        await on_trial(bench, peer.session)
        slow, waiting = Transfer.start(bench, peer.session), Transfer.start(bench, peer.session)
        await slow.moving.wait()
        async with asyncio.timeout(60):
            await waiting.moving.wait()
        for each in (slow, waiting):
            each.end.set_result(None)
            await each.task


async def test_a_registration_lets_those_go_who_wait_for_a_trial() -> None:
    async with probing() as bench, listening(Peer()) as peer:
        await on_trial(bench, peer.session)
        slow, waiting = Transfer.start(bench, peer.session), Transfer.start(bench, peer.session)
        await slow.moving.wait()
        await some_time()
        bench.prober.registered(peer.session)
        async with asyncio.timeout(60):
            await waiting.moving.wait()
        for each in (slow, waiting):
            each.end.set_result(None)
            await each.task


@pytest.mark.parametrize("admitted", [True, False], ids=["by a transfer", "by a request"])
async def test_a_blocked_session_that_is_wanted_is_asked_sooner_than_its_wait(admitted: bool) -> None:
    policy = replace(POLICY, multiplier=1e6, max_interval_s=60.0, wanted_interval_s=0.05)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        session = f"127.0.0.1:{listener.getsockname()[1]}"
    async with probing(policy=policy) as bench:
        bench.block(session)
        await until(lambda: bench.probes("refused") == 1)
        assert (bench.prober.standing(session).next_question_s or 0) > 10
        if admitted:
            with pytest.raises(SessionBlocked):
                async with bench.prober.passing(session):
                    raise AssertionError
        else:
            assert bench.prober.reason_blocked(session) is not None
        await until(lambda: bench.probes("refused") == 2)


# Asked by hand, told by others


async def test_asked_by_hand_the_answer_is_told_and_counts() -> None:
    async with listening(Peer()) as peer, probing(policy=replace(POLICY, interval_s=60.0)) as bench:
        bench.block(peer.session)
        with capture_logs() as lines:
            answer = await bench.prober.ask_now(peer.session)
        (said,) = [line for line in lines if line["event"] == "session asked"]
        assert (said["session"], said["result"], said["depth"]) == (peer.session, "well", "identity")
        assert (answer.is_well, answer.depth, answer.how) == (True, Depth.IDENTITY, "descriptor compared")
        assert answer.standing.state is State.TRIAL
        assert answer.detail == ""
        assert 0 < answer.seconds < 1
        assert bench.probes("well") == 1


async def test_asked_by_hand_a_peer_that_is_not_well_is_told_with_its_cause() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        session = f"127.0.0.1:{listener.getsockname()[1]}"
    async with probing() as bench:
        answer = await bench.prober.ask_now(session)
        assert (answer.is_well, answer.cause, answer.depth) == (False, Cause.REFUSED, None)
        assert "cannot be reached" in answer.detail
        assert answer.standing.state is State.TRUSTED, "only transfers put out"


async def test_asked_by_hand_another_life_is_found_out_though_nothing_has_failed() -> None:
    async with listening(Peer(data_port=15002)) as peer, probing(known=pinned) as bench:
        answer = await bench.prober.ask_now(peer.session)
        assert (answer.cause, answer.depth) == (Cause.PEER_CHANGED, Depth.IDENTITY)
        assert "another process" in answer.detail
        assert answer.standing.state is State.DROPPED


async def test_a_question_by_hand_that_is_given_up_is_asked_again_by_itself() -> None:
    asked = Counter[str]()

    async def ask(session: str, *, deadline_s: float) -> PeerCard:
        asked[session] += 1
        return await never(session, deadline_s=deadline_s) if asked[session] == 1 else pinned(session)

    async with probing(ask, replace(POLICY, deadline_s=60.0)) as bench:
        bench.block("a:1")
        question = asyncio.create_task(bench.prober.ask_now("a:1"))
        await until(lambda: asked["a:1"] == 1)
        question.cancel()
        await until(lambda: bench.prober.reason_blocked("a:1") is None)


async def test_no_more_are_asked_by_hand_at_once_than_the_policy_allows() -> None:
    async with probing(never, replace(POLICY, max_concurrent=2, deadline_s=60.0)) as bench:
        questions = [asyncio.create_task(bench.prober.ask_now(f"a:{i}")) for i in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(LimitReached, match="2 questions"):
            await bench.prober.ask_now("b:1")
        for each in questions:
            each.cancel()
        await asyncio.wait(questions)
        assert bench.probes("timed_out") == 0


async def test_a_life_that_the_registry_says_is_over_is_served_no_more_until_it_registers() -> None:
    async with listening(Peer()) as peer, probing() as bench:
        bench.prober.superseded(peer.session, "epoch 4 holds its seat")
        assert "epoch 4 holds its seat" in (bench.prober.reason_blocked(peer.session) or "")
        assert bench.prober.standing(peer.session).state is State.DROPPED
        bench.prober.registered(peer.session)
        assert bench.prober.reason_blocked(peer.session) is None


async def test_a_hand_lifts_what_is_held_and_says_whether_there_was_anything() -> None:
    async with probing(never) as bench:
        bench.block("a:1")
        assert bench.prober.lift("a:1", "an operator vouches for it")
        assert bench.prober.reason_blocked("a:1") is None
        assert not bench.prober.lift("a:1", "once more")
        assert not bench.prober.lift("b:1", "never heard of")


async def test_changes_are_told_to_whoever_subscribed_until_he_leaves() -> None:
    heard: list[ChangeKind] = []
    async with listening(Peer()) as peer, probing() as bench:
        leave = bench.prober.subscribe(lambda changes: heard.extend(change.kind for change in changes))
        bench.block(peer.session)
        await until(lambda: len(heard) == 2)
        assert heard == [ChangeKind.BLOCKED, ChangeKind.RECOVERED]
        leave()
        bench.block(peer.session)
        assert len(heard) == 2


# Doubt of ourselves, and panic


def hold_the_loop(seconds: float) -> None:
    time.sleep(seconds)


async def test_after_our_own_stall_a_time_out_blocks_nobody_and_a_refusal_still_does() -> None:
    async with probing(never, replace(POLICY, lag_s=0.05, doubt_window_s=30.0), lag=LoopLag(time.monotonic)) as bench:
        await asyncio.sleep(0.01)  # the meter has begun
        with capture_logs() as lines:
            hold_the_loop(0.3)
            await failing(bench, "slow:1", Cause.TIMED_OUT)
            await failing(bench, "dead:1", Cause.REFUSED)
            assert bench.prober.reason_blocked("slow:1") is None
            assert bench.prober.reason_blocked("dead:1") is not None
            await asyncio.sleep(0.1)
        assert bench.prober.doubting
        assert bench.count("pdctl_session_doubt") == 1
        assert len([line for line in lines if "the fault may be here" in line["event"]]) == 1


async def test_our_lateness_counts_before_the_meter_itself_has_had_its_turn() -> None:
    async with probing(never, lag=Late(time.monotonic)) as bench:
        await failing(bench, "slow:1", Cause.TIMED_OUT)
        assert bench.prober.reason_blocked("slow:1") is None
    async with probing(
        answers_in_turn(TransferFailed(Cause.TIMED_OUT, "a:1", "late")), lag=Late(time.monotonic)
    ) as bench:
        assert not bench.prober.doubting
        await bench.prober.ask_now("a:1")
        assert bench.prober.doubting


async def test_a_question_that_ran_out_while_we_were_stalled_does_not_count() -> None:
    """The answer is there when the loop wakes, but so is the deadline: it must not be the peer's fault."""
    policy = replace(POLICY, lag_s=0.05, deadline_s=0.2, multiplier=1e6, max_interval_s=60.0)
    async with listening(Peer()) as peer, probing(policy=policy) as bench:
        peer.hold = asyncio.Event()
        bench.block(peer.session)
        await until(lambda: peer.asked == 1)
        hold_the_loop(0.5)
        peer.hold.set()
        await until(lambda: bench.prober.reason_blocked(peer.session) is None)
        assert bench.probes("timed_out") >= 1


async def test_deadlines_are_stretched_while_in_doubt_and_the_doubt_ends() -> None:
    deadlines: list[float] = []

    async def ask(session: str, *, deadline_s: float) -> PeerCard:
        deadlines.append(deadline_s)
        raise TransferFailed(Cause.REFUSED, session, "no")

    policy, lag = replace(POLICY, deadline_s=0.5, stretch=3.0, doubt_window_s=0.2), Late(time.monotonic)
    async with probing(ask, policy, lag=lag) as bench:
        bench.block("a:1")
        await until(lambda: 1.5 in deadlines)
        lag.late_s = 0.0
        await until(lambda: not bench.prober.doubting)
        assert bench.count("pdctl_session_doubt") == 0
        deadlines.clear()
        await until(lambda: bool(deadlines))
        assert deadlines[0] == 0.5
        assert bench.count("pdctl_session_changes_total", kind="doubt_ended") == 1


async def test_when_too_many_of_a_group_are_blocked_all_are_served_and_it_is_said_once() -> None:
    async with probing(never) as bench:
        for i in range(4):
            bench.prober.registered(f"10.0.0.{i}:1")
        with capture_logs() as lines:
            bench.block(*(f"10.0.0.{i}:1" for i in range(3)))
            assert bench.prober.reason_blocked("10.0.0.0:1") is None
            assert bench.prober.panicking == ("",)
            assert bench.count("pdctl_session_panic_groups") == 1
            assert bench.count("pdctl_session_blocked", cause="peer_gone") == 3
            bench.prober.lift("10.0.0.0:1", "by hand")
        assert bench.prober.reason_blocked("10.0.0.1:1") is not None
        assert bench.count("pdctl_session_panic_groups") == 0
        assert [line["why"] for line in lines if "all of the group are served" in line["event"]] == [
            "3 of 4 are blocked"
        ]


# Threads that hang


async def test_engines_own_questions_that_hang_hold_threads_and_delay_nobody() -> None:
    let_go = threading.Event()

    def send_probe(session: str) -> int:
        let_go.wait(60)
        return 0

    names = [f"node-{i}" for i in range(9)]
    policy = replace(POLICY, deadline_s=0.2, max_ejected=1.0)
    try:
        async with listening(Peer()) as peer, probing(Asking(send_probe=send_probe), policy) as bench:
            bench.block(*names, peer.session)
            await until(lambda: bench.prober.reason_blocked(peer.session) is None, within_s=1.0)
            await until(lambda: bench.count("pdctl_session_probe_threads_held") == 8)
            await until(lambda: bench.probes("local") >= 1)
            assert "all 8 threads are taken" in (await bench.prober.ask_now(blocked_out(bench, names))).detail
            let_go.set()
            await until(lambda: bench.count("pdctl_session_probe_threads_held") == 0)
    finally:
        let_go.set()


def blocked_out(bench: Bench, names: list[str]) -> str:
    """The one that got no thread."""
    return next(name for name in names if bench.prober.standing(name).last_answer == "local")


# Many at once


async def test_hung_peers_delay_nobody() -> None:
    async with AsyncExitStack() as stack:
        stopped = [stack.enter_context(hung()) for _ in range(8)]
        healthy = [await stack.enter_async_context(listening(Peer())) for _ in range(42)]
        bench = await stack.enter_async_context(probing(policy=replace(POLICY, deadline_s=30.0)))
        bench.block(*stopped, *(peer.session for peer in healthy))
        await until(lambda: bench.count("sglang:failed_session_recoveries_total") == 42, within_s=20.0)
        assert bench.probes("timed_out") == 0, "not one of the hung questions has ended yet"
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
        return pinned(session)

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
        await until(lambda: sum(bool(each.last_answer) for each in bench.table.standings(0.0)) >= 2)
        assert readings["clock"] < 40


async def test_a_sleeping_prober_is_woken_by_a_new_failure() -> None:
    """It sleeps for a minute, as the dead peer is not asked earlier."""
    policy = replace(POLICY, multiplier=1e6, max_interval_s=60.0)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        dead = f"127.0.0.1:{listener.getsockname()[1]}"
    async with listening(Peer()) as peer, probing(policy=policy) as bench:
        bench.block(dead)
        await until(lambda: bench.probes("refused") == 1)
        bench.block(peer.session)
        await until(lambda: bench.probes("well") == 1)


# Nothing ends the loop but its owner


@pytest.mark.parametrize(
    "trouble", [RuntimeError("a defect"), asyncio.CancelledError("from inside"), KeyError("status")], ids=repr
)
async def test_a_question_that_breaks_is_an_answer_and_the_loop_goes_on(trouble: BaseException) -> None:
    async with probing(answers_in_turn(trouble, None)) as bench:
        with capture_logs() as lines:
            bench.block("a:1")
            await until(lambda: bench.prober.reason_blocked("a:1") is None)
        assert bench.probes("local") == 1
        assert [line["session"] for line in lines if line["event"] == "question failed on our side"] == ["a:1"]


@pytest.mark.parametrize("cause", list(Cause), ids=str)
async def test_an_engines_verdict_is_counted_under_its_cause(cause: Cause) -> None:
    async with probing(answers_in_turn(TransferFailed(cause, "a:1", "why"))) as bench:
        bench.block("a:1")
        await until(lambda: bench.probes(cause) >= 1)
        assert bench.prober.reason_blocked("a:1") is not None


async def test_an_engine_that_forgets_its_deadline_is_held_to_it() -> None:
    async with probing(never, replace(POLICY, deadline_s=0.05)) as bench:
        bench.block("a:1")
        await until(lambda: bench.probes("timed_out") >= 2)


async def test_cancelling_stops_at_once_and_leaves_no_task() -> None:
    before = asyncio.all_tasks()
    with ExitStack() as stack:
        stopped = [stack.enter_context(hung()) for _ in range(10)]
        async with probing(policy=replace(POLICY, deadline_s=60.0)) as bench:
            bench.block(*stopped)
            await until(
                lambda: len(asyncio.all_tasks() - before) == 12
            )  # ten questions, the loop, the meter of its lag
            began = time.monotonic()
            bench.loop.cancel()
            with pytest.raises(asyncio.CancelledError):
                await bench.loop
            assert time.monotonic() - began < 5.0
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
