"""
Opens the rank of an engine in another process, and serves it at a socket that is listening already: `pdctl agent`.

What pdctl/agent.py is given: how its memory is mapped, and which node is opened for it. Never listens by itself, and
never serves a second rank: succession.py starts another process for that.
"""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial

from aiohttp import web

from pdctl.agent import Agent
from pdctl.config import Settings, environment
from pdctl.core.device import DeviceKind
from pdctl.core.handover import Mapped, Offer, Role
from pdctl.core.layout import RankPools, Region
from pdctl.core.trace import TraceContext
from pdctl.core.transfer import Quarantined
from pdctl.device.base import Device
from pdctl.device.cpu import Cpu
from pdctl.device.open import open_device
from pdctl.errors import CallerError
from pdctl.memory import map_shared
from pdctl.node import DecodeNode, PrefillNode, decode_node, prefill_node
from pdctl.tenancy import Arrival, Arriving, Rank, Release, Sending


async def serve(
    settings: Settings, sock: socket.socket, *, hurry: Callable[[], object], ready: Callable[[], None]
) -> None:
    """Serve one rank from its handover to its end; `ready` is called when the socket answers."""
    async with AsyncExitStack() as stack:
        at = _Place(settings, stack)
        agent = Agent(partial(_open, settings, at), at.map, frozenset({os.geteuid(), *settings.agent.users}), hurry)
        runner = web.AppRunner(agent.app(), handler_cancellation=True, access_log=None)
        await runner.setup()
        await web.SockSite(runner, sock).start()
        ready()
        await agent.live()


class _Place:
    """Where the memory that is handed over is opened: on its own device, which is this process's from then on."""

    def __init__(self, settings: Settings, stack: AsyncExitStack) -> None:
        self._settings, self._stack = settings, stack
        self.device: Device = Cpu()

    async def map(self, offer: Offer, owner: int | None) -> list[Mapped]:
        """What has been opened for an offer that is refused is closed again."""
        async with AsyncExitStack() as trial:
            device = await trial.enter_async_context(open_device(self._spec(offer), environ=environment()))
            mapped = [
                map_shared(memory, f"memory.{number}", owner, device.open_shared)
                for number, memory in enumerate(offer.memory)
            ]
            self.device = device
            self._stack.push_async_callback(trial.pop_all().aclose)
        return mapped

    def _spec(self, offer: Offer) -> str:
        """The settings' own if they name one; its UUID is then held against the offer's."""
        own = self._settings.node.accelerator
        return f"{DeviceKind.CUDA}:{offer.device}" if offer.device and own == DeviceKind.CPU else own


@asynccontextmanager
async def _open(
    settings: Settings, at: _Place, offer: Offer, pools: RankPools, regions: Sequence[Region]
) -> AsyncIterator[Rank]:
    how, device = settings.node, at.device
    registry = offer.registry or how.registry
    if offer.role is Role.PREFILL:
        own = settings.model_copy(
            update={"node": replace(how, registry=registry, instance=offer.instance or how.instance)}
        )
        prefill_rank = prefill_node(own, pools=pools, arena=regions, seat=offer.seat, shape=offer.shape, device=device)
        async with prefill_rank as prefill:
            yield _Prefill(prefill, offer.seat.dp)
        return
    own = settings.model_copy(update={"node": replace(how, decode_instance=offer.instance or how.decode_instance)})
    async with decode_node(
        own,
        pools=pools,
        arena=regions,
        shape=offer.shape,
        tp_rank=offer.seat.tp,
        pp_rank=offer.seat.pp,
        registry=registry if offer.instance else None,
        device=device,
    ) as decode:
        yield _Decode(decode, registry)


class _Opened:
    """What is told of a rank of either role."""

    node: PrefillNode | DecodeNode

    @property
    def session(self) -> str:
        return self.node.engine.session

    @property
    def metrics_url(self) -> str:
        return self.node.metrics_url

    @property
    def registered(self) -> bool:
        return self.node.registered


@dataclass(frozen=True)
class _Prefill(_Opened):
    node: PrefillNode
    dp_rank: int

    @property
    def rooms(self) -> Sequence[int]:
        return self.node.sender.rooms

    @property
    def quarantine(self) -> Sequence[Quarantined]:
        return self.node.sender.quarantine

    def sending(self, room: int, release: Release, trace: TraceContext | None) -> AbstractAsyncContextManager[Sending]:
        return self.node.sender.open(room, release=release, trace=trace)

    async def announce(self, room: int) -> None:
        await self.node.client.announce_room(room, self.dp_rank)

    async def receiving(
        self,
        room: int,
        asked: Arrival,  # noqa: ARG002
        release: Release,  # noqa: ARG002
    ) -> AbstractAsyncContextManager[Arriving]:
        raise CallerError(f"room {room} cannot be received by a prefill rank: hand the pool over as decode")


@dataclass(frozen=True)
class _Decode(_Opened):
    node: DecodeNode
    registry: str

    @property
    def rooms(self) -> Sequence[int]:
        return self.node.receiver.rooms

    @property
    def quarantine(self) -> Sequence[Quarantined]:
        return self.node.receiver.quarantine

    def sending(
        self,
        room: int,
        release: Release,  # noqa: ARG002
        trace: TraceContext | None,  # noqa: ARG002
    ) -> AbstractAsyncContextManager[Sending]:
        raise CallerError(f"room {room} cannot be sent by a decode rank: hand the pool over as prefill")

    async def announce(self, room: int) -> None:
        raise CallerError(f"room {room} cannot be announced by a decode rank: its prefill does that")

    async def receiving(self, room: int, asked: Arrival, release: Release) -> AbstractAsyncContextManager[Arriving]:
        paired = await self.node.pair(self.registry, room, trace=asked.trace)
        where = (asked.pages, asked.aux_row, asked.prefix_len)
        return self.node.receiver.open(room, paired, *where, release, state_rows=asked.state_rows, trace=asked.trace)
