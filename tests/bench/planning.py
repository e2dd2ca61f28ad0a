"""
Planning a room's copies: `core.plan.item_plan` beside the loops that one would write first, and beside the transfer.

The large room is 8,192 pages x 64 layers, K and V of each, in runs of 1 to 8 pages in an order of chance, other runs at
each side. Its transfer is real, between two processes, of a quarter of its layers in pages of 1 KiB: smaller than any
model's, so that the planning has the least to hide behind.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import chain, pairwise

import numpy as np

from pdctl.core.allowance import SenderLimits
from pdctl.core.comparing import Checksum
from pdctl.core.layout import Pool
from pdctl.core.plan import CopyPlan, Ints, item_plan
from pdctl.core.turns import cut, split
from tests.bench.checksums import Pair
from tests.bench.rivals import Row, race
from tests.e2e.kv import Kv

ENTRIES = 64  # K and V of 32 layers
PAGE_NBYTES = 64 * 1024
POOL_PAGES = 16384
KINDS = {"one run": 512, "runs of 16": 16, "scattered": 1}
Copy = tuple[int, int, int]
Loop = Callable[[Pool, Pool, Sequence[int], Sequence[int]], list[Copy]]

LARGE, LAYERS, LONGEST_RUN = 8192, 64, 8
PART, MOVED_PAGE, MOVES = 4, 1024, 5
BLOCK_LIMIT = 1 << 20


def bench() -> list[Row]:
    rows = [one(pages, kind, run) for pages in (8, 512) for kind, run in KINDS.items()]
    rows += large()
    print(beside_the_transfer())
    return rows


def one(pages: int, kind: str, run: int) -> Row:
    """`pages` pages whose indices go on for `run` pages on both sides, then jump."""
    src, dst = indices(pages, run, seed=1), indices(pages, run, seed=2)
    return against(runs_once, f"plan {pages} pages x {ENTRIES} entries, {kind}", pools(ENTRIES, PAGE_NBYTES), src, dst)


def large() -> list[Row]:
    """Page numbers come as an array, as `SendingRoom.send` takes them, and as a list to the loops."""
    src, dst = shuffled_runs(LARGE, seed=1), shuffled_runs(LARGE, seed=2)
    what = f"plan {LARGE} pages x {LAYERS} layers, runs of 1 to {LONGEST_RUN}"
    return [
        against(loop, f"{what}, {name}", pools(2 * LAYERS, PAGE_NBYTES), src, dst)
        for name, loop in (("per layer", per_layer), ("runs found once", runs_once))
    ]


def against(loop: Loop, what: str, both: tuple[Pool, Pool], src: Sequence[int], dst: Sequence[int]) -> Row:
    arrays, copies = (np.asarray(src), np.asarray(dst)), loop(*both, src, dst)
    plan = item_plan(*both, *arrays, "kv")
    if list(zip(plan.src.tolist(), plan.dst.tolist(), plan.nbytes.tolist(), strict=True)) != copies:
        raise AssertionError(f"item_plan and the loop disagree on {what}: nothing here is worth timing")
    return race(
        f"{what} ({len(copies)} copies)",
        ("item_plan", lambda: item_plan(*both, *arrays, "kv")),
        ("python loop", lambda: loop(*both, src, dst)),
    )


def beside_the_transfer() -> str:
    """What all that is done of a plan before its first block leaves takes, of the time that its pages take to move."""
    kv = Kv([MOVED_PAGE] * (2 * LAYERS // PART), n_pages=POOL_PAGES)
    src, dst = shuffled_runs(LARGE, seed=3), shuffled_runs(LARGE, seed=4)
    both, arrays = pools(len(kv.lens), MOVED_PAGE), (np.asarray(src), np.asarray(dst))
    moves, plans = [], []
    with ExitStack() as stack:
        pair = Pair(stack, kv, checksum=Checksum.OFF)
        pair.ours, pair.theirs = src, dst
        pair.check()
        for _ in range(MOVES):  # cold each time, as in a prefill that has computed meanwhile
            moves.append(seconds(pair.move))
            plans.append(seconds(lambda: planned(*both, *arrays)))
    plan_s, move_s, copies = max(plans), statistics.median(moves), len(item_plan(*both, *arrays, "kv"))
    return (
        f"{LARGE} pages x {LAYERS // PART} layers, {copies} copies: moved in {move_s:.2f} s"
        f" ({min(moves):.2f} to {max(moves):.2f}), planned and cut in {plan_s * 1e3:.1f} ms at worst "
        f"({statistics.median(plans) * 1e3:.1f} median): {plan_s / move_s:.2%} of it (target: under 2 %)"
    )


def planned(source: Pool, destination: Pool, src: Ints, dst: Ints) -> list[CopyPlan]:
    limit = SenderLimits().turn_nbytes
    return [
        split(turn, BLOCK_LIMIT) for turn in cut(split(item_plan(source, destination, src, dst, "kv"), limit), limit)
    ]


def seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def per_layer(source: Pool, destination: Pool, src: Sequence[int], dst: Sequence[int]) -> list[Copy]:
    """The straightforward rival: for each entry walk over the pages, and let what goes on at both sides grow."""
    copies: list[Copy] = []
    for ours, theirs, nbytes in zip(source.pointers, destination.pointers, source.item_lens, strict=True):
        first_s, first_d, count = src[0], dst[0], 0
        for s, d in zip(src, dst, strict=True):
            if s == first_s + count and d == first_d + count:
                count += 1
            else:
                copies.append((ours + first_s * nbytes, theirs + first_d * nbytes, count * nbytes))
                first_s, first_d, count = s, d, 1
        copies.append((ours + first_s * nbytes, theirs + first_d * nbytes, count * nbytes))
    return copies


def runs_once(source: Pool, destination: Pool, src: Sequence[int], dst: Sequence[int]) -> list[Copy]:
    """A better one: find the runs once, then write them down for each entry. Neither checks, in their favour."""
    runs: list[Copy] = []
    for s, d in zip(src, dst, strict=True):
        if runs and runs[-1][0] + runs[-1][2] == s and runs[-1][1] + runs[-1][2] == d:
            runs[-1] = (*runs[-1][:2], runs[-1][2] + 1)
        else:
            runs.append((s, d, 1))
    return [
        (ours + s * nbytes, theirs + d * nbytes, count * nbytes)
        for ours, theirs, nbytes in zip(source.pointers, destination.pointers, source.item_lens, strict=True)
        for s, d, count in runs
    ]


def pools(entries: int, nbytes: int) -> tuple[Pool, Pool]:
    return pool(1 << 42, entries, nbytes), pool(1 << 43, entries, nbytes)


def pool(base: int, entries: int, nbytes: int) -> Pool:
    return Pool(tuple(base + e * POOL_PAGES * nbytes for e in range(entries)), (nbytes,) * entries, POOL_PAGES)


def indices(pages: int, run: int, seed: int) -> list[int]:
    """Runs of `run` indices that begin at places two runs apart, in an order drawn from `seed`."""
    starts = list(range(0, POOL_PAGES - run, 2 * run))
    random.Random(seed).shuffle(starts)
    return [start + offset for start in starts[: -(-pages // run)] for offset in range(run)][:pages]


def shuffled_runs(pages: int, seed: int) -> list[int]:
    """The whole pool cut into runs of 1 to LONGEST_RUN pages, in an order of chance; `pages` of them."""
    chance = random.Random(seed)
    starts = [0]
    while starts[-1] < POOL_PAGES:
        starts.append(min(POOL_PAGES, starts[-1] + chance.randint(1, LONGEST_RUN)))
    runs = [range(first, end) for first, end in pairwise(starts)]
    chance.shuffle(runs)
    return list(chain.from_iterable(runs))[:pages]
