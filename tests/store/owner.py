"""
The owner of all bytes hangs while pages are read from it, and goes on later: does anything land after the call failed?

`python -m tests.store.owner PIECES STALL_S` reads 64 pages of 1 MiB in calls of so many, and says what it saw. With
all in one call and MC_TCP_LANES_PER_PEER=4, at 5 s, the wheel gives up after 60 s, and 24 MiB land after that.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time

import numpy as np

from pdctl.core.kvstore import SetUp
from pdctl.engine import wheel
from pdctl.engine.store_wheel import store_class
from pdctl.memory import Arena
from pdctl.store.attachment import AttachPolicy, attached
from pdctl.store.base import Ints
from pdctl.store.mooncake import open_mooncake_store
from tests.bench.store_pages import nobody, owning
from tests.store.master import master

N, NBYTES = 64, 1 << 20


async def through(address: str, owner: int, pieces: int) -> dict[str, float]:
    plan = SetUp("127.0.0.1", "P2PHANDSHAKE", 0, 16 << 20, "tcp", "", address)
    policy = AttachPolicy(pieces_at_once=pieces, nbytes_at_once=1 << 30, fresh_s=60.0)
    keys = [f"p{n}" for n in range(N)]
    sizes: Ints = np.full((N, 1), NBYTES, np.int64)
    with Arena(N * NBYTES) as arena:
        memory = arena.array(N * NBYTES, np.uint8)
        memory[:] = 7
        pointers: Ints = (arena.region.pointer + np.arange(N, dtype=np.int64) * NBYTES)[:, None]
        async with (
            open_mooncake_store(plan, store_class("tcp"), keep=wheel.keep_until_exit) as store,
            attached(store, nobody, policy=policy) as attachment,
        ):
            await store.register(arena.region)
            kept = sum(await attachment.put_pages(keys, pointers, sizes))
            memory[:] = 0
            os.kill(owner, signal.SIGSTOP)
            began = time.monotonic()
            hits = sum(await attachment.get_pages(keys, pointers, sizes))
            took_s = time.monotonic() - began
            memory[:] = 0  # the pages are somebody else's now
            os.kill(owner, signal.SIGCONT)
            await asyncio.sleep(2.0)
            return {"kept": kept, "hits": hits, "took_s": took_s, "landed": int((memory == 7).sum())}


def main(pieces: str, stall_s: str) -> int:
    for name in ("MC_TCP_PROGRESS_TIMEOUT_SEC", "MC_TCP_STATUS_TIMEOUT_SEC"):
        os.environ[name] = stall_s
    with master() as at, owning(at.address, 256 << 20) as owner:
        print(json.dumps(asyncio.run(through(at.address, owner, int(pieces)))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
