"""`pdctl explain [INSTANCE|RANK|P D|room N]`: why can this not serve? The culprit first."""

from __future__ import annotations

import argparse
import json
import sys

from pdctl import explaining
from pdctl.commands import drawing
from pdctl.commands.base import Commands, add_command, add_service, never
from pdctl.config import Settings
from pdctl.core.findings import Scope

UNAVAILABLE = 69
SHOWN = 40


def add(commands: Commands) -> None:
    about = "say why an instance, a rank, a pair or a room cannot serve; exit 0 nothing found, 1 found, 69 no registry"
    command = add_command(commands, "explain", _explain, never, about)
    command.add_argument(
        "what", nargs="*", metavar="WHAT",
        help="INSTANCE; a RANK (prefill/tp1); two of them, a prefill and a decode; or: room N. All, unless said",
    )  # fmt: skip
    command.add_argument("--room", metavar="N", help="this room, as `room N`")
    add_service(command, "the registry (http://127.0.0.1:8998)")
    command.add_argument("--json", action="store_true", help="one JSON document")
    command.set_defaults(what=[], room=None, json=False)


async def _explain(settings: Settings, args: argparse.Namespace) -> int:
    scope = Scope.parse(args.what, args.room)
    with drawing.console(sys.stderr).status("") as status:
        told = await explaining.why(settings, scope, status.update)
    if args.json:
        rows = explaining.as_rows(told.findings)
        print(
            json.dumps({"scope": str(told.scope), "registry": told.registry, "reached": told.reached, "findings": rows})
        )
    else:
        _show(told)
    if not told.reached:
        return UNAVAILABLE
    return 1 if told.findings else 0


def _show(told: explaining.Explained) -> None:
    if not told.findings:
        print(f"nothing is known to be wrong with {told.scope}: {told.known} ranks known, {told.asked} addresses asked")
    for number, finding in enumerate(told.findings[:SHOWN], 1):
        print(f"{number}. {finding.what.value}: {drawing.shown(finding.why)}")
        for fact in finding.evidence:
            print(f"   seen: {drawing.shown(fact)}")
        print(f"   do: {drawing.shown(finding.do)}")
    if (more := len(told.findings) - SHOWN) > 0:
        print(f"and {more} more: ask about one of them, or for all with --json")
