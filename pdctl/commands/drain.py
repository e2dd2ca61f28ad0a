"""`pdctl drain INSTANCE [RANK]`: nothing new for it from now on, and gone when what it has under way is done."""

from __future__ import annotations

import argparse
import sys

from pdctl import dismissal
from pdctl.commands import drawing
from pdctl.config import Settings
from pdctl.dismissal import Gone, Whom
from pdctl.errors import NotReady


async def run(settings: Settings, args: argparse.Namespace) -> int:
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
