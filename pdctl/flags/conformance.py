"""`pdctl conformance URL`: does a bootstrap registry keep its promises? 0: all; 1: not all; 69: none is there."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from pdctl.flags.base import Commands, add_command, add_credentials, never

if TYPE_CHECKING:
    from pdctl.config import Settings


def add(commands: Commands) -> None:
    command = add_command(
        commands, "conformance", _conformance, never,
        "put what a bootstrap registry promises to any server on SGLang's wire; exit 0 all kept, 1 not all",
    )  # fmt: skip
    command.add_argument(
        "url", metavar="URL", help="http://HOST:PORT of a server without a fleet: ranks are registered"
    )
    add_credentials(command)
    command.add_argument("--force", action="store_true", help="also where ranks are registered, whom it replaces")
    command.add_argument(
        "--from-address", metavar="ADDRESS", help="a second address of this host, to claim what is held"
    )
    command.add_argument(
        "--rooms", type=int, metavar="N", help="so many rooms, to see that they are bounded (0: not tried)"
    )
    command.add_argument("--idle", type=float, metavar="SECONDS", help="of silence on a connection that must stay (6)")
    command.add_argument("--json", action="store_true", help="one JSON document")
    command.set_defaults(force=False, from_address=None, rooms=0, idle=6.0, json=False)


async def _conformance(settings: Settings, args: argparse.Namespace) -> int:
    from pdctl.commands import conformance

    return await conformance.run(settings, args)
