"""
A prefill or a decode rank in a process of its own: `python -m tests.e2e.rank SETTINGS_JSON`, driven by JSON lines.

The real engine, the real link, the real sender and receiver; only the model is missing. Rooms run beside the commands.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from pdctl.core.address import Endpoint
from pdctl.core.comparing import Checksum
from pdctl.core.layout import Pool, RankPools
from pdctl.core.transfer import RoomTimeouts
from pdctl.device.cpu import Cpu
from pdctl.engine.base import Engine
from pdctl.engine.mooncake import open_mooncake
from pdctl.engine.settings import MooncakeSettings
from pdctl.errors import PdctlError
from pdctl.memory import Arena
from pdctl.metrics import Metrics
from pdctl.peer import LinkSettings, PeerLink, open_link
from pdctl.receiver import Receiver
from pdctl.sender import Sender
from tests.e2e.kv import Kv, content
from tests.engine.processes import live, obey
from tests.room_rig import RigGate

AUX = (64, 256)
N_ROWS = 8


class Rank:
    """What both kinds have: memory, and rooms as tasks by number."""

    def __init__(self, kv: Kv, engine: Engine, link: PeerLink) -> None:
        self.engine, self.link = engine, link
        self.arena = Arena(kv.nbytes + 64 * len(kv.lens) + 2 * sum(AUX) * N_ROWS)
        self.kv = [self.arena.array((kv.n_pages, nbytes), np.uint8) for nbytes in kv.lens]
        self.aux = [self.arena.array((N_ROWS, nbytes), np.uint8) for nbytes in AUX]
        self.pools = RankPools(_pool(self.kv), _pool(self.aux))
        self.rooms: dict[int, asyncio.Task[str]] = {}
        self.ended: list[int] = []
        self.named: defaultdict[int, asyncio.Event] = defaultdict(asyncio.Event)
        self.released: list[list[int]] = []
        self.given_back = asyncio.Event()

    def start(self, room: int, work: Any) -> dict[str, Any]:
        self.rooms[room] = asyncio.create_task(self._outcome(room, work))
        return {}

    async def order(self) -> dict[str, Any]:
        """In which rooms have ended."""
        return {"rooms": self.ended}

    async def result(self, room: int) -> dict[str, Any]:
        """Empty when all went well, else the reason."""
        return {"why": await self.rooms.pop(room)}

    async def is_named(self, room: int) -> dict[str, Any]:
        """Wait until its pages have been named: sent at the decode, and heard at the prefill."""
        await self.named[room].wait()
        return {}

    async def digest(self, pages: list[int], row: int) -> dict[str, Any]:
        digest = hashlib.sha256()
        for entry in self.kv:
            digest.update(entry[pages].tobytes())
        for buffer in self.aux:
            digest.update(buffer[row].tobytes())
        return {"sha": digest.hexdigest()}

    def release(self, pages: np.ndarray) -> None:
        self.released.append(pages.tolist())
        self.given_back.set()

    async def _outcome(self, room: int, work: Any) -> str:
        try:
            await work
        except PdctlError as error:
            return str(error)
        finally:
            self.ended.append(room)
        return ""


class PrefillRank(Rank):
    """`send` sends chunk after chunk; it waits for `proceed` before each but the first."""

    def __init__(self, kv: Kv, engine: Engine, link: PeerLink, timeouts: RoomTimeouts) -> None:
        super().__init__(kv, engine, link)
        for array, there in zip(self.kv, content(kv), strict=True):
            array[:] = there
        rng = np.random.default_rng(kv.seed + 1)
        for array in self.aux:
            array[:] = rng.integers(0, 256, array.shape, np.uint8)
        self.gate = RigGate()
        self.go, self.landed_chunks = asyncio.Semaphore(0), asyncio.Semaphore(0)
        self.shell = Sender(engine, link.send, self.pools, 0, self.gate, timeouts, time.monotonic, Metrics())

    async def send(self, room: int, chunks: list[list[int]], row: int, paced: bool = False) -> dict[str, Any]:
        return self.start(room, self._send(room, chunks, row, paced))

    async def landed(self) -> dict[str, Any]:
        """Wait for one more chunk of any room to have landed."""
        await self.landed_chunks.acquire()
        return {}

    async def proceed(self) -> dict[str, Any]:
        self.go.release()
        return {}

    async def state(self) -> dict[str, Any]:
        held = [entry.room for entry in self.shell.quarantine]
        causes = [cause for _, cause in self.gate.told]
        return {"rooms": self.shell.rooms, "early": self.shell.early, "quarantine": held, "causes": causes}

    async def _send(self, room: int, chunks: list[list[int]], row: int, paced: bool) -> None:
        async with self.shell.open(room, release=self.release) as r:
            await r.peers_ready()
            self.named[room].set()
            for n, chunk in enumerate(chunks):
                if paced and n:
                    await self.go.acquire()
                await r.send(chunk)
                self.landed_chunks.release()
            await r.finish(row)


class DecodeRank(Rank):
    """`receive` names its pages; the pages given back are in `released`."""

    def __init__(self, kv: Kv, engine: Engine, link: PeerLink, timeouts: RoomTimeouts) -> None:
        super().__init__(kv, engine, link)
        self.shown = self.real = engine.session.encode()
        self.shell = Receiver(
            engine.session,
            self._send,
            link.endpoint,
            self.pools,
            0,
            1,
            timeouts,
            time.monotonic,
            Metrics(),
            link.is_gone,
        )

    async def receive(self, room: int, prefill: str, pages: list[int], row: int) -> dict[str, Any]:
        return self.start(room, self._receive(room, Endpoint.parse(prefill), pages, row))

    async def via(self, session: str) -> dict[str, Any]:
        """Prefill ranks reach this engine by `session`, at which something stands between."""
        self.shown = session.encode()
        return {}

    async def _send(self, to: Endpoint, frames: Sequence[bytes]) -> None:
        await self.link.send(to, [self.shown if frame == self.real else frame for frame in frames])

    async def spoil(self, entry: int, page: int) -> dict[str, Any]:
        """One bit of a page turns over."""
        self.kv[entry][page, 100] ^= 1
        return {}

    async def abort(self, room: int) -> dict[str, Any]:
        self.rooms[room].cancel()
        await asyncio.wait([self.rooms.pop(room)])
        return {}

    async def let_go(self, n: int, within_s: float = 60.0) -> dict[str, Any]:
        """The pages that were given back, as soon as those of `n` rooms were, or when the time is over."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                while len(self.released) < n:
                    self.given_back.clear()
                    await self.given_back.wait()
        return {"released": self.released}

    async def state(self) -> dict[str, Any]:
        return {"rooms": self.shell.rooms, "quarantine": [entry.room for entry in self.shell.quarantine]}

    async def _receive(self, room: int, prefill: Endpoint, pages: list[int], row: int) -> None:
        async with self.shell.open(room, prefill, pages, row, release=self.release) as r:
            self.named[room].set()
            await r.arrived()


def _pool(arrays: list[np.ndarray]) -> Pool:
    return Pool(tuple(a.ctypes.data for a in arrays), tuple(a.shape[1] for a in arrays), len(arrays[0]))


async def main(role: str, kv: Kv, timeouts: RoomTimeouts, host: str) -> None:
    kind = PrefillRank if role == "prefill" else DecodeRank
    async with (
        open_link(host, metrics=Metrics(), settings=LinkSettings(send_deadline_s=5.0)) as link,
        open_mooncake(MooncakeSettings(host=host, progress_timeout_s=5, handshake_timeout_s=10.0), Cpu()) as engine,
    ):
        rank: PrefillRank | DecodeRank = kind(kv, engine, link, timeouts)
        await engine.register(rank.arena.region)
        async with rank.shell:
            serving = asyncio.create_task(link.serve(rank.shell.handle))
            await obey(rank, {"session": engine.session, "link": str(link.endpoint)})
            serving.cancel()


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    timeouts = given.get("timeouts", {})
    how = RoomTimeouts(**timeouts | {"checksum": Checksum(timeouts.get("checksum", Checksum.OFF))})
    live(main(given["role"], Kv(**given["kv"]), how, given.get("host", "127.0.0.1")))
