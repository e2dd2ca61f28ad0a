"""
Copies that go on at the peer but not here, put together in a buffer of ours, so that one block takes them all.

A block costs the engine about 30 us whatever its size (MOONCAKE_FACTS 3.4); to put 64 pieces of 1 KiB together costs
about as much. A decode rank with more TP ranks than we have keeps its heads of page after page in one piece, of which
we hold one slice a token; pages of one token that stand anywhere here may stand in a row there. The peer notices
nothing: the same bytes come to the same places. What is strewn at the peer cannot be helped from here.

The kernel reads the pieces, as it does for the engine: memory that was registered and is mapped no more is an error,
not the end of this process. Never for memory of a device; whose it is, the adapter says.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pdctl.core.plan import CopyPlan, Ints
from pdctl.engine.blocks import AT_ONCE, Block, blocks

STAGE_NBYTES = 64 << 10  # what the engine sends at once
LONGEST_PIECE = STAGE_NBYTES // 4  # of longer ones too few fit to be worth a copy
_MOST_PIECES = 512  # a call takes 1024
_A_FILE = 64  # stages: a file takes two descriptors


class _File:
    """So many stages, as memory of ours and as a file of the same bytes, through which the kernel fills it."""

    fd = -1

    def __init__(self) -> None:
        self.fd = os.memfd_create("pdctl-stages")
        os.truncate(self.fd, _A_FILE * STAGE_NBYTES)
        self._map = mmap.mmap(self.fd, _A_FILE * STAGE_NBYTES)
        self.pointer = ctypes.addressof(ctypes.c_ubyte.from_buffer(self._map))

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


@dataclass(frozen=True, slots=True)
class Stage:
    """STAGE_NBYTES of our memory, for one block at a time."""

    file: _File
    offset: int

    def put(self, pieces: list[memoryview]) -> int:
        """One after another; the address of the first. Raises OSError for one that cannot be read."""
        if os.pwritev(self.file.fd, pieces, self.offset) != sum(map(len, pieces)):  # it ends where one cannot be read
            raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))
        return self.file.pointer + self.offset


class Stages:
    """Those that no block is on. As many are made as there were ever blocks at once."""

    def __init__(self) -> None:
        self._free: list[Stage] = []

    def take(self) -> Stage:
        """Raises OSError where the process may have no more files, or memory."""
        if not self._free:
            file = _File()
            self._free += [Stage(file, n * STAGE_NBYTES) for n in range(_A_FILE)]
        return self._free.pop()

    def give_back(self, stage: Stage) -> None:
        self._free.append(stage)


@dataclass(frozen=True, slots=True)
class Scattered:
    """Pieces of `nbytes` each, at `offsets` of `memory`, that are one at the peer."""

    memory: memoryview
    offsets: Ints
    nbytes: int

    def into(self, stage: Stage) -> int:
        """Put them together; the address of the first byte. Raises OSError."""
        memory, nbytes = self.memory, self.nbytes
        return stage.put([memory[at : at + nbytes] for at in self.offsets.tolist()])


@dataclass(frozen=True, slots=True)
class Gathering:
    """A plan as blocks, of which some are put together when their turn comes: `starts[i]` is the first copy of each,
    `counts[i]` how many."""

    plan: CopyPlan
    starts: Ints
    counts: Ints

    def __len__(self) -> int:
        return len(self.starts)

    @classmethod
    def nothing(cls, plan: CopyPlan) -> Gathering:
        """Each copy by itself."""
        return cls(plan, np.arange(len(plan)), np.ones(len(plan), np.int64))

    @classmethod
    def of(cls, plan: CopyPlan) -> Gathering:
        """Neighbours of one length that go on at the peer, at most STAGE_NBYTES of them together."""
        nbytes, dst = plan.nbytes, plan.dst
        goes_on = dst[1:] == dst[:-1] + nbytes[:-1]
        if not goes_on.any():  # of most plans nothing does, and then this look is all that it costs
            return cls.nothing(plan)
        goes_on &= (nbytes[1:] == nbytes[:-1]) & (nbytes[1:] <= LONGEST_PIECE)
        if not goes_on.any():
            return cls.nothing(plan)
        begins = np.flatnonzero(np.r_[True, ~goes_on])
        place = np.arange(len(plan)) - np.repeat(begins, np.diff(np.r_[begins, len(plan)]))
        starts = np.flatnonzero(place % np.clip(STAGE_NBYTES // nbytes, 1, _MOST_PIECES) == 0)
        return cls(plan, starts, np.diff(np.r_[starts, len(plan)]))

    def blocks(self) -> Iterator[Block]:
        if len(self) == len(self.plan):
            yield from blocks(self.plan)
            return
        plan, base = self.plan, int(self.plan.src.min())
        # A view of all that lies between the first and the last of them; only what the plan names is ever read.
        size = int((plan.src + plan.nbytes).max()) - base
        memory = memoryview((ctypes.c_ubyte * size).from_address(base))
        for first in range(0, len(self), AT_ONCE):
            part = slice(first, first + AT_ONCE)
            starts = self.starts[part]
            dst, nbytes = plan.dst[starts].tolist(), plan.nbytes[starts].tolist()
            for start, count, to, piece in zip(starts.tolist(), self.counts[part].tolist(), dst, nbytes, strict=True):
                src = plan.src[start : start + count]
                local = int(src[0]) if count == 1 else Scattered(memory, src - base, piece)
                yield local, to, count * piece
