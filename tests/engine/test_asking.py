"""How a session is asked: by which means, how deep, and what questions that hang may hold. The threads are real."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import ModuleType

import pytest
from structlog.testing import capture_logs

from pdctl.core.kinds import Depth
from pdctl.core.layout import Region
from pdctl.device.cpu import Cpu
from pdctl.engine.asking import Asking, ProbeThreads
from pdctl.engine.base import PeerCard, Proof
from pdctl.engine.mooncake import by_name
from pdctl.engine.settings import MooncakeSettings
from pdctl.errors import Cause, TransferFailed
from tests.engine.processes import Peers
from tests.engine.test_contract import failure
from tests.patience import until


@dataclass
class Probing:
    """A `send_probe` that truly blocks its thread: peers in `hung` get no answer before `let_go`."""

    codes: dict[str, int] = field(default_factory=dict)
    hung: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)
    free: threading.Event = field(default_factory=threading.Event)

    def __call__(self, session: str) -> int:
        self.asked.append(session)
        if session in self.hung:
            self.free.wait(60)
        return self.codes.get(session, 0)

    def let_go(self) -> None:
        self.hung.clear()
        self.free.set()


@pytest.fixture
def probing() -> Iterator[Probing]:
    probing = Probing()
    yield probing
    probing.let_go()


@dataclass
class OurEngine:
    """What an engine of ours says of each session."""

    proof: Proof

    async def prove(self, session: str, *, deadline_s: float) -> Proof:
        return self.proof

    async def probe(self, session: str, *, deadline_s: float) -> PeerCard:
        return self.proof.card


# Which means


async def test_an_engine_of_ours_is_asked_for_its_deepest_proof() -> None:
    proof = Proof(PeerCard("10.0.0.1:15001", 4711, ()), Depth.DATA, "nonce written and read back")
    asking = Asking(OurEngine(proof))
    assert await asking.prove("10.0.0.1:15001", deadline_s=1) == proof
    assert await asking.card("10.0.0.1:15001", deadline_s=1) == proof.card


async def test_without_an_engine_our_handshake_shows_who_is_there(peers: Peers) -> None:
    far = peers.take()
    pointer = (await far.ask("register", nbytes=4096))["pointer"]
    proof = await Asking().prove(far.session, deadline_s=5)
    assert (proof.depth, proof.how) == (Depth.IDENTITY, "descriptor compared")
    assert Region(pointer, 4096) in proof.card.regions
    assert await Asking().card(far.session, deadline_s=5) == proof.card
    peers.give_back(far)


async def test_without_an_engine_a_peer_that_hangs_costs_its_deadline() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        session = f"127.0.0.1:{listener.getsockname()[1]}"
        began = time.monotonic()
        assert (await failure(Asking().prove(session, deadline_s=0.1))).cause is Cause.TIMED_OUT
        assert time.monotonic() - began < 1


async def test_a_session_with_an_address_never_costs_a_thread(probing: Probing) -> None:
    asking = Asking(OurEngine(Proof(PeerCard("[::1]:15001", 1, ()), Depth.DATA, "how")), probing)
    await asking.prove("[::1]:15001", deadline_s=1)
    assert probing.asked == []


async def test_a_name_is_asked_with_send_probe_and_proves_no_more_than_that_somebody_answers(probing: Probing) -> None:
    asking = Asking(send_probe=probing)
    proof = await asking.prove("node-b", deadline_s=5)
    assert (proof.depth, proof.how) == (Depth.HANDSHAKE, "send_probe answered")
    assert await asking.card("node-b", deadline_s=5) is None
    assert probing.asked == ["node-b"]


@pytest.mark.parametrize(
    ("code", "cause"),
    [
        (-1, Cause.LOCAL),
        (-101, Cause.REFUSED),
        (-102, Cause.REFUSED),
        (-103, Cause.NOT_AN_ENGINE),
        (-200, Cause.REFUSED),
        (-999, Cause.LOCAL),
    ],
)
async def test_each_code_of_send_probe_has_its_cause_and_stands_in_the_words(
    probing: Probing, code: int, cause: Cause
) -> None:
    probing.codes["node-b"] = code
    failed = await failure(Asking(send_probe=probing).prove("node-b", deadline_s=5))
    assert failed.cause is cause
    assert failed.detail.endswith(f"(send_probe: {code})")


async def test_where_nobody_can_ask_one_warning_says_what_helps() -> None:
    asking = Asking()
    with capture_logs() as lines:
        for session in ("node-b", "node-c", "node-b"):
            failed = await failure(asking.prove(session, deadline_s=1))
            assert failed.cause is Cause.LOCAL
            assert "lift it by hand" in failed.detail
        assert await asking.card("node-b", deadline_s=1) is None
    assert [(line["log_level"], line["session"]) for line in lines] == [("warning", "node-b")]
    assert "registers anew, or by hand" in lines[0]["event"]


# Threads


async def test_questions_that_hang_delay_nobody_and_are_held_by_name(probing: Probing) -> None:
    threads = ProbeThreads(probing, limit=4)
    probing.hung = {"a", "b", "c"}
    with capture_logs() as lines:
        began = time.monotonic()
        failures = await asyncio.gather(*(failure(threads.ask(name, deadline_s=0.3)) for name in "abc"))
        assert await threads.ask("well", deadline_s=5) == 0
        assert time.monotonic() - began < 2
    assert {each.cause for each in failures} == {Cause.TIMED_OUT}
    assert sorted(threads.held) == ["a", "b", "c"]
    assert [line["session"] for line in lines if line["event"] == "question that hangs holds a thread"] == [*"abc"]


async def test_with_every_thread_taken_the_answer_is_local_at_once_and_names_who_has_them(probing: Probing) -> None:
    threads = ProbeThreads(probing, limit=2)
    probing.hung = {"a", "b"}
    await asyncio.gather(*(failure(threads.ask(name, deadline_s=0.05)) for name in "ab"))
    began = time.monotonic()
    refused = await failure(threads.ask("c", deadline_s=30))
    assert time.monotonic() - began < 1
    assert (refused.cause, refused.session) == (Cause.LOCAL, "c")
    assert refused.detail == "all 2 threads are taken by questions to a, b"
    assert probing.asked == ["a", "b"]


async def test_a_peer_never_has_two_threads_and_later_questions_get_the_same_answer(probing: Probing) -> None:
    threads = ProbeThreads(probing)
    probing.hung, probing.codes = {"a"}, {"a": -102}
    for _ in range(3):
        assert (await failure(threads.ask("a", deadline_s=0.02))).cause is Cause.TIMED_OUT
    late = asyncio.create_task(threads.ask("a", deadline_s=30))
    await asyncio.sleep(0)
    probing.let_go()
    assert await late == -102
    assert probing.asked == ["a"]


async def test_a_thread_that_comes_back_is_free_for_the_next(probing: Probing) -> None:
    threads = ProbeThreads(probing, limit=1)
    probing.hung = {"a"}
    with capture_logs() as lines:
        await failure(threads.ask("a", deadline_s=0.02))
        probing.let_go()
        await until(lambda: not threads.held)
    assert lines[-1]["event"] == "held thread is free again"
    assert await threads.ask("b", deadline_s=5) == 0
    assert await threads.ask("a", deadline_s=5) == 0


async def test_a_question_is_cancelled_at_once_and_its_thread_counted_as_held(probing: Probing) -> None:
    threads = ProbeThreads(probing)
    probing.hung = {"a"}
    question = asyncio.create_task(threads.ask("a", deadline_s=30))
    await until(lambda: probing.asked == ["a"])
    question.cancel()
    with pytest.raises(asyncio.CancelledError):
        await question
    assert threads.held == ("a",)


async def test_a_send_probe_that_breaks_is_our_own_fault() -> None:
    def broken(session: str) -> int:
        raise TypeError("send_probe(): incompatible function arguments")

    failed = await failure(ProbeThreads(broken).ask("a", deadline_s=5))
    assert failed.cause is Cause.LOCAL
    assert "incompatible" in failed.detail


def test_an_answer_that_comes_after_the_loop_has_closed_troubles_nobody(probing: Probing) -> None:
    probing.hung = {"a"}

    async def leave_early() -> None:
        with pytest.raises(TransferFailed):
            await ProbeThreads(probing).ask("a", deadline_s=0.02)

    asyncio.run(leave_early())
    (thread,) = [each for each in threading.enumerate() if each.name == "pdctl-probe a"]
    probing.let_go()
    thread.join(60)
    assert not thread.is_alive()


async def test_the_real_send_probe_answers_of_living_and_dead_peers_and_is_held_by_a_stopped_one(peers: Peers) -> None:
    probe = by_name(MooncakeSettings(), Cpu())
    assert probe is not None
    threads = ProbeThreads(probe)
    stopped, living = peers.take(), peers.take()
    assert await threads.ask(living.session, deadline_s=5) == 0
    assert await threads.ask("127.0.0.1:1", deadline_s=5) == -102
    stopped.stop()
    asked = asyncio.create_task(failure(threads.ask(stopped.session, deadline_s=0.3)))
    assert await threads.ask(living.session, deadline_s=5) == 0
    assert (await asked).cause is Cause.TIMED_OUT
    assert threads.held == (stopped.session,)
    stopped.resume()
    await until(lambda: not threads.held)
    for each in (stopped, living):
        peers.give_back(each)


class Wheel(ModuleType):
    """A wheel whose engines are slow to open, and are counted."""

    def __init__(self) -> None:
        super().__init__("mooncake.engine")
        opened = self.opened = list[object]()

        class TransferEngine:
            def initialize(self, *_: str) -> int:
                time.sleep(0.05)
                opened.append(self)
                return 0

            def get_rpc_port(self) -> int:
                return 15000

            def transfer_submit_write(self) -> None: ...

            def transfer_check_status(self) -> None: ...

            def send_probe(self, session: str) -> int:
                return len(opened)

        self.TransferEngine = TransferEngine


async def test_the_engine_that_asks_by_name_is_made_by_the_first_question_and_only_once() -> None:
    installed, environ = Wheel(), dict[str, str]()
    probe = by_name(MooncakeSettings(), Cpu(), importer=lambda _: installed, environ=environ)
    assert probe is not None
    assert installed.opened == []
    threads = ProbeThreads(probe)
    assert await asyncio.gather(*(threads.ask(name, deadline_s=5) for name in "abcd")) == [1, 1, 1, 1]
    assert environ["MC_FORCE_TCP"] == "1"


def test_a_wheel_without_send_probe_asks_nobody_by_name() -> None:
    installed = Wheel()
    del installed.TransferEngine.send_probe
    assert by_name(MooncakeSettings(), Cpu(), importer=lambda _: installed) is None
