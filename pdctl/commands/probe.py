"""The work of `pdctl probe`."""

from __future__ import annotations

import argparse

from pdctl import inquiry
from pdctl.config import Settings
from pdctl.core.kinds import Depth


async def run(settings: Settings, args: argparse.Namespace) -> int:
    wanted = Depth[args.depth.upper()]
    if "node.registry" in vars(args):
        verdict = await inquiry.ask_service(settings, args.session)
    else:
        verdict = await inquiry.ask(settings, args.session, args.deadline, wanted)
    works = f"works: {verdict.depth}" if verdict.works else "does not work"
    print(f"{verdict.session} {works} ({verdict.detail}), {verdict.seconds * 1e3:.1f} ms")
    return 0 if verdict.works else 1
