"""The work of `pdctl agent`: one process that listens, and one for each rank that moves."""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import sys
from contextlib import ExitStack
from typing import NoReturn

import structlog

from pdctl import config, handed, succession
from pdctl.beside import beside
from pdctl.config import Settings
from pdctl.errors import PdctlError

log = structlog.get_logger(__name__)

_CLOSING_S = 0.9  # from the end of an engine to the end of the process that moved for it


async def run(settings: Settings, args: argparse.Namespace) -> int:
    if args.inherited is not None:
        await _one_agent(settings, args.inherited)
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


def _agent_is_ready() -> None:
    gc.freeze()  # as in `_serve`
    print("ready", flush=True)


async def _one_agent(settings: Settings, inherited: str) -> NoReturn:
    """One rank, and then this process ends whatever is left in it: that is what lets the pool go."""
    try:
        await handed.serve(
            settings,
            succession.inherited(inherited),
            hurry=lambda: asyncio.get_running_loop().call_later(_CLOSING_S, os._exit, 0),
            ready=_agent_is_ready,
        )
    except asyncio.CancelledError:  # told to stop, and done with it
        os._exit(0)
    except PdctlError:
        raise
    except Exception as error:
        log.error("agent ended by a defect, another takes its place", exc_info=error)
        os._exit(1)
    os._exit(0)
