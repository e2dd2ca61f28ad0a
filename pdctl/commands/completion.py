"""`pdctl completion SHELL`: what a shell needs to complete our commands and flags, from the parser itself."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import shtab

from pdctl.commands.base import Commands, add_command, never
from pdctl.config import Settings

SHELLS = ("bash", "zsh", "tcsh")
_FILES = ("PATH", "FILE")
_FILE_FLAGS = ("_file", ".tls_cert", ".tls_key", ".tls_ca", ".tls_client_ca")


def add(commands: Commands) -> None:
    """What makes the whole of it, of which this is one command, is told with the arguments: `parser`."""
    about = 'print a completion script: eval "$(pdctl completion bash)", or put it where the shell looks for them'
    command = add_command(commands, "completion", _completion, never, about)
    command.add_argument("shell", choices=SHELLS)


async def _completion(settings: Settings, args: argparse.Namespace) -> int:  # noqa: ARG001
    whole = args.parser()
    for action in _actions(whole):
        if action.type is Path or action.metavar in _FILES or action.dest.endswith(_FILE_FLAGS):
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(whole, shell=args.shell))
    return 0


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:  # argparse has no other way to its flags, and shtab goes the same
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from _actions(inner)
