"""What `room.checksum` costs: the same rooms between two processes, checked and not, over the real engine and link.

Scattered pages, so that nothing merges and each page of each entry is a block and a span of its own.
"""

from __future__ import annotations

import itertools
from contextlib import ExitStack

import numpy as np

from pdctl.core.comparing import Checksum
from tests.bench.rivals import Row, race
from tests.e2e.kv import Kv
from tests.e2e.test_rooms import rank
from tests.engine.processes import Child

SIZES = {
    "4 KiB": Kv([4 << 10] * 32, n_pages=256),
    "64 KiB": Kv([64 << 10] * 16, n_pages=64),
    "1 MiB": Kv([1 << 20] * 4, n_pages=16),
}


def bench() -> list[Row]:
    return [one(name, kv) for name, kv in SIZES.items()]


def one(name: str, kv: Kv) -> Row:
    with ExitStack() as stack:
        plain, checked = (Pair(stack, kv, how) for how in (Checksum.OFF, Checksum.REQUIRED))
        for pair in (plain, checked):
            pair.check()
        what = f"a room of {kv.nbytes >> 20} MiB in blocks of {name}"
        return race(what, ("plain", plain.move), ("checked", checked.move), round_s=0.5)


class Pair:
    """A prefill and a decode, each a process; `move` takes all their pages across."""

    def __init__(self, stack: ExitStack, kv: Kv, checksum: Checksum) -> None:
        self.prefill, self.decode = (
            stack.enter_context(rank(role, kv, checksum=checksum)) for role in ("prefill", "decode")
        )
        rng = np.random.default_rng(5)
        self.ours, self.theirs = (rng.permutation(kv.n_pages).tolist() for _ in range(2))
        self.rooms = itertools.count(1)

    def move(self) -> None:
        room = next(self.rooms)
        self.prefill.ask_now("send", room=room, chunks=[self.ours], row=1)
        self.decode.ask_now("receive", room=room, prefill=self.prefill.hello["link"], pages=self.theirs, row=1)
        ended = [side.ask_now("result", room=room)["why"] for side in (self.decode, self.prefill)]
        if any(ended):
            raise AssertionError(f"nothing here is worth timing: {ended}")

    def check(self) -> None:
        self.move()
        if digest(self.decode, self.theirs) != digest(self.prefill, self.ours):
            raise AssertionError("other bytes arrived: nothing here is worth timing")


def digest(rank: Child, pages: list[int]) -> str:
    return str(rank.ask_now("digest", pages=pages, row=1)["sha"])
