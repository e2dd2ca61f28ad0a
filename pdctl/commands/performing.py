"""
Settings, a log and a loop, the work of a command in it, and its exit status (`pdctl.cli` has their meanings).

Apart from the command line, because `pdctl --help` need not wait for them.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from collections.abc import Awaitable

from pdctl import config, logs
from pdctl.errors import CallerError, ConfigError, NotReady, OperatorError, PdctlError, Superseded, Unreachable

USAGE, UNAVAILABLE = 2, 69


def perform(args: argparse.Namespace) -> int:
    """Do what was asked for; its exit status."""
    flags = {name: value for name, value in vars(args).items() if "." in name}
    try:
        settings = config.load(flags, file=args.config)
        logs.configure(settings.log)
        with asyncio.Runner(loop_factory=args.loop) as runner:
            return runner.run(_until_told_to_stop(args.run(settings, args), lasting=args.lasts(settings)))
    except PdctlError as error:
        print(f"pdctl: {error}", file=sys.stderr)
        return _status(error)


def _status(error: PdctlError) -> int:
    if isinstance(error, Superseded):
        return 1
    if isinstance(error, ConfigError | CallerError):
        return USAGE
    return UNAVAILABLE if isinstance(error, OperatorError | Unreachable | NotReady) else 1


async def _until_told_to_stop(work: Awaitable[int], *, lasting: bool) -> int:
    """Await `work`; SIGTERM ends it in order, as SIGINT does by asyncio's handler. `lasting`: stopping is its end."""
    task = asyncio.ensure_future(work)
    told = asyncio.Event()

    def stop() -> None:
        told.set()
        task.cancel()

    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop)
    try:
        return await task
    except asyncio.CancelledError:
        if not told.is_set():
            raise
        return 0 if lasting else 128 + signal.SIGTERM
