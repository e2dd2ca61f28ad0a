"""`pdctl demo`: the main job, for people to watch."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from pdctl.flags.base import Commands, add_command, never

if TYPE_CHECKING:
    from pdctl.config import Settings


def add(commands: Commands) -> None:
    command = add_command(
        commands, "demo", _demo, never, "move real KV between real processes, break it, watch it heal"
    )
    command.add_argument("--prompt", action="append", help="a prompt to run; may be given again (a built-in set)")
    command.add_argument("--trace", type=Path, help="replay the lengths and shared prefixes of a trace, JSON lines")
    command.add_argument("--requests", type=int, default=20, help="how many requests of the trace (20)")
    how = command.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help="one JSON document instead of the show")
    how.add_argument(
        "--page", action="store_true", help="slowly, for those who watch its page; stays until it is stopped"
    )
    command.set_defaults(prompt=None, trace=None, requests=20, json=False, page=False)


async def _demo(settings: Settings, args: argparse.Namespace) -> int:
    from pdctl.commands import demo

    return await demo.run(settings, args)
