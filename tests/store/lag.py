"""`python -m tests.store.lag JSON`: by how much an event loop comes late while a store is set up, or closed.

By the wheel alone, called on a thread as its users do; or by us. A line of JSON when it begins, one when it is known.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

from pdctl import logs
from pdctl.core.kvstore import KVStoreConfig, SetUp, StoreRank, set_up
from pdctl.device.open import open_device
from pdctl.engine.store_wheel import store_class
from pdctl.errors import StoreNotReady, StoreUnusable
from pdctl.kvstore import mooncake_means, open_store
from pdctl.lag import watched
from pdctl.logs import LogSettings
from pdctl.retry import RetryPolicy
from pdctl.store.patience import StorePatience
from tests.engine.processes import die_with_parent

T = TypeVar("T")

GIVE_UP_S = 6.0
PATIENCE = StorePatience(until_ready=RetryPolicy(first_wait_s=0.5, max_wait_s=1.0, give_up_after_s=GIVE_UP_S))


async def by_the_wheel(config: KVStoreConfig, pid: int, trouble: str) -> float:
    """Its worst while it is set up; with trouble at the end, while it is closed."""
    store: Any = store_class("tcp")()
    plan, _ = set_up(config, StoreRank(), frozenset())
    sizes = (plan.segment_nbytes, plan.buffer_nbytes)
    arguments: tuple[Any, ...] = (plan.local_hostname, plan.metadata_server, *sizes, plan.protocol, "", plan.master)
    async with watched(time.monotonic, 0.005) as worst:
        await asyncio.sleep(0.02)  # it has begun to tick
        await asyncio.to_thread(store.setup, *arguments)
        setting_up_s = worst()
    if trouble not in CLOSING:
        return setting_up_s
    meet(pid, trouble)
    async with watched(time.monotonic, 0.005) as worst:
        await asyncio.sleep(0.02)
        await asyncio.to_thread(store.close)
        return worst()


async def by_us(config: KVStoreConfig, pid: int, trouble: str) -> float:
    store_class("tcp")
    async with open_device("cpu") as device, watched(time.monotonic, 0.005) as worst:
        means = mooncake_means(config, device, PATIENCE)
        if trouble in BETWEEN:
            means = replace(means, open=after(lambda: meet(pid, trouble), means.open))
        opening = open_store(config, StoreRank(), device, patience=PATIENCE, means=means)
        try:
            async with opening as opened:
                await opened.store.put("lag", b"1")
                if trouble in CLOSING:
                    meet(pid, trouble)
        except (StoreNotReady, StoreUnusable):
            pass
        return worst()


CLOSING = {"closing": None, "closing, hung": signal.SIGSTOP, "closing, killed": signal.SIGKILL}
BETWEEN = {"hung in between": signal.SIGSTOP, "killed in between": signal.SIGKILL}


def meet(pid: int, trouble: str) -> None:
    how = {**CLOSING, **BETWEEN}[trouble]
    if how is not None:
        os.kill(pid, how)
        time.sleep(0.1)


def after(first: Callable[[], None], opening: Callable[[SetUp], T]) -> Callable[[SetUp], T]:
    def both(plan: SetUp) -> T:
        first()
        return opening(plan)

    return both


async def main(by: str, config: dict[str, Any], pid: int, trouble: str) -> None:
    logs.configure(LogSettings(level="error"))
    print(json.dumps({"begun": True}), flush=True)
    measure = {"wheel": by_the_wheel, "us": by_us}[by]
    print(json.dumps({"lag_s": await measure(KVStoreConfig(**config), pid, trouble)}), flush=True)


if __name__ == "__main__":
    die_with_parent()
    asyncio.run(main(**json.loads(sys.argv[1])))
    os._exit(0)
