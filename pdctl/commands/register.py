"""The work of `pdctl register`."""

from __future__ import annotations

import argparse

from pdctl import holding
from pdctl.config import Settings


async def run(settings: Settings, args: argparse.Namespace) -> int:  # noqa: ARG001
    await holding.register(settings)
    return 0
