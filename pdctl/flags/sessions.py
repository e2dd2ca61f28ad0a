"""`pdctl sessions` and `pdctl probe SESSION`: which links are trusted, and does this one work?"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from pdctl.core.kinds import Depth, State
from pdctl.flags.base import Commands, add_command, add_service, never

if TYPE_CHECKING:
    from pdctl.config import Settings


def add(commands: Commands) -> None:
    add_sessions(commands)
    add_probe(commands)


def add_sessions(commands: Commands) -> None:
    """`pdctl sessions`: which links are trusted, and why the others are not."""
    command = add_command(
        commands, "sessions", _sessions, never, "list transfer sessions: which are trusted, and why not"
    )
    add_service(command, "the service that keeps the table (http://127.0.0.1:8998)")
    command.add_argument("--state", choices=[state.value for state in State], help="only those that stand so")
    command.add_argument("--lift", metavar="SESSION", help="trust this one again, by hand, whatever is held against it")
    command.add_argument("--json", action="store_true", help="one JSON document")
    command.set_defaults(state=None, lift=None, json=False)


def add_probe(commands: Commands) -> None:
    """`pdctl probe SESSION`: does it work? 0: yes; 1: no, and why."""
    command = add_command(commands, "probe", _probe, never, "ask whether a transfer session works; exit 0 yes, 1 no")
    command.add_argument("session", help="ip:port of the peer's engine")
    add_service(command, "let this service ask, which has the link; else we ask ourselves")
    command.add_argument("--depth", choices=[depth.name.lower() for depth in Depth], help="what must be proven (data)")
    command.add_argument("--deadline", type=float, metavar="SECONDS", help="for the answer (3)")
    command.add_argument(
        "--host", dest="node.host", help="our own address, under which the peer reaches us (127.0.0.1)"
    )
    command.set_defaults(depth="data", deadline=3.0)


async def _sessions(settings: Settings, args: argparse.Namespace) -> int:
    from pdctl.commands import sessions

    return await sessions.run(settings, args)


async def _probe(settings: Settings, args: argparse.Namespace) -> int:
    if "node.registry" in vars(args):  # the service has the engine
        from pdctl.commands import sessions

        return await sessions.probe(settings, args)
    from pdctl.commands import probe

    return await probe.run(settings, args)
