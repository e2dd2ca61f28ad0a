"""
Where KV bytes live in this process: one big page-aligned arena, cut into numpy arrays.

Registering is quadratic in the number of regions (50 s for 30,000, MOONCAKE_FACTS 2), so an arena is registered as one
region, never page by page. Nothing here knows an engine.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from pdctl.core.layout import Region
from pdctl.errors import BadField

_ALIGNMENT = 64  # a cache line: no two arrays of an arena share one


class Arena:
    """`nbytes` of zeroed anonymous memory, rounded up to whole pages; a context manager.

    Private to this process. The memory goes back to the system when the arena is closed and the last array cut from it
    is gone, whichever comes later: no array can ever dangle.
    """

    def __init__(self, nbytes: int) -> None:
        if nbytes <= 0:
            raise BadField("nbytes", f"is {nbytes}: an arena needs at least one byte")
        size = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self._map = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._bytes: npt.NDArray[np.uint8] | None = np.frombuffer(self._map, dtype=np.uint8)
        self._region = Region(self._bytes.ctypes.data, size)
        self._taken = 0

    @property
    def region(self) -> Region:
        """All of it: what to register."""
        return self._region

    @property
    def free(self) -> int:
        """Bytes that no array has been cut from yet."""
        return self._region.nbytes - self._taken

    def array(self, shape: int | tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """A zeroed array of the next free bytes, at a multiple of 64."""
        if self._bytes is None:
            raise BadField("arena", "is closed: cut arrays while it is open")
        kind = np.dtype(dtype)
        nbytes = kind.itemsize * (shape if isinstance(shape, int) else math.prod(shape))
        start = -(-self._taken // _ALIGNMENT) * _ALIGNMENT
        if start + nbytes > self._region.nbytes:
            raise BadField("shape", f"{shape} of {kind} is {nbytes} bytes, {self.free} are left: make a larger arena")
        self._taken = start + nbytes
        return self._bytes[start : start + nbytes].view(kind).reshape(shape)

    def close(self) -> None:
        self._bytes = None
        with contextlib.suppress(BufferError):  # arrays still look at it; the last of them takes it along
            self._map.close()

    def __enter__(self) -> Arena:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
