"""`python -m tests.store.rank CONFIG`: one rank that opens the store, says what came of it, and ends when told.

A line of JSON for the Report, with the event loop's worst lag until then; it stays until it reads a line, or its input
ends, and then says how late the loop came while the store was closed.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import sys
import time
from contextlib import AsyncExitStack
from dataclasses import asdict
from typing import Any

from pdctl import logs
from pdctl.core.kvstore import KVStoreConfig, StoreRank
from pdctl.core.warmup import Report
from pdctl.device.open import open_device
from pdctl.errors import StoreNotReady, StoreUnusable
from pdctl.kvstore import open_store
from pdctl.lag import watched
from pdctl.logs import LogSettings
from pdctl.store.patience import StorePatience
from tests.engine.processes import die_with_parent


async def main(config: dict[str, Any], rank: dict[str, int], patience: dict[str, Any]) -> None:
    logs.configure(LogSettings())  # to stderr: our lines are for who started us
    print(json.dumps({"started": True}), flush=True)
    importlib.import_module("mooncake.store")  # once in a process, and no matter of the store's master
    async with open_device("cpu") as device, AsyncExitStack() as stack:
        opening = open_store(KVStoreConfig(**config), StoreRank(**rank), device, patience=StorePatience(**patience))
        async with watched(time.monotonic, 0.005) as worst:
            try:
                opened = await stack.enter_async_context(opening)
            except (StoreNotReady, StoreUnusable) as error:
                say(error.report, worst())  # type: ignore[arg-type]
                return
        say(opened.report, worst())
        await asyncio.to_thread(sys.stdin.readline)
        async with watched(time.monotonic, 0.005) as worst:
            await stack.aclose()
        print(json.dumps({"closed": True, "lag_s": worst()}), flush=True)


def say(report: Report, lag_s: float) -> None:
    print(json.dumps(asdict(report) | {"ready": report.ready, "said": str(report), "lag_s": lag_s}), flush=True)


if __name__ == "__main__":
    die_with_parent()
    asyncio.run(main(**json.loads(sys.argv[1])))
    os._exit(0)
