"""What a tether says of the process that it is tied to, and what a writer makes of it."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from typing import Any

import psutil
import pytest

from pdctl.core.plan import CopyPlan
from pdctl.device.cpu import Cpu
from pdctl.engine import handshake
from pdctl.engine.blocks import Lane
from pdctl.engine.mooncake import open_mooncake
from pdctl.engine.pins import Pin
from pdctl.engine.promises import PromisedEngine
from pdctl.engine.settings import MooncakeSettings
from pdctl.engine.tether import Tether
from pdctl.errors import Cause
from tests.engine.conftest import Stage, mooncake_stage
from tests.engine.processes import Child, Peers
from tests.engine.test_contract import failure
from tests.engine.test_hazards import Spy

MIB = 1 << 20


@pytest.fixture
def peer(peers: Peers) -> Iterator[Child]:
    child = peers.take()
    yield child
    peers.give_back(child)


@pytest.fixture
async def tether(peer: Child) -> AsyncIterator[Tether]:
    found = await handshake.metadata(peer.session, deadline_s=5)
    tied = await Tether.tie(peer.session, found.host, found.card.data_port, deadline_s=5)
    yield tied
    tied.close()


async def ended(tether: Tether, within_s: float = 5.0) -> str:
    async with asyncio.timeout(within_s):
        while (end := tether.over) is None:  # noqa: ASYNC110  it is another process, which sets no event of ours
            await asyncio.sleep(0.001)
    return end


# --- one tether


async def test_a_tether_holds_while_its_process_lives_stopped_or_not(peer: Child, tether: Tether) -> None:
    assert tether.over is None
    peer.stop()
    await asyncio.sleep(0.2)
    assert tether.over is None
    peer.resume()
    await asyncio.sleep(0.2)
    assert tether.over is None


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
async def test_a_tether_ends_with_its_process(peer: Child, tether: Tether, end: signal.Signals) -> None:
    os.kill(peer.pid, end)
    assert "its process has ended" in await ended(tether)
    assert not tether.was_cut
    peer.kill()


async def test_a_stopped_process_that_is_killed_ends_its_tether_too(peer: Child, tether: Tether) -> None:
    peer.stop()
    peer.kill()
    assert "its process has ended" in await ended(tether)


async def test_a_tether_that_was_reset_has_ended() -> None:
    with socket.create_server(("127.0.0.1", 0)) as there:
        tether = await Tether.tie("s", "127.0.0.1", there.getsockname()[1], deadline_s=1)
        accepted, _ = there.accept()
        accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, (1).to_bytes(4, "little") + bytes(4))
        accepted.close()
        assert "its process has ended" in await ended(tether)
        tether.close()
        assert "its process has ended" in (tether.over or "")


async def test_a_tether_that_was_let_go_is_over() -> None:
    with socket.create_server(("127.0.0.1", 0)) as there:
        tether = await Tether.tie("s", "127.0.0.1", there.getsockname()[1], deadline_s=1)
        tether.close()
        assert tether.over == "that life is not meant any more"


async def test_nobody_to_be_tied_to_is_no_data() -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        error = await failure(Tether.tie("s", "127.0.0.1", held.getsockname()[1], deadline_s=1))
    assert error.cause is Cause.NO_DATA
    assert "refused" in error.detail


async def test_a_look_costs_microseconds(tether: Tether) -> None:
    """1.6 us on a quiet machine. Of several rounds the best: what is held is the cost, not the machine's mood."""
    rounds = []
    for _ in range(20):
        began = time.perf_counter()
        for _ in range(200):
            assert tether.over is None
        rounds.append((time.perf_counter() - began) / 200)
    assert min(rounds) < 10e-6


# --- a writer and its tethers


@pytest.fixture
async def stage(peers: Peers) -> AsyncIterator[Stage]:
    async with AsyncExitStack() as stack:
        yield await mooncake_stage(stack, peers)


def pin_of(stage: Stage, session: str) -> Pin:
    assert isinstance(stage.engine, PromisedEngine)
    return stage.engine._pins._pins[session]


def lane_of(stage: Stage, session: str) -> Lane:
    return pin_of(stage, session).lane


def connections_to(port: int) -> list[str]:
    return [c.status for c in psutil.Process().net_connections("tcp") if c.raddr and c.raddr.port == port]


async def test_no_block_is_given_to_the_engine_after_the_life_has_ended(peers: Peers) -> None:
    spy = Spy(window=4)
    async with AsyncExitStack() as stack:
        stage = await mooncake_stage(stack, peers, factory=spy.make)
        far = await stage.far()
        await stage.engine.write(far.session, stage.plan(far, MIB), deadline_s=5)
        lane, before = lane_of(stage, far.session), spy.submitted
        await far.kill()
        while lane.over() is None:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        error = await failure(stage.engine.write(far.session, stage.plan(far), deadline_s=5))
        assert error.cause in (Cause.REFUSED, Cause.PEER_GONE)
        assert spy.submitted == before


async def test_a_life_that_ends_between_two_blocks_gets_no_more_of_them(peers: Peers) -> None:
    """The mover itself looks, before each block, not only who asks before the transfer."""
    spy = Spy(window=1)
    async with AsyncExitStack() as stack:
        stage = await mooncake_stage(stack, peers, factory=spy.make, window=1)
        far = await stage.far()
        await stage.engine.write(far.session, stage.plan(far, MIB), deadline_s=5)
        pin, before = pin_of(stage, far.session), spy.submitted
        pin.canary = None
        pin.lane.over = lambda: "its process has ended" if spy.submitted - before >= 2 else None
        error = await failure(stage.engine.write(far.session, stage.plan(far), deadline_s=5))
        assert error.cause is Cause.PEER_CHANGED
        assert spy.submitted - before == 2


async def test_a_peer_that_was_only_cut_off_is_asked_and_written_to_again(stage: Stage) -> None:
    """What broke the tether broke a connection, not a process: the boot id says so."""
    far = await stage.far()
    await stage.engine.write(far.session, stage.plan(far, MIB), deadline_s=5)
    lane = lane_of(stage, far.session)
    lane.over = lambda: "its process has ended: the kernel has closed what was connected to it"
    stage.memory[:] = 6
    await stage.engine.write(far.session, stage.plan(far), deadline_s=5)
    assert await far.count(6) == 4 * MIB
    assert lane_of(stage, far.session) is not lane
    assert lane_of(stage, far.session).over() is None


async def test_a_stock_peer_whose_tether_ended_is_not_taken_for_itself(peers: Peers) -> None:
    """It shows no boot id: of two processes with equal ports and addresses nothing tells the second from the first."""
    async with AsyncExitStack() as stack:
        stage = await mooncake_stage(stack, peers)
        far = await stage.far()
        await stage.engine.write(far.session, stage.plan(far, MIB), deadline_s=5)
        pin = pin_of(stage, far.session)
        pin.canary, pin.lane.over = None, lambda: "its process has ended"
        for _ in range(3):
            error = await failure(stage.engine.write(far.session, stage.plan(far, MIB), deadline_s=5))
            assert error.cause is Cause.PEER_CHANGED
        stage.engine.forget(far.session)
        await stage.engine.write(far.session, stage.plan(far, MIB), deadline_s=5)


async def test_a_stock_peer_whose_way_was_cut_is_asked_again(stage: Stage) -> None:
    far = await stage.far()
    await stage.engine.write(far.session, stage.plan(far, MIB), deadline_s=5)
    pin = pin_of(stage, far.session)
    pin.canary, pin.lane.over, pin.lane.was_cut = None, lambda: "the way to it was cut", lambda: True
    await stage.engine.write(far.session, stage.plan(far, MIB), deadline_s=5)


# --- ways


async def test_each_block_in_flight_has_a_connection_of_its_own(peers: Peers) -> None:
    async with AsyncExitStack() as stack:
        stage = await mooncake_stage(stack, peers, window=6)
        far = await stage.far()
        port = (await stage.engine.probe(far.session, deadline_s=5)).data_port
        await stage.engine.write(far.session, stage.plan(far, MIB, block=4096), deadline_s=5)
        await stage.engine.write(far.session, stage.plan(far, MIB, block=4096), deadline_s=5)
        assert len(connections_to(port)) == 6 + 1, "and the tether"


class Recorder:
    """The real engine, and by which name each block went: ("read" or "write", name, nbytes)."""

    def __init__(self) -> None:
        self.given: list[tuple[str, str, int]] = []
        self.on: dict[str, int] = {}
        self.crowded: list[str] = []

    def make(self) -> Any:
        from mooncake.engine import TransferEngine

        recorder = self

        class Recorded(TransferEngine):  # type: ignore[misc, unused-ignore]
            def transfer_submit_write(self, name: str, local: int, remote: int, nbytes: int) -> int:
                recorder.given.append(("write", name, nbytes))
                return recorder.took(name, super().transfer_submit_write(name, local, remote, nbytes))

            def batch_transfer_async_read(self, name: str, local: object, remote: object, nbytes: list[int]) -> int:
                recorder.given.append(("read", name, nbytes[0]))
                return recorder.took(name, super().batch_transfer_async_read(name, local, remote, nbytes))

            def transfer_check_status(self, ticket: int) -> int:
                status = int(super().transfer_check_status(ticket))
                if status:
                    recorder.on = {name: other for name, other in recorder.on.items() if other != ticket}
                return status

        return Recorded()

    def took(self, name: str, ticket: int) -> int:
        if name in self.on:
            self.crowded.append(name)
        self.on[name] = ticket
        return ticket


async def test_no_two_blocks_are_on_one_way_and_each_way_is_tried_by_a_byte_first(peers: Peers) -> None:
    """What the engine has to queue or to connect for, it may send to whoever listens there a second later."""
    recorder = Recorder()
    async with AsyncExitStack() as stack:
        stage = await mooncake_stage(stack, peers, window=8, factory=recorder.make)
        far = await stage.far()
        for _ in range(3):
            await stage.engine.write(far.session, stage.plan(far), deadline_s=5)
        far.stop()
        await failure(stage.engine.write(far.session, stage.plan(far), deadline_s=20))
        far.resume()
        await stage.engine.write(far.session, stage.plan(far), deadline_s=10)
    assert not recorder.crowded
    first = {name: (what, nbytes) for what, name, nbytes in reversed(recorder.given)}
    assert set(first.values()) == {("read", 1)}
    assert len(first) > 8, "ways whose block has failed are not used again"
    assert sum(what == "write" for what, _, _ in recorder.given) >= 4 * 64


async def test_a_hung_peer_is_at_rest_after_one_stall_however_many_blocks_it_has(peers: Peers) -> None:
    """They do not wait for each other's connections: 16 blocks took four stalls and as many pauses."""
    async with AsyncExitStack() as stack:
        stage = await mooncake_stage(stack, peers, window=16)
        far = await stage.far()
        await stage.engine.write(far.session, stage.plan(far), deadline_s=5)
        far.stop()
        began = time.monotonic()
        error = await failure(stage.engine.write(far.session, stage.plan(far), deadline_s=20))
        assert (error.cause, error.settled) == (Cause.TIMED_OUT, True)
        assert time.monotonic() - began < 2.5
        far.resume()


async def test_connections_to_a_life_that_is_over_are_closed(stage: Stage) -> None:
    """The engine keeps one that it is not asked to use: a peer that comes and goes would fill the table of files."""
    far = await stage.far()
    port = (await stage.engine.probe(far.session, deadline_s=5)).data_port
    await stage.engine.write(far.session, stage.plan(far), deadline_s=5)
    assert len(connections_to(port)) == 5
    stage.engine.forget(far.session)
    async with asyncio.timeout(60):
        while "ESTABLISHED" in connections_to(port):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    await stage.engine.write(far.session, stage.plan(far), deadline_s=5)
    await far.kill()
    stage.engine.forget(far.session)
    async with asyncio.timeout(60):
        while connections_to(port):  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_connections_that_were_in_use_when_a_life_was_given_up_are_closed_too(stage: Stage) -> None:
    far = await stage.far()
    port = (await stage.engine.probe(far.session, deadline_s=5)).data_port
    for _ in range(5):
        writing = asyncio.create_task(stage.engine.write(far.session, stage.plan(far, block=4096), deadline_s=10))
        async with asyncio.timeout(60):
            while len(connections_to(port)) < 3:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        stage.engine.forget(far.session)
        await writing
    async with asyncio.timeout(60):
        while len(connections_to(port)) > 4 + 1:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_a_wheel_that_cannot_read_greets_nobody_and_writes_all_the_same(peers: Peers) -> None:
    from mooncake.engine import TransferEngine

    class Older:
        """Without a call for reads."""

        initialize, get_rpc_port = TransferEngine.initialize, TransferEngine.get_rpc_port

    for name in ("register_memory", "unregister_memory", "transfer_submit_write", "transfer_check_status"):
        setattr(Older, name, lambda self, *given, _name=name: getattr(self.it, _name)(*given))

    class Made(Older):
        def __init__(self) -> None:
            self.it = TransferEngine()

        def initialize(self, *given: object) -> int:
            return int(self.it.initialize(*given))

        def get_rpc_port(self) -> int:
            return int(self.it.get_rpc_port())

    far = peers.take()
    pointer = far.ask_now("register", nbytes=MIB)["pointer"]
    async with AsyncExitStack() as stack:
        settings = MooncakeSettings()
        engine = await stack.enter_async_context(open_mooncake(settings, Cpu(), factory=Made))
        assert not engine.capabilities.async_read
        from pdctl.memory import Arena

        arena = stack.enter_context(Arena(MIB))
        arena.array(MIB, "uint8")[:] = 9
        await engine.register(arena.region)
        await engine.write(far.session, CopyPlan.of((arena.region.pointer, pointer, MIB)), deadline_s=5)
    assert far.ask_now("count", pointer=pointer, value=9)["n"] == MIB
    peers.give_back(far)
