"""Both adapters behind one face: engines of this process, and peers that can be stopped, killed and replaced."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from typing import Any, Protocol

import numpy as np
import pytest

from pdctl.core.layout import Region
from pdctl.core.plan import CopyPlan
from pdctl.device.cpu import Cpu
from pdctl.engine.base import Engine, PeerCard
from pdctl.engine.canary import candidates
from pdctl.engine.loopback import Directory, open_loopback
from pdctl.engine.mooncake import open_mooncake
from pdctl.engine.settings import MooncakeSettings
from pdctl.memory import Arena
from tests.engine.cable import Cable
from tests.engine.peer import be_reborn, be_stock
from tests.engine.processes import Address, Child, Peers

BLOCK = 1 << 16
STALL_S = 1


def registered(card: PeerCard) -> tuple[Region, ...]:
    """What its callers have registered: all that the card shows but the one canary of every engine of ours."""
    places = candidates(card.regions)
    assert len(places) <= 1
    return tuple(region for region in card.regions if region not in places)


class Far(Protocol):
    """A peer with `nbytes` of registered memory at `pointer`."""

    session: str
    pointer: int

    async def register(self, nbytes: int) -> int: ...
    async def unregister(self, pointer: int) -> None: ...
    async def fill(self, value: int) -> None: ...
    async def count(self, value: int) -> int: ...
    def stop(self) -> None: ...
    def resume(self) -> None: ...
    async def kill(self) -> None: ...
    async def cut(self) -> None: ...
    async def mend(self) -> None: ...
    async def be_reborn(self) -> None: ...
    async def be_stock(self) -> None: ...


class Process:
    """A Mooncake peer in a process of its own."""

    def __init__(self, child: Child, session: str, cable: Cable | None = None) -> None:
        self._child = child
        self._cable = cable
        self.session = session
        self.stop, self.resume = child.stop, child.resume
        self.pointer = 0

    async def kill(self) -> None:
        self._child.kill()

    async def register(self, nbytes: int) -> int:
        self.pointer = (await self._child.ask("register", nbytes=nbytes))["pointer"]
        return self.pointer

    async def unregister(self, pointer: int) -> None:
        await self._child.ask("unregister", pointer=pointer)

    async def fill(self, value: int) -> None:
        await self._child.ask("fill", pointer=self.pointer, value=value)

    async def count(self, value: int) -> int:
        return int((await self._child.ask("count", pointer=self.pointer, value=value))["n"])

    async def cut(self) -> None:
        assert self._cable, "start it at the end of a cable"
        await self._cable.cut()

    async def mend(self) -> None:
        assert self._cable
        await self._cable.mend()

    async def be_reborn(self) -> None:
        await self._child.ask("be_reborn")

    async def be_stock(self) -> None:
        await self._child.ask("be_stock")


class Neighbour:
    """A loopback peer in this process."""

    def __init__(self, directory: Directory, engine: Engine) -> None:
        self._directory = directory
        self._engine = engine
        self._arenas: dict[int, tuple[Arena, Any]] = {}
        self.session = engine.session
        self.pointer = 0

    async def register(self, nbytes: int) -> int:
        arena = Arena(nbytes)
        await self._engine.register(arena.region)
        self.pointer = arena.region.pointer
        self._arenas[self.pointer] = (arena, arena.array(nbytes, np.uint8))
        return self.pointer

    async def unregister(self, pointer: int) -> None:
        await self._engine.unregister(self._arenas[pointer][0].region)

    async def fill(self, value: int) -> None:
        self._arenas[self.pointer][1][:] = value

    async def count(self, value: int) -> int:
        return int((self._arenas[self.pointer][1] == value).sum())

    def stop(self) -> None:
        self._directory.stop(self.session)

    def resume(self) -> None:
        self._directory.resume(self.session)

    async def kill(self) -> None:
        self._directory.kill(self.session)

    async def cut(self) -> None:
        self._directory.cut(self.session)

    async def mend(self) -> None:
        self._directory.mend(self.session)

    async def be_reborn(self) -> None:
        be_reborn(self._engine)

    async def be_stock(self) -> None:
        await be_stock(self._engine)


class Stage:
    """One adapter: `engine` is ours, `memory` is 4 MiB registered with it, `far()` starts a peer."""

    def __init__(self, engine: Engine, stack: AsyncExitStack, start: Callable[[str | None], Awaitable[Far]]) -> None:
        self.engine = engine
        self.arena = Arena(4 << 20)
        self.memory = self.arena.array(4 << 20, np.uint8)
        self._stack = stack
        self._start = start

    async def ready(self) -> Stage:
        await self.engine.register(self.arena.region)
        return self

    async def far(self, nbytes: int = 4 << 20, *, at: str | None = None) -> Far:
        """`at`: the session of a peer that was killed, to take its place; "anywhere" for one that can be replaced;
        "a cable" for one that can be cut off."""
        peer = await self._start(at)
        await peer.register(nbytes)
        return peer

    def plan(self, far: Far, nbytes: int = 4 << 20, *, block: int = BLOCK, first: int = 0) -> CopyPlan:
        """The first `nbytes` of both sides, in blocks."""
        at = np.arange(first, first + nbytes, block, dtype=np.int64)
        return CopyPlan(self.arena.region.pointer + at, far.pointer + at, np.full(len(at), block, np.int64))


@pytest.fixture(scope="session")
def peers() -> Iterator[Peers]:
    started = Peers()
    yield started
    started.close()


@pytest.fixture(params=["mooncake", "loopback"])
async def stage(request: pytest.FixtureRequest, peers: Peers) -> AsyncIterator[Stage]:
    async with AsyncExitStack() as stack:
        made = await (mooncake_stage(stack, peers) if request.param == "mooncake" else loopback_stage(stack))
        yield made


async def mooncake_stage(
    stack: AsyncExitStack, peers: Peers, factory: Callable[[], Any] | None = None, **settings: Any
) -> Stage:
    """Four blocks in flight, one a lane: a hung peer holds a transfer for one stall."""
    small = MooncakeSettings(**{"window": 4, "progress_timeout_s": STALL_S, **settings})
    engine = await stack.enter_async_context(open_mooncake(small, Cpu(), factory=factory))

    addresses: dict[str, Address] = {}

    async def start(at: str | None) -> Process:
        child = peers.take()
        stack.callback(peers.give_back, child)
        if at is None:
            return Process(child, child.session)
        if at == "a cable":
            cable = await stack.enter_async_context(Cable.to(child.session))
            return Process(child, cable.session, cable)
        if at == "anywhere":
            address = await stack.enter_async_context(Address.listening())
            at = address.session
            addresses[at] = address
        addresses[at].holder = child.session
        return Process(child, at)

    return await Stage(engine, stack, start).ready()


async def loopback_stage(stack: AsyncExitStack) -> Stage:
    directory = Directory()
    engine = await stack.enter_async_context(open_loopback(directory, stall_s=STALL_S, block_limit=BLOCK))

    async def start(at: str | None) -> Neighbour:
        port = None if at in (None, "anywhere", "a cable") else int(str(at).rpartition(":")[2])
        return Neighbour(directory, await stack.enter_async_context(open_loopback(directory, port=port)))

    return await Stage(engine, stack, start).ready()
