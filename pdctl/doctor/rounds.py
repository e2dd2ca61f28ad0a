"""Every check, in the order in which they are told; they run together."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping
from typing import Final

from pdctl.config import Settings
from pdctl.doctor import host, network, software
from pdctl.doctor.base import Check, Checked, checked
from pdctl.errors import BadField

CHECKS: Final[Mapping[str, Check]] = {
    "python": software.python,
    "packages": software.packages,
    "wheel": software.engine_wheel,
    "libraries": software.shared_objects,
    "cuda": software.cuda,
    "device": software.device,
    "ports": network.ports,
    "clocks": host.clocks,
    "shm": host.shared_memory,
    "files": host.open_files,
    "memlock": host.locked_memory,
    "address": network.address,
    "registry": network.registry,
    "engine": network.engine,
    "store": network.store,
    "journal": host.journal,
}


async def rounds(settings: Settings, only: Collection[str] = ()) -> list[Checked]:
    """All of them, or `only` those. Raises BadField for a check that is not there."""
    for name in only:
        if name not in CHECKS:
            raise BadField("only", f"is {name!r}: there is {', '.join(CHECKS)}")
    wanted = {name: check for name, check in CHECKS.items() if not only or name in only}
    return await asyncio.gather(*(checked(name, check, settings) for name, check in wanted.items()))
