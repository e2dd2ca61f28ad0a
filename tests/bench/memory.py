"""
Resident memory of a registry through which a million of each went, beside itself after the first hundred thousand.

In a process of its own, with the registrar's own sweep and a journal on disk; its clock runs 600 times as fast as ours,
so that what is remembered for ten minutes is forgotten in a second. A ratio of 1.00 x is no growth; 0.95 x is 5 %.

At no time is more held than HELD, and nothing when memory is looked at: an allocator gives back what was held at once
only in part, and how much that is would be a question of how busy the machine was.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import psutil

from pdctl import logs
from pdctl.core.address import Endpoint
from pdctl.core.capacity import RegistryLimits
from pdctl.core.lives import Claim, Owner
from pdctl.core.registry import Registry
from pdctl.core.rooms import RoomBook
from pdctl.core.route import Announcement, Seat, Shape
from pdctl.logs import LogSettings
from pdctl.metrics import Metrics
from pdctl.persistence.open import open_journal
from pdctl.registrar import Registrar
from tests.bench.rivals import Row
from tests.patience import until

TOTAL, STEP = 1_000_000, 100_000
AT_ONCE = 1000
CLOCK = 600.0
SEATS = 64
HELD = 20_000
SETTLE_S = 1.0

Do = Callable[[Registrar, int], Awaitable[None]]


def bench() -> list[Row]:
    return [row(name) for name in KINDS]


def row(name: str) -> Row:
    command = [sys.executable, "-m", "tests.bench.memory", name]
    first, *later = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return Row(WHAT[name], "1,000,000", "100,000", tuple(later), (first,) * len(later), unit="B")


async def samples(do: Do) -> list[int]:
    """Resident bytes after each STEP, when all that ends by itself has ended."""
    clock = lambda: time.monotonic() * CLOCK  # noqa: E731
    taken, rooms = [], RoomBook()
    with tempfile.TemporaryDirectory(prefix="pdctl-bench-") as folder:
        async with open_journal(f"sqlite:{Path(folder) / 'journal'}") as journal:
            registry = Registry(RegistryLimits(max_instances=TOTAL))
            registrar = Registrar(registry, rooms, journal, Metrics(), clock)
            await registrar.restore()
            sweep = asyncio.create_task(registrar.sweep())
            for first in range(0, TOTAL, AT_ONCE):
                await until(lambda: len(registry) + len(rooms) <= HELD - AT_ONCE)
                await asyncio.gather(*(do(registrar, first + n) for n in range(AT_ONCE)))
                if (first + AT_ONCE) % STEP == 0:
                    await until(lambda: len(registry) + len(rooms) <= 1)  # the seats that were taken again and again
                    await asyncio.sleep(SETTLE_S)
                    taken.append(resident())
            sweep.cancel()
            await asyncio.wait({sweep})
    return taken


def resident() -> int:
    """Without what the allocator keeps for itself."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(psutil.Process().memory_info().rss)


def claim(instance: str, number: int, seat: int, seats: int, ttl_s: float | None) -> Claim:
    shape = Shape(attn_tp_size=seats, attn_cp_size=1, dp_size=1, pp_size=1, page_size=16, kv_cache_dtype="bfloat16")
    address = Endpoint(f"10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}", 40_000 + seat)
    return Claim(instance, Announcement(Seat(0, 0, seat, 0), shape, address), Owner(address.host), ttl_s=ttl_s)


async def restart(registrar: Registrar, number: int) -> None:
    """A stock rank comes back at another address."""
    await registrar.register(claim("fleet", number, number % SEATS, SEATS, None))


async def expire(registrar: Registrar, number: int) -> None:
    """A leased rank of an instance that nobody has heard of, and nobody will again; it falls silent at once."""
    await registrar.register(claim(f"pod-{number}", number, 0, 1, 30.0))


async def announce(registrar: Registrar, number: int) -> None:
    await registrar.announce_room(number * 2_654_435_761, number % 8)


KINDS: dict[str, Do] = {"restarts": restart, "expiries": expire, "rooms": announce}
WHAT = {
    "restarts": "ranks registered anew, 64 seats: resident memory",
    "expiries": "instances registered, silent, forgotten: resident memory",
    "rooms": "rooms announced and over: resident memory",
}

if __name__ == "__main__":
    logs.configure(LogSettings(level="warning"))
    print(json.dumps(asyncio.run(samples(KINDS[sys.argv[1]]))))
