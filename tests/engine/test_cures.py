"""Links whose peer is well while a way of ours to it is not: told apart from a sick peer, and mended on this side.

Mooncake only: its lanes wedge and go stale. The real wedge, and that a second engine object in the same process does
not share it, is shown in test_hazards.py; here the engine does what it did there.
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import threading
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Literal, cast

import numpy as np
import psutil
import pytest
from structlog.testing import capture_logs

from pdctl.core.kinds import Depth
from pdctl.core.layout import Region
from pdctl.core.plan import CopyPlan
from pdctl.engine.base import Engine, Proof
from pdctl.engine.blocks import Direction, Lane, Transfer
from pdctl.engine.canary import Canary, Questions
from pdctl.engine.pins import STALE, WEDGED
from pdctl.engine.promises import PromisedEngine
from pdctl.errors import Cause, TransferFailed
from tests.engine.cable import Cable
from tests.engine.conftest import STALL_S, Process, Stage, mooncake_stage
from tests.engine.processes import Peers
from tests.engine.roads import Roads
from tests.engine.test_contract import failure
from tests.engine.test_hazards import Spy
from tests.patience import until

MIB = 1 << 20


@asynccontextmanager
async def staged(peers: Peers, **how: Any) -> AsyncIterator[Stage]:
    async with AsyncExitStack() as stack:
        yield await mooncake_stage(stack, peers, **how)


def lane_of(engine: Engine, session: str) -> Lane:
    assert isinstance(engine, PromisedEngine)
    return engine._pins._pins[session].lane


@asynccontextmanager
async def longest_pause() -> AsyncIterator[list[float]]:
    """How long the loop was held at a time, in seconds; the last entry is the longest."""
    worst = [0.0]

    async def tick() -> None:
        while True:
            before = time.monotonic()
            await asyncio.sleep(0.001)
            worst.append(max(worst[-1], time.monotonic() - before))

    task = asyncio.create_task(tick())
    try:
        yield worst
    finally:
        task.cancel()
        await asyncio.wait([task])


async def proven_at_last(engine: Engine, session: str) -> Proof:
    """On a busy machine our own loop is late now and then, and nothing is cured meanwhile."""
    async with asyncio.timeout(60):
        while True:
            with contextlib.suppress(TransferFailed):
                return await engine.prove(session, deadline_s=2.0)


def hold_the_loop(seconds: float) -> None:
    time.sleep(seconds)


# --- an engine that does not reach one peer any more


@pytest.mark.parametrize("how", ["refuses", "swallows"])
async def test_what_one_engine_does_not_reach_a_fresh_one_does_and_transfers_take_it(
    peers: Peers, how: Literal["refuses", "swallows"]
) -> None:
    roads = Roads()
    async with staged(peers, factory=roads.make) as stage:
        far, other = await stage.far(), await stage.far()
        for peer in (far, other):
            await stage.engine.write(peer.session, stage.plan(peer, MIB), deadline_s=5)
        roads.block(0, (await stage.engine.probe(far.session, deadline_s=5)).regions, how)
        error = await failure(stage.engine.write(far.session, stage.plan(far, MIB), deadline_s=0.3))
        assert error.settled == (how == "refuses")

        async with longest_pause() as pauses:
            proof = await proven_at_last(stage.engine, far.session)
        assert (proof.depth, proof.cured) == (Depth.DATA, WEDGED)
        assert pauses[-1] < 0.4, "making an engine takes milliseconds, destroying one half a second and more"
        assert len(roads.made) == 2

        stage.memory[:] = 7
        await stage.engine.write(far.session, stage.plan(far), deadline_s=5)
        assert await far.count(7) == 4 * MIB
        assert (await stage.engine.prove(far.session, deadline_s=2.0)).cured is None
        assert lane_of(stage.engine, other.session).engine == 0, "only the peer that was out of reach has moved"
        roads.unblock()
        await asyncio.wait_for(stage.engine.settle(far.session), 60)


async def test_the_blocks_of_the_engine_that_was_left_still_hold_their_memory(peers: Peers) -> None:
    """A cure is for new transfers: what the old engine has in flight is at rest when it says so, not before."""
    roads = Roads()
    async with staged(peers, factory=roads.make) as stage:
        far = await stage.far()
        await stage.engine.write(far.session, stage.plan(far, MIB), deadline_s=5)
        roads.block(0, (await stage.engine.probe(far.session, deadline_s=5)).regions, "swallows")
        assert not (await failure(stage.engine.write(far.session, stage.plan(far, MIB), deadline_s=0.2))).settled
        assert (await proven_at_last(stage.engine, far.session)).cured is WEDGED
        settling = asyncio.create_task(stage.engine.settle(far.session))
        await asyncio.wait([settling], timeout=0.2)
        assert not settling.done()
        roads.unblock()
        await asyncio.wait_for(settling, 60)


async def test_a_peer_that_no_engine_reaches_is_out_and_costs_few_engines(peers: Peers) -> None:
    roads = Roads()
    async with staged(peers, factory=roads.make) as stage:
        far = await stage.far()
        regions = (await stage.engine.probe(far.session, deadline_s=5)).regions
        for engine in range(10):
            roads.block(engine, regions, "refuses")
        for _ in range(20):
            assert (await failure(stage.engine.prove(far.session, deadline_s=1.0))).cause is Cause.NO_DATA
        assert len(roads.made) == 3
        assert len(roads.doors) <= 4, "one for each engine, and one that was made anew"
        roads.unblock()
        assert (await stage.engine.prove(far.session, deadline_s=1.0)).depth is Depth.DATA


async def test_a_fresh_engine_that_cannot_be_opened_leaves_the_peer_out_and_the_others_served(peers: Peers) -> None:
    roads = Roads()
    async with staged(peers, factory=roads.make) as stage:
        lost, well = await stage.far(), await stage.far()
        roads.block(0, (await stage.engine.probe(lost.session, deadline_s=5)).regions, "refuses")
        roads.broken = OSError("no descriptors are left")
        assert (await failure(stage.engine.prove(lost.session, deadline_s=1.0))).cause is Cause.NO_DATA
        await stage.engine.write(well.session, stage.plan(well), deadline_s=5)
        roads.broken = None
        assert (await stage.engine.prove(lost.session, deadline_s=1.0)).cured is WEDGED


async def test_a_fresh_engine_is_made_with_the_settings_of_the_first(peers: Peers) -> None:
    """Each reads its environment when it is made, and others may have written there since."""
    roads = Roads()
    async with staged(peers, factory=roads.make) as stage:
        far = await stage.far()
        roads.block(0, (await stage.engine.probe(far.session, deadline_s=5)).regions, "refuses")
        os.environ["MC_TCP_PROGRESS_TIMEOUT_SEC"] = "300"
        await stage.engine.prove(far.session, deadline_s=1.0)
        assert os.environ["MC_TCP_PROGRESS_TIMEOUT_SEC"] == str(STALL_S)


# --- a lane that leads nowhere


async def test_a_lane_that_became_stale_is_made_anew_and_transfers_take_it(peers: Peers) -> None:
    roads = Roads()
    async with staged(peers, factory=roads.make) as stage:
        far = await stage.far()
        await stage.engine.write(far.session, stage.plan(far), deadline_s=5)
        before = lane_of(stage.engine, far.session)
        roads.lost.update(roads.doors)
        assert (await failure(stage.engine.write(far.session, stage.plan(far), deadline_s=5))).settled
        with capture_logs() as logged:
            proof = await stage.engine.prove(far.session, deadline_s=1.0)
        assert (proof.depth, proof.cured) == (Depth.DATA, STALE)
        assert [line["cured"] for line in logged if "cured" in line["event"]] == [STALE]
        assert lane_of(stage.engine, far.session) is not before
        stage.memory[:] = 4
        await stage.engine.write(far.session, stage.plan(far), deadline_s=5)
        assert await far.count(4) == 4 * MIB
        assert len(roads.made) == 1, "no fresh engine for what a fresh lane mends"


async def test_connections_that_ended_without_a_word_cost_new_ones_and_no_engine(peers: Peers) -> None:
    """As behind a middlebox that forgets who has been idle."""
    roads = Roads()
    async with staged(peers, factory=roads.make) as stage:
        far = await stage.far()
        await stage.engine.write(far.session, stage.plan(far), deadline_s=5)
        roads.mute.update(roads.doors)
        proof = await stage.engine.prove(far.session, deadline_s=2.0)
        assert (proof.depth, proof.cured, len(roads.made)) == (Depth.DATA, STALE, 1)
        stage.memory[:] = 6
        await stage.engine.write(far.session, stage.plan(far), deadline_s=5)
        assert await far.count(6) == 4 * MIB
        roads.unblock()


# --- when the fault may be here


async def test_no_engine_is_made_while_our_own_loop_is_late_and_one_is_when_it_is_not(peers: Peers) -> None:
    roads = Roads()
    async with staged(peers, factory=roads.make) as stage:
        far = await stage.far()
        await stage.engine.write(far.session, stage.plan(far), deadline_s=5)
        roads.block(0, (await stage.engine.probe(far.session, deadline_s=5)).regions, "swallows")
        known = len(roads.doors)
        proving = asyncio.create_task(stage.engine.prove(far.session, deadline_s=2.0))
        with capture_logs() as logged:
            await until(lambda: len(roads.doors) > known)
            hold_the_loop(0.35)  # while an answer by the new lane is waited for
            assert (await failure(proving)).cause is Cause.NO_DATA
        assert ["late" in line["why"] for line in logged if "no fresh engine" in line["event"]] == [True]
        assert len(roads.made) == 1

        assert (await proven_at_last(stage.engine, far.session)).cured is WEDGED
        assert len(roads.made) == 2
        roads.unblock()


async def test_no_engine_is_made_for_peers_that_fell_silent_together(peers: Peers) -> None:
    roads = Roads()
    async with staged(peers, factory=roads.make) as stage:
        both = [await stage.far(), await stage.far()]
        for far in both:
            await stage.engine.write(far.session, stage.plan(far), deadline_s=5)
        cards = [await stage.engine.probe(far.session, deadline_s=5) for far in both]
        roads.block(0, [region for card in cards for region in card.regions], "swallows")
        for _ in range(2):
            proofs = [stage.engine.prove(far.session, deadline_s=1.0) for far in both]
            said = await asyncio.gather(*(failure(proof) for proof in proofs))
            assert {error.cause for error in said} == {Cause.NO_DATA}
        assert len(roads.made) == 1

        roads.block(0, cards[0].regions, "swallows")
        assert (await proven_at_last(stage.engine, both[1].session)).cured is not WEDGED
        assert (await proven_at_last(stage.engine, both[0].session)).cured is WEDGED, "it is the only one now"
        roads.unblock()


# --- peers that are sick behind a handshake that is not


@pytest.fixture
async def far_and_cable(peers: Peers) -> AsyncIterator[tuple[Process, Cable]]:
    child = peers.take()
    async with Cable.to(child.session) as cable:
        far = Process(child, cable.session, cable)
        await far.register(4 * MIB)
        yield far, cable
    peers.give_back(child)


async def test_a_data_port_that_takes_bytes_and_never_answers_is_no_data(
    peers: Peers, far_and_cable: tuple[Process, Cable]
) -> None:
    far, cable = far_and_cable
    async with staged(peers) as stage:
        await stage.engine.write(far.session, stage.plan(far, MIB), deadline_s=5)
        cable.hold()
        for _ in range(2):
            began = time.monotonic()
            assert (await failure(stage.engine.prove(far.session, deadline_s=1.0))).cause is Cause.NO_DATA
            assert time.monotonic() - began < 2.0
        cable.release()
        assert (await stage.engine.prove(far.session, deadline_s=5.0)).depth is Depth.DATA


async def test_what_comes_back_late_is_a_slow_peer_and_no_wedge(
    peers: Peers, far_and_cable: tuple[Process, Cable]
) -> None:
    far, cable = far_and_cable
    async with staged(peers) as stage:
        await stage.engine.write(far.session, stage.plan(far, MIB), deadline_s=5)
        cable.hold()
        await failure(stage.engine.prove(far.session, deadline_s=0.2))
        proving = asyncio.create_task(stage.engine.prove(far.session, deadline_s=2.0))
        await asyncio.wait([proving], timeout=0.1)
        cable.release()
        assert (await proving).cured is None
        assert lane_of(stage.engine, far.session).engine == 0


async def test_a_data_port_that_swallows_packets_has_nothing_in_flight_to_it(
    peers: Peers, far_and_cable: tuple[Process, Cable]
) -> None:
    """A block would be in flight for the two minutes that the kernel tries to connect."""
    far, cable = far_and_cable
    spy = Spy(window=4)
    async with staged(peers, factory=spy.make) as stage:
        await cable.clog()
        assert (await failure(stage.engine.prove(far.session, deadline_s=0.4))).cause is Cause.NO_DATA
        error = await failure(stage.engine.write(far.session, stage.plan(far, MIB), deadline_s=2.0))
        assert (error.cause, error.settled) == (Cause.NO_DATA, True)
        assert "firewall" in error.detail
        assert (spy.submitted, spy.in_flight) == (0, set())
        cable.unclog()
        await cable.mend()
        assert (await stage.engine.prove(far.session, deadline_s=1.0)).depth is Depth.DATA


async def test_a_silent_peer_has_one_question_of_ours_in_flight_on_each_way_to_it(
    peers: Peers, far_and_cable: tuple[Process, Cable]
) -> None:
    far, cable = far_and_cable
    async with staged(peers, progress_timeout_s=5) as stage:
        await stage.engine.prove(far.session, deadline_s=2.0)
        cable.hold()
        for _ in range(10):
            await failure(stage.engine.prove(far.session, deadline_s=0.1))
        assert isinstance(stage.engine, PromisedEngine)
        assert 1 <= len(stage.engine._questions.moving) <= 4, "each engine's, and a lane that was made anew"
        cable.release()


async def test_a_data_port_that_begins_to_swallow_packets_is_no_data_within_the_deadline(
    peers: Peers, far_and_cable: tuple[Process, Cable]
) -> None:
    far, cable = far_and_cable
    async with staged(peers, handshake_timeout_s=5.0) as stage:
        await stage.engine.write(far.session, stage.plan(far, MIB), deadline_s=5)
        await cable.clog()
        for _ in range(2):
            began = time.monotonic()
            assert (await failure(stage.engine.prove(far.session, deadline_s=1.0))).cause is Cause.NO_DATA
            assert time.monotonic() - began < 2.0
        cable.unclog()
        await cable.mend()
        assert (await stage.engine.prove(far.session, deadline_s=5.0)).depth is Depth.DATA


# --- lives that ended


async def test_what_was_held_for_a_life_that_ended_is_let_go_when_another_begins(peers: Peers) -> None:
    """Else each decode rank that is started anew, under a session of its own, would cost a port for ever."""
    roads = Roads()
    async with staged(peers, factory=roads.make) as stage:
        well, old = await stage.far(), await stage.far()
        for peer in (well, old):
            await stage.engine.write(peer.session, stage.plan(peer, MIB), deadline_s=5)
        first, second = roads.doors
        await old.kill()
        await until(lambda: lane_of(stage.engine, old.session).over() is not None)
        anew = await stage.far()
        await stage.engine.write(anew.session, stage.plan(anew, MIB), deadline_s=5)
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", int(second))
        (await asyncio.open_connection("127.0.0.1", int(first)))[1].close()
        assert "ended" in (lane_of(stage.engine, old.session).over() or "")
        assert (await failure(stage.engine.write(old.session, stage.plan(old, MIB), deadline_s=5))).settled


async def test_what_was_held_for_a_life_that_ended_is_let_go_when_no_other_begins(peers: Peers) -> None:
    """Up to 17 connections each, half closed: a rank whose decodes all died held them until the next one came."""

    # Engines of earlier tests, which live until the process ends, may be connected to the same peer.
    before = {each.laddr.port for each in psutil.Process().net_connections("tcp")}

    def half_closed() -> int:
        found = [each for each in psutil.Process().net_connections("tcp") if each.laddr.port not in before]
        return sum(each.status == psutil.CONN_CLOSE_WAIT for each in found)

    async with staged(peers) as stage:
        old = await stage.far()
        await stage.engine.write(old.session, stage.plan(old, block=4096), deadline_s=5)
        await old.kill()
        await until(lambda: half_closed() > 4)
        await until(lambda: not half_closed())


# --- scratch memory


class Slow:
    """A carrier that keeps what it is given until it is told."""

    def __init__(self) -> None:
        self.held: list[Transfer] = []

    def add(self, transfer: Transfer) -> None:
        self.held.append(transfer)

    def nudge(self) -> None: ...

    async def end(self, transfer: Transfer) -> None:
        transfer.settle()
        await asyncio.sleep(0)
        await asyncio.sleep(0)


def a_lane() -> Lane:
    lane: Lane = cast(Any, Lane)("far")  # where it leads to does not matter here
    return lane


async def given_up(questions: Questions, lane: Lane) -> None:
    error = await failure(questions.read("far", lane, 4096, 16, asyncio.get_running_loop().time() + 0.01))
    assert error.cause is Cause.TIMED_OUT


async def test_the_memory_of_a_question_in_flight_is_given_to_no_other() -> None:
    slow, canary = Slow(), Canary()
    questions = Questions(canary, slow.add, slow.nudge)
    for _ in range(256):
        await given_up(questions, a_lane())
    places = [place for transfer in slow.held if isinstance(place := next(transfer.blocks)[0], int)]
    assert len(set(places)) == 256
    assert min(b - a for a, b in zip(sorted(places), sorted(places)[1:], strict=False)) >= 64
    error = await failure(questions.read("far", a_lane(), 4096, 16, asyncio.get_running_loop().time() + 1))
    assert error.cause is Cause.LOCAL
    await slow.end(slow.held[7])
    await given_up(questions, a_lane())
    assert next(slow.held[-1].blocks)[0] == places[7]


async def test_a_question_that_was_cancelled_keeps_its_memory_until_it_is_at_rest() -> None:
    slow, canary = Slow(), Canary()
    questions, lane = Questions(canary, slow.add, slow.nudge), a_lane()
    asking = asyncio.create_task(questions.write("far", lane, 4096, b"nonce", asyncio.get_running_loop().time() + 30))
    await asyncio.sleep(0)
    asking.cancel()
    await asyncio.wait([asking])
    assert questions.moving == slow.held
    assert slow.held[0].direction is Direction.WRITE
    assert slow.held[0].exhausted, "no more of it is submitted"
    await slow.end(slow.held[0])
    assert questions.moving == []


# --- the end


async def test_closing_waits_for_a_question_in_flight_and_ends_every_thread(
    peers: Peers, far_and_cable: tuple[Process, Cable]
) -> None:
    far, cable = far_and_cable
    before = set(threading.enumerate())
    async with staged(peers) as stage:
        await stage.engine.prove(far.session, deadline_s=2.0)
        cable.hold()
        await failure(stage.engine.prove(far.session, deadline_s=0.4))
        movers = [t for t in threading.enumerate() if t.name == "pdctl-mover" and t not in before]
        assert len(movers) == 3
        began = time.monotonic()
        assert await stage.engine.close()  # type: ignore[attr-defined]
        assert time.monotonic() - began < 4 * STALL_S
        assert stage.engine._questions.moving == []  # type: ignore[attr-defined]
    cable.release()
    for mover in movers:
        mover.join(60)
        assert not mover.is_alive()


async def test_without_reads_identity_is_the_deepest(peers: Peers) -> None:
    def make() -> Any:
        from mooncake.engine import TransferEngine

        class WriteOnly:
            def __init__(self) -> None:
                engine = TransferEngine()
                self.initialize, self.get_rpc_port = engine.initialize, engine.get_rpc_port
                self.transfer_submit_write = engine.transfer_submit_write
                self.transfer_check_status = engine.transfer_check_status
                self.batch_register_memory, self.unregister_memory = (
                    engine.batch_register_memory,
                    engine.unregister_memory,
                )

            def __getattr__(self, name: str) -> Any:
                raise AttributeError(name)

        for name in ("initialize", "get_rpc_port", "transfer_submit_write", "transfer_check_status"):
            setattr(WriteOnly, name, None)
        WriteOnly.batch_register_memory = None
        return WriteOnly()

    async with staged(peers, factory=make) as stage:
        far = await stage.far()
        stage.memory[:] = 2
        await stage.engine.write(far.session, stage.plan(far), deadline_s=5)
        proof = await stage.engine.prove(far.session, deadline_s=2.0)
        assert (proof.depth, proof.how) == (Depth.IDENTITY, "descriptor compared")
        assert await far.count(2) == 4 * MIB


def test_a_canary_says_what_it_is_in_its_first_bytes() -> None:
    one, two = Canary(), Canary()
    title = np.frombuffer(one.view(0, 32), np.uint8).tobytes()
    assert title == b"pdctl canary v1\n" + one.boot
    assert one.boot != two.boot
    assert one.region.nbytes % 64, "a length that no allocator of pages or rows makes"


async def test_a_plan_may_not_name_the_canary_as_its_source(peers: Peers) -> None:
    """It is no memory of the caller's: what lies there is scratch."""
    async with staged(peers) as stage:
        far = await stage.far()
        assert isinstance(stage.engine, PromisedEngine)
        plan = CopyPlan.of((stage.engine.canary.region.pointer, far.pointer, 16))
        assert (await failure(stage.engine.write(far.session, plan, deadline_s=5))).cause is Cause.LOCAL


async def test_writes_that_fail_by_their_own_fault_take_no_neighbour_along(peers: Peers) -> None:
    """Memory that is registered and not mapped: each block of it costs the peer's other transfers one stop."""
    async with staged(peers) as stage:
        far = await stage.far()
        unmapped = Region(np.frombuffer(mmap.mmap(-1, 1 << 16, prot=0), np.uint8).ctypes.data, 1 << 16)
        await stage.engine.register(unmapped)
        stage.memory[:] = 7
        good = asyncio.create_task(stage.engine.write(far.session, stage.plan(far, block=4096), deadline_s=20))
        for _ in range(4):
            bad = CopyPlan.of((unmapped.pointer, far.pointer, 4096))
            assert (await failure(stage.engine.write(far.session, bad, deadline_s=20))).settled
        await good
        assert await far.count(7) == 4 * MIB
        await stage.engine.unregister(unmapped)
