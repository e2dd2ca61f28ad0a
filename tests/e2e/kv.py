"""The shape of a rank's KV memory in these tests, and what its bytes are; both processes and the test agree on it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Kv:
    """`lens[e]` bytes a page in entry e; the prefill's bytes are random from `seed`."""

    lens: list[int]
    n_pages: int = 64
    seed: int = 1

    @property
    def nbytes(self) -> int:
        return sum(self.lens) * self.n_pages


def content(kv: Kv) -> list[np.ndarray]:
    """What the prefill's entries hold: each of shape (pages, bytes)."""
    rng = np.random.default_rng(kv.seed)
    return [rng.integers(0, 256, (kv.n_pages, nbytes), np.uint8) for nbytes in kv.lens]


# 8 layers: K of each, then V of each; 16 tokens x 2 heads x 64 x 2 bytes
MHA = Kv([4096] * 16)
# 8 layers, one entry each, of a length that is no power of two: 16 tokens x 576 x 2 bytes
MLA = Kv([18432] * 8)
# pages large enough that a room is still moving when something happens to it
BIG = Kv([1 << 20] * 4, n_pages=48)
