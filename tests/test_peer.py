"""The control link, over real sockets: what one peer does never reaches the next one's messages."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import zmq
import zmq.asyncio
from structlog.testing import capture_logs

from pdctl.core.address import Endpoint
from pdctl.errors import BadFrames, ConfigError, Unreachable
from pdctl.metrics import Metrics
from pdctl.peer import LinkSettings, PeerLink, open_link
from tests.conftest import Clock

LOCAL = "127.0.0.1"
QUICK = LinkSettings(send_deadline_s=0.2)


class Inbox:
    """What a served link has heard, one message after another."""

    def __init__(self) -> None:
        self._heard: asyncio.Queue[list[bytes]] = asyncio.Queue()
        self.handle: Callable[[list[bytes]], None] = self._heard.put_nowait

    async def next(self) -> list[bytes]:
        return await asyncio.wait_for(self._heard.get(), 60)


@asynccontextmanager
async def served(link: PeerLink, handle: Callable[[list[bytes]], None]) -> AsyncIterator[None]:
    task = asyncio.create_task(link.serve(handle))
    try:
        yield
    finally:
        assert not task.done()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@asynccontextmanager
async def listening(host: str = LOCAL, settings: LinkSettings = QUICK) -> AsyncIterator[tuple[PeerLink, Inbox]]:
    inbox = Inbox()
    async with open_link(host, metrics=Metrics(), settings=settings) as link, served(link, inbox.handle):
        yield link, inbox


@pytest.fixture
async def link() -> AsyncIterator[PeerLink]:
    async with open_link(LOCAL, metrics=Metrics(), settings=QUICK) as link:
        yield link


def silent_port() -> tuple[socket.socket, Endpoint]:
    """Takes connections, as a stopped process does, and never says a word."""
    listener = socket.create_server((LOCAL, 0))
    return listener, Endpoint(LOCAL, listener.getsockname()[1])


def free_port() -> Endpoint:
    listener, endpoint = silent_port()
    listener.close()
    return endpoint


@pytest.mark.parametrize("host", [LOCAL, "::1", "localhost"])
async def test_frames_arrive_whole_and_in_order(host: str) -> None:
    async with listening(host) as (there, inbox), open_link(LOCAL, metrics=Metrics()) as here:
        for n in range(100):
            await here.send(there.endpoint, [b"%d" % n, b"", b"x" * n])
        assert [await inbox.next() for _ in range(100)] == [[b"%d" % n, b"", b"x" * n] for n in range(100)]


async def test_a_stock_socket_is_understood() -> None:
    async with listening() as (there, inbox):
        context = zmq.asyncio.Context()
        push = context.socket(zmq.PUSH)
        push.connect(there.endpoint.tcp)
        await push.send_multipart([b"7", b"4", b"0"])
        assert await inbox.next() == [b"7", b"4", b"0"]
        context.destroy(linger=0)


async def test_nobody_there_is_unreachable_within_the_deadline(link: PeerLink) -> None:
    started = time.monotonic()
    with pytest.raises(Unreachable, match=r"no connection took a message within 0\.2 s: see whether it runs"):
        await link.send(free_port(), [b"x"])
    assert time.monotonic() - started < 2


async def test_what_was_called_unsent_never_arrives(link: PeerLink) -> None:
    endpoint = free_port()
    with pytest.raises(Unreachable):
        await link.send(endpoint, [b"late"])
    context = zmq.asyncio.Context()
    pull = context.socket(zmq.PULL)
    pull.bind(endpoint.tcp)
    for _ in range(50):
        with contextlib.suppress(Unreachable):
            await link.send(endpoint, [b"now"])
            break
    assert await asyncio.wait_for(pull.recv_multipart(), 60) == [b"now"]
    context.destroy(linger=0)


async def test_a_peer_that_is_gone_delays_no_other() -> None:
    async with listening() as (there, inbox), open_link(LOCAL, metrics=Metrics(), settings=QUICK) as here:
        lost = asyncio.create_task(here.send(free_port(), [b"lost"]))
        await here.send(there.endpoint, [b"found"])
        assert await inbox.next() == [b"found"]
        assert not lost.done()
        with pytest.raises(Unreachable):
            await lost


async def test_a_silent_peer_can_hold_only_so_many_messages() -> None:
    settings = LinkSettings(send_deadline_s=0.3, max_waiting=3)
    async with open_link(LOCAL, metrics=Metrics(), settings=settings) as link:
        nobody = free_port()
        results = await asyncio.gather(*(link.send(nobody, [b"x"]) for _ in range(5)), return_exceptions=True)
        assert [("3 messages wait" in str(r)) for r in results] == [False, False, False, True, True]


async def test_a_peer_that_comes_back_is_reached_again() -> None:
    async with open_link(LOCAL, metrics=Metrics(), settings=LinkSettings(send_deadline_s=3)) as here:
        async with listening() as (there, inbox):
            await here.send(there.endpoint, [b"1"])
            assert await inbox.next() == [b"1"]
        back = zmq.asyncio.Context()
        pull = back.socket(zmq.PULL)
        pull.bind(there.endpoint.tcp)
        heard = asyncio.ensure_future(pull.recv_multipart())
        while not heard.done():  # the first may be lost in the broken connection
            await here.send(there.endpoint, [b"2"])
            await asyncio.wait({heard}, timeout=0.05)
        assert heard.result() == [b"2"]
        back.destroy(linger=0)


async def test_the_peer_unused_for_longest_makes_room() -> None:
    settings = LinkSettings(send_deadline_s=1, max_sockets=2)
    async with (
        listening() as (a, at_a),
        listening() as (b, at_b),
        listening() as (c, at_c),
        open_link(LOCAL, metrics=Metrics(), settings=settings) as here,
    ):
        for there, inbox in ((a, at_a), (b, at_b), (a, at_a), (c, at_c)):
            await here.send(there.endpoint, [b"x"])
            assert await inbox.next() == [b"x"]
        assert here.connected == (a.endpoint, c.endpoint)


async def test_messages_taken_by_an_evicted_socket_still_arrive() -> None:
    settings = LinkSettings(send_deadline_s=5, max_sockets=1, flush_s=5)
    context = zmq.asyncio.Context()
    slow = context.socket(zmq.PULL)
    slow.set(zmq.RCVHWM, 1)
    port = slow.bind_to_random_port(f"tcp://{LOCAL}")
    large = b"x" * (4 << 20)  # more than the kernel takes at once
    async with listening() as (other, _), open_link(LOCAL, metrics=Metrics(), settings=settings) as here:
        for _ in range(8):
            await here.send(Endpoint(LOCAL, port), [large])
        await here.send(other.endpoint, [b"y"])
        assert here.connected == (other.endpoint,)
        for _ in range(8):
            assert await asyncio.wait_for(slow.recv_multipart(), 60) == [large]
    context.destroy(linger=0)


async def test_a_socket_that_somebody_waits_for_is_not_evicted() -> None:
    settings = LinkSettings(send_deadline_s=0.3, max_sockets=1)
    async with listening() as (there, _), open_link(LOCAL, metrics=Metrics(), settings=settings) as here:
        waiting = asyncio.create_task(here.send(free_port(), [b"x"]))
        await asyncio.sleep(0)
        with pytest.raises(Unreachable, match="all 1 sockets wait"):
            await here.send(there.endpoint, [b"y"])
        with pytest.raises(Unreachable, match="no connection"):
            await waiting


async def test_a_name_that_nobody_has_is_unreachable(link: PeerLink) -> None:
    with pytest.raises(Unreachable, match="name cannot be resolved"):
        await link.send(Endpoint("no-such-host.invalid", 1), [b"x"])


# --- listening


async def test_a_bad_message_does_not_end_the_loop() -> None:
    metrics, inbox = Metrics(), Inbox()

    def handle(frames: list[bytes]) -> None:
        if frames == [b"bad"]:
            raise BadFrames("frame 0 is bad")
        if frames == [b"defect"]:
            raise ZeroDivisionError
        inbox.handle(frames)

    async with open_link(LOCAL, metrics=metrics) as link, served(link, handle):
        for frames in ([b"bad"], [b"defect"], [b"good"]):
            await link.send(link.endpoint, frames)
        assert await inbox.next() == [b"good"]
    shown = metrics.exposition()[0].decode()
    assert 'pdctl_link_messages_dropped_total{kind="malformed"} 1.0' in shown
    assert 'pdctl_link_messages_dropped_total{kind="not_handled"} 1.0' in shown
    assert "pdctl_link_messages_received_total 3.0" in shown


async def test_a_flood_of_bad_messages_is_not_a_flood_of_lines(clock: Clock) -> None:
    def handle(frames: list[bytes]) -> None:
        raise BadFrames("bad")

    async with open_link(LOCAL, metrics=Metrics(), clock=clock) as link:
        with capture_logs() as lines:
            for _ in range(50):
                link._deliver(handle, [b"x"])
            clock.forward(1)
            link._deliver(handle, [b"x"])
    assert [(line["event"], line["unlogged"]) for line in lines] == [("message dropped", 0), ("message dropped", 49)]


async def test_a_frame_above_the_limit_is_dropped_and_others_go_on() -> None:
    settings = LinkSettings(max_frame_nbytes=1000)
    async with (
        listening(settings=settings) as (there, inbox),
        open_link(LOCAL, metrics=Metrics()) as hostile,
        open_link(LOCAL, metrics=Metrics()) as good,
    ):
        await hostile.send(there.endpoint, [b"x" * 1001])
        await good.send(there.endpoint, [b"x" * 1000])
        assert await inbox.next() == [b"x" * 1000]


async def test_bytes_that_are_no_zmq_hurt_nobody() -> None:
    async with listening() as (there, inbox), open_link(LOCAL, metrics=Metrics()) as here:
        stranger = socket.create_connection((there.endpoint.host, there.endpoint.port))
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n" * 100)
        await here.send(there.endpoint, [b"x"])
        assert await inbox.next() == [b"x"]
        stranger.close()


async def test_a_flood_leaves_the_loop_to_others() -> None:
    n_heard, first, last = 0, asyncio.Event(), asyncio.Event()

    def handle(frames: list[bytes]) -> None:
        nonlocal n_heard
        n_heard += 1
        first.set()
        if frames == [b"last"]:
            last.set()

    async with open_link(LOCAL, metrics=Metrics()) as link:
        for _ in range(500):
            await link.send(link.endpoint, [b"x"])
        await link.send(link.endpoint, [b"last"])
        async with served(link, handle):
            await first.wait()
            assert n_heard < 500
            await asyncio.wait_for(last.wait(), 60)


# --- the ends


async def test_messages_that_take_long_to_handle_hold_the_loop_one_at_a_time() -> None:
    """64 rooms that decode names at one moment held a prefill's loop for 12 ms."""
    handled: list[float] = []

    def slow(_: list[bytes]) -> None:
        handled.append(time.perf_counter())
        while time.perf_counter() < handled[-1] + 0.004:
            pass

    async with open_link(LOCAL, metrics=Metrics(), settings=QUICK) as link:
        async with open_link(LOCAL, metrics=Metrics(), settings=QUICK) as peer:
            for number in range(20):
                await peer.send(link.endpoint, [b"%d" % number])
        beats = 0
        async with served(link, slow), asyncio.timeout(60):
            while len(handled) < 20:
                await asyncio.sleep(0)
                beats += bool(handled)
        assert beats >= 19


async def test_closing_takes_a_moment_whatever_the_peers_do() -> None:
    listener, silent = silent_port()
    async with open_link(LOCAL, metrics=Metrics(), settings=QUICK) as link:
        with contextlib.suppress(Unreachable):
            await link.send(silent, [b"x" * 1_000_000])
        started = time.monotonic()
    assert time.monotonic() - started < 1
    listener.close()


async def test_cancelled_in_mid_send_it_closes_all_the_same() -> None:
    opened = asyncio.Event()

    async def work() -> None:
        async with open_link(LOCAL, metrics=Metrics(), settings=LinkSettings(send_deadline_s=60)) as link:
            opened.set()
            await link.send(free_port(), [b"x"])

    task = asyncio.create_task(work())
    await opened.wait()
    task.cancel()
    started = time.monotonic()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert time.monotonic() - started < 1


async def test_what_was_sent_last_leaves_before_the_link_closes() -> None:
    async with listening() as (there, inbox):
        async with open_link(LOCAL, metrics=Metrics()) as here:
            await here.send(there.endpoint, [b"x" * 100_000])
        assert await inbox.next() == [b"x" * 100_000]


async def test_an_address_of_another_host_is_refused_with_its_text() -> None:
    with pytest.raises(ConfigError, match=r"cannot listen for peers at '192\.0\.2\.1'"):
        async with open_link("192.0.2.1", metrics=Metrics()):
            pass


async def test_peers_are_told_the_announced_host() -> None:
    async with open_link("0.0.0.0", metrics=Metrics(), announce_host=LOCAL) as link:
        assert link.endpoint.host == LOCAL
        await link.send(link.endpoint, [b"x"])


@pytest.mark.parametrize("name", ["send_deadline_s", "max_sockets", "max_frame_nbytes", "max_waiting", "flush_s"])
def test_a_limit_of_nothing_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        LinkSettings(**{name: 0})


async def test_only_a_refusal_proves_that_a_peer_is_gone(link: PeerLink) -> None:
    listener, silent = silent_port()
    assert not await link.is_gone(silent)
    assert not await link.is_gone(Endpoint("no-such-host.invalid", 1))
    listener.close()
    assert await link.is_gone(silent)
