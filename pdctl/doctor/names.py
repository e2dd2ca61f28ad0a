"""What the checks are called, in the order in which they are told."""

from __future__ import annotations

from typing import Final

CHECKS: Final = (
    "python",
    "packages",
    "wheel",
    "libraries",
    "cuda",
    "device",
    "ports",
    "clocks",
    "shm",
    "files",
    "memlock",
    "address",
    "registry",
    "engine",
    "store",
    "journal",
)
