"""`pdctl completion SHELL`: what a shell needs to complete our commands and flags, from the parser itself."""

from __future__ import annotations

import argparse

from pdctl.flags.base import Commands

SHELLS = ("bash", "zsh", "tcsh")


def add(commands: Commands) -> None:
    """What makes the whole of it, of which this is one command, is told with the arguments: `parser`. It has no flag of
    the others, for it asks no settings: a shell that starts waits for it."""
    about = 'print a completion script: eval "$(pdctl completion bash)", or put it where the shell looks for them'
    command = commands.add_parser("completion", help=about, description=about)
    command.set_defaults(perform=_perform)
    command.add_argument("shell", choices=SHELLS)


def _perform(args: argparse.Namespace) -> int:
    from pdctl.commands import completion

    return completion.run(args)
