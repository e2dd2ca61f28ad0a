"""
An engine whose rooms an agent moves, and which can stand still in the midst of one: `python -m tests.faults.agent_rank
JSON`, driven by JSON lines.

Pages that are given back are filled at once with what no room sends, as in room_rank.py.
"""

from __future__ import annotations

import asyncio
import json
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pdctl.agent_client import AgentClient, AgentReceiver, AgentSender
from tests.agent_engine import ABSENT, Engine, Memory, expected
from tests.engine.processes import live, obey

GIVEN_BACK, REUSED = 0x5A, 0xA5


class Rank(Engine):
    """`begin` a room, which stands still at a point; `went` says how each has ended."""

    def __init__(self, memory: Memory, stack: AsyncExitStack, agent: AgentClient, given: dict[str, Any]) -> None:
        super().__init__(memory, stack, agent, given)
        self.calls: dict[int, asyncio.Task[str]] = {}
        self.standing, self.going = asyncio.Event(), asyncio.Event()
        self.given_back: list[int] = []
        self.foreign: list[str] = []

    async def begin(self, room: int, pages: list[int], sent: list[int] | None = None) -> dict[str, Any]:
        """A prefill stands still when all but the last page have landed; `sent`: what a decode will find in `pages`."""
        self.standing.clear()
        self.going.clear()
        work = self._send(room, pages) if isinstance(self.rank, AgentSender) else self._await(room, pages, sent or [])
        self.calls[room] = asyncio.create_task(self._outcome(work))
        return {}

    async def stands(self, room: int) -> dict[str, Any]:
        """Wait until it does; or until the room is over, if it never will."""
        standing = asyncio.create_task(self.standing.wait())
        async with asyncio.timeout(60):
            await asyncio.wait({standing, self.calls[room]}, return_when=asyncio.FIRST_COMPLETED)
        standing.cancel()
        return {"stands": self.standing.is_set()}

    async def go(self) -> dict[str, Any]:
        self.going.set()
        return {}

    async def went(self, room: int) -> dict[str, Any]:
        async with asyncio.timeout(60):
            return {"why": await self.calls.pop(room)}

    async def give_up(self, room: int) -> dict[str, Any]:
        self.calls[room].cancel()
        return {}

    async def hand_over_again(self) -> dict[str, Any]:
        """To the next life of the agent's process at the same socket."""
        await self.stack.aclose()
        async with asyncio.timeout(60):
            return await self.hand_over()

    async def start_afresh(self) -> dict[str, Any]:
        """Where pages were given back there may be what they were filled with, and nothing else; then all is new."""
        found, value = self.foreign, REUSED if self.given["role"] == "prefill" else GIVEN_BACK
        found += [f"entry {n}" for n, kv in enumerate(self.memory.kv) if not (kv[self.given_back] == value).all()]
        told = {"foreign": found, "given_back": sorted(self.given_back)}
        self.given_back, self.foreign = [], []
        (self.memory.fill if self.given["role"] == "prefill" else self.memory.clear)()
        return told

    async def _send(self, room: int, pages: list[int]) -> None:
        assert isinstance(self.rank, AgentSender)
        async with self.rank.room(room, self._reused) as sending:
            await sending.peers_ready()
            await sending.send(pages[:-1])
            self.standing.set()
            await self.going.wait()
            await sending.send(pages[-1:])
            await sending.finish(1)

    async def _await(self, room: int, pages: list[int], sent: list[int]) -> None:
        assert isinstance(self.rank, AgentReceiver)
        await self.rank.receive(room, pages, 3, release=lambda given: self._taken_back(given, pages, sent))

    def _reused(self, pages: npt.NDArray[np.int64]) -> None:
        self._fill(pages, REUSED)

    def _taken_back(self, given: npt.NDArray[np.int64], pages: list[int], sent: list[int]) -> None:
        for entry, array in enumerate(self.memory.kv):
            have = array[pages]
            if not ((have == expected(entry, array)[sent]) | (have == ABSENT)).all():
                self.foreign.append(f"entry {entry} when it was given back")
        self._fill(given, GIVEN_BACK)

    def _fill(self, pages: npt.NDArray[np.int64], value: int) -> None:
        again = set(pages.tolist()) & set(self.given_back)
        if again:
            self.foreign.append(f"given back twice: {sorted(again)}")
        self.given_back += pages.tolist()
        for array in self.memory.kv:
            array[pages] = value

    @staticmethod
    async def _outcome(work: Any) -> str:
        try:
            await work
        except asyncio.CancelledError:
            return "cancelled"
        except Exception as error:  # told to the test, which fails by it
            return f"{type(error).__name__}: {error}"
        return ""


async def main(given: dict[str, Any]) -> None:
    memory = Memory(Path(given["path"]))
    (memory.fill if given["role"] == "prefill" else memory.clear)()
    async with AgentClient(given["socket"]) as agent, AsyncExitStack() as stack:
        await obey(Rank(memory, stack, agent, given), {})


if __name__ == "__main__":
    live(main(json.loads(sys.argv[1])))
