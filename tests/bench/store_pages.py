"""Pages in calls of so many through an Attachment, beside all of them in one bare call of the wheel; over TCP to the
memory of another process. As few as 16 in a call cost little, and all end within one stall of an owner that hangs.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from uuid import uuid4

import numpy as np

from pdctl.core.kvstore import SetUp
from pdctl.engine.store_wheel import store_class
from pdctl.memory import Arena
from pdctl.store.attachment import Attachment, AttachPolicy, attached
from pdctl.store.base import Ints
from pdctl.store.mooncake import open_mooncake_store
from tests.bench.rivals import Row, race
from tests.engine.processes import die_with_parent
from tests.store.master import master

SIZES = {64 << 10: 512, 1 << 20: 128}
AT_ONCE = (1, 4, 16, 64)
SEGMENT = 1 << 30
OWNER = """
import json, sys
from pdctl.engine.store_wheel import store_class
store = store_class("tcp")()
code = store.setup("127.0.0.1", "P2PHANDSHAKE", int(sys.argv[2]), 16 << 20, "tcp", "", sys.argv[1])
print(json.dumps(code), flush=True)
sys.stdin.read()
"""


def bench() -> list[Row]:
    return asyncio.run(rows())


async def rows() -> list[Row]:
    with master() as at, owning(at.address, SEGMENT):
        return await beside(at.address)


@contextmanager
def owning(address: str, nbytes: int) -> Iterator[int]:
    """The pid of another process whose memory, `nbytes` of it, is all that the master at `address` has."""
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, address, str(nbytes)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        preexec_fn=die_with_parent,
    )
    try:
        assert owner.stdout is not None
        assert json.loads(owner.stdout.readline()) == 0
        yield owner.pid
    finally:
        owner.kill()
        owner.wait()


async def beside(address: str) -> list[Row]:
    made: list[Any] = []
    plan = SetUp("127.0.0.1", "P2PHANDSHAKE", 0, 16 << 20, "tcp", "", address)
    found = []
    async with open_mooncake_store(plan, store_class("tcp"), keep=made.append) as store:
        for nbytes, n in SIZES.items():
            with Arena(n * nbytes) as arena:
                await store.register(arena.region)
                pages = Pages(made[0], arena, nbytes, n)
                for at_once in AT_ONCE:
                    policy = replace(AttachPolicy(), pieces_at_once=at_once, nbytes_at_once=1 << 30, fresh_s=60.0)
                    async with attached(store, nobody, policy=policy) as attachment:
                        found.append(await asyncio.to_thread(pages.read, attachment, asyncio.get_running_loop()))
                await store.unregister(arena.region)
    return found


async def nobody() -> None:
    """The master is not asked."""


class Pages:
    """Put once, read over and over."""

    def __init__(self, raw: Any, arena: Arena, nbytes: int, n: int) -> None:
        self._raw = raw
        self._nbytes = nbytes
        self._keys = [f"{uuid4().hex}-{i}" for i in range(n)]
        self._at: Ints = (arena.region.pointer + np.arange(n, dtype=np.int64) * nbytes)[:, None]
        self._sizes: Ints = np.full((n, 1), nbytes, np.int64)
        codes = raw.batch_put_from(self._keys, self._at[:, 0].tolist(), self._sizes[:, 0].tolist())
        assert set(codes) == {0}

    def read(self, attachment: Attachment, loop: asyncio.AbstractEventLoop) -> Row:
        """From a thread beside the loop, as the bare call would stand in an engine's."""

        def run(work: Awaitable[list[bool]]) -> list[bool]:
            async def wait() -> list[bool]:
                return await work

            return asyncio.run_coroutine_threadsafe(wait(), loop).result()

        def ours() -> None:
            assert all(run(attachment.get_pages(self._keys, self._at, self._sizes)))

        def theirs() -> None:
            sizes = self._raw.batch_get_into(self._keys, self._at[:, 0].tolist(), self._sizes[:, 0].tolist())
            assert set(sizes) == {self._nbytes}

        n = attachment._policy.pieces_at_once
        what = f"{len(self._keys)} pages of {self._nbytes >> 10} KiB, {n} a call"
        return race(what, ("attached", ours), ("one bare call", theirs), rounds=7, round_s=0.2)
