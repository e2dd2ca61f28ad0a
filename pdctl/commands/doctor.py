"""`pdctl doctor`: what is wrong with this host, and what mends it."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict

from pdctl.commands import drawing
from pdctl.commands.base import Commands, add_command, add_credentials, never
from pdctl.config import Settings
from pdctl.doctor.base import Checked, Result
from pdctl.doctor.rounds import CHECKS, rounds


def add(commands: Commands) -> None:
    about = "look at this host: libraries, devices, ports, clocks, limits, addresses; exit 0 nothing fails, 1 something"
    command = add_command(commands, "doctor", _doctor, never, about)
    command.add_argument("--registry", "--at", dest="node.registry", metavar="URL", help="the registry it should reach")
    add_credentials(command)
    command.add_argument("--host", dest="node.host", help="the address that ranks here announce (127.0.0.1)")
    command.add_argument("--port", dest="serve.port", help="the port that pdctl serve would take (8998)")
    command.add_argument("--listen-host", dest="serve.host", help="the address that pdctl serve would take (127.0.0.1)")
    command.add_argument("--accelerator", dest="node.accelerator", help="cpu (default), cuda:N or npu:N")
    command.add_argument("--journal", dest="serve.journal", help="where pdctl serve would keep its rows")
    command.add_argument("--only", action="append", metavar="CHECK", help=f"this check alone, of {', '.join(CHECKS)}")
    command.add_argument("--json", action="store_true", help="one JSON document")
    command.set_defaults(only=[], json=False)


async def _doctor(settings: Settings, args: argparse.Namespace) -> int:
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
