"""`pdctl journal copy FROM TO`: to another store, with every epoch."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from pdctl.flags.base import Commands, add_command, never

if TYPE_CHECKING:
    from pdctl.config import Settings


def add(commands: Commands) -> None:
    journal = commands.add_parser("journal", help="what a registry keeps", description="What a registry keeps.")
    actions: Commands = journal.add_subparsers(metavar="ACTION", required=True)
    what = "put all that a journal keeps into an empty one, for a registry that moves; stop the registry first"
    command = add_command(actions, "copy", _copy, never, what)
    command.add_argument("source", metavar="FROM", help="sqlite:PATH or etcd://HOST:PORT[,HOST:PORT...][?prefix=NAME]")
    command.add_argument("target", metavar="TO", help="the same; it has to be empty")


async def _copy(settings: Settings, args: argparse.Namespace) -> int:
    from pdctl.commands import journal

    return await journal.run(settings, args)
