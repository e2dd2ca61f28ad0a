"""
Rooms of engines whose KV an agent moves, in the midst of which a mover is killed or stopped, or either engine gives up.

One chunk has landed when it happens. The rest of the matrix is in test_rooms.py: the rooms are the same, only the
engine is in a process of its own, and so is its death (tests/test_agent.py).
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import psutil
import pytest

from tests.agent_engine import arguments
from tests.agents import AgentProcess, agent
from tests.engine.processes import Child
from tests.faults.rooms import ask
from tests.service import service, until

TIMES: dict[str, Any] = {"PDCTL_ROOM__WAITING_S": "4", "PDCTL_ROOM__BOOTSTRAP_S": "4", "PDCTL_ROOM__RELEASE_S": "0.3"}
SENT, NAMED = [5, 6, 7, 20], [9, 10, 3, 0]
TABLES = ("rooms", "tickets", "quarantine")


@dataclass
class Sides:
    """A registry, and on each side an agent and its engine."""

    agents: dict[str, AgentProcess]
    engines: dict[str, Child]
    last_room: int = field(default=0)

    def mover(self, side: str) -> psutil.Process:
        (found,) = self.agents[side].movers()
        return found

    async def one_room(self) -> int:
        """A chunk of it has landed, and the prefill engine computes the next."""
        async with asyncio.timeout(60):
            while True:
                self.last_room = room = self.last_room + 1
                await ask(self.engines["prefill"], "begin", room=room, pages=SENT)
                await ask(self.engines["decode"], "begin", room=room, pages=NAMED, sent=SENT)
                if (await ask(self.engines["prefill"], "stands", room=room))["stands"]:
                    return room
                await self.is_not_yet_proven_well(room)

    async def is_not_yet_proven_well(self, room: int) -> None:
        """The decode rank whose mover was stopped a moment ago: nothing else keeps a room from its first chunk."""
        assert "is blocked: " in await self.went("prefill", room)
        await self.went("decode", room)
        await self.tables_are_empty()
        for engine in self.engines.values():
            await ask(engine, "start_afresh")

    async def went(self, side: str, room: int) -> str:
        return str((await ask(self.engines[side], "went", room=room))["why"])

    async def revive(self, side: str) -> None:
        """What is left of that side hands its pool over again, to the next life at the socket."""
        for do in ("lost", "hand_over_again", "registered"):
            await ask(self.engines[side], do)

    async def everything_is_empty(self) -> None:
        """What was given back was given back once, and nobody has touched it since."""
        await self.tables_are_empty()
        for side, at_least, of in (("prefill", SENT[:-1], SENT), ("decode", NAMED, NAMED)):
            found = await ask(self.engines[side], "start_afresh")
            assert found["foreign"] == [], (side, found)
            assert set(at_least) <= set(found["given_back"]) <= set(of), (side, found)

    async def tables_are_empty(self) -> None:
        """As the movers tell."""
        async with asyncio.timeout(60):
            while any(card[table] for card in await self.cards() for table in TABLES):  # noqa: ASYNC110
                await asyncio.sleep(0.1)

    async def cards(self) -> list[dict]:
        return [await ask(engine, "status") for engine in self.engines.values()]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sides]:
    at = tmp_path_factory.mktemp("sides")
    with ExitStack() as stack:
        registry = stack.enter_context(service(at / "registry.log", "--journal", "memory:"))
        told = ("--registry", registry.url, "--ttl", "2")
        agents = {side: stack.enter_context(agent(at / side, *told, **TIMES)) for side in ("prefill", "decode")}
        engines = {}
        for side, name in (("prefill", "default"), ("decode", "dec")):
            given = arguments(side, agents[side].socket, at / f"{side}.kv", instance=name)
            engines[side] = stack.enter_context(Child("tests.faults.agent_rank", given))
            engines[side].ask_now("hand_over")
        yield Sides(agents, engines)


@asynccontextmanager
async def a_room_in_its_midst(both: Sides) -> AsyncIterator[int]:
    for engine in both.engines.values():
        await ask(engine, "registered")
    yield await both.one_room()
    await both.everything_is_empty()


async def test_a_room_of_two_agents_that_nothing_happens_to(both: Sides) -> None:
    async with a_room_in_its_midst(both) as room:
        await ask(both.engines["prefill"], "go")
        assert [await both.went(side, room) for side in both.engines] == ["", ""]


async def test_a_room_that_decode_gives_up(both: Sides) -> None:
    async with a_room_in_its_midst(both) as room:
        await ask(both.engines["decode"], "give_up", room=room)
        assert await both.went("decode", room) == "cancelled"
        await ask(both.engines["prefill"], "go")
        assert "has given the room up" in await both.went("prefill", room)


async def test_a_room_that_prefill_gives_up(both: Sides) -> None:
    async with a_room_in_its_midst(both) as room:
        await ask(both.engines["prefill"], "give_up", room=room)
        assert await both.went("prefill", room) == "cancelled"
        assert re.search(
            "prefill rank 0 says: the prefill engine (left|has left|gave)", await both.went("decode", room)
        )


async def test_a_mover_of_prefill_that_is_stopped(both: Sides) -> None:
    async with a_room_in_its_midst(both) as room:
        mover = both.mover("prefill")
        mover.send_signal(signal.SIGSTOP)
        try:
            assert "no final status from prefill at" in await both.went("decode", room)
            assert (await ask(both.engines["decode"], "status"))["quarantine"], "it may still write"
        finally:
            mover.send_signal(signal.SIGCONT)
        await ask(both.engines["prefill"], "go")
        why = await both.went("prefill", room)
        assert re.search("has given the room up|no further chunk", why), why


async def test_a_mover_of_decode_that_is_stopped(both: Sides) -> None:
    async with a_room_in_its_midst(both) as room:
        mover = both.mover("decode")
        mover.send_signal(signal.SIGSTOP)
        try:
            await ask(both.engines["prefill"], "go")
            why = await both.went("prefill", room)
            assert re.search(r"transfer with [\d.:]+ failed \(timed_out\)", why), why
        finally:
            mover.send_signal(signal.SIGCONT)
        assert "prefill rank 0 says: transfer with" in await both.went("decode", room)


async def test_a_mover_of_decode_that_is_killed(both: Sides) -> None:
    async with a_room_in_its_midst(both) as room:
        os.kill(both.mover("decode").pid, signal.SIGKILL)
        assert "Unreachable" in await both.went("decode", room)
        await ask(both.engines["prefill"], "go")
        why = await both.went("prefill", room)
        assert re.search(r"transfer with [\d.:]+ failed \((peer_gone|refused)\)", why), why
        await both.revive("decode")


async def test_a_mover_of_prefill_that_is_killed(both: Sides) -> None:
    async with a_room_in_its_midst(both) as room:
        os.kill(both.mover("prefill").pid, signal.SIGKILL)
        await ask(both.engines["prefill"], "go")
        assert "Unreachable" in await both.went("prefill", room)
        why = await both.went("decode", room)
        assert re.search(r"prefill rank at [\d.:]+ is gone|no final status from prefill at", why), why
        await both.revive("prefill")
        until(lambda: bool(both.agents["prefill"].movers()))
