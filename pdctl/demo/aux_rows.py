"""
What travels beside the pages: one row a request, a few small buffers, as SGLang's ranks keep theirs.

The first token that prefill has chosen, how much of the prompt it had computed before, and whose row this is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pdctl.core.layout import Pool
from pdctl.errors import NotReady

ROW_NBYTES = 64  # a buffer's row: one cache line, as SGLang pads its own for RDMA
_BUFFERS = ("output_ids", "cached_tokens", "bootstrap_room")


@dataclass(frozen=True, slots=True)
class AuxRow:
    first_token: int
    cached_tokens: int
    room: int


class AuxRows:
    """`n_rows` rows in each buffer, cut out of `memory`: uint8, contiguous, at least `nbytes_for(n_rows)` long."""

    def __init__(self, n_rows: int, memory: npt.NDArray[np.uint8]) -> None:
        self.n_rows = n_rows
        used = memory[: self.nbytes_for(n_rows)].view(np.uint64)
        self._buffers = used.reshape(len(_BUFFERS), n_rows, ROW_NBYTES // 8)
        self._free = list(range(n_rows))[::-1]

    @staticmethod
    def nbytes_for(n_rows: int) -> int:
        return len(_BUFFERS) * n_rows * ROW_NBYTES

    def pool(self) -> Pool:
        pointers = tuple(int(buffer.ctypes.data) for buffer in self._buffers)
        return Pool(pointers, (ROW_NBYTES,) * len(_BUFFERS), self.n_rows)

    def take(self) -> int:
        """A row of one's own, wiped, so that nothing old can be taken for an arrival."""
        if not self._free:
            raise NotReady(f"all {self.n_rows} aux rows are held: wait for a request to end")
        row = self._free.pop()
        self._buffers[:, row] = 0
        return row

    def give_back(self, row: int) -> None:
        self._free.append(row)

    def write(self, row: int, values: AuxRow) -> None:
        self._buffers[:, row, 0] = (values.first_token, values.cached_tokens, values.room)

    def read(self, row: int) -> AuxRow:
        first_token, cached_tokens, room = (int(value) for value in self._buffers[:, row, 0])
        return AuxRow(first_token, cached_tokens, room)
