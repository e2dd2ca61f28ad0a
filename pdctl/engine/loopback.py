"""
The engine port between engines of one process: `memmove`, with the promises and the errors of a real engine.

For tests, and for seeing the house run where no Mooncake wheel can be. Engines find each other in a `Directory`, which
can also stop, resume and kill them, and the faults truly act: a block to a stopped engine hangs, lands after it
resumes, or fails when it has stood still too long. No thread, no socket. Never touches memory that was not mapped when
it was registered.
"""

from __future__ import annotations

import asyncio
import ctypes
import itertools
import mmap
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from pdctl.core.address import Endpoint
from pdctl.core.layout import Region
from pdctl.engine.base import Capabilities, Engine, PeerCard
from pdctl.engine.blocks import Direction, Lane, Transfer
from pdctl.engine.handshake import Descriptor
from pdctl.engine.promises import PromisedEngine
from pdctl.engine.settings import Patience
from pdctl.errors import AddressTaken, Cause, TransferFailed

NOT_MAPPED = -1
_HOST = "127.0.0.1"
_FIRST_PORT = 20_001
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(eq=False)
class _Life:
    """One engine between open and close, as its peers meet it."""

    session: str
    data_port: int
    regions: dict[int, Region] = field(default_factory=dict)
    cut: bool = False
    running: asyncio.Event = field(default_factory=asyncio.Event)
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def card(self) -> PeerCard:
        return PeerCard(self.session, self.data_port, tuple(self.regions.values()))

    async def answering(self) -> bool:
        """Wait while it is stopped; whether it lives."""
        while not (self.running.is_set() or self.gone.is_set()):
            waits = [asyncio.ensure_future(event.wait()) for event in (self.running, self.gone)]
            try:
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for wait in waits:
                    wait.cancel()
        return not self.gone.is_set()


class Directory:
    """The network that loopback engines share: who is at which address, and what has befallen it."""

    def __init__(self) -> None:
        self._lives: dict[str, _Life] = {}
        self._born = 0

    def stop(self, session: str) -> None:
        """As SIGSTOP: it keeps its memory and address and does not answer."""
        self._lives[session].running.clear()

    def resume(self, session: str) -> None:
        """As SIGCONT: what hung goes on."""
        self._lives[session].running.set()

    def kill(self, session: str) -> None:
        """As SIGKILL: its address is free for another life at once."""
        self._lives.pop(session).gone.set()

    def cut(self, session: str) -> None:
        """As a data port that nothing listens on any more: it says who it is, and its memory cannot be reached."""
        self._lives[session].cut = True

    def mend(self, session: str) -> None:
        self._lives[session].cut = False

    def _join(self, port: int | None) -> _Life:
        self._born += 1
        session = str(Endpoint(_HOST, port or _FIRST_PORT + self._born))
        if session in self._lives:
            raise AddressTaken(f"loopback session {session} has another holder: choose another port, or none")
        life = _Life(session, 1024 + self._born)
        life.running.set()
        self._lives[session] = life
        return life

    def _leave(self, life: _Life) -> None:
        life.gone.set()
        if self._lives.get(life.session) is life:
            del self._lives[life.session]

    def _find(self, session: str) -> _Life | None:
        return self._lives.get(session)


@asynccontextmanager
async def open_loopback(
    directory: Directory,
    *,
    port: int | None = None,
    stall_s: float = 0.5,
    block_limit: int = 1 << 20,
    ask_s: float = 0.25,
    recheck_s: float = 5.0,
) -> AsyncIterator[Engine]:
    """An open engine in `directory`. `port`: to come back at an address; `stall_s`: when a hung block ends FAILED."""
    life = directory._join(port)
    carrier = _Carrier(directory, life, stall_s)
    engine = PromisedEngine(carrier, Patience(ask_s, recheck_s, stall_s + 1.0, block_limit))
    try:
        await engine.show()
        yield engine
    finally:
        await engine.close()
        await carrier.close()


class _Carrier:
    """Moves blocks in small slices of the loop, one transfer a task, one block a slice."""

    def __init__(self, directory: Directory, life: _Life, stall_s: float) -> None:
        self._directory = directory
        self._life = life
        self._stall_s = stall_s
        self._lanes: dict[Lane, _Life] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def session(self) -> str:
        return self._life.session

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities("loopback", "1", send_probe=True, async_read=True)

    @property
    def is_open(self) -> bool:
        return not self._life.gone.is_set()

    async def register(self, region: Region) -> int:
        if not is_mapped(region):
            return NOT_MAPPED
        self._life.regions[region.pointer] = region
        return 0

    async def unregister(self, region: Region) -> int:
        return 0 if self._life.regions.pop(region.pointer, None) else NOT_MAPPED

    async def describe(self, session: str, deadline_s: float) -> Descriptor:
        life = self._directory._find(session)
        if life is None:
            raise TransferFailed(Cause.REFUSED, session, "no engine of this directory has that address")
        try:
            async with asyncio.timeout(deadline_s):
                if await life.answering():
                    return Descriptor(life.card, b"")
        except TimeoutError:
            raise TransferFailed(Cause.TIMED_OUT, session, f"no answer within {deadline_s:g} s: it hangs") from None
        raise TransferFailed(Cause.PEER_GONE, session, "it was killed before it answered")

    @property
    def gathers(self) -> bool:
        return False

    @property
    def engines(self) -> int:
        return 1

    def has_made(self, engine: int) -> bool:
        return engine == 0

    async def knock(self, session: str, found: Descriptor, deadline_s: float) -> None:  # noqa: ARG002  it never waits
        life = self._directory._find(session)
        if life is None or life.data_port != found.card.data_port or life.cut:
            raise TransferFailed(Cause.NO_DATA, session, "its data port cannot be reached: Connection refused")

    async def lane(self, session: str, found: Descriptor, engine: int) -> Lane:  # noqa: ARG002  there is one
        """To the life that answered, as a connection would be: who comes later to the address is not on it."""
        lane = Lane(itertools.repeat(session))
        life = self._directory._find(session)
        if life is None or life.card.data_port != found.card.data_port:
            raise TransferFailed(Cause.PEER_GONE, session, "it was killed just after it answered")
        self._lanes[lane] = life
        lane.close = lambda: self._drop(lane)
        return lane

    def add(self, transfer: Transfer) -> None:
        task = asyncio.create_task(self._carry(transfer, self._lanes[transfer.lane]), name="pdctl-loopback-transfer")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def own_fault(self, spans: Iterable[Region]) -> str | None:  # noqa: ARG002  it never touches what is not mapped
        return None

    def nudge(self) -> None:
        """Every task looks before each block."""

    async def close(self) -> None:
        self._directory._leave(self._life)
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _drop(self, lane: Lane) -> None:
        self._lanes.pop(lane, None)

    async def _carry(self, transfer: Transfer, peer: _Life) -> None:
        while not transfer.exhausted:
            if transfer.faith != transfer.lane.failures:
                transfer.stop(Cause.PEER_GONE, "another transfer with this peer has failed meanwhile")
                break
            if self._life.gone.is_set():
                transfer.stop(Cause.LOCAL, "this engine was killed")
                break
            await self._carry_one(transfer, peer)
            await asyncio.sleep(0)
        transfer.settle()

    async def _carry_one(self, transfer: Transfer, peer: _Life) -> None:
        local, remote, nbytes = next(transfer.blocks)
        assert isinstance(local, int), "nothing is put together for a memmove"  # noqa: S101
        transfer.submitted += 1
        transfer.in_flight += 1
        failure = await self._obstacle(peer, Region(remote, nbytes))
        if failure is None and transfer.direction is Direction.WRITE:
            ctypes.memmove(remote, local, nbytes)
        elif failure is None:
            ctypes.memmove(local, remote, nbytes)
        else:
            transfer.lane.failures += 1
            transfer.stop(*failure)
        transfer.in_flight -= 1

    async def _obstacle(self, peer: _Life, span: Region) -> tuple[Cause, str] | None:
        """Why the block cannot land; None when it can."""
        try:
            async with asyncio.timeout(self._stall_s):
                alive = await peer.answering()
        except TimeoutError:
            return Cause.TIMED_OUT, f"a block did not move for {self._stall_s:g} s: the peer hangs"
        if not alive:
            return Cause.PEER_GONE, "a block ended FAILED: the peer was killed"
        if peer.cut:
            return Cause.PEER_GONE, "a block ended FAILED: the peer's data port is cut"
        if not any(span in region for region in peer.regions.values()):
            return Cause.PEER_GONE, "a block ended FAILED: the peer has unregistered its place"
        return None


def is_mapped(region: Region) -> bool:
    """Whether every page of it is this process's. Asked of the kernel, so that no memmove can hit a hole."""
    start = region.pointer // mmap.PAGESIZE * mmap.PAGESIZE
    size = region.end - start
    pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
    return int(_libc.mincore(ctypes.c_void_p(start), ctypes.c_size_t(size), pages)) == 0
