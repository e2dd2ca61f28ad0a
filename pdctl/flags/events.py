"""`pdctl events`: what has happened in the fleet of late, and with --follow what happens."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from pdctl.core.kinds import ChangeKind, Kind
from pdctl.flags.base import Commands, add_command, add_service, never

if TYPE_CHECKING:
    from pdctl.config import Settings


KINDS = sorted({*(kind.value for kind in Kind), *(kind.value for kind in ChangeKind)})


def add(commands: Commands) -> None:
    about = "list what has happened in the fleet of late, oldest first; exit 0 told, 69 no registry"
    command = add_command(commands, "events", _events, never, about)
    add_service(command, "the registry (http://127.0.0.1:8998)")
    command.add_argument("--follow", "-f", action="store_true", help="and what happens from now on, until SIGINT")
    command.add_argument("--since", type=int, metavar="ID", help="from this id on (the oldest that is known)")
    command.add_argument("--last", type=int, metavar="N", help="the last N of them only")
    command.add_argument(
        "--kind", action="append", choices=KINDS, metavar="KIND",
        help=f"only these; may be given again: {', '.join(KINDS)}",
    )  # fmt: skip
    command.add_argument("--instance", metavar="NAME", help="only what is about this one")
    command.add_argument("--json", action="store_true", help="one JSON document a line")
    command.set_defaults(follow=False, since=0, last=None, kind=None, instance=None, json=False)


async def _events(settings: Settings, args: argparse.Namespace) -> int:
    from pdctl.commands import events

    return await events.run(settings, args)
