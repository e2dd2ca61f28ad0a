"""
What a command can be told: the arguments that all have, and how its work is found.

`add` of each file here declares a command; the work is in `pdctl.commands`, and is loaded when it is to be done. That
is why each of these imports its own in the function that runs it: whoever asks for `pdctl status` at night, and the
probe that runs `pdctl` every few seconds, need not wait for an engine, a server and what draws tables, nor
`pdctl --help` for any of them. A file here imports nothing of the house but its like, `core.kinds` and names.
"""

from __future__ import annotations

import argparse
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import asyncio

    from pdctl.config import Settings

Run: TypeAlias = "Callable[[Settings, argparse.Namespace], Awaitable[int]]"
Lasts: TypeAlias = "Callable[[Settings], bool]"
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_command(commands: Commands, name: str, run: Run, lasts: Lasts, what: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=what, description=what, argument_default=argparse.SUPPRESS)
    command.set_defaults(perform=_perform, run=run, lasts=lasts, loop=None)
    command.add_argument("--config", type=Path, default=None, help="settings as a TOML file, one table a section")
    command.add_argument("--log-format", dest="log.format", help="kv (key=value, the default) or json")
    command.add_argument("--log-level", dest="log.level", help="debug, info (the default), warning or error")
    return command


def _perform(args: argparse.Namespace) -> int:
    from pdctl.commands.performing import perform

    return perform(args)


def add_service(command: argparse.ArgumentParser, what: str) -> None:
    command.add_argument("--at", dest="node.registry", metavar="URL", help=what)
    add_credentials(command)


def add_credentials(command: argparse.ArgumentParser) -> None:
    """What is shown to a service, and whose certificate is believed: docs/security.md."""
    command.add_argument("--token-file", dest="client.token_file", help="our token for the registry, alone in a file")
    command.add_argument("--tls-ca", dest="client.tls_ca", help="whose certificate of the registry we believe, PEM")
    command.add_argument("--tls-cert", dest="client.tls_cert", help="our certificate, for a registry that wants one")
    command.add_argument("--tls-key", dest="client.tls_key", help="its key, where the certificate's file has none")


def always(_: Settings) -> bool:
    return True


def never(_: Settings) -> bool:
    return False


def on_uvloop() -> asyncio.AbstractEventLoop:
    """The loop of who serves or moves: the others move little over sockets of ours."""
    import uvloop

    return uvloop.new_event_loop()
