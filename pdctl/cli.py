"""
Flags -> Settings -> run. The only place that prints or exits.

    0   done
    1   the work was done and something in it failed (a check of the demo, a probe), or another process has replaced it
    2   wrong usage or settings; nothing was started
    69  a service that was needed cannot be had (the registry, the engine, the port)
    130 stopped by SIGINT
    141 nobody reads any more what is printed
    143 stopped by SIGTERM before the work was whole; what runs until it is stopped exits 0
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from pdctl.flags import (
    agent,
    completion,
    conformance,
    demo,
    doctor,
    drain,
    events,
    explain,
    journal,
    register,
    serve,
    sessions,
    status,
    store,
)

COMMANDS = (
    *(serve, register, agent, sessions, store, journal, demo),
    *(completion, conformance, doctor, drain, events, explain, status),
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command and exit with its status."""
    sys.exit(run(argv))


def run(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status."""
    given = list(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(given)
    args.argv = given
    try:
        status: int = args.perform(args)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # whoever read us has seen enough: `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def parser() -> argparse.ArgumentParser:
    """All commands; a flag's dest is the dotted name of the knob that it turns."""
    top = argparse.ArgumentParser(
        prog="pdctl", description="The control plane for prefill/decode disaggregated LLM serving."
    )
    top.add_argument("--version", action=_Version, nargs=0, help="show program's version number and exit")
    commands = top.add_subparsers(metavar="COMMAND", required=True)
    top.set_defaults(parser=parser)
    for each in COMMANDS:
        each.add(commands)
    return top


class _Version(argparse.Action):
    """argparse's own wants the text before anybody has asked for it, and to find it takes as long as all the rest."""

    def __call__(self, top: argparse.ArgumentParser, *_: object) -> NoReturn:
        from importlib.metadata import version

        print(f"pdctl {version('pdctl')}")
        top.exit()
