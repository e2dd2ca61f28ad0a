"""`pdctl doctor`: what is wrong with this host, and what mends it."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict

from pdctl.commands import drawing
from pdctl.config import Settings
from pdctl.doctor.base import Checked, Result
from pdctl.doctor.rounds import rounds


async def run(settings: Settings, args: argparse.Namespace) -> int:
    with drawing.console(sys.stderr).status("looking at this host"):
        found = await rounds(settings, args.only)
    if args.json:
        print(json.dumps({"checks": [asdict(each) for each in found]}))
    else:
        for each in found:
            _show(each)
        failed, warned = (sum(each.result is result for each in found) for result in (Result.FAIL, Result.WARN))
        print(f"{len(found)} checks: {failed} failed, {warned} to know about")
    return 1 if any(each.result is Result.FAIL for each in found) else 0


def _show(said: Checked) -> None:
    print(f"{said.result.value:<5} {said.name:<10} {drawing.shown(said.evidence)}")
    if said.fix:
        print(f"{'':17}do: {drawing.shown(said.fix)}")
