"""
Reads memory of this process and sums it, beside the loop: `zlib.crc32` lets the interpreter go while it sums.

One thread, which takes the batches of all who ask in turn, so that a large room does not hold up a small one's. Only
memory of the host: a pointer to a device's memory is not one that a processor may follow.
"""

from __future__ import annotations

import asyncio
import ctypes
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from pdctl.core.layout import Pool
from pdctl.core.plan import Ints
from pdctl.core.sums import Crcs, Spans
from pdctl.errors import ConfigError

Bytes = npt.NDArray[np.uint8]

_AT_ONCE = 64 << 10  # 30 us at the 2.0 GB/s measured: what a visit to the thread costs, or less
_BATCH = 4 << 20  # 2 ms: what a batch of another room waits, and what closing does
_DIRECT = 16 << 10  # spans from here on are summed where they lie; shorter ones are gathered first, a call each is dear


class Checksums:
    """`close` it when nobody asks any more: it waits for the batch under way."""

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None

    async def of(self, pool: Pool, items: Ints, spans: Spans) -> Crcs:
        """The sum of each of `items`, shape (n,), over `spans`. The bytes must stay mapped until it returns, or, where
        it is cancelled, until `close` has."""
        if len(items) * spans.nbytes <= _AT_ONCE:
            return sums(pool, items, spans)
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "checksums")
        loop, n = asyncio.get_running_loop(), max(1, _BATCH // max(1, spans.nbytes))
        batches = [items[first : first + n] for first in range(0, len(items), n)]
        return np.concatenate([await loop.run_in_executor(self._thread, sums, pool, each, spans) for each in batches])

    def close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)


def sums(pool: Pool, items: Ints, spans: Spans) -> Crcs:
    """On whatever thread calls it. Raises ConfigError for a device's pool: to follow its pointer is SIGSEGV."""
    if not pool.on.is_host:
        raise ConfigError(f"a pool on {pool.on} cannot be summed by the host's processor: switch room.checksum off")
    if not len(items):
        return np.empty(0, np.uint32)
    rows = _gathered if spans.parts > 1 or int(spans.widths.min()) < _DIRECT else _where_they_lie
    return np.fromiter((_crc(row) for row in rows(pool, items, spans)), np.uint32, len(items))


def _crc(row: Iterator[Bytes]) -> int:
    crc = 0
    for piece in row:
        crc = zlib.crc32(piece.data, crc)
    return crc


def _where_they_lie(pool: Pool, items: Ints, spans: Spans) -> Iterator[Iterator[Bytes]]:
    table = [
        (pool.pointers[entry] + offset, pool.item_lens[entry], width)
        for entry, offset, width in zip(
            spans.entries.tolist(), spans.offsets.tolist(), spans.widths.tolist(), strict=True
        )
    ]
    for item in items.tolist():
        yield (_bytes(first + item * stride, width) for first, stride, width in table)


def _gathered(pool: Pool, items: Ints, spans: Spans) -> Iterator[Iterator[Bytes]]:
    """A copy of what is summed, one row an item."""
    rows, column = np.empty((len(items), spans.nbytes), np.uint8), 0
    for entry, offset, width in zip(spans.entries.tolist(), spans.offsets.tolist(), spans.widths.tolist(), strict=True):
        nbytes = pool.item_lens[entry]
        whole = _bytes(pool.pointers[entry], (int(items.max()) + 1) * nbytes).reshape(
            -1, spans.parts, nbytes // spans.parts
        )
        here = rows[:, column : column + spans.parts * width]
        here.reshape(len(items), spans.parts, width)[...] = whole[:, :, offset : offset + width][items]
        column += spans.parts * width
    return (iter((row,)) for row in rows)


def _bytes(pointer: int, nbytes: int) -> Bytes:
    return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(pointer))
