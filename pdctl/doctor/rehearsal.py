"""
What may hang or end its process, tried in a child of its own with a deadline: `python -m pdctl.doctor.rehearsal`.

The child opens the configured device, or an engine on this host's loopback that writes one block from its own memory to
its own memory and compares. It prints one line of JSON, and outlives neither its deadline nor its answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from pdctl import config
from pdctl.config import Settings
from pdctl.core.plan import CopyPlan
from pdctl.device.cpu import Cpu
from pdctl.device.open import open_device
from pdctl.engine.mooncake import open_mooncake
from pdctl.engine.settings import MooncakeSettings
from pdctl.errors import EngineUnavailable, PdctlError
from pdctl.logs import LogSettings, configure
from pdctl.memory import Arena

DEADLINE_S = 20.0
NBYTES = 1 << 16
_LONGEST_S = 60
"""The kernel ends the child then, whoever holds the interpreter: its parent may have died."""


@dataclass(frozen=True, slots=True)
class Told:
    """Whether it worked, and the child's words, or what became of it."""

    works: bool
    words: str


async def rehearsed(what: str, settings: Settings, deadline_s: float = DEADLINE_S) -> Told:
    """Try `what` ("engine" or "device") in a child with these settings."""
    host = "::1" if ":" in settings.node.host else "127.0.0.1"  # what is announced has a check of its own
    said = {"accelerator": settings.node.accelerator, "engine": asdict(replace(settings.engine, host=host))}
    try:
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "pdctl.doctor.rehearsal", what, json.dumps(said)),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
    except OSError as error:
        return Told(False, f"no child can be started to try it ({error}): let this user run {sys.executable}")
    try:
        async with asyncio.timeout(deadline_s):
            told, _ = await child.communicate()
    except TimeoutError:
        return Told(False, f"no word from the child within {deadline_s:g} s: the engine or a driver hangs, see dmesg")
    finally:
        with contextlib.suppress(ProcessLookupError):
            child.kill()
        await child.wait()
    return _read(told, child.returncode or 0)


def _read(told: bytes, status: int) -> Told:
    if told.startswith(b"{"):
        answer = json.loads(told)
        return Told(bool(answer["works"]), str(answer["words"]))
    if status < 0:
        name = signal.Signals(-status).name
        return Told(False, f"it ended the process that tried it ({name}): see dmesg, and the wheel against this host")
    return Told(False, f"the child ended with {status} and no word: run python -m pdctl.doctor.rehearsal by hand")


def main() -> None:
    """In the child. The engine's own end takes a second, and nothing here needs it."""
    signal.alarm(_LONGEST_S)
    configure(LogSettings(level="error"))
    what, given = sys.argv[1], json.loads(sys.argv[2])
    try:
        words, works = asyncio.run({"engine": _engine, "device": _device}[what](given)), True
    except (PdctlError, OSError) as error:
        words, works = str(error), False
    sys.stdout.write(json.dumps({"works": works, "words": words}) + "\n")
    sys.stdout.flush()
    os._exit(0)


async def _device(given: dict[str, Any]) -> str:
    async with open_device(given["accelerator"], environ=config.environment()) as device:
        return f"{device.spec} opens"


async def _engine(given: dict[str, Any]) -> str:
    arena, began = Arena(2 * NBYTES), time.monotonic()
    here, there = (arena.array((NBYTES,), np.uint8) for _ in range(2))
    here[:] = np.frombuffer(os.urandom(NBYTES), np.uint8)
    async with open_mooncake(MooncakeSettings(**given["engine"]), Cpu()) as engine:
        await engine.register(arena.region)
        plan = CopyPlan.of((here.ctypes.data, there.ctypes.data, NBYTES))
        await engine.write(engine.session, plan, deadline_s=10.0)
        took_ms = (time.monotonic() - began) * 1e3
        if not (here == there).all():
            raise EngineUnavailable(
                "the engine said that its block was written, and the bytes differ: take another version of the wheel"
            )
        return f"{NBYTES >> 10} KiB written to itself and found alike, in {took_ms:.0f} ms with its opening"


if __name__ == "__main__":
    main()
