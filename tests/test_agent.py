"""The mover in a process of its own, between real engines' processes: moved, killed, refused, and nothing left over."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest

from tests.agent_engine import Memory, arguments
from tests.agents import AgentProcess, agent, offer
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
        """Every table is empty, soon: pages wait for the margin, and the word of it for the engine to read it."""
        async with asyncio.timeout(60):
            while any(await self.left()):  # noqa: ASYNC110  other processes empty them
                await asyncio.sleep(0.02)

    async def left(self) -> list[Any]:
        cards = [await child.ask("status") for child in (self.sending, self.receiving)]
        return [card[table] for card in cards for table in ("rooms", "tickets", "quarantine", "held")]


@contextmanager
def pair(at: Path, shared: str = "file") -> Iterator[Pair]:
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
            assert "session" in engine.ask_now("hand_over")
            assert engine.ask_now("registered") == {}
        it = Pair(registry, sides[0], sides[1], engines[0], engines[1])
        yield it
        for engine in engines:
            if engine.is_alive:
                assert engine.ask_now("leave") == {}


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with pair(tmp_path_factory.mktemp("both")) as it:
        yield it


@pytest.fixture
async def calm(both: Pair) -> Pair:
    """A pair that other tests have used, and will: nothing of them is left."""
    await both.idle()
    for engine in (both.sending, both.receiving):
        engine.ask_now("free_pages")
    return both


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
    with pair(tmp_path, shared) as it:
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
    with pair(tmp_path) as it:
        (mover,) = it.prefill.movers()
        kv = str(tmp_path / "prefill.kv")
        assert any(kv in line for line in maps(mover))
        await it.sending.ask("open", room=7)
        await it.receiving.ask("open", room=8)
        await until_open(it.prefill, 7)
        await until_open(it.decode, 8)
        it.sending.kill()
        until(lambda: not lives(mover))
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
    with pair(tmp_path) as it:
        await it.receiving.ask("open", room=3)
        await until_open(it.decode, 3)
        (mover,) = it.decode.movers()
        waiting = asyncio.create_task(it.receiving.ask("lost"))
        begun = time.monotonic()
        mover.kill()
        assert "ended" in (await waiting)["why"]
        assert time.monotonic() - begun < 15.0
        assert await it.receiving.ask("free_pages") == {"freed": [1, 2]}
        assert "session" in await it.receiving.ask("hand_over")
        await it.move(4)
        await it.idle()


async def test_whoever_keeps_the_socket_takes_the_mover_along_when_it_is_killed(tmp_path: Path) -> None:
    with pair(tmp_path) as it:
        (mover,) = it.decode.movers()
        waiting = asyncio.create_task(it.receiving.ask("lost"))
        it.decode.process.kill()
        it.decode.process.wait()
        assert "ended" in (await waiting)["why"]
        until(lambda: not lives(mover))
        assert "Unreachable" in (await it.receiving.ask("hand_over"))["error"]
        with agent(tmp_path / "d", "--registry", it.registry.url) as again:  # at the same path
            assert again.socket == it.decode.socket
            assert "session" in await it.receiving.ask("hand_over")
            await it.move(5)


async def test_ranks_of_one_agent_have_a_process_each(tmp_path: Path) -> None:
    second = tmp_path / "run" / "second.sock"
    with agent(tmp_path, "--socket", str(second)) as it:
        until(lambda: f"serving at unix:{second}" in it.log())
        one, other = it.movers()
        one.kill()
        until(lambda: len(alive := [each.pid for each in it.movers() if lives(each)]) == 2 and one.pid not in alive)
        assert lives(other)
        for socket in (it.socket, second):
            it.socket = socket
            assert (await it.ask("GET", "/v1/rank"))[0] == 404


async def test_an_agent_that_is_stopped_tells_its_engine_and_leaves_nothing(tmp_path: Path) -> None:
    with pair(tmp_path) as it:
        (mover,) = it.prefill.movers()
        waiting = asyncio.create_task(it.sending.ask("lost"))
        it.prefill.process.send_signal(signal.SIGTERM)
        assert await waiting == {"why": "the agent was told to stop: hand over again"}
        assert it.prefill.process.wait(60) == 0
        assert not it.prefill.socket.exists()
        until(lambda: not lives(mover))
        assert await seats(it.registry, "default") == []


async def test_an_aborted_room_fails_at_both_sides_and_frees_its_pages(calm: Pair) -> None:
    it = calm
    await it.sending.ask("open", room=1)
    await until_open(it.prefill, 1)
    assert await it.sending.ask("abort", room=1) == {}
    assert "the prefill engine left the room" in (await it.sending.ask("outcomes"))["outcomes"][0]
    await it.receiving.ask("open", room=2)
    await until_open(it.decode, 2)
    assert await it.receiving.ask("abort", room=2) == {}
    assert "this engine has given it up" in (await it.receiving.ask("outcomes"))["outcomes"][0]
    error = (await it.sending.ask("send", room=2, chunks=[[1]]))["error"]
    assert re.search(r"decode rank \S+ (gave|has given) the room up", error)  # before it was opened here, or after
    await it.idle()
    assert await it.receiving.ask("free_pages") == {"freed": [1, 2]}
    await it.move(1)  # both ids can be used again


@pytest.mark.parametrize("how", [{"do": "send", "chunks": [[5], [6]]}, {"do": "send_at_once", "pages": [5, 6]}])
async def test_the_answer_that_ends_a_room_says_that_its_pages_are_free(calm: Pair, how: dict[str, Any]) -> None:
    it = calm
    given = {"ticket": 900, "pages": [1, 2], "aux_row": 3}
    told, found = await asyncio.gather(
        it.sending.ask(how["do"], room=1, **{name: value for name, value in how.items() if name != "do"}),
        it.decode.ask("POST", "/v1/receiving/1", given),
    )
    assert "error" not in told
    assert found == (200, {"free": True})
    assert await it.sending.ask("free_pages") == {"freed": [5, 6]}, "by then"
    assert [card["tickets"] for card in (await it.sending.ask("status"), await it.receiving.ask("status"))] == [[], []]


async def test_a_call_that_is_cancelled_gives_its_room_up(calm: Pair) -> None:
    it = calm
    await it.sending.ask("open", room=1)
    await it.receiving.ask("open", room=2)
    await until_open(it.prefill, 1)
    await until_open(it.decode, 2)
    for engine in (it.sending, it.receiving):
        assert await engine.ask("cancel") == {}
    await it.idle()
    assert await it.receiving.ask("free_pages") == {"freed": [1, 2]}
    await it.move(1)


async def test_a_room_that_fails_says_why_and_the_next_one_is_well(calm: Pair) -> None:
    it = calm
    told, found = await asyncio.gather(
        it.sending.ask("send", room=1, chunks=[[1, 2, 3]]),
        it.receiving.ask("receive", room=1, pages=[4, 5], sent=[1, 2]),
    )
    assert "named 2 pages and page 3 is being sent" in told["error"]
    assert "named 2 pages and page 3 is being sent" in found["error"]
    assert "is outside the pool" not in told["error"]
    await it.idle()
    await it.move(30)


async def test_a_child_that_the_engine_forked_does_not_keep_its_pool(tmp_path: Path) -> None:
    """It has the engine's connection too, which stays open."""
    with pair(tmp_path) as it:
        (mover,) = it.prefill.movers()
        forked = psutil.Process((await it.sending.ask("fork"))["pid"])
        try:
            it.sending.kill()
            until(lambda: not lives(mover))
            assert lives(forked)
        finally:
            forked.kill()


async def test_a_socket_serves_one_rank_and_says_whose(calm: Pair, memory: Memory) -> None:
    it = calm
    status, said = await it.prefill.ask("POST", "/v1/rank", offer(memory))
    assert status == 409
    assert f"process {it.sending.pid} has handed over its pool here" in said["error"]["message"]
    await it.move(1)


MISTAKES: list[tuple[str, str, str, bytes | None, int, str]] = [
    ("no JSON", "POST", "/v1/rank", b"{", 400, "body: is no JSON"),
    ("too deep", "POST", "/v1/rank", b"[" * 200_000, 400, "body: is no JSON"),
    ("no object", "POST", "/v1/rank", b"[]", 400, "body: is a list: send an object"),
    ("no fields", "POST", "/v1/rank", b"{}", 400, "memory: is missing"),
    ("too large", "POST", "/v1/rank", b" " * (9 << 20), 413, "body is over 8388608 bytes"),
    ("nothing there", "GET", "/v1/rank", None, 404, "no pool has been handed over"),
    ("no pool yet", "POST", "/v1/sending/1", b"{}", 404, "no pool has been handed over"),
    ("no room", "POST", "/v1/sending/x", b"{}", 400, "room: is 'x': give a number"),
    ("another path", "GET", "/v2", None, 404, "GET /v2 is not served"),
    ("another method", "PUT", "/v1/rank", None, 405, "PUT /v1/rank is not served"),
]


@pytest.mark.parametrize(
    ("method", "path", "raw", "status", "said"), [m[1:] for m in MISTAKES], ids=[m[0] for m in MISTAKES]
)
async def test_a_mistake_is_answered_with_its_name_and_changes_nothing(
    lone: AgentProcess, method: str, path: str, raw: bytes | None, status: int, said: str
) -> None:
    (mover,) = lone.movers()
    got, answer = await lone.ask(method, path, raw=raw)
    assert got == status
    assert answer["error"]["message"].startswith(said)
    assert [each.pid for each in lone.movers()] == [mover.pid]


async def test_memory_that_is_not_what_was_said_is_refused_before_it_is_registered(
    lone: AgentProcess, memory: Memory
) -> None:
    for change, said in (
        ({"path": "/none"}, "memory.0.path: /none cannot be opened"),
        ({"nbytes": 1 << 40}, "memory.0.nbytes: ends at"),
        ({"offset": 1}, "memory.0.offset: is 1: give a multiple of 4096"),
    ):
        wrong = offer(memory)
        wrong["memory"][0] |= change
        status, answer = await lone.ask("POST", "/v1/rank", wrong)
        assert (status, answer["error"]["kind"]) == (400, "BadField")
        assert answer["error"]["message"].startswith(said)
    (mover,) = lone.movers()
    assert not any(memory.arena.handed.memory.name in line for line in maps(mover))


async def test_device_memory_is_refused_where_no_device_can_be_opened(lone: AgentProcess, memory: Memory) -> None:
    device = offer(memory)
    nbytes = device["memory"][0]["nbytes"]
    device["memory"][0] = {
        "kind": "cuda_ipc",
        "handle": "AAAA",
        "nbytes": nbytes,
        "device": "GPU-00112233-4455-6677-8899-aabbccddeeff",
    }
    status, answer = await lone.ask("POST", "/v1/rank", device)
    assert (status, answer["error"]["kind"]) == (503, "DeviceUnavailable")
    assert "libcuda.so.1 is not on this host" in answer["error"]["message"]
    status, answer = await lone.ask("GET", "/v1/rank")
    assert status == 404  # it is as free as before


async def test_what_a_room_cannot_be_is_refused_and_the_rank_goes_on(calm: Pair) -> None:
    it = calm
    p, d, sending, receiving = it.prefill, it.decode, "/v1/sending/1", "/v1/receiving/1"
    cases: list[tuple[AgentProcess, str, dict[str, Any], int, str]] = [
        (p, sending, {}, 400, "ticket: is missing"),
        (p, sending, {"ticket": 9, "pages": [64]}, 400, "pages: has 64 to 64: give 0 to 63"),
        (p, sending, {"ticket": 9, "pages": [1.0]}, 400, "pages: is no list of integers"),
        (p, sending, {"ticket": 9, "aux": 1}, 400, "aux: is no field"),
        (p, f"{sending}/pages", {"pages": [1]}, 404, "room 1 is not open"),
        (p, receiving, {"ticket": 9, "pages": [1], "aux_row": 0}, 400, "room 1 cannot be received"),
        (d, receiving, {"ticket": 9, "pages": [1]}, 400, "aux_row: is missing"),
        (d, receiving, {"ticket": 9, "pages": [1], "aux_row": 8}, 400, "aux_row: is 8"),
        (d, receiving, {"ticket": 9, "pages": [1, 1], "aux_row": 0}, 400, "a page is named twice"),
        (d, sending, {"ticket": 9}, 400, "room 1 cannot be sent"),
    ]
    for at, path, body, status, said in cases:
        got, answer = await at.ask("POST", path, body)
        assert got == status, answer
        assert answer["error"]["message"].startswith(said)
    await it.idle()
    await it.move(1)


async def test_a_request_that_comes_after_its_own_end_is_refused(calm: Pair) -> None:
    """Its pages were given back when the agent had not heard of it."""
    it = calm
    assert await it.decode.ask("DELETE", "/v1/receiving/1?ticket=77") == (200, {"free": True})
    status, answer = await it.decode.ask("POST", "/v1/receiving/1", {"ticket": 77, "pages": [1], "aux_row": 0})
    assert (status, answer["error"]["message"].partition(":")[0]) == (400, "ticket 77 was given up before")
    await it.receiving.ask("open", room=1)
    await until_open(it.decode, 1)
    assert await it.decode.ask("DELETE", "/v1/receiving/1?ticket=78") == (200, {"free": True})
    assert 1 in (await it.decode.ask("GET", "/v1/rank"))[1]["rooms"]  # it has another ticket
    await it.receiving.ask("cancel")


AS_SOMEBODY = r"""
import json, os, socket, sys
path, user, body = sys.argv[1], int(sys.argv[2]), sys.argv[3].encode()
os.setgid(user), os.setuid(user)
with socket.socket(socket.AF_UNIX) as s:
    s.connect(path)
    s.sendall(b"POST /v1/rank HTTP/1.1\r\nHost: a\r\nConnection: close\r\n")
    s.sendall(b"Content-Length: %d\r\n\r\n" % len(body) + body)
    print(s.makefile("rb").read().decode())
"""


async def as_somebody(user: int, at: AgentProcess, body: object) -> str:
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", AS_SOMEBODY, str(at.socket), str(user), json.dumps(body)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    out, _ = await asyncio.wait_for(child.communicate(), 60)
    return out.decode()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
async def test_only_its_owner_and_who_was_named_may_speak_to_it(tmp_path: Path, memory: Memory) -> None:
    run = Path(tempfile.mkdtemp(dir="/tmp"))  # the tests' own directories are closed to others
    try:
        with agent(tmp_path / "own", socket=run / "own.sock") as own:
            assert stat.S_IMODE(own.socket.stat().st_mode) == 0o600
            assert "PermissionError" in await as_somebody(65534, own, {})
            os.chmod(run, 0o711)
            own.socket.chmod(0o666)  # were it open: the kernel still says who asks
            assert "user 65534 may not speak to this agent" in await as_somebody(65534, own, {})
        with agent(tmp_path / "named", "--user", "65534", socket=run / "named.sock") as named:
            assert "user 65533 may not speak to this agent" in await as_somebody(65533, named, {})
            # allowed to speak, and still no way to the files of the agent's user
            assert "belongs to user 0, not to yours (65534)" in await as_somebody(65534, named, offer(memory))
    finally:
        shutil.rmtree(run)


def lives(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def maps(process: psutil.Process) -> list[str]:
    return Path(f"/proc/{process.pid}/maps").read_text().splitlines()


async def until_open(at: AgentProcess, room: int) -> None:
    async with asyncio.timeout(60):
        while room not in (await at.ask("GET", "/v1/rank"))[1]["rooms"]:  # noqa: ASYNC110  another process opens it
            await asyncio.sleep(0.02)


async def test_the_ranks_of_agents_tell_their_registry_how_they_are(calm: Pair) -> None:
    async with aiohttp.ClientSession() as http, asyncio.timeout(60):
        while True:
            async with http.get(f"{calm.registry.url}/v1/overview") as answer:
                reports = (await answer.json())["reports"]
            if len(reports) == 2:
                break
            await asyncio.sleep(0.05)
    assert {(each["instance"], each["role"], tuple(each["unready"])) for each in reports} == {
        ("default", "prefill", ()),
        ("dec", "decode", ()),
    }


async def seats(registry: Service, instance: str) -> list[Any]:
    async with aiohttp.ClientSession() as http, http.get(f"{registry.url}/v1/instances/{instance}") as answer:
        return list((await answer.json()).get("alive_seats", ()))
