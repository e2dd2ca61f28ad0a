"""`pdctl explain [INSTANCE|RANK|P D|room N]`: why can this not serve? The culprit first."""

from __future__ import annotations

import argparse
import json
import sys

from pdctl import explaining
from pdctl.commands import drawing
from pdctl.config import Settings
from pdctl.core.findings import Scope

UNAVAILABLE = 69
SHOWN = 40


async def run(settings: Settings, args: argparse.Namespace) -> int:
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
