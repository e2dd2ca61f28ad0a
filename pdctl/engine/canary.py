"""
A few bytes that every engine of ours lets its peers read and write, and what a peer proves with them.

    magic 16 | boot id 16 | spare 32 | slots 256 x 64: peers write nonces here | cells 256 x 64: our own questions

The magic says that a peer is ours, the boot id which life of it; a nonce that was written to a slot and read back says
that bytes move both ways. The region's odd length is how it is found among those that a handshake shows; one of that
length without the magic is a stranger's, and is only ever read.

Never waits for a block to come to rest, and never gives a cell to a second question before it has: a question to a peer
that hangs is given up at its deadline, its 64 bytes are not.
"""

from __future__ import annotations

import asyncio
import mmap
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from pdctl.core.layout import Region
from pdctl.engine.blocks import Direction, Lane, Transfer, Verdict
from pdctl.errors import Cause, TransferFailed

MAGIC = b"pdctl canary v1\n"
NBYTES = 32_869  # no allocator of pages, rows or heads makes this length
TITLE_NBYTES = 32
NONCE_NBYTES = 16
_STEP, _SLOTS, _CELLS = 64, 256, 256
_FIRST_CELL = _STEP + _SLOTS * _STEP


def candidates(regions: Iterable[Region]) -> list[Region]:
    """Those that can be a canary of ours: by their length, which a stranger's may have too."""
    return [region for region in regions if region.nbytes == NBYTES]


def slot(place: Region, chance: Callable[[int], int]) -> int:
    """The address of one slot of a peer's canary; `chance(n)` gives a number below n."""
    return place.pointer + _STEP + chance(_SLOTS) * _STEP


class Canary:
    """This process's own: `region` is what to register, `boot` the id of this life."""

    def __init__(self) -> None:
        self._map = mmap.mmap(-1, NBYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._bytes = np.frombuffer(self._map, dtype=np.uint8, count=NBYTES)
        self.region = Region(self._bytes.ctypes.data, NBYTES)
        self.boot = secrets.token_bytes(16)
        self._map[:TITLE_NBYTES] = MAGIC + self.boot
        self._free = list(range(_CELLS))

    def take(self) -> Cell | None:
        """Some scratch memory of one question's own; None while all of it is in flight."""
        return Cell(self, self._free.pop()) if self._free else None

    def give_back(self, cell: Cell) -> None:
        self._free.append(cell.number)

    def view(self, start: int, nbytes: int) -> memoryview:
        return memoryview(self._map)[start : start + nbytes]


@dataclass(frozen=True, slots=True)
class Cell:
    """64 bytes that one question's block may touch."""

    canary: Canary
    number: int

    @property
    def start(self) -> int:
        return _FIRST_CELL + self.number * _STEP

    @property
    def pointer(self) -> int:
        return self.canary.region.pointer + self.start

    def store(self, data: bytes) -> None:
        self.canary.view(self.start, len(data))[:] = data

    def load(self, nbytes: int) -> bytes:
        return bytes(self.canary.view(self.start, nbytes))


class Questions:
    """Single small blocks to and from peers, each with a cell of its own until it is at rest.

    At most one question a lane is in flight after its deadline: what has not come back holds back the next.
    """

    def __init__(self, canary: Canary, add: Callable[[Transfer], None], nudge: Callable[[], None]) -> None:
        self._canary = canary
        self._add = add
        self._nudge = nudge
        self._moving: dict[Lane, Transfer] = {}
        self._loop = asyncio.get_running_loop()

    @property
    def moving(self) -> list[Transfer]:
        """What closing has to wait for."""
        return list(self._moving.values())

    async def read(self, session: str, lane: Lane, pointer: int, nbytes: int, until: float) -> bytes:
        """`nbytes` (64 at most) of the peer's at `pointer`. Raises TransferFailed; TIMED_OUT is silence."""
        return await self._ask(session, lane, Direction.READ, pointer, bytes(nbytes), until)

    async def write(self, session: str, lane: Lane, pointer: int, data: bytes, until: float) -> None:
        """`data` (64 bytes at most) to the peer's `pointer`. Raises as `read` does."""
        await self._ask(session, lane, Direction.WRITE, pointer, data, until)

    async def _ask(
        self, session: str, lane: Lane, direction: Direction, pointer: int, data: bytes, until: float
    ) -> bytes:
        """What the cell holds afterwards."""
        await self._turn(session, lane, until)
        cell = self._canary.take()
        if cell is None:
            raise TransferFailed(Cause.LOCAL, session, f"{_CELLS} questions to peers are in flight: none can be put")
        cell.store(data)
        rest: asyncio.Future[Verdict | None] = self._loop.create_future()
        transfer = Transfer(
            lane, lane.failures, direction, iter([(cell.pointer, pointer, len(data))]), 1, len(data), rest
        )
        self._moving[lane] = transfer
        self._add(transfer)
        try:
            await asyncio.wait([rest], timeout=max(0.0, until - self._loop.time()))
            if not rest.done():
                raise TransferFailed(Cause.TIMED_OUT, session, "a block to it has not come back")
            if (verdict := rest.result()) is not None:
                raise TransferFailed(verdict[0], session, verdict[1])
            return cell.load(len(data))
        finally:
            self._leave(lane, cell, transfer)

    async def _turn(self, session: str, lane: Lane, until: float) -> None:
        """What was given up may come back any moment, and then the lane is as good as its peer."""
        earlier = self._moving.get(lane)
        if earlier is not None:
            await asyncio.wait([earlier.rest], timeout=max(0.0, until - self._loop.time()))
        if lane in self._moving:
            raise TransferFailed(Cause.TIMED_OUT, session, "an earlier block to it has not come back")

    def _leave(self, lane: Lane, cell: Cell, transfer: Transfer) -> None:
        """The asker goes; the cell stays for as long as the block can touch it."""
        if transfer.rest.done():
            self._at_rest(lane, cell)
            return
        transfer.stop(Cause.TIMED_OUT, "given up")
        self._nudge()
        transfer.rest.add_done_callback(lambda _: self._at_rest(lane, cell))

    def _at_rest(self, lane: Lane, cell: Cell) -> None:
        del self._moving[lane]
        cell.canary.give_back(cell)
