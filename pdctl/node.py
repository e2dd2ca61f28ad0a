"""
Opens a prefill rank or a decode rank in order and closes it in reverse.

The only place that knows who is wired to whom in one. A node announces itself last, when its memory is registered with
the engine and its control link listens, and what it opened last is closed first.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, closing
from dataclasses import dataclass, field, replace
from typing import Any

import structlog
from fastapi import APIRouter

from pdctl import config, logs, server
from pdctl.beside import beside
from pdctl.client import Registries, RegistryClient
from pdctl.config import Settings
from pdctl.core.device import HOST
from pdctl.core.layout import RankPools, Region
from pdctl.core.naming import HTTP_KEY, SESSION_KEY
from pdctl.core.pairing import Paired, check_rank, dp_rank_of, pair, rank_id
from pdctl.core.route import Announcement, Seat, Shape
from pdctl.core.trace import Trace, trace_of
from pdctl.core.transfer import Side
from pdctl.device.base import Device
from pdctl.device.open import open_device
from pdctl.door import Door, open_door
from pdctl.engine.asking import Asking
from pdctl.engine.base import Engine
from pdctl.engine.mooncake import by_name, open_mooncake
from pdctl.errors import BadField, ConfigError, NotReady, PdctlError
from pdctl.holding import Listed, hold_prefill, lease_of
from pdctl.lease import Lease, LeaseTerms
from pdctl.links import Links
from pdctl.metrics import Metrics
from pdctl.peer import PeerLink, open_link
from pdctl.prober import Prober
from pdctl.receiver import Receiver
from pdctl.reporting import Rank as Reported
from pdctl.reporting import Reporter
from pdctl.sender import Sender
from pdctl.spans import Spans, within
from pdctl.store.watch import StoreWatch
from pdctl.telling import Telling
from pdctl.tracing import open_tracing

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class PrefillNode:
    """A prefill rank that is open: its rooms are opened at `sender`."""

    sender: Sender
    engine: Engine
    prober: Prober
    client: RegistryClient
    metrics_url: str

    @property
    def registered(self) -> bool:
        """Whether the registry's last answer about this rank was yes; `/readyz` says the same."""
        return self.client.registered


@asynccontextmanager
async def prefill_node(
    settings: Settings,
    *,
    pools: RankPools,
    arena: Region | Sequence[Region],
    seat: Seat,
    shape: Shape,
    device: Device | None = None,
    store: StoreWatch | None = None,
) -> AsyncIterator[PrefillNode]:
    """A prefill rank in `seat`: `arena`, one or several, holds all its pools, and is all that peers may reach.

    `device`: an open one that they are on; without it `node.accelerator` is opened. `store`: the watch that
    `open_store` tells; its state is in this rank's report, its counts in its /metrics.

    It takes a lease when its memory is registered and its link listens, renews it while it lives, gives it back before
    the link stops, and is `registered` only while the registry says so. Raises EngineUnavailable, AddressTaken,
    RegistrationGaveUp, Superseded, ...
    """
    check_rank(pools.layout, seat, shape, prefill=True)
    async with _rank(settings, device, arena, str(seat), "prefill", store) as rank:
        asking = Asking(rank.engine, by_name(replace(settings.engine, host=settings.node.host), rank.device))
        links = Links.open(settings, asking, rank.metrics, _refused, rank.engine.card)
        sender = Sender(
            rank.engine,
            rank.link.send,
            pools.placed(rank.device.where),
            rank_id(seat, shape),
            links.prober,
            settings.room,
            time.monotonic,
            rank.metrics,
            settings.sender,
            rank.telling,
        )
        client = RegistryClient(
            settings.node.registry, policy=settings.retry, credentials=settings.client, spans=rank.spans
        )
        async with sender, client:
            unready = lambda: [] if client.registered else [f"not registered at {client.url}"]  # noqa: E731
            rank.metrics.registration.follow("prefill", lambda: client.registered)
            async with beside(
                link=rank.link.serve(sender.handle),
                **links.loops,
                **rank.http(unready, links.router),
            ):
                # within the others: withdrawn before the link stops listening
                terms = LeaseTerms(
                    settings.node.instance,
                    Announcement(seat, shape, rank.link.endpoint),
                    settings.node.ttl_s,
                    rooms=lambda: len(sender.rooms) + len(sender.early),
                    metadata=rank.metadata,
                )
                lease = lease_of(client, terms, settings)
                reporter = rank.reporter(client, lease, terms, sender, unready, links.prober)
                links.prober.subscribe(reporter.changed)
                async with beside(registration=hold_prefill(client, lease, terms, settings), reports=reporter.run()):
                    yield PrefillNode(sender, rank.engine, links.prober, client, rank.metrics_url)


@dataclass(frozen=True, slots=True)
class DecodeNode:
    """A decode rank that is open: `pair` says which prefill ranks send a room, `receiver` opens the room there."""

    receiver: Receiver
    engine: Engine
    metrics_url: str
    shape: Shape
    seat: Seat
    _settings: Settings
    _listed: Listed | None = None
    _registries: Registries = field(default_factory=Registries)

    @property
    def registered(self) -> bool:
        """Whether the registry that was given has this rank, by its last answer."""
        return self._listed is not None and self._listed.client.registered

    async def pair(self, registry: str, room: int, *, trace: Trace = None) -> Paired:
        """The control links of the prefill ranks that will send `room` to this one.

        Asked anew for every room (requests of a millisecond), but once for all that ask at one moment: a prefill that
        was replaced is found by the next one, and no stale address can be kept. Raises NotReady, Unreachable, and
        LayoutMismatch with both values.
        """
        with within(trace_of(trace)):
            return await self._pair(registry, room)

    async def _pair(self, registry: str, room: int) -> Paired:
        how = self._settings
        async with self._registries.asking(registry, how.retry, how.client) as client:
            await self.receiver.pace.step()
            shape = await client.topology()
            await self.receiver.pace.step()
            layout = self.receiver.pools.layout
            found = pair(shape, self.shape, self.seat.tp, self.seat.pp, layout.kind, layout.tokens.size)
            pairing = found.at(await _dp_rank(client, shape, room))
            at = await asyncio.gather(*map(client.rank, (*pairing.senders, *pairing.dummies)))
        n = pairing.responses
        ranks = tuple(rank_id(seat, shape) for seat in pairing.senders)
        return Paired(tuple(at[:n]), tuple(at[n:]), pairing.required, n, ranks)


@asynccontextmanager
async def decode_node(
    settings: Settings,
    *,
    pools: RankPools,
    arena: Region | Sequence[Region],
    shape: Shape,
    tp_rank: int = 0,
    pp_rank: int = 0,
    registry: str | None = None,
    device: Device | None = None,
    store: StoreWatch | None = None,
) -> AsyncIterator[DecodeNode]:
    """A decode rank; `shape` is its own, with which a prefill's must agree. `arena` holds all its pools, `device` is an
    open one that they are on; without it `node.accelerator` is opened. `store` as of a prefill.

    With the URL of a `registry` it holds a lease there, as role decode of `node.decode_instance`, so that it is seen,
    watched and drained as prefills are; its engine's session stands in the metadata. Without one it only asks. Raises
    as `prefill_node`.
    """
    seat = Seat(0, 0, tp_rank, pp_rank)
    check_rank(pools.layout, seat, shape, prefill=False)
    async with _rank(settings, device, arena, str(seat), "decode", store) as rank:
        pools = pools.placed(rank.device.where)
        receiver = Receiver(
            rank.engine.session,
            rank.link.send,
            rank.link.endpoint,
            pools,
            tp_rank,
            shape.attn_tp_size,
            settings.room,
            time.monotonic,
            rank.metrics,
            rank.link.is_gone,
            rank.telling,
        )
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(receiver)
            registries = await stack.enter_async_context(Registries())
            listed = None
            if registry is not None:
                client = RegistryClient(registry, policy=settings.retry, credentials=settings.client, spans=rank.spans)
                listed = shown = Listed(await stack.enter_async_context(client), settings)
                rank.metrics.registration.follow("decode", lambda: not shown.unready())
            http = rank.http(list if listed is None else listed.unready)
            await stack.enter_async_context(beside(link=rank.link.serve(receiver.handle), **http))
            if listed is not None:
                terms = LeaseTerms(
                    settings.node.decode_instance,
                    Announcement(seat, shape, rank.link.endpoint),
                    settings.node.ttl_s,
                    role="decode",
                    rooms=lambda: len(receiver.rooms),
                    metadata=rank.metadata,
                )
                lease = lease_of(listed.client, terms, settings)
                reporter = rank.reporter(listed.client, lease, terms, receiver, listed.unready)
                await stack.enter_async_context(beside(registration=listed.hold(lease), reports=reporter.run()))
            yield DecodeNode(receiver, rank.engine, rank.metrics_url, shape, seat, settings, listed, registries)


def _refused(error: PdctlError, path: str, peer: str) -> PdctlError:
    log.warning("request refused", path=path, peer=peer, detail=str(error))
    return error


async def _dp_rank(client: RegistryClient, shape: Shape, room: int) -> int:
    """Which DP rank has `room`: SGLANG_WIRE 1.4."""
    if (said := dp_rank_of(shape, room)) is not None:
        return said
    found = await client.rooms([room])
    if room not in found:
        raise NotReady(f"no DP rank has announced room {room} yet: send the request to the prefill first, or ask again")
    return found[room]


@dataclass(frozen=True, slots=True)
class _Rank:
    """What a prefill and a decode rank have in common."""

    device: Device
    engine: Engine
    link: PeerLink
    metrics: Metrics
    sock: socket.socket
    door: Door
    grace_s: float
    report_every_s: float
    spans: Spans | None
    telling: Telling
    store: StoreWatch | None

    def reporter(
        self,
        client: RegistryClient,
        lease: Lease,
        terms: LeaseTerms,
        rooms: Sender | Receiver,
        unready: Callable[[], list[str]],
        links: Prober | None = None,
    ) -> Reporter:
        side = Side.SENDER if isinstance(rooms, Sender) else Side.RECEIVER
        seen = (lambda: None) if self.store is None else self.store.seen
        who = Reported(terms.role, terms.path, self.engine.session, side, rooms, rooms.telling, unready, links, seen)
        told, counts = self.report_every_s, self.metrics.reports
        reporter = Reporter(client.tell, who, lambda: lease.granted, told, counts, time.monotonic)
        if self.store is not None:
            self.store.subscribe(reporter.changed)
        return reporter

    @property
    def metrics_url(self) -> str:
        return f"{self.door.scheme}://{server.bound(self.sock)}/metrics"

    @property
    def metadata(self) -> dict[str, str]:
        return {SESSION_KEY: self.engine.session, HTTP_KEY: self.metrics_url.removesuffix("/metrics")}

    def http(self, unready: Callable[[], list[str]], *routers: APIRouter) -> dict[str, Coroutine[Any, Any, None]]:
        """What serves this rank's own /livez, /readyz, /metrics and `routers`, by name."""
        return self.door.services(server.app(routers, self.metrics, unready), [self.sock], self.grace_s)


@asynccontextmanager
async def _device(settings: Settings, given: Device | None) -> AsyncIterator[Device]:
    """The one that the caller keeps open, or the one that the settings name."""
    if given is not None:
        yield given
        return
    async with open_device(settings.node.accelerator, environ=config.environment()) as device:
        yield device


@asynccontextmanager
async def _rank(
    settings: Settings,
    given: Device | None,
    arena: Region | Sequence[Region],
    name: str,
    role: str,
    store: StoreWatch | None,
) -> AsyncIterator[_Rank]:
    host, metrics = settings.node.host, Metrics(store=None if store is None else store.counts)
    if settings.engine.protocol == "nvlink_intra":
        raise ConfigError(
            "engine.protocol nvlink_intra registers device memory alone, and a rank's aux rows are on the host: set "
            "protocol tcp or rdma; nvlink_intra is for an engine by itself (open_mooncake)"
        )
    door = open_door(settings.access, metrics)
    sock = server.bind(host, settings.node.http_port)
    with closing(sock), logs.rank_bound(name, role=role):
        async with (
            _device(settings, given) as device,
            open_mooncake(replace(settings.engine, host=host), device) as engine,
            open_link(host, metrics=metrics) as link,
            open_tracing(settings.trace, role=role, rank=name) as spans,
        ):
            for region in (arena,) if isinstance(arena, Region) else arena:
                if (on := device.where(region)) not in (HOST, device.spec):
                    raise BadField("arena", f"{region} is on {on}, and this rank's device is {device.spec}: open {on}")
                await engine.register(region)
            telling = Telling(spans, settings.log.rooms_a_second)
            yield _Rank(
                device,
                engine,
                link,
                metrics,
                sock,
                door,
                settings.serve.grace_s,
                settings.node.report_every_s,
                spans,
                telling,
                store,
            )
