"""The work of `pdctl journal copy`."""

from __future__ import annotations

import argparse

from pdctl import journals
from pdctl.config import Settings


async def run(settings: Settings, args: argparse.Namespace) -> int:
    copied = await journals.copy_journal(settings, args.source, args.target)
    print(
        f"{copied.lives} lives, {copied.rooms} rooms and {copied.notes} notes copied; "
        f"epochs go on after {copied.last_epoch}"
    )
    return 0
