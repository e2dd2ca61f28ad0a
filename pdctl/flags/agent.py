"""`pdctl agent`: moves KV for engines in other processes."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from pdctl.flags.base import Commands, add_command, add_credentials, always, on_uvloop

if TYPE_CHECKING:
    from pdctl.config import Settings


def add(commands: Commands) -> None:
    command = add_command(commands, "agent", _agent, always, "move KV for engines in other processes: docs/agent.md")
    command.set_defaults(loop=on_uvloop)
    command.add_argument(
        "--socket", dest="agent.sockets", action="append", metavar="PATH",
        help="where an engine hands its pool over; give one for each rank (agent.sock in the runtime directory)",
    )  # fmt: skip
    command.add_argument(
        "--user", dest="agent.users", action="append", metavar="UID",
        help="a user who may speak to it besides our own; may be given again",
    )  # fmt: skip
    command.add_argument("--registry", dest="node.registry", help="the registry's URL (http://127.0.0.1:8998)")
    command.add_argument("--host", dest="node.host", help="our address, at which peers reach the ranks (127.0.0.1)")
    command.add_argument(
        "--accelerator", dest="node.accelerator", metavar="DEVICE",
        help="cpu, cuda:N, cuda:GPU-<uuid> or npu:N: the only device whose pools are taken (whichever is handed over)",
    )  # fmt: skip
    command.add_argument("--instance", dest="node.instance", help="of prefills whose engine names none (default)")
    command.add_argument("--ttl", dest="node.ttl_s", help="seconds of the lease, renewed every third of it (15)")
    add_credentials(command)
    command.add_argument("--inherited", default=None, help=argparse.SUPPRESS)  # from succession.py, to its child


async def _agent(settings: Settings, args: argparse.Namespace) -> int:
    if args.inherited is not None:  # who only keeps such processes has nothing of what moves
        from pdctl.commands import mover

        await mover.run(settings, args)
    from pdctl.commands import agent

    return await agent.run(settings, args)
