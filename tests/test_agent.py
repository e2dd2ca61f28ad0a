"""The mover in a process of its own, between real engines' processes: moved, killed, refused, and nothing left over."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest

from tests.agent_engine import Memory, arguments
from tests.agents import AgentProcess, agent
from tests.engine.processes import Child
from tests.service import Service, service, until

SENT, NAMED = [[5, 6, 7], [20], [12, 11]], [9, 10, 11, 3, 23, 0]
ALL = [page for chunk in SENT for page in chunk]


@dataclass
class Pair:
    """A registry, an agent for each side, an engine for each side."""

    registry: Service
    prefill: AgentProcess
    decode: AgentProcess
    sending: Child
    receiving: Child

    async def move(self, room: int) -> None:
        told, found = await asyncio.gather(
            self.sending.ask("send", room=room, chunks=SENT),
            self.receiving.ask("receive", room=room, pages=NAMED, sent=ALL),
        )
        assert (told, found) == ({"n_pages": 6}, {"wrong": []}), (self.prefill.log(), self.decode.log())

    async def idle(self) -> None:
        """Every table is empty, soon: pages wait for the margin."""
        async with asyncio.timeout(20):
            while any(await self.left()):  # noqa: ASYNC110  other processes empty them
                await asyncio.sleep(0.02)

    async def left(self) -> list[Any]:
        cards = [await child.ask("status") for child in (self.sending, self.receiving)]
        return [card[table] for card in cards for table in ("rooms", "tickets", "quarantine")]


@asynccontextmanager
async def pair(at: Path, shared: str = "file") -> AsyncIterator[Pair]:
    def place(side: str) -> str | Path:
        return at / f"{side}.kv" if shared == "file" else f"/pdctl-test-{os.getpid()}-{side}"

    with ExitStack() as stack:
        registry = stack.enter_context(service(at / "registry.log", "--journal", "memory:"))
        sides = [stack.enter_context(agent(at / side, "--registry", registry.url, "--ttl", "2")) for side in ("p", "d")]
        engines = [
            stack.enter_context(Child("tests.agent_engine", arguments(role, side.socket, place(role), instance=name)))
            for role, side, name in zip(("prefill", "decode"), sides, ("default", "dec"), strict=True)
        ]
        for engine in engines:
            assert engine.hello == {"mooncake": False}
            assert "session" in await engine.ask("hand_over")
            assert await engine.ask("registered") == {}
        it = Pair(registry, sides[0], sides[1], engines[0], engines[1])
        yield it
        for engine in engines:
            if engine.is_alive:
                assert await engine.ask("leave") == {}


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Memory]:
    it = Memory(tmp_path / "kv")
    yield it
    it.arena.close()


@pytest.fixture(scope="module")
def lone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentProcess]:
    """An agent that nobody hands anything over to."""
    with agent(tmp_path_factory.mktemp("lone")) as it:
        yield it


@pytest.mark.parametrize("shared", ["file", "POSIX shared memory"])
async def test_pages_move_between_two_engines_that_have_no_transfer_engine(tmp_path: Path, shared: str) -> None:
    async with pair(tmp_path, shared) as it:
        await it.move(1)
        told, found = await asyncio.gather(
            it.sending.ask("send_at_once", room=2, pages=ALL),
            it.receiving.ask("receive", room=2, pages=NAMED, sent=ALL),
        )
        assert (told, found) == ({}, {"wrong": []})
        await it.idle()
        assert await it.sending.ask("free_pages") == {"freed": sorted(ALL * 2)}
        assert await it.receiving.ask("free_pages") == {"freed": sorted(NAMED * 2)}


async def test_an_engine_that_is_killed_takes_its_rooms_its_seat_and_its_pool_along(tmp_path: Path) -> None:
    async with pair(tmp_path) as it:
        (mover,) = it.prefill.movers()
        kv = str(tmp_path / "prefill.kv")
        assert any(kv in line for line in maps(mover))
        await it.sending.ask("open", room=7)
        await it.receiving.ask("open", room=8)
        await until_open(it.prefill, 7)
        await until_open(it.decode, 8)
        it.sending.kill()
        until(lambda: not mover.is_running() or mover.status() == psutil.STATUS_ZOMBIE, 1.0 + 0.5)
        assert await seats(it.registry, "default") == []
        # its peer's room has ended too, and the next engine takes the pool's place
        with Child("tests.agent_engine", arguments("prefill", it.prefill.socket, tmp_path / "prefill.kv")) as after:
            assert "session" in await after.ask("hand_over")
            await after.ask("registered")
            await it.receiving.ask("cancel")
            it.sending = after
            await it.move(9)
            await it.idle()


async def test_an_engine_hears_at_once_that_its_agent_is_killed_and_hands_over_again(tmp_path: Path) -> None:
    async with pair(tmp_path) as it:
        await it.receiving.ask("open", room=3)
        await until_open(it.decode, 3)
        (mover,) = it.decode.movers()
        waiting = asyncio.create_task(it.receiving.ask("lost"))
        begun = time.monotonic()
        mover.kill()
        assert "ended" in (await waiting)["why"]
        assert time.monotonic() - begun < 1.0
        assert await it.receiving.ask("free_pages") == {"freed": [1, 2]}
        assert "session" in await it.receiving.ask("hand_over")
        await it.move(4)
        await it.idle()


async def test_whoever_keeps_the_socket_takes_the_mover_along_when_it_is_killed(tmp_path: Path) -> None:
    async with pair(tmp_path) as it:
        (mover,) = it.decode.movers()
        waiting = asyncio.create_task(it.receiving.ask("lost"))
        it.decode.process.kill()
        it.decode.process.wait()
        assert "ended" in (await waiting)["why"]
        until(lambda: not mover.is_running(), 2.0)
        assert "Unreachable" in (await it.receiving.ask("hand_over"))["error"]
        with agent(tmp_path / "d", "--registry", it.registry.url) as again:  # at the same path
            assert again.socket == it.decode.socket
            assert "session" in await it.receiving.ask("hand_over")
            await it.move(5)


async def test_an_agent_that_is_stopped_tells_its_engine_and_leaves_nothing(tmp_path: Path) -> None:
    async with pair(tmp_path) as it:
        (mover,) = it.prefill.movers()
        waiting = asyncio.create_task(it.sending.ask("lost"))
        it.prefill.process.send_signal(signal.SIGTERM)
        assert await waiting == {"why": "the agent was told to stop: hand over again"}
        assert it.prefill.process.wait(10) == 0
        assert not it.prefill.socket.exists()
        until(lambda: not mover.is_running(), 2.0)
        assert await seats(it.registry, "default") == []


async def test_an_aborted_room_fails_at_both_sides_and_frees_its_pages(tmp_path: Path) -> None:
    async with pair(tmp_path) as it:
        await it.sending.ask("open", room=1)
        await until_open(it.prefill, 1)
        assert await it.sending.ask("abort", room=1) == {}
        assert "the prefill engine left the room" in (await it.sending.ask("outcomes"))["outcomes"][0]
        await it.receiving.ask("open", room=2)
        await until_open(it.decode, 2)
        assert await it.receiving.ask("abort", room=2) == {}
        assert "this engine has given it up" in (await it.receiving.ask("outcomes"))["outcomes"][0]
        assert "gave the room up" in (await it.sending.ask("send", room=2, chunks=[[1]]))["error"]
        await it.idle()
        assert await it.receiving.ask("free_pages") == {"freed": [1, 2]}
        await it.move(1)  # both ids can be used again


async def test_a_call_that_is_cancelled_gives_its_room_up(tmp_path: Path) -> None:
    async with pair(tmp_path) as it:
        await it.sending.ask("open", room=1)
        await it.receiving.ask("open", room=2)
        await until_open(it.prefill, 1)
        await until_open(it.decode, 2)
        for engine in (it.sending, it.receiving):
            assert await engine.ask("cancel") == {}
        await it.idle()
        assert await it.receiving.ask("free_pages") == {"freed": [1, 2]}
        await it.move(1)


async def test_a_room_that_fails_says_why_and_the_next_one_is_well(tmp_path: Path) -> None:
    async with pair(tmp_path) as it:
        told, found = await asyncio.gather(
            it.sending.ask("send", room=1, chunks=[[1, 2, 3]]),
            it.receiving.ask("receive", room=1, pages=[4, 5], sent=[1, 2]),
        )
        assert "named 2 pages and page 3 is being sent" in told["error"]
        assert "named 2 pages and page 3 is being sent" in found["error"]
        assert "is outside the pool" not in told["error"]
        await it.idle()
        await it.move(2)


def maps(process: psutil.Process) -> list[str]:
    return Path(f"/proc/{process.pid}/maps").read_text().splitlines()


async def until_open(at: AgentProcess, room: int) -> None:
    async with asyncio.timeout(20):
        while room not in (await at.ask("GET", "/v1/rank"))[1]["rooms"]:  # noqa: ASYNC110  another process opens it
            await asyncio.sleep(0.02)


async def seats(registry: Service, instance: str) -> list[Any]:
    async with aiohttp.ClientSession() as http, http.get(f"{registry.url}/v1/instances/{instance}") as answer:
        return list((await answer.json()).get("alive_seats", ()))
