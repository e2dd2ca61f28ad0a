"""`pdctl doctor`: what is wrong with this host, and what mends it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from pdctl.doctor.names import CHECKS
from pdctl.flags.base import Commands, add_command, add_credentials, never

if TYPE_CHECKING:
    from pdctl.config import Settings


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
    from pdctl.commands import doctor

    return await doctor.run(settings, args)
