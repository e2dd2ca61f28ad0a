"""The work of `pdctl serve`."""

from __future__ import annotations

import argparse
import asyncio
import gc

from pdctl import serving
from pdctl.config import Settings


async def run(settings: Settings, args: argparse.Namespace) -> int:  # noqa: ARG001
    async with serving.sidecar(settings) as sidecar:
        gc.freeze()  # what the imports have made is no garbage; a pass over it holds the loop for 40 to 200 ms
        print(f"serving at {sidecar.url}", flush=True)
        for name, url in sidecar.listeners:
            print(f"serving {name} at {url}", flush=True)
        await asyncio.Event().wait()
    return 0
