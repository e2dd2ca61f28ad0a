"""The work of `pdctl agent`: listens, and keeps a process for each rank, which moves (mover.py)."""

from __future__ import annotations

import argparse
import asyncio
import sys
from contextlib import ExitStack

from pdctl import config, succession
from pdctl.beside import beside
from pdctl.config import Settings


async def run(settings: Settings, args: argparse.Namespace) -> int:
    command = (sys.executable, "-m", "pdctl", *args.argv)
    users = bool(settings.agent.users)
    paths = settings.agent.sockets or (config.runtime_dir(config.environment()) / "agent.sock",)
    with ExitStack() as stack:
        socks = [stack.enter_context(succession.listening(path, for_others=users)) for path in paths]
        loops = {
            str(path): succession.keep(sock, path, command, lambda at: print(f"serving at unix:{at}", flush=True))
            for path, sock in zip(paths, socks, strict=True)
        }
        async with beside(**loops):
            await asyncio.Event().wait()
    return 0
