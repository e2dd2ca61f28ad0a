"""
A process with an engine of its own, driven by JSON lines: `python -m tests.engine.peer ENGINE_SETTINGS_JSON`.

First line out: {"session": ...}. Then one answer for each command. Dies with its parent, whatever kills that.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import sys
from typing import Any

import numpy as np

from pdctl.core.plan import CopyPlan
from pdctl.device.cpu import Cpu
from pdctl.engine.base import Engine
from pdctl.engine.canary import MAGIC, Canary
from pdctl.engine.mooncake import open_mooncake
from pdctl.engine.promises import PromisedEngine
from pdctl.engine.settings import MooncakeSettings
from pdctl.errors import PdctlError
from pdctl.memory import Arena
from tests.engine.processes import die_with_parent


class Commands:
    """What a test can ask of its peer; each method is one command."""

    def __init__(self, engine: Engine, bare: Any) -> None:
        self.engine = engine
        self.bare = bare
        self.arenas: dict[int, tuple[Arena, Any]] = {}
        self.is_stock = False

    async def register(self, nbytes: int, fill: int = 0) -> dict[str, Any]:
        arena = Arena(nbytes)
        view = arena.array(nbytes, np.uint8)
        view[:] = fill
        await self.engine.register(arena.region)
        self.arenas[arena.region.pointer] = (arena, view)
        return {"pointer": arena.region.pointer, "nbytes": arena.region.nbytes}

    async def unregister(self, pointer: int) -> dict[str, Any]:
        await self.engine.unregister(self.arenas.pop(pointer)[0].region)
        return {}

    async def empty(self) -> dict[str, Any]:
        for pointer in list(self.arenas):
            await self.unregister(pointer)
        if self.is_stock:
            await show(self.engine)
            self.is_stock = False
        return {}

    async def poison(self) -> dict[str, Any]:
        """What the bare engine lets a careless process do to all who want to reach it."""
        return {"code": self.bare.register_memory(0, 4096)}

    async def fill(self, pointer: int, value: int) -> dict[str, Any]:
        self.arenas[pointer][1][:] = value
        return {}

    async def count(self, pointer: int, value: int, first: int = 0, nbytes: int | None = None) -> dict[str, Any]:
        """How many of the bytes have `value`."""
        view = self.arenas[pointer][1]
        return {"n": int((view[first : None if nbytes is None else first + nbytes] == value).sum())}

    async def bytes(self, pointer: int, first: int, nbytes: int) -> dict[str, Any]:
        return {"hex": self.arenas[pointer][1][first : first + nbytes].tobytes().hex()}

    async def be_reborn(self) -> dict[str, Any]:
        be_reborn(self.engine)
        return {}

    async def be_stock(self) -> dict[str, Any]:
        await be_stock(self.engine)
        self.is_stock = True
        return {}

    async def canary(self, first: int, nbytes: int) -> dict[str, Any]:
        """Bytes of its canary, as it stands in its memory."""
        return {"hex": canary_of(self.engine).view(first, nbytes).hex()}

    async def write(self, session: str, src: int, dst: int, nbytes: int) -> dict[str, Any]:
        await self.engine.write(session, CopyPlan.of((src, dst, nbytes)), deadline_s=30)
        return {}


async def main(settings: MooncakeSettings) -> None:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    made: list[Any] = []
    async with open_mooncake(settings, Cpu(), factory=lambda: bare(made)) as engine:
        commands = Commands(engine, made[0])
        print(json.dumps({"session": engine.session}), flush=True)
        while line := await reader.readline():
            asked = json.loads(line)
            print(json.dumps(await answer(commands, asked.pop("do"), asked)), flush=True)


def canary_of(engine: Engine) -> Canary:
    assert isinstance(engine, PromisedEngine)
    return engine.canary


def be_reborn(engine: Engine) -> None:
    """As if a new life had everything of the old one: session, data port, regions, addresses. Not its boot id."""
    canary_of(engine).view(len(MAGIC), 16)[:] = secrets.token_bytes(16)


async def show(engine: Engine) -> None:
    assert isinstance(engine, PromisedEngine)
    await engine.show()


async def be_stock(engine: Engine) -> None:
    """An engine that is not ours registers what its callers do, and no more."""
    assert isinstance(engine, PromisedEngine)
    await engine._carrier.unregister(engine.canary.region)


def bare(made: list[Any]) -> Any:
    from mooncake.engine import TransferEngine

    made.append(TransferEngine())
    return made[0]


async def answer(commands: Commands, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    try:
        done: dict[str, Any] = await getattr(commands, name)(**arguments)
    except PdctlError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return done


if __name__ == "__main__":
    die_with_parent()
    asyncio.run(main(MooncakeSettings(**json.loads(sys.argv[1]))))
    sys.stdout.flush()
    os._exit(0)
