"""`pdctl explain [INSTANCE|RANK|P D|room N]`: why can this not serve? The culprit first."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from pdctl.flags.base import Commands, add_command, add_service, never

if TYPE_CHECKING:
    from pdctl.config import Settings


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
    from pdctl.commands import explain

    return await explain.run(settings, args)
