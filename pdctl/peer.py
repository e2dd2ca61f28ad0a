"""
The control link between prefill and decode ranks: whole messages in and out, over ZMQ.

One PULL socket to listen at, one PUSH socket for each peer, as SGLang's ranks have them. What a message means is not
known here. Nothing is retried here, and nobody waits for a peer but those who speak to it.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import structlog
import zmq
import zmq.asyncio

from pdctl.core.address import Endpoint
from pdctl.core.seconds import check_seconds
from pdctl.counts.rooms import LinkDrop
from pdctl.errors import BadFrames, ConfigError, Unreachable
from pdctl.lag import done_within, patience
from pdctl.metrics import Metrics

log = structlog.get_logger(__name__)

_BREATHE_AFTER_S = 1e-3  # of messages; a receive that is ready at once never lets the event loop run
_LOG_EVERY_S = 1.0
# Until a connection whose other end acknowledges no byte is given up, and made anew with the next message. The kernel's
# own patience is a quarter of an hour. A peer that is stopped acknowledges: its kernel does.
_UNHEARD_S = 10.0


@dataclass(frozen=True, slots=True)
class LinkSettings:
    """send_deadline_s: until a peer must have taken a message; SGLang's ranks wait 1 s as well.

    max_sockets: peers that a socket is kept for; the one unused for longest makes room. SGLang keeps 16,384.
    max_frame_nbytes: ZMQ cuts the connection of a peer that sends a larger frame. 16 MiB are the page numbers of four
        million pages, or a generous aux row.
    max_waiting: messages that may wait for one peer; it is what a stopped peer can cost us.
    flush_s: at the end, how long what was sent last may take to leave this host.
    """

    send_deadline_s: float = 1.0
    max_sockets: int = 1024
    max_frame_nbytes: int = 16 << 20
    max_waiting: int = 64
    flush_s: float = 0.1

    def __post_init__(self) -> None:
        check_seconds(self, "link")
        for name in ("max_sockets", "max_frame_nbytes", "max_waiting"):
            if getattr(self, name) < 1:
                raise ConfigError(f"link {name} is {getattr(self, name)}: give at least 1")


@dataclass(slots=True)
class _Peer:
    socket: zmq.asyncio.Socket
    waiting: int = 0


class PeerLink:
    """An open link. `endpoint` is where peers reach it."""

    def __init__(
        self,
        context: zmq.asyncio.Context,
        pull: zmq.asyncio.Socket,
        endpoint: Endpoint,
        settings: LinkSettings,
        metrics: Metrics,
        clock: Callable[[], float],
    ) -> None:
        self.endpoint = endpoint
        self._context = context
        self._pull = pull
        self._settings = settings
        self._metrics = metrics.link
        self._clock = clock
        self._peers: OrderedDict[Endpoint, _Peer] = OrderedDict()
        self._quiet_until = 0.0
        self._unlogged = 0

    @property
    def connected(self) -> tuple[Endpoint, ...]:
        """Peers that a socket is held for now, the one unused for longest first."""
        return tuple(self._peers)

    async def send(self, to: Endpoint, frames: Sequence[bytes]) -> None:
        """Hand `frames` to the connection with `to`, in order with what was sent to it before.

        Raises Unreachable when no connection takes them in time; then they never leave. Cancelled, they may or may not.
        """
        address = await self._address(to)
        peer = self._peer(to, address)
        if peer.waiting >= self._settings.max_waiting:
            raise self._unreachable(to, f"{peer.waiting} messages wait for it already")
        peer.waiting += 1
        try:
            await self._hand_over(peer.socket, to, frames)
        finally:
            peer.waiting -= 1

    async def serve(self, handle: Callable[[list[bytes]], None]) -> None:
        """Give each message to `handle`, for ever. What is wrong with one message never reaches the next."""
        loop = asyncio.get_running_loop()
        breathed = loop.time()
        while True:
            frames = await self._pull.recv_multipart()
            self._deliver(handle, frames)
            if loop.time() - breathed > _BREATHE_AFTER_S:
                await asyncio.sleep(0)
                breathed = loop.time()

    async def is_gone(self, peer: Endpoint) -> bool:
        """Whether the peer's own host says that nobody listens there: the process that did has ended.

        Silence proves nothing: a stopped process, a cut cable and a slow host are silent too.
        """
        try:
            async with patience(self._settings.send_deadline_s):
                _, writer = await asyncio.open_connection(peer.host, peer.port)
        except ConnectionRefusedError:
            return True
        except (OSError, TimeoutError):
            return False
        writer.close()
        return False

    async def _address(self, to: Endpoint) -> str:
        """As a number: ZMQ resolves names in the one thread that serves all peers, for as long as that takes."""
        if to in self._peers or _is_number(to.host):
            return to.tcp
        loop = asyncio.get_running_loop()
        try:
            async with patience(self._settings.send_deadline_s):
                found = await loop.getaddrinfo(to.host, to.port, type=socket.SOCK_STREAM)
        except (OSError, TimeoutError) as error:
            raise self._unreachable(to, f"its name cannot be resolved ({error or 'no answer'})") from None
        # IPv4 first: a name is mostly listened at as ZMQ itself resolves it, without IPv6
        best = min(found, key=lambda address: address[0] != socket.AF_INET)
        return Endpoint(str(best[4][0]), to.port).tcp

    def _peer(self, to: Endpoint, address: str) -> _Peer:
        if to not in self._peers:
            self._make_room(to)
            self._peers[to] = _Peer(_push(self._context, address))
        self._peers.move_to_end(to)
        return self._peers[to]

    def _make_room(self, to: Endpoint) -> None:
        if len(self._peers) < self._settings.max_sockets:
            return
        idle = next((endpoint for endpoint, peer in self._peers.items() if not peer.waiting), None)
        if idle is None:
            raise self._unreachable(to, f"all {len(self._peers)} sockets wait for other peers")
        # what it has taken may still leave: nobody waits for that here
        self._peers.pop(idle).socket.close(linger=_ms(self._settings.flush_s))

    async def _hand_over(self, push: zmq.asyncio.Socket, to: Endpoint, frames: Sequence[bytes]) -> None:
        # not patience(): a message taken in the very moment of the deadline must not be called unsent
        sending = asyncio.ensure_future(push.send_multipart(list(frames)))
        try:
            await done_within(sending, self._settings.send_deadline_s)
        finally:
            late = not sending.done()
            sending.cancel()
        if late:
            raise self._unreachable(to, f"no connection took a message within {self._settings.send_deadline_s:g} s")
        if (error := sending.exception()) is not None:
            raise self._unreachable(to, str(error))

    def _unreachable(self, to: Endpoint, why: str) -> Unreachable:
        self._metrics.unreachable()
        return Unreachable(f"peer {to} is not reachable: {why}: see whether it runs and its control port is open to us")

    def _deliver(self, handle: Callable[[list[bytes]], None], frames: list[bytes]) -> None:
        self._metrics.received()
        try:
            handle(frames)
        except BadFrames as error:
            self._drop(LinkDrop.MALFORMED, str(error))
        except Exception as error:
            # One message must not end the link for all peers: a stock prefill's control thread dies of a malformed one
            # while its process looks healthy.
            self._drop(LinkDrop.NOT_HANDLED, f"{type(error).__name__}: {error}", exc_info=error)

    def _drop(self, kind: LinkDrop, why: str, exc_info: Exception | None = None) -> None:
        self._metrics.dropped(kind)
        now = self._clock()
        if now < self._quiet_until:
            self._unlogged += 1
            return
        log.warning("message dropped", kind=kind.value, why=why, unlogged=self._unlogged, exc_info=exc_info)
        self._quiet_until, self._unlogged = now + _LOG_EVERY_S, 0


@asynccontextmanager
async def open_link(
    host: str,
    *,
    metrics: Metrics,
    settings: LinkSettings | None = None,
    announce_host: str | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> AsyncIterator[PeerLink]:
    """Listen at `host` on a port of the system's choice; peers are told `announce_host`, or else `host`.

    Leaving takes at most `settings.flush_s`, whatever the peers do.
    """
    settings = settings or LinkSettings()
    context = zmq.asyncio.Context()
    context.set(zmq.MAX_SOCKETS, settings.max_sockets + 16)
    try:
        pull = _pull(context, settings)
        endpoint = Endpoint(announce_host or host, _bind(pull, host))
        yield PeerLink(context, pull, endpoint, settings, metrics, clock)
    finally:
        context.destroy(linger=_ms(settings.flush_s))


def _pull(context: zmq.asyncio.Context, settings: LinkSettings) -> zmq.asyncio.Socket:
    socket = context.socket(zmq.PULL)
    socket.set(zmq.MAXMSGSIZE, settings.max_frame_nbytes)
    _keep_alive(socket)
    return socket


def _bind(socket: zmq.asyncio.Socket, host: str) -> int:
    if ":" in host:
        socket.set(zmq.IPV6, 1)
    try:
        socket.bind(f"tcp://[{host}]:0" if ":" in host else f"tcp://{host}:0")
    except zmq.ZMQError as error:
        raise ConfigError(f"cannot listen for peers at {host!r}: {error}: give an address of this host") from None
    return int(socket.get_string(zmq.LAST_ENDPOINT).rpartition(":")[2])


def _push(context: zmq.asyncio.Context, address: str) -> zmq.asyncio.Socket:
    socket = context.socket(zmq.PUSH)
    if "[" in address:
        socket.set(zmq.IPV6, 1)
    socket.set(zmq.LINGER, 0)
    socket.set(zmq.TCP_MAXRT, _ms(_UNHEARD_S))
    # Without it a message to nobody is queued and called sent; with it a send waits for a connection.
    socket.set(zmq.IMMEDIATE, 1)
    _keep_alive(socket)
    socket.connect(address)
    return socket


def _keep_alive(socket: zmq.asyncio.Socket) -> None:
    socket.set(zmq.TCP_KEEPALIVE, 1)
    socket.set(zmq.TCP_KEEPALIVE_IDLE, 30)
    socket.set(zmq.TCP_KEEPALIVE_INTVL, 5)
    socket.set(zmq.TCP_KEEPALIVE_CNT, 3)


def _is_number(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _ms(seconds: float) -> int:
    return max(1, round(seconds * 1000))
