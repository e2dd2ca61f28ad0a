"""The work of `pdctl probe` where we ask ourselves."""

from __future__ import annotations

import argparse

from pdctl import firsthand
from pdctl.commands.sessions import told
from pdctl.config import Settings
from pdctl.core.kinds import Depth


async def run(settings: Settings, args: argparse.Namespace) -> int:
    return told(await firsthand.ask(settings, args.session, args.deadline, Depth[args.depth.upper()]))
