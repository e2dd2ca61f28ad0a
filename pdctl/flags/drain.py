"""`pdctl drain INSTANCE [RANK]`: nothing new for it from now on, and gone when what it has under way is done."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from pdctl.flags.base import Commands, add_command, add_service, never

if TYPE_CHECKING:
    from pdctl.config import Settings


GRACE_S = 300.0


def add(commands: Commands) -> None:
    about = (
        "let an instance or a rank take nothing new, and go when it is done; exit 0 asked, with --wait gone, 1 it stays"
    )
    command = add_command(commands, "drain", _drain, never, about)
    command.add_argument("instance", metavar="INSTANCE", help="its name, as `pdctl status` has it; or INSTANCE/RANK")
    command.add_argument("rank", nargs="?", metavar="RANK", help="one rank of it: tp1, dp0-tp1 (all)")
    command.add_argument("--grace", type=float, metavar="SECONDS", help=f"gone after so long in any case ({GRACE_S:g})")
    command.add_argument(
        "--wait", action="store_true", help="until they are gone; SIGINT ends the waiting, not the drain"
    )
    add_service(command, "the registry (http://127.0.0.1:8998)")
    command.set_defaults(rank=None, grace=GRACE_S, wait=False)


async def _drain(settings: Settings, args: argparse.Namespace) -> int:
    from pdctl.commands import drain

    return await drain.run(settings, args)
