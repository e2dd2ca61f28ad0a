"""The work of `pdctl demo`."""

from __future__ import annotations

import argparse

from pdctl.config import Settings
from pdctl.demo import story


async def run(settings: Settings, args: argparse.Namespace) -> int:  # noqa: ARG001
    return await story.run(story.DemoOptions(args.prompt, args.trace, args.requests, args.json, args.page))
