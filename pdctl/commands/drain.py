"""`pdctl drain INSTANCE [RANK]`: nothing new for it from now on, and gone when what it has under way is done."""

from __future__ import annotations

import argparse
import sys

from pdctl import dismissal
from pdctl.commands import drawing
from pdctl.commands.base import Commands, add_command, add_service, never
from pdctl.config import Settings
from pdctl.dismissal import Gone, Whom
from pdctl.errors import NotReady

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
    whom = Whom.parse(args.instance, args.rank)
    said = f"{whom} drains: it takes nothing new, and is gone when it is done, after {args.grace:g} s at the latest"
    if not args.wait:
        await dismissal.drain(settings, whom, args.grace)
        print(said)
        return 0
    with drawing.console(sys.stderr).status(f"{whom} drains") as status:

        def tell(gone: Gone) -> None:
            print(f"{gone.rank} is gone after {gone.after_s:.1f} s: {drawing.shown(gone.how)}", flush=True)
            status.update(f"{whom} drains, {gone.left} left")

        try:
            await dismissal.drain_and_wait(
                settings, whom, args.grace, asked=lambda number: print(f"{said}; {number} here", flush=True), tell=tell
            )
        except NotReady as error:
            print(f"pdctl: {error}", file=sys.stderr)
            return 1
    print(f"{whom} is drained")
    return 0
