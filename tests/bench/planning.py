"""Planning a room's copies: `core.plan.item_plan` beside the loop over entries and runs that one would write first."""

from __future__ import annotations

import random

from pdctl.core.layout import Pool
from pdctl.core.plan import item_plan
from tests.bench.rivals import Row, race

ENTRIES = 64  # K and V of 32 layers
PAGE_NBYTES = 64 * 1024
POOL_PAGES = 16384
KINDS = {"one run": 512, "runs of 16": 16, "scattered": 1}
Copy = tuple[int, int, int]


def bench() -> list[Row]:
    return [one(pages, kind, run) for pages in (8, 512) for kind, run in KINDS.items()]


def one(pages: int, kind: str, run: int) -> Row:
    """`pages` pages whose indices go on for `run` pages on both sides, then jump."""
    source, destination = pool(1 << 40), pool(1 << 41)
    src, dst = indices(pages, run, seed=1), indices(pages, run, seed=2)
    plan, copies = item_plan(source, destination, src, dst, "kv"), loop(source, destination, src, dst)
    if list(zip(plan.src.tolist(), plan.dst.tolist(), plan.nbytes.tolist(), strict=True)) != copies:
        raise AssertionError(f"item_plan and the loop disagree on {pages} pages, {kind}: nothing here is worth timing")
    return race(
        f"plan {pages} pages x {ENTRIES} entries, {kind} ({len(copies)} copies)",
        ("item_plan", lambda: item_plan(source, destination, src, dst, "kv")),
        ("python loop", lambda: loop(source, destination, src, dst)),
    )


def loop(source: Pool, destination: Pool, src: list[int], dst: list[int]) -> list[Copy]:
    """The rival: find the runs once, then write them down for each entry. It checks nothing, which is in its favour."""
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


def pool(base: int) -> Pool:
    return Pool(
        tuple(base + e * POOL_PAGES * PAGE_NBYTES for e in range(ENTRIES)), (PAGE_NBYTES,) * ENTRIES, POOL_PAGES
    )


def indices(pages: int, run: int, seed: int) -> list[int]:
    """Runs of `run` indices that begin at places two runs apart, in an order drawn from `seed`."""
    starts = list(range(0, POOL_PAGES - run, 2 * run))
    random.Random(seed).shuffle(starts)
    return [start + offset for start in starts[: -(-pages // run)] for offset in range(run)][:pages]
