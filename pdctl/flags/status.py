"""`pdctl status [INSTANCE]`: how the fleet is: who serves, who is missing, what flows, which links are out."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from pdctl.flags.base import Commands, add_command, add_service, never

if TYPE_CHECKING:
    from pdctl.config import Settings


EVERY_S = 2.0


def add(commands: Commands) -> None:
    about = "show the fleet: instances, ranks, links that are out, rooms, what flows; exit 0 shown, 69 no registry"
    command = add_command(commands, "status", _status, never, about)
    command.add_argument("instance", nargs="?", metavar="INSTANCE", help="this one alone, with all its ranks (all)")
    add_service(command, "the registry (http://127.0.0.1:8998)")
    command.add_argument("--ranks", action="store_true", help="every rank, however many there are")
    command.add_argument("--watch", action="store_true", help="again and again, until SIGINT")
    command.add_argument("--every", type=float, metavar="SECONDS", help=f"how often, with --watch ({EVERY_S:g})")
    command.add_argument(
        "--json", action="store_true", help="the registry's overview as one JSON document (a line each)"
    )
    command.set_defaults(instance=None, ranks=False, watch=False, every=EVERY_S, json=False)


async def _status(settings: Settings, args: argparse.Namespace) -> int:
    from pdctl.commands import status

    return await status.run(settings, args)
