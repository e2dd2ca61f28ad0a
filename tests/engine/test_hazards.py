"""The twelve hazards of the engine: each is shown on the bare engine, then shown not to reach those who use the port.

docs/hazards.md is the table of these. The bare engine runs in processes of its own: it freezes and crashes them.
"""

from __future__ import annotations

import ast
import asyncio
import json
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pdctl.core.layout import Region
from pdctl.core.plan import CopyPlan
from pdctl.device.cpu import Cpu
from pdctl.engine.environment import environment
from pdctl.engine.mooncake import open_mooncake
from pdctl.engine.settings import MooncakeSettings
from pdctl.errors import BadField, Cause, TransferFailed
from pdctl.memory import Arena
from tests.engine.conftest import STALL_S, Far, Stage, mooncake_stage, registered
from tests.engine.processes import ROOT, Address, Child, Peers, peer
from tests.engine.test_contract import failure

MIB = 1 << 20
QUIET = {"MC_FORCE_TCP": "1", "MC_LOG_LEVEL": "ERROR"}


def bare(scenario: str, environ: dict[str, str] | None = None, **arguments: object) -> Child:
    return Child("tests.engine.bare", scenario, json.dumps(arguments), environ={**QUIET, **(environ or {})})


def go_on(child: Child) -> None:
    stdin = child._process.stdin
    assert stdin
    stdin.write(b"\n")
    stdin.flush()


def counted(far: Child, pointer: int, value: int) -> int:
    return int(far.ask_now("count", pointer=pointer, value=value)["n"])


@pytest.fixture
async def stage(peers: Peers) -> AsyncIterator[Stage]:
    async with AsyncExitStack() as stack:
        yield await mooncake_stage(stack, peers)


@pytest.fixture
def far(peers: Peers) -> Iterator[Child]:
    child = peers.take()
    yield child
    peers.give_back(child)


# --- H1: a batch call answers -1 while the rest of the batch is still moving


def test_h1_the_bare_engine_sends_a_buffer_that_its_caller_uses_again(far: Child) -> None:
    pointer = far.ask_now("register", nbytes=64 * MIB)["pointer"]
    with bare(
        "batch_write_fails_early", session=far.session, pointer=pointer, environ={"MC_TRANSFER_TIMEOUT": "5"}
    ) as it:
        far.stop()
        go_on(it)
        assert it.line()["code"] == -1
        far.resume()
        _wait_for_quiet(far, pointer)
        assert counted(far, pointer, 2) > MIB, "bytes written after the failure was reported"


def _wait_for_quiet(far: Child, pointer: int) -> None:
    before = -1
    while (now := counted(far, pointer, 0)) != before:
        before = now
        time.sleep(0.3)


async def test_h1_no_byte_leaves_after_a_failure_was_reported(stage: Stage) -> None:
    far = await stage.far(64 * MIB)
    with Arena(64 * MIB) as arena:
        view = arena.array(64 * MIB, np.uint8)
        await stage.engine.register(arena.region)
        at = np.arange(64, dtype=np.int64) * MIB
        plan = CopyPlan(arena.region.pointer + at, far.pointer + at, np.full(64, MIB, np.int64))
        view[:] = 1
        far.stop()
        assert (await failure(stage.engine.write(far.session, plan, deadline_s=30))).settled
        view[:] = 2
        far.resume()
        await stage.engine.probe(far.session, deadline_s=10)
        await _still(far)
        assert await far.count(2) == 0
        await stage.engine.unregister(arena.region)


async def _still(far: Any) -> None:
    """Until two looks, a while apart, see the same bytes."""
    before = -1
    while (now := await far.count(0)) != before:
        before = now
        await asyncio.sleep(0.3)


# --- H2: more than 2048 blocks outstanding wedge the engine


def test_h2_the_bare_engine_reports_failure_for_a_long_batch_and_delivers_of_it(far: Child) -> None:
    pointer = far.ask_now("register", nbytes=16 * MIB)["pointer"]
    with bare("queue_overflows", session=far.session, pointer=pointer, blocks=4096) as it:
        assert it.hello["code"] == -1
        _wait_for_quiet(far, pointer)
        assert counted(far, pointer, 1) > 4096, "blocks of a batch that had failed; how many differs from run to run"


def test_h2_the_bare_engine_wedges_and_a_second_one_in_the_same_process_does_not_share_it(far: Child) -> None:
    """A matter of chance: 1 to 15 batches in 6 rounds, with queues as narrow as these. The probe says 0 = healthy."""
    narrow = {
        "MC_TCP_MAX_QUEUED_TRANSFERS_PER_PEER": "1",
        "MC_TCP_MAX_PENDING_ADMISSIONS_PER_PEER": "1024",
        "MC_TCP_ADMISSION_TIMEOUT_MS": "600000",
    }
    pointer = far.ask_now("register", nbytes=16 * MIB)["pointer"]
    with bare("wedges", session=far.session, pointer=pointer, environ=narrow) as it:
        found = it.hello
        assert (found["probe"], found["first"], found["second"]) == (0, False, True), found


async def test_h2_any_number_of_blocks_goes_through_a_bounded_window(peers: Peers) -> None:
    spy = Spy(window=16)
    async with AsyncExitStack() as stack:
        stage = await mooncake_stage(stack, peers, factory=spy.make, window=16)
        far = await stage.far()
        stage.memory[:] = 1
        plan = stage.plan(far, block=512)
        plan = CopyPlan(plan.src, plan.dst[::-1].copy(), plan.nbytes)  # so that none is put together with another
        await asyncio.gather(*(stage.engine.write(far.session, plan, deadline_s=60) for _ in range(2)))
        assert await far.count(1) == 4 * MIB
        assert spy.submitted == 2 * 8192
        assert 4 <= spy.most_in_flight <= 16


class Spy:
    """The real engine, with its submissions and questions counted."""

    def __init__(self, window: int) -> None:
        self.window = window
        self.submitted = 0
        self.most_in_flight = 0
        self.in_flight: set[int] = set()
        self.strange: list[str] = []
        self.before_next: Callable[[], None] | None = None

    def make(self) -> Any:
        from mooncake.engine import TransferEngine

        spy = self

        class Watched(TransferEngine):  # type: ignore[misc, unused-ignore]
            def transfer_submit_write(self, *block: object) -> int:
                if spy.before_next:
                    spy.before_next()
                    spy.before_next = None
                return spy.took(super().transfer_submit_write(*block))

            def batch_transfer_async_read(self, *block: object) -> int:
                ticket = spy.took(super().batch_transfer_async_read(*block))
                spy.submitted -= 1  # pdctl's own questions
                return ticket

            def transfer_check_status(self, ticket: int) -> int:
                return spy.asked(ticket, super().transfer_check_status(ticket))

        return Watched()

    def stop_before_next(self, far: Far) -> None:
        self.before_next = far.stop

    def took(self, ticket: int) -> int:
        self.submitted += 1
        self.in_flight.add(ticket)
        self.most_in_flight = max(self.most_in_flight, len(self.in_flight))
        return ticket

    def asked(self, ticket: int, status: int) -> int:
        if ticket == 0 or ticket not in self.in_flight:
            self.strange.append(f"asked for ticket {ticket}")
        if status != 0:
            self.in_flight.discard(ticket)
        return status


# --- H3: the first transfer to a hung peer blocks the whole engine


def test_h3_the_bare_engine_serves_nobody_while_it_opens_a_hung_peer(far: Child) -> None:
    """61 s; here it is let go after 3, with every limit that the engine has set to 1 s."""
    limits = {"MC_HANDSHAKE_CONNECT_TIMEOUT": "1", "MC_TCP_PROGRESS_TIMEOUT_SEC": "1", "MC_TCP_STATUS_TIMEOUT_SEC": "1"}
    pointer = far.ask_now("register", nbytes=MIB)["pointer"]
    with (
        peer() as hung,
        bare("first_open_blocks_all", hung=hung.session, well=far.session, pointer=pointer, environ=limits) as it,
    ):
        hung.stop()
        go_on(it)
        with pytest.raises(TimeoutError):
            it.line(3.0)
        hung.resume()
        assert it.line()["code"] == 0, "the healthy peer's transfer, as soon as the hung one answers"


async def test_h3_a_peer_that_hangs_just_after_it_was_asked_blocks_nobody(peers: Peers) -> None:
    """The moment that no question can cover: asked and well, then stopped, then first used."""
    spy = Spy(window=16)
    async with AsyncExitStack() as stack:
        stage = await mooncake_stage(stack, peers, factory=spy.make)
        hung, well = await stage.far(), await stage.far()
        await stage.engine.write(well.session, stage.plan(well, MIB), deadline_s=5)
        spy.stop_before_next(hung)
        first_use = asyncio.create_task(failure(stage.engine.write(hung.session, stage.plan(hung, MIB), deadline_s=20)))
        async with asyncio.timeout(60):
            while spy.before_next is not None:  # noqa: ASYNC110  the mover thread does it, at its next submission
                await asyncio.sleep(0.001)
        began = time.monotonic()
        for _ in range(5):
            await stage.engine.write(well.session, stage.plan(well, MIB), deadline_s=5)
        assert time.monotonic() - began < STALL_S * 0.9
        assert (await first_use).cause is Cause.TIMED_OUT
        assert time.monotonic() - began < 5 * STALL_S
        hung.resume()


# --- H4: send_probe has no usable time-out


def test_h4_the_bare_probe_of_a_hung_peer_does_not_come_back(far: Child) -> None:
    limits = {"MC_HANDSHAKE_CONNECT_TIMEOUT": "1"}
    with bare("probe_blocks", session=far.session, environ=limits) as it:
        far.stop()
        go_on(it)
        with pytest.raises(TimeoutError):
            it.line(3.0)
        far.resume()
        assert it.line()["took_s"] > 2.5


async def test_h4_a_hundred_hung_probes_end_together_at_their_deadline(stage: Stage) -> None:
    far = await stage.far()
    far.stop()
    began = time.monotonic()
    found = await asyncio.gather(*(failure(stage.engine.probe(far.session, deadline_s=0.5)) for _ in range(100)))
    assert {error.cause for error in found} == {Cause.TIMED_OUT}
    assert time.monotonic() - began < 1.5
    far.resume()


async def test_h4_a_probe_can_be_cancelled_at_once(stage: Stage) -> None:
    far = await stage.far()
    far.stop()
    probing = asyncio.create_task(stage.engine.probe(far.session, deadline_s=30))
    await asyncio.wait([probing], timeout=0.1)
    began = time.monotonic()
    probing.cancel()
    await asyncio.wait([probing])
    assert probing.cancelled()
    assert time.monotonic() - began < 0.2
    far.resume()


# --- H5: a probe's 0 proves nothing


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while asked := await reader.read(4096):
        writer.write(asked)
    writer.close()


async def test_h5_the_bare_probe_takes_an_echo_for_an_engine() -> None:
    async with await asyncio.start_server(echo, "127.0.0.1", 0) as server:
        session = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        child = await asyncio.to_thread(bare, "probe_blocks", session=session)
        with child:
            go_on(child)
            assert (await asyncio.to_thread(child.line))["code"] == 0


async def test_h5_an_echo_is_no_engine(stage: Stage) -> None:
    async with await asyncio.start_server(echo, "127.0.0.1", 0) as server:
        session = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        assert (await failure(stage.engine.probe(session, deadline_s=5))).cause is Cause.NOT_AN_ENGINE
        error = await failure(stage.engine.write(session, stage.plan(await stage.far()), deadline_s=5))
        assert error.cause is Cause.NOT_AN_ENGINE


# --- H6: a descriptor is cached for ever


async def test_h6_the_bare_engine_never_reaches_a_restarted_peer_and_its_probe_is_0(peers: Peers) -> None:
    async with Address.listening() as address:
        first = peers.take()
        address.holder = first.session
        pointer = first.ask_now("register", nbytes=MIB)["pointer"]
        with await asyncio.to_thread(bare, "writes_to_an_heir", session=address.session, pointer=pointer) as it:
            assert it.hello["code"] == 0
            first.kill()
            heir = peers.take()
            heir.ask_now("register", nbytes=MIB)
            address.holder = heir.session
            go_on(it)
            found = await asyncio.to_thread(it.line)
            assert (found["codes"], found["probe"]) == ([-1] * 6, 0)
        peers.give_back(heir)


async def test_h6_an_heir_is_told_from_its_forerunner_and_reached_after_forget(stage: Stage) -> None:
    far = await stage.far(at="anywhere")
    await stage.engine.write(far.session, stage.plan(far), deadline_s=10)
    await far.kill()
    await failure(stage.engine.write(far.session, stage.plan(far), deadline_s=20))
    heir = await stage.far(at=far.session)
    assert (await failure(stage.engine.write(heir.session, stage.plan(heir), deadline_s=5))).cause is Cause.PEER_CHANGED
    stage.engine.forget(heir.session)
    stage.memory[:] = 4
    await stage.engine.write(heir.session, stage.plan(heir), deadline_s=10)
    assert await heir.count(4) == 4 * MIB


async def test_h6_after_one_failed_block_no_other_transfer_begins_with_that_peer(peers: Peers) -> None:
    """Of a replaced peer the engine fails a block for each old connection, and then reaches the heir."""
    spy = Spy(window=4)
    async with AsyncExitStack() as stack:
        stage = await mooncake_stage(stack, peers, factory=spy.make)
        far = await stage.far()
        await stage.engine.write(far.session, stage.plan(far, MIB), deadline_s=10)
        far.stop()
        before = spy.submitted
        plan = stage.plan(far, block=MIB)
        errors = await asyncio.gather(
            *(failure(stage.engine.write(far.session, plan, deadline_s=20)) for _ in range(8))
        )
        assert spy.submitted - before == 4, "the window, and not one block more"
        assert all(error.settled for error in errors)
        far.resume()


async def test_h6_a_restart_that_nobody_noticed_is_noticed_before_the_next_transfer(peers: Peers) -> None:
    async with AsyncExitStack() as stack:
        stage = await mooncake_stage(stack, peers, recheck_s=0.0)
        far = await stage.far(at="anywhere")
        await stage.engine.write(far.session, stage.plan(far), deadline_s=10)
        await far.kill()
        heir = await stage.far(at=far.session)
        error = await failure(stage.engine.write(heir.session, stage.plan(heir), deadline_s=5))
        assert error.cause is Cause.PEER_CHANGED


# --- H7: all registered memory is open to whoever reaches the ports


def test_h7_the_bare_engine_listens_on_every_interface_whatever_it_was_told() -> None:
    with bare("listens_everywhere") as it:
        assert it.hello["hosts"] == ["0.0.0.0", "::"]


async def test_h7_only_what_was_registered_is_open_and_nothing_after_closing() -> None:
    with Arena(MIB) as arena, Arena(MIB):
        async with (
            open_mooncake(MooncakeSettings(), Cpu()) as engine,
            open_mooncake(MooncakeSettings(), Cpu()) as other,
        ):
            await engine.register(arena.region)
            card = await other.probe(engine.session, deadline_s=5)
            assert registered(card) == (arena.region,)
            assert len(card.regions) == 2, "beside the canary"
            session = engine.session
        async with open_mooncake(MooncakeSettings(), Cpu()) as other:
            assert (await other.probe(session, deadline_s=5)).regions == ()


# --- H8: the store holds the interpreter


@pytest.fixture
def nobody() -> Iterator[socket.socket]:
    """A bound port that refuses, or hangs once it listens."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held


def test_h8_the_bare_store_freezes_the_interpreter_while_its_master_is_down(nobody: socket.socket) -> None:
    """90 s by default; with a single try it is still seconds."""
    master = f"127.0.0.1:{nobody.getsockname()[1]}"
    with bare("store_setup_freezes", master=master, environ={"MC_STORE_CLIENT_SETUP_RETRIES": "1"}) as it:
        assert it.line(60)["frozen_s"] > 2.0


def test_h8_our_environment_bounds_the_freeze_of_a_hung_master(nobody: socket.socket) -> None:
    """30 s a try without it, and twenty tries."""
    nobody.listen()
    master = f"127.0.0.1:{nobody.getsockname()[1]}"
    with bare("store_setup_freezes", master=master, environ=environment(MooncakeSettings())) as it:
        assert it.line(60)["frozen_s"] < 6.0


def test_h8_nothing_of_the_spine_imports_the_store() -> None:
    for path in (ROOT / "pdctl").rglob("*.py"):
        if path.name != "kvstore.py":
            assert "mooncake.store" not in _imports(path), path


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


# --- H9: the destructor holds the interpreter


def test_h9_destroying_the_bare_engine_freezes_every_thread() -> None:
    with bare("destructor_freezes") as it:
        assert it.hello["frozen_s"] > 0.3


async def test_h9_opening_and_closing_leaves_the_loop_running(stage: Stage) -> None:
    far = await stage.far()
    lag = asyncio.create_task(longest_lag())
    for _ in range(3):
        async with open_mooncake(MooncakeSettings(), Cpu()) as engine:
            await engine.register(stage.arena.region)
            await engine.write(far.session, stage.plan(far), deadline_s=10)
    lag.cancel()
    assert await lag < 0.25, "a destructor holds the interpreter for half a second at least"


async def longest_lag() -> float:
    loop = asyncio.get_running_loop()
    longest, last = 0.0, loop.time()
    try:
        while True:
            await asyncio.sleep(0.002)
            now = loop.time()
            longest, last = max(longest, now - last - 0.002), now
    except asyncio.CancelledError:
        return longest


# --- H10: segmentation faults


@pytest.mark.parametrize("scenario", ["asks_after_ticket_0", "registers_before_initialize"])
def test_h10_the_bare_engine_crashes_the_process(scenario: str) -> None:
    with bare(scenario) as it:
        with pytest.raises(EOFError):
            it.line()
        assert it.end() == -signal.SIGSEGV


class Refusing:
    """A stand-in whose engine takes no block: ticket 0, after which nobody may ask. An old wheel: no send_probe."""

    asked: list[int]

    def __init__(self) -> None:
        self.asked = []

    def initialize(self, host: str, metadata: str, protocol: str, device: str) -> int:
        return 0

    def get_rpc_port(self) -> int:
        return 15_001

    def transfer_submit_write(self, name: str, local: int, remote: int, nbytes: int) -> int:
        return 0

    def transfer_check_status(self, ticket: int) -> int:
        self.asked.append(ticket)
        return 0

    def register_memory(self, pointer: int, nbytes: int) -> int:
        return 0

    def unregister_memory(self, pointer: int) -> int:
        return 0


async def test_h10_a_block_that_was_not_taken_is_never_asked_about(far: Child) -> None:
    pointer, made = far.ask_now("register", nbytes=MIB)["pointer"], Refusing()
    with Arena(MIB) as arena:
        async with open_mooncake(MooncakeSettings(), Cpu(), factory=lambda: made) as engine:
            await engine.register(arena.region)
            plan = CopyPlan.of((arena.region.pointer, pointer, MIB))
            error = await failure(engine.write(far.session, plan, deadline_s=5))
            assert (error.cause, error.settled) == (Cause.REFUSED, True)
    assert made.asked == []


async def test_h10_no_ticket_is_asked_about_once_it_is_over(peers: Peers) -> None:
    spy = Spy(window=4)
    async with AsyncExitStack() as stack:
        stage = await mooncake_stage(stack, peers, factory=spy.make)
        far = await stage.far()
        await stage.engine.write(far.session, stage.plan(far), deadline_s=10)
        await stage.engine.read(far.session, stage.plan(far), deadline_s=10)
        await far.kill()
        await failure(stage.engine.write(far.session, stage.plan(far), deadline_s=10))
    assert spy.strange == []
    assert spy.in_flight == set()


# --- H11: a status speaks of the first block only


def test_h11_the_bare_engine_calls_a_batch_done_when_its_first_block_is() -> None:
    with bare("status_of_the_first_block_only") as it:
        assert it.hello["code"] == 1
        assert it.hello["landed"] < 32


async def test_h11_a_write_is_over_when_each_of_its_blocks_is(stage: Stage) -> None:
    far = await stage.far(64 * MIB)
    with Arena(64 * MIB) as arena:
        arena.array(64 * MIB, np.uint8)[:] = 1
        await stage.engine.register(arena.region)
        large = [(arena.region.pointer + n * MIB, far.pointer + n * MIB, MIB) for n in range(1, 64)]
        small = (arena.region.pointer, far.pointer, 64)
        await stage.engine.write(far.session, CopyPlan.of(small, *large), deadline_s=20)
        assert await far.count(1) == 63 * MIB + 64
        await stage.engine.unregister(arena.region)


# --- H12: failed is not undelivered


async def test_h12_a_failed_write_may_still_land_but_only_what_was_meant(stage: Stage) -> None:
    """Why receivers keep a failed room's pages in quarantine: no sender can take back what the kernel holds."""
    far = await stage.far()
    await stage.engine.write(far.session, stage.plan(far, MIB), deadline_s=10)
    stage.memory[:] = 1
    far.stop()
    error = await failure(stage.engine.write(far.session, stage.plan(far), deadline_s=20))
    stage.memory[:] = 2
    far.resume()
    await _still(far)
    assert error.settled
    assert await far.count(1) > 0, "bytes of a write that had failed"
    assert await far.count(2) == 0, "bytes of a source that was free to be used again"


# --- section 2: nothing is validated


def test_the_bare_engine_registers_null_and_memory_that_is_not_there() -> None:
    with bare("accepts_null_and_unmapped") as it:
        assert it.hello["codes"] == [0, 0]


async def test_null_is_refused_before_it_can_poison_the_segment(stage: Stage) -> None:
    with pytest.raises(BadField, match="pointer"):
        await stage.engine.register(Region(0, 4096))


async def test_a_peer_that_registered_null_can_still_be_written_to(stage: Stage) -> None:
    """The bare engine cannot open such a peer at all."""
    with Child("tests.engine.peer", "{}") as far:
        pointer = far.ask_now("register", nbytes=MIB)["pointer"]
        far.ask_now("poison")
        plan = CopyPlan.of((stage.arena.region.pointer, pointer, 64))
        await stage.engine.write(far.session, plan, deadline_s=5)
        with pytest.raises(TransferFailed, match="regions"):
            await stage.engine.write(far.session, CopyPlan.of((stage.arena.region.pointer, 1, 64)), deadline_s=5)
