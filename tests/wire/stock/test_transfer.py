"""Real bytes over the real Mooncake engine between stock SGLang ranks and ours, paired by our registry."""

from __future__ import annotations

import asyncio
import base64
import itertools
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import psutil
import pytest

from pdctl.arriving import ArrivingRoom
from pdctl.beside import beside
from pdctl.client import RegistryClient
from pdctl.core.address import Endpoint
from pdctl.core.comparing import Checksum
from pdctl.core.ejection import ProbePolicy
from pdctl.core.layout import Pool, RankPools
from pdctl.core.route import Announcement, Seat, Shape
from pdctl.core.sessions import SessionTable
from pdctl.core.trace import TraceContext
from pdctl.core.transfer import RoomTimeouts
from pdctl.device.cpu import Cpu
from pdctl.engine.asking import Asking
from pdctl.engine.base import Engine
from pdctl.engine.mooncake import open_mooncake
from pdctl.engine.settings import MooncakeSettings
from pdctl.errors import RoomFailed
from pdctl.memory import Arena
from pdctl.metrics import Metrics
from pdctl.peer import PeerLink, open_link
from pdctl.prober import Prober
from pdctl.receiver import Receiver
from pdctl.sender import Sender
from tests.room_rig import Released
from tests.wire.stock.conftest import Stock

ENTRIES, PAGES, PAGE_NBYTES, ROWS = 4, 16, 2048, 4
AUX_NBYTES = (64, 16)
SEED = 20260
BOOTSTRAPPING, WAITING, TRANSFERRING, SUCCESS, FAILED = 1, 2, 3, 4, 0
# checksum: rooms with a stock peer go as without
TIMEOUTS = RoomTimeouts(
    bootstrap_s=20, waiting_s=20, transfer_s=20, release_s=10, drain_margin_s=0.1, checksum=Checksum.OFFERED
)
SEAT, SHAPE = Seat(0, 0, 0, 0), Shape(1, 1, 1, 1, 16, "bfloat16")
WITHIN_S = 60.0

rooms = itertools.count(2**40)


@dataclass
class Ours:
    """Our side of one pair: an engine, a link, and memory of the same layout as stock's."""

    engine: Engine
    link: PeerLink
    kv: list[Any]
    aux: list[Any]

    @property
    def kv_pool(self) -> Pool:
        return Pool(tuple(a.ctypes.data for a in self.kv), (PAGE_NBYTES,) * ENTRIES, PAGES)

    @property
    def aux_pool(self) -> Pool:
        return Pool(tuple(a.ctypes.data for a in self.aux), AUX_NBYTES, ROWS)

    def fill(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        for array in (*self.kv, *self.aux):
            array[:] = rng.integers(0, 256, array.shape, np.uint8)


@pytest.fixture
async def ours(metrics: Metrics) -> AsyncIterator[Ours]:
    arena = Arena(1 << 20)
    kv = [arena.array((PAGES, PAGE_NBYTES), np.uint8) for _ in range(ENTRIES)]
    aux = [arena.array((ROWS, nbytes), np.uint8) for nbytes in AUX_NBYTES]
    async with (
        open_mooncake(MooncakeSettings(progress_timeout_s=2, handshake_timeout_s=2.0), Cpu()) as engine,
        open_link("127.0.0.1", metrics=metrics) as link,
    ):
        await engine.register(arena.region)
        yield Ours(engine, link, kv, aux)
        await engine.unregister(arena.region)


@pytest.fixture
def timeouts() -> RoomTimeouts:
    return TIMEOUTS


@pytest.fixture
async def receiver(ours: Ours, metrics: Metrics, timeouts: RoomTimeouts) -> AsyncIterator[Receiver]:
    one = Receiver(
        ours.engine.session, ours.link.send, ours.link.endpoint, RankPools(ours.kv_pool, ours.aux_pool), 0, 1,
        timeouts, time.monotonic, metrics, ours.link.is_gone,
    )  # fmt: skip
    async with beside(link=ours.link.serve(one.handle)), one:
        yield one


@pytest.fixture
async def sender(ours: Ours, metrics: Metrics, timeouts: RoomTimeouts) -> AsyncIterator[Sender]:
    table: SessionTable[Any] = SessionTable(ProbePolicy(interval_s=0.1), lambda: 0.5)
    prober = Prober(table, Asking(ours.engine), clock=time.monotonic, metrics=metrics)
    pools = RankPools(ours.kv_pool, ours.aux_pool)
    one = Sender(ours.engine, ours.link.send, pools, 0, prober, timeouts, time.monotonic, metrics)
    async with beside(link=ours.link.serve(one.handle), prober=prober.run()), one:
        yield one


@pytest.fixture
async def client(registry_url: str) -> AsyncIterator[RegistryClient]:
    async with RegistryClient(registry_url) as one:
        yield one


@pytest.fixture
def address(registry_url: str) -> str:
    return registry_url.removeprefix("http://")


def decoded(texts: list[str]) -> list[bytes]:
    return [base64.b64decode(text) for text in texts]


@asynccontextmanager
async def stock_prefill(stock: Stock, address: str) -> AsyncIterator[Callable[..., Any]]:
    """A stock prefill rank with known bytes, in our registry; gives what opens a stock sender for a room."""
    await stock("rank", name="p", role="prefill", registry=address, moves=True)
    await stock("fill", name="p", seed=SEED)

    async def sending(room: int, n_pages: int, row: int) -> None:
        await stock("open_sender", name="p", room=room, address=address, pages=n_pages, row=row)

    yield sending


async def stock_decode(stock: Stock, client: RegistryClient, ours: Ours, address: str) -> None:
    """A stock decode rank that has found our prefill rank in our registry."""
    await client.register(Announcement(SEAT, SHAPE, ours.link.endpoint, 30000))
    await stock("rank", name="d", role="decode", registry=address, moves=True)
    assert await stock("topology", name="d", address=address) is not None


async def named_by_stock(stock: Stock, address: str, pages: list[int], row: int) -> int:
    room = next(rooms)
    await stock("open_receiver", name="d", room=room, address=address)
    await stock("send_metadata", room=room, pages=pages, row=row)
    return room


def _told(receiver: Receiver, room: int, prefill: Endpoint, pages: list[int]) -> ArrivingRoom:
    """With frames behind those that stock knows."""
    return receiver.open(room, prefill, pages, 3, trace=TraceContext("a" * 32, "b" * 16, state="vendor=1"))


async def test_what_a_stock_prefill_sends_arrives_in_our_pages(
    stock: Stock, client: RegistryClient, ours: Ours, receiver: Receiver, address: str
) -> None:
    source, destination, room = [3, 4, 5, 9, 1], [0, 7, 8, 2, 15], next(rooms)
    async with stock_prefill(stock, address) as sending:
        await sending(room, len(source), 2)
        prefill = await client.rank(SEAT)
        async with asyncio.timeout(WITHIN_S), _told(receiver, room, prefill, destination) as arriving:
            await stock("poll_until", room=room, status=[WAITING])
            await stock("send", room=room, pages=source[:3])
            await stock("send", room=room, pages=source[3:])
            await arriving.arrived()
        assert await stock("poll_until", room=room, status=[SUCCESS]) == SUCCESS
        sent = decoded(await stock("page_bytes", name="p", pages=source))
        assert [array[destination].tobytes() for array in ours.kv] == sent
        assert [array[3].tobytes() for array in ours.aux] == decoded(await stock("row_bytes", name="p", row=2))
    untouched = sorted(set(range(PAGES)) - set(destination))
    assert not any(array[untouched].any() for array in ours.kv)


async def test_what_we_send_arrives_in_a_stock_decodes_pages(
    stock: Stock, client: RegistryClient, ours: Ours, sender: Sender, address: str
) -> None:
    ours.fill(SEED)
    await stock_decode(stock, client, ours, address)
    source, destination = [3, 4, 5, 9, 1], [0, 7, 8, 2, 15]
    room = await named_by_stock(stock, address, destination, 3)
    async with asyncio.timeout(WITHIN_S), sender.open(room) as sending:
        await sending.peers_ready()
        await sending.send(source[:3])
        await sending.send(source[3:])
        await sending.finish(2)
    assert await stock("poll_until", room=room, status=[SUCCESS]) == SUCCESS
    arrived = decoded(await stock("page_bytes", name="d", pages=destination))
    assert arrived == [array[source].tobytes() for array in ours.kv]
    assert decoded(await stock("row_bytes", name="d", row=3)) == [array[2].tobytes() for array in ours.aux]


async def test_a_stock_prefill_confirms_our_abort_and_the_pages_come_back(
    stock: Stock, client: RegistryClient, receiver: Receiver, address: str
) -> None:
    room, released = next(rooms), asyncio.Event()
    async with stock_prefill(stock, address) as sending:
        await sending(room, 2, 0)
        prefill = await client.rank(SEAT)
        async with receiver.open(room, prefill, [4, 5], 0, release=lambda pages: released.set()):
            await stock("poll_until", room=room, status=[WAITING])
        assert [held.room for held in receiver.quarantine] == [room]
        await asyncio.wait_for(released.wait(), TIMEOUTS.release_s / 2)
        assert await stock("poll_until", room=room, status=[FAILED]) == FAILED
    assert receiver.quarantine == ()


async def test_we_confirm_a_stock_decodes_abort(
    stock: Stock, client: RegistryClient, ours: Ours, sender: Sender, address: str
) -> None:
    await stock_decode(stock, client, ours, address)
    room = await named_by_stock(stock, address, [1, 2], 0)
    async with sender.open(room) as sending:
        await asyncio.wait_for(sending.peers_ready(), WITHIN_S)
        await stock("abort", room=room)
        assert await stock("is_release_safe", name="d", room=room, acks=1)
        with pytest.raises(RoomFailed, match="given the room up"):
            await sending.send([1, 2])


async def fall_over(sender: Sender, room: int) -> None:
    async with sender.open(room) as sending:
        await asyncio.wait_for(sending.peers_ready(), WITHIN_S)
        raise ValueError("the model fell over")


async def test_a_stock_decode_learns_why_our_room_failed(
    stock: Stock, client: RegistryClient, ours: Ours, sender: Sender, address: str
) -> None:
    await stock_decode(stock, client, ours, address)
    room = await named_by_stock(stock, address, [1, 2], 0)
    with pytest.raises(ValueError, match="the model fell over"):
        await fall_over(sender, room)
    await stock("poll_until", room=room, status=[FAILED])
    assert "the model fell over" in await stock("reason", room=room)


async def one_page(sender: Sender, room: int) -> None:
    async with sender.open(room) as sending:
        await sending.peers_ready()
        await sending.send([0])
        await sending.finish(0)


async def until_trusted(sender: Sender) -> None:
    (session,) = sender.sessions
    while sender.gate.reason_blocked(session):  # noqa: ASYNC110 - the gate has no event for strangers
        await asyncio.sleep(0.02)


async def test_a_stopped_stock_decode_is_blocked_and_served_again_when_it_goes_on(
    stock: Stock, client: RegistryClient, ours: Ours, sender: Sender, address: str
) -> None:
    ours.fill(SEED)
    await stock_decode(stock, client, ours, address)
    first, second, third = [await named_by_stock(stock, address, [n], n) for n in range(3)]
    async with asyncio.timeout(WITHIN_S):
        await one_page(sender, first)
        os.kill(stock.process.pid, signal.SIGSTOP)
        while psutil.Process(stock.process.pid).status() != psutil.STATUS_STOPPED:
            pass  # takes microseconds; a page may take less
        try:
            with pytest.raises(RoomFailed):
                await one_page(sender, second)
            with pytest.raises(RoomFailed, match="is blocked"):
                await one_page(sender, third)
        finally:
            os.kill(stock.process.pid, signal.SIGCONT)
        served = await named_by_stock(stock, address, [5], 1)
        await until_trusted(sender)
        await one_page(sender, served)
    assert await stock("poll_until", room=served, status=[SUCCESS]) == SUCCESS
    assert decoded(await stock("page_bytes", name="d", pages=[5])) == [array[[0]].tobytes() for array in ours.kv]
    await stock("poll_until", room=third, status=[FAILED])
    assert "is blocked" in await stock("reason", room=third)


SUMS_REQUIRED = pytest.mark.parametrize("timeouts", [replace(TIMEOUTS, checksum=Checksum.REQUIRED)], ids=["required"])


@SUMS_REQUIRED
async def test_a_decode_that_requires_checksums_refuses_a_stock_prefill_before_it_is_told_of_a_page(
    stock: Stock, client: RegistryClient, receiver: Receiver, address: str
) -> None:
    room, given_back = next(rooms), Released()
    async with stock_prefill(stock, address) as sending:
        await sending(room, 1, 0)
        arriving = receiver.open(room, await client.rank(SEAT), [4], 0, release=given_back)
        with pytest.raises(RoomFailed, match=r"gives no checksums, and room\.checksum is required here"):
            await asyncio.wait_for(arriving.__aenter__(), 60)
        assert given_back.now == [[4]]
        assert await stock("poll_until", room=room, status=[FAILED]) == FAILED, "it need not wait for its own time-out"
    assert (receiver.contacts.told, receiver.quarantine) == ((), ())


@SUMS_REQUIRED
async def test_a_prefill_that_requires_checksums_refuses_a_stock_decode_and_says_why(
    stock: Stock, client: RegistryClient, ours: Ours, sender: Sender, address: str
) -> None:
    await stock_decode(stock, client, ours, address)
    room = await named_by_stock(stock, address, [1, 2], 0)
    with pytest.raises(RoomFailed, match=r"asks for no checksums, and room\.checksum is required here"):
        await asyncio.wait_for(one_page(sender, room), WITHIN_S)
    await stock("poll_until", room=room, status=[FAILED])
    assert "asks for no checksums" in await stock("reason", room=room)
