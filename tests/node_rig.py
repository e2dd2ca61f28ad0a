"""The least that a rank of tests has: one layer of K and V, an aux buffer, a seat. Without pytest: processes use it."""

from __future__ import annotations

from typing import Any

import numpy as np

from pdctl.core.layout import Pool, RankPools
from pdctl.core.route import Seat, Shape
from pdctl.memory import Arena

PAGE, N_PAGES, ROW, N_ROWS = 4096, 16, 64, 4
SHAPE = Shape(attn_tp_size=1, attn_cp_size=1, dp_size=1, pp_size=1, page_size=16, kv_cache_dtype="float16")
FIRST = Seat(0, 0, 0, 0)


KEPT: list[Memory] = []
"""An arena that nobody holds is unmapped, and a node holds addresses."""


def memory_pools() -> dict[str, Any]:
    """Of an arena that nobody else looks at."""
    KEPT.append(Memory())
    return KEPT[-1].pools


class Memory:
    """K and V of one layer, and one aux buffer, in an arena of their own."""

    def __init__(self) -> None:
        self.arena = Arena(1 << 20)
        self.kv = [self.arena.array((N_PAGES, PAGE), np.uint8) for _ in "KV"]
        self.aux = self.arena.array((N_ROWS, ROW), np.uint8)
        self.pools: dict[str, Any] = {
            "pools": RankPools(
                Pool(tuple(entry.ctypes.data for entry in self.kv), (PAGE, PAGE), N_PAGES),
                Pool((self.aux.ctypes.data,), (ROW,), N_ROWS),
            ),
            "arena": self.arena.region,
        }
