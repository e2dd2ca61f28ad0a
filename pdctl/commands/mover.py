"""The work of a process that `pdctl agent` keeps: moves for one rank, and ends with it."""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
from typing import NoReturn

import structlog

from pdctl import handed, succession
from pdctl.config import Settings
from pdctl.errors import PdctlError

log = structlog.get_logger(__name__)

_CLOSING_S = 0.9  # from the end of an engine to the end of the process that moved for it


def _is_ready() -> None:
    gc.freeze()  # what the imports have made is no garbage; a pass over it holds the loop for 40 to 200 ms
    print("ready", flush=True)


async def run(settings: Settings, args: argparse.Namespace) -> NoReturn:
    """One rank, and then this process ends whatever is left in it: that is what lets the pool go."""
    try:
        await handed.serve(
            settings,
            succession.inherited(args.inherited),
            hurry=lambda: asyncio.get_running_loop().call_later(_CLOSING_S, os._exit, 0),
            ready=_is_ready,
        )
    except asyncio.CancelledError:  # told to stop, and done with it
        os._exit(0)
    except PdctlError:
        raise
    except Exception as error:
        log.error("agent ended by a defect, another takes its place", exc_info=error)
        os._exit(1)
    os._exit(0)
