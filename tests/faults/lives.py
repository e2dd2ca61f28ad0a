"""
A writer that goes on writing to a session while the processes behind it are killed and replaced, each by one that
nothing tells from the last: same session, same data port, memory at the same address. `python -m tests.faults.lives N`.

Each life is written a value of its own. A byte of another value in its memory came in under another life's session.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pdctl.core.plan import CopyPlan
from pdctl.device.cpu import Cpu
from pdctl.engine.base import Engine
from pdctl.engine.mooncake import open_mooncake
from pdctl.engine.settings import MooncakeSettings
from pdctl.errors import TransferFailed
from pdctl.memory import Arena
from tests.engine.processes import Child

NBYTES = 1 << 18
BLOCK = 1 << 14
SLICES = 4  # what was meant for a life is not overwritten while the next three live
WELL_AGAIN_S = 30.0


@dataclass
class Tally:
    """`foreign`: bytes of one life's value in another's memory; `stuck`: lives that no write reached in time; `lies`:
    writes that were said to have landed after their life was over; `again_s`: from registering anew to the first write
    that landed."""

    kills: int = 0
    foreign: int = 0
    stuck: int = 0
    lies: int = 0
    writes: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    again_s: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        again = sorted(self.again_s)
        return (
            f"{self.kills} kills: {self.foreign} bytes in a life that they were not meant for, {self.stuck} lives that "
            f"no write reached, {self.lies} false successes; {self.writes} writes landed, {self.refused.total()} not "
            f"({', '.join(f'{cause} {n}' for cause, n in self.refused.most_common())}); from registering anew to "
            f"written again {again[len(again) // 2] * 1e3:.0f} ms median, {again[-1] * 1e3:.0f} ms at most"
        )


class Lineage:
    """The lives at one address, one at a time. `kind`: "ours" or "stock"."""

    def __init__(self, cradle: Child, folder: Path, kind: str) -> None:
        self._cradle = cradle
        self._folder = folder
        self._kind = kind
        self._port: int | None = None
        self._born = 0
        self._pid = 0
        self.at = int(cradle.hello["at"])
        self.session = ""
        self.memory: Any = None

    @classmethod
    @asynccontextmanager
    async def beginning(cls, folder: Path, kind: str) -> AsyncIterator[Lineage]:
        first = free_pair()
        environ = {"MC_MIN_RPC_PORT": str(first), "MC_MAX_RPC_PORT": str(first + 1), "MC_FORCE_TCP": "1"}
        with await asyncio.to_thread(Child, "tests.faults.cradle", environ=environ) as cradle:
            it = cls(cradle, folder, kind)
            await it.bear()
            yield it

    async def bear(self) -> None:
        """The next life, as soon as the last one's ports can be had: 15 to 120 ms."""
        path = self._folder / f"{self._kind}-{self._born}"
        self._born += 1
        with path.open("wb") as file:
            file.truncate(NBYTES)
        self.memory = np.memmap(path, np.uint8)
        told = await self._cradle.ask("live", memory=str(path), rpc=self._port, kind=self._kind)
        assert told, "another process has taken the port"
        assert self.session in ("", told["session"])
        self.session, self._pid = told["session"], told["pid"]
        self._port = int(self.session.rpartition(":")[2])

    def stop(self) -> None:
        os.kill(self._pid, signal.SIGSTOP)

    def kill(self) -> None:
        os.kill(self._pid, signal.SIGKILL)


def free_pair() -> int:
    """Two ports side by side that are nobody's, below those that the system gives away."""
    while True:
        first = random.randrange(20_000, 32_000, 2)
        with socket.socket() as one, socket.socket() as other:
            try:
                one.bind(("", first))
                other.bind(("", first + 1))
            except OSError:
                continue
        return first


class Writer:
    """Writes `value` all over the session's memory, again and again, whatever becomes of it."""

    def __init__(self, engine: Engine, arena: Arena, lineage: Lineage, tally: Tally) -> None:
        self._engine = engine
        self._arena = arena
        self._bytes = arena.array(SLICES * NBYTES, np.uint8).reshape(SLICES, NBYTES)
        self._lineage = lineage
        self._tally = tally
        self.value = 0
        self.landed = 0

    def mean(self, life: int) -> None:
        self.value = life % 250 + 1
        self.landed = 0
        self._bytes[life % SLICES] = self.value
        source = self._arena.region.pointer + life % SLICES * NBYTES
        at = np.arange(0, NBYTES, BLOCK, dtype=np.int64)
        self._plan = CopyPlan(source + at, self._lineage.at + at, np.full(len(at), BLOCK, np.int64))

    async def run(self) -> None:
        while True:
            meant = self.value
            try:
                await self._engine.write(self._lineage.session, self._plan, deadline_s=10.0)
            except TransferFailed as failure:
                self._tally.refused[failure.cause] += 1
                await asyncio.sleep(0.001)
            else:
                self._tally.writes += 1
                self.landed += meant == self.value

    async def lands(self) -> bool:
        """Whether a write to the life that is meant now lands in time."""
        began = time.monotonic()
        while not self.landed and time.monotonic() - began < WELL_AGAIN_S:  # noqa: ASYNC110
            await asyncio.sleep(0.0005)
        self._tally.again_s.append(time.monotonic() - began)
        return self.landed > 0


async def soak(kills: int, kind: str, seed: int, folder: Path) -> Tally:
    chance, tally = random.Random(seed), Tally()
    async with Lineage.beginning(folder, kind) as lineage, open_mooncake(MooncakeSettings(), Cpu()) as engine:
        with Arena(SLICES * NBYTES) as arena:
            await engine.register(arena.region)
            writer = Writer(engine, arena, lineage, tally)
            writer.mean(0)
            writing = asyncio.create_task(writer.run(), name="writer")
            try:
                for life in range(1, kills + 1):
                    await one_life(lineage, writer, tally, chance)
                    engine.forget(lineage.session)  # what its registration does
                    writer.mean(life)
                tally.stuck += not await writer.lands()
            finally:
                writing.cancel()
                await asyncio.gather(writing, return_exceptions=True)
    return tally


async def one_life(lineage: Lineage, writer: Writer, tally: Tally, chance: random.Random) -> None:
    """It is written to, ends at some moment, and another stands in its place while it is still written to."""
    tally.stuck += not await writer.lands()
    await asyncio.sleep(chance.uniform(0.0, 0.06))
    if chance.random() < 0.3:
        lineage.stop()
        await asyncio.sleep(chance.uniform(0.0, 0.1))
    lineage.kill()
    tally.kills += 1
    last = lineage.memory
    if chance.random() < 0.3:
        await asyncio.sleep(chance.uniform(0.0, 0.2))
    await lineage.bear()
    landed = writer.landed
    # Once in a while longer than the second that the engine waits before it connects again.
    await asyncio.sleep(1.2 if chance.random() < 0.1 else chance.uniform(0.0, 0.2))
    tally.lies += writer.landed - landed
    tally.foreign += int((lineage.memory != 0).sum()) + int(((last != 0) & (last != writer.value)).sum())


def main(kills: int) -> None:
    for kind in ("ours", "stock"):
        seed = random.randrange(1 << 30)
        with tempfile.TemporaryDirectory() as folder:
            print(f"{kind}, seed {seed}: {asyncio.run(soak(kills, kind, seed, Path(folder)))}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
    os._exit(0)
