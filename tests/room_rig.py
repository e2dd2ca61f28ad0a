"""What the tests of rooms share: an engine that truly copies, and can be made to hang, fail or stay unsettled."""

from __future__ import annotations

import asyncio
import ctypes
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import numpy as np

from pdctl.core.address import Endpoint
from pdctl.core.kinds import Depth
from pdctl.core.layout import Pool, RankPools, Region
from pdctl.core.plan import CopyPlan
from pdctl.engine.base import Capabilities, PeerCard, Proof
from pdctl.errors import Cause, SessionBlocked, TransferFailed, Unreachable

N_PAGES, N_ROWS = 16, 4


@dataclass
class Memory:
    """One rank's KV entries and aux buffers; `kv[e]` has shape (pages, bytes), `aux[b]` (rows, bytes)."""

    kv: list[np.ndarray]
    aux: list[np.ndarray]

    @property
    def kv_pool(self) -> Pool:
        return _pool(self.kv)

    @property
    def aux_pool(self) -> Pool:
        return _pool(self.aux)

    @property
    def pools(self) -> RankPools:
        return RankPools(self.kv_pool, self.aux_pool)


def memory(lens: Sequence[int] = (64, 64, 32), aux_lens: Sequence[int] = (8, 40), seed: int | None = None) -> Memory:
    """Random when seeded, else zero."""
    rng = None if seed is None else np.random.default_rng(seed)

    def fill(rows: int, nbytes: int) -> np.ndarray:
        return np.zeros((rows, nbytes), np.uint8) if rng is None else rng.integers(1, 256, (rows, nbytes), np.uint8)

    return Memory([fill(N_PAGES, n) for n in lens], [fill(N_ROWS, n) for n in aux_lens])


def _pool(arrays: list[np.ndarray]) -> Pool:
    return Pool(tuple(a.ctypes.data for a in arrays), tuple(a.shape[1] for a in arrays), len(arrays[0]))


@dataclass
class RigEngine:
    """Copies by memmove. `hold`: writes wait until it is set; `rest`: so do cancelled ones, for their blocks in flight.

    `failures`: session -> what its writes raise.
    """

    session: str = "10.0.0.1:15000"
    failures: dict[str, TransferFailed] = field(default_factory=dict)
    forgotten: list[str] = field(default_factory=list)
    written: list[tuple[str, int]] = field(default_factory=list)
    in_flight: int = 0

    def __post_init__(self) -> None:
        self.hold = asyncio.Event()
        self.hold.set()
        self.rest = asyncio.Event()
        self.rest.set()
        self.busy = asyncio.Event()
        self.settling = asyncio.Event()
        self.settling.set()

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities("rig", "0", send_probe=False, async_read=False)

    async def write(self, session: str, plan: CopyPlan, *, deadline_s: float) -> None:
        self.in_flight += 1
        self.busy.set()
        try:
            await self.hold.wait()
            if session in self.failures:
                raise self.failures[session]
            for src, dst, nbytes in zip(plan.src.tolist(), plan.dst.tolist(), plan.nbytes.tolist(), strict=True):
                ctypes.memmove(dst, src, nbytes)
            self.written.append((session, plan.total))
        except asyncio.CancelledError:
            await self.rest.wait()
            raise
        finally:
            self.in_flight -= 1

    async def settle(self, session: str) -> None:
        await self.settling.wait()

    def card(self, session: str) -> PeerCard | None:
        return None

    def forget(self, session: str) -> None:
        self.forgotten.append(session)

    async def read(self, session: str, plan: CopyPlan, *, deadline_s: float) -> None:
        raise TransferFailed(Cause.LOCAL, session, "the rig does not read")

    async def register(self, region: Region) -> None: ...

    async def unregister(self, region: Region) -> None: ...

    async def probe(self, session: str, *, deadline_s: float) -> PeerCard:
        return PeerCard(session, 1, ())

    async def prove(self, session: str, *, deadline_s: float) -> Proof:
        return Proof(await self.probe(session, deadline_s=deadline_s), Depth.IDENTITY, "descriptor compared")


@dataclass
class RigGate:
    """A session table of one test."""

    blocked: dict[str, str] = field(default_factory=dict)
    told: list[tuple[str, Cause]] = field(default_factory=list)
    registrations: list[str] = field(default_factory=list)
    pointers: dict[str, tuple[int, ...]] = field(default_factory=dict)
    passed: list[str] = field(default_factory=list)

    def reason_blocked(self, session: str) -> str | None:
        return self.blocked.get(session)

    def failed(self, session: str, cause: Cause, detail: str) -> None:
        self.told.append((session, cause))

    def registered(self, session: str, pointers: Sequence[int] = ()) -> None:
        self.registrations.append(session)
        self.pointers[session] = tuple(pointers)

    @asynccontextmanager
    async def passing(self, session: str) -> AsyncIterator[None]:
        if session in self.blocked:
            raise SessionBlocked(session, self.blocked[session])
        try:
            yield
        except TransferFailed as failure:
            self.failed(session, failure.cause, failure.detail)
            raise
        self.passed.append(session)


async def let_others_run() -> None:
    """Whatever can happen now without the outside world happens."""
    for _ in range(20):
        await asyncio.sleep(0)


class Post:
    """Where messages go instead of a link; `unreachable` peers take none."""

    def __init__(self) -> None:
        self._sent: asyncio.Queue[tuple[Endpoint, list[bytes]]] = asyncio.Queue()
        self.unreachable: set[Endpoint] = set()

    async def send(self, to: Endpoint, frames: Sequence[bytes]) -> None:
        if to in self.unreachable:
            raise Unreachable(f"peer {to} is not reachable: it is away")
        self._sent.put_nowait((to, list(frames)))

    async def next(self) -> tuple[Endpoint, list[bytes]]:
        return await asyncio.wait_for(self._sent.get(), 60)

    @property
    def is_empty(self) -> bool:
        return self._sent.empty()


class Released:
    """Collects what is given back; `next()` waits for it."""

    def __init__(self) -> None:
        self._given: asyncio.Queue[list[int]] = asyncio.Queue()

    def __call__(self, pages: np.ndarray) -> None:
        self._given.put_nowait(pages.tolist())

    async def next(self) -> list[int]:
        return await asyncio.wait_for(self._given.get(), 60)

    @property
    def now(self) -> list[list[int]]:
        """Everything given back since the last look."""
        return [self._given.get_nowait() for _ in range(self._given.qsize())]
