# ruff: noqa: ASYNC110, ASYNC240 - another process is waited for; its files are what is tested
"""A real `pdctl serve` and its journal: killed, starved of space, made read-only, and lied to by its file."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

import aiohttp
import pytest

from pdctl.core.address import Endpoint
from pdctl.core.route import Announcement, Seat, Shape
from tests.persistence.tmpfs import Tmpfs, can_mount
from tests.scripted import reserve_port

DEADLINE_S = 60.0
CLIENTS = 1000
KILLS = 20
SHAPE = Shape(attn_tp_size=CLIENTS, attn_cp_size=1, dp_size=1, pp_size=1, page_size=16, kv_cache_dtype="bfloat16")
SOLO = replace(SHAPE, attn_tp_size=1)
GOT_NO_ANSWER = (aiohttp.ClientConnectionError, asyncio.TimeoutError)

needs_mount = pytest.mark.skipif(not can_mount(), reason="cannot mount a small tmpfs here")


class Service:
    """`pdctl serve` on one port and one journal, through all its lives."""

    def __init__(self, port: int, journal: Path, log: Path) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.journal = journal
        self._words = ("serve", "--port", str(port), "--journal", f"sqlite:{journal}", "--log-level", "warning")
        self._log = log
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        with self._log.open("wb") as log:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "pdctl", *self._words), stdout=asyncio.subprocess.PIPE, stderr=log
            )
        assert self._process.stdout is not None
        line = await asyncio.wait_for(self._process.stdout.readline(), DEADLINE_S)
        assert line.decode().strip() == f"serving at {self.url}", self._log.read_text()

    async def end(self, how: signal.Signals = signal.SIGKILL) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(how)
            await self._process.communicate()

    async def refusal(self) -> str:
        """What it says when it does not start."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "pdctl", *self._words),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        _, err = await asyncio.wait_for(process.communicate(), DEADLINE_S)
        assert process.returncode == 69
        return err.decode()


@pytest.fixture
def port() -> Iterator[int]:
    with reserve_port() as sock:
        yield sock.getsockname()[1]


Serving = Callable[[Path], Service]


@pytest.fixture
async def serving(port: int, tmp_path: Path) -> AsyncIterator[Serving]:
    """A service by its journal, not started yet; gone after the test, whatever happened."""
    made: list[Service] = []

    def make(journal: Path) -> Service:
        made.append(Service(port, journal, tmp_path / "log"))
        return made[-1]

    yield make
    for each in made:
        await each.end()


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    timeout = aiohttp.ClientTimeout(total=60.0)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        yield session


def row(tp: int, version: int, shape: Shape = SHAPE) -> Announcement:
    """The rank in seat `tp` in its life number `version`, which its port tells."""
    return Announcement(Seat(0, 0, tp, 0), shape, Endpoint("127.0.0.1", 10000 + version))


async def put(http: aiohttp.ClientSession, url: str, announcement: Announcement) -> tuple[int, str]:
    async with http.put(url + "/route", json=announcement.to_body()) as answer:
        return answer.status, await answer.text()


async def address(http: aiohttp.ClientSession, url: str, tp: int = 0) -> str | None:
    ranks = {"prefill_dp_rank": 0, "prefill_cp_rank": 0, "target_tp_rank": tp, "target_pp_rank": 0}
    async with http.get(url + "/route", params=ranks) as answer:
        said = json.loads(await answer.text()) if answer.status == 200 else None
    return said and f"{said['rank_ip']}:{said['rank_port']}"


async def readiness(http: aiohttp.ClientSession, url: str) -> tuple[int, str]:
    async with http.get(url + "/readyz") as answer:
        return answer.status, await answer.text()


async def until_ready(http: aiohttp.ClientSession, url: str) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while (await readiness(http, url))[0] != 200:
            await asyncio.sleep(0.05)


# --- killed


@dataclass(slots=True)
class History:
    """What one client has sent, and what it was told. `maybe`: sent after `sure`, and never answered."""

    seat: int
    sent: int = 0
    sure: int | None = None
    maybe: set[int] = field(default_factory=set)
    rooms: dict[int, int] = field(default_factory=dict)
    lost_rooms: set[int] = field(default_factory=set)
    highest_epoch: int = 0

    def allows(self, version: int | None) -> bool:
        return version == self.sure or version in self.maybe

    def answered(self, version: int, status: int) -> None:
        if status == 200:
            self.sure, self.maybe = version, set()


class Fleet:
    """Clients that never stop: a new life in the seat, a room, again. While the gate is shut they wait."""

    def __init__(self, http: aiohttp.ClientSession, url: str) -> None:
        self.histories = [History(seat) for seat in range(CLIENTS)]
        self.gate = asyncio.Event()
        self.acknowledged = 0
        self.statuses: set[int] = set()
        self._http = http
        self._url = url
        self._busy = 0
        self._random = Random(3)

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for history in self.histories:
                group.create_task(self._live(history))

    async def rest(self) -> None:
        """Until nothing is under way any more: the gate is shut and the service is dead."""
        async with asyncio.timeout(DEADLINE_S):
            while self._busy:
                await asyncio.sleep(0.01)

    async def _live(self, history: History) -> None:
        while True:
            await self.gate.wait()
            self._busy += 1
            try:
                await self._register(history)
                await self._announce(history)
            except GOT_NO_ANSWER:
                pass
            finally:
                self._busy -= 1
            await asyncio.sleep(self._random.uniform(0, 0.05))

    async def _register(self, history: History) -> None:
        history.sent += 1
        version = history.sent
        history.maybe.add(version)
        status, _ = await put(self._http, self._url, row(history.seat, version))
        self.statuses.add(status)
        history.answered(version, status)
        self.acknowledged += status == 200

    async def _announce(self, history: History) -> None:
        room = self._random.getrandbits(63)
        history.lost_rooms.add(room)
        body = {"bootstrap_room": room, "dp_rank": history.seat % 7}
        async with self._http.post(self._url + "/register_dp_rank", json=body) as answer:
            self.statuses.add(answer.status)
            if answer.status == 200:
                history.lost_rooms.discard(room)
                history.rooms[room] = history.seat % 7


async def check(http: aiohttp.ClientSession, url: str, fleet: Fleet) -> None:
    """Every acknowledged row is there, none that was not sent, none twice; no epoch went back."""
    async with http.get(url + "/v1/instances/default") as answer:
        shown = (await answer.json())["alive_seats"] if answer.status == 200 else []
    held: dict[int, dict[str, Any]] = {seat["tp"]: seat for seat in shown}
    assert len(held) == len(shown), "a seat twice"
    for history in fleet.histories:
        there = held.get(history.seat)
        version = None if there is None else int(there["address"].rpartition(":")[2]) - 10000
        assert history.allows(version), f"{history} but the registry has {version}"
        if there is not None:
            assert there["epoch"] >= history.highest_epoch
            history.highest_epoch = there["epoch"]
    epochs = [seat["epoch"] for seat in shown]
    assert len(set(epochs)) == len(epochs), "an epoch twice"
    await check_rooms(http, url, fleet)


async def check_rooms(http: aiohttp.ClientSession, url: str, fleet: Fleet) -> None:
    sure = {str(room): rank for history in fleet.histories for room, rank in history.rooms.items()}
    maybe = {str(room): history.seat % 7 for history in fleet.histories for room in history.lost_rooms}
    asked = [int(room) for room in (*sure, *maybe)]
    async with http.post(url + "/query_dp_ranks", json={"bootstrap_rooms": asked}) as answer:
        found = await answer.json()
    assert {room: found.get(room) for room in sure} == sure
    assert {room: rank for room, rank in found.items() if room not in sure}.items() <= maybe.items()


@pytest.mark.timeout(400)
async def test_a_thousand_clients_lose_nothing_to_twenty_kills(
    serving: Serving, tmp_path: Path, http: aiohttp.ClientSession
) -> None:
    random = Random(20)
    served = serving(tmp_path / "journal")
    fleet = Fleet(http, served.url)
    running = asyncio.create_task(fleet.run(), name="clients")
    try:
        for _kill in range(KILLS):
            await served.start()
            await check(http, served.url, fleet)
            before = fleet.acknowledged
            fleet.gate.set()
            async with asyncio.timeout(DEADLINE_S):
                while fleet.acknowledged < before + CLIENTS // 4:
                    await asyncio.sleep(0.01)
            await asyncio.sleep(random.uniform(0, 0.3))  # so that the kill falls anywhere in a transaction
            fleet.gate.clear()
            await served.end()
            await fleet.rest()
            assert not running.done(), running
        await served.start()
        await check(http, served.url, fleet)
    finally:
        running.cancel()
        await asyncio.wait({running})
    assert fleet.acknowledged >= KILLS * CLIENTS // 4
    assert all(history.sure for history in fleet.histories)
    assert not list(tmp_path.glob("*corrupt*"))


async def test_what_a_stock_rank_said_once_is_served_after_any_end(
    serving: Serving, tmp_path: Path, http: aiohttp.ClientSession
) -> None:
    served = serving(tmp_path / "journal")
    for how in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGKILL):
        await served.start()
        if how is signal.SIGKILL and await address(http, served.url) is None:
            assert await put(http, served.url, row(0, 1, SOLO)) == (200, "OK")
        assert await address(http, served.url) == "127.0.0.1:10001"
        await served.end(how)


# --- disks


@needs_mount
async def test_a_full_disk_is_a_503_with_the_cause_while_reads_go_on_and_ends_by_itself(
    serving: Serving, tmp_path: Path, http: aiohttp.ClientSession
) -> None:
    with Tmpfs(tmp_path / "disk") as disk:
        served = serving(disk.path / "journal")
        await served.start()
        assert await put(http, served.url, row(0, 1, SOLO)) == (200, "OK")
        stuffing = disk.fill()
        version, status, text = 1, 200, ""
        while status == 200:  # what the file system had set aside for the WAL is used up first
            version += 1
            status, text = await put(http, served.url, row(0, version, SOLO))
        assert status == 503
        assert "the journal takes no rows" in text
        assert "no space is left" in text
        assert await address(http, served.url) == f"127.0.0.1:{10000 + version - 1}"
        status, text = await readiness(http, served.url)
        assert status == 503
        assert "no space is left" in text
        await served.end()
        await served.start()  # on the full disk
        assert await address(http, served.url) == f"127.0.0.1:{10000 + version - 1}"
        stuffing.unlink()
        await until_ready(http, served.url)
        assert await put(http, served.url, row(0, version, SOLO)) == (200, "OK")


@needs_mount
async def test_a_read_only_disk_serves_what_it_holds_and_goes_on_when_it_may_write(
    serving: Serving, tmp_path: Path, http: aiohttp.ClientSession
) -> None:
    with Tmpfs(tmp_path / "disk") as disk:
        served = serving(disk.path / "journal")
        await served.start()
        assert await put(http, served.url, row(0, 1, SOLO)) == (200, "OK")
        await served.end()  # killed: the row stands in the WAL alone
        disk.remount("ro")
        await served.start()
        assert await address(http, served.url) == "127.0.0.1:10001"
        status, text = await put(http, served.url, row(0, 2, SOLO))
        assert status == 503
        assert "read-only" in text
        assert (await readiness(http, served.url))[0] == 503
        assert await address(http, served.url) == "127.0.0.1:10001"
        disk.remount("rw")
        await until_ready(http, served.url)
        assert await put(http, served.url, row(0, 2, SOLO)) == (200, "OK")
        await served.end()
        await served.start()
        assert await address(http, served.url) == "127.0.0.1:10002"


# --- files


async def test_a_corrupt_journal_is_set_aside_and_the_service_serves(
    serving: Serving, tmp_path: Path, http: aiohttp.ClientSession
) -> None:
    journal = tmp_path / "journal"
    journal.write_bytes(b"this was a journal" * 1000)
    served = serving(journal)
    await served.start()
    assert (await readiness(http, served.url))[0] == 200
    assert await put(http, served.url, row(0, 1, SOLO)) == (200, "OK")
    (aside,) = tmp_path.glob("journal.corrupt-*")
    assert aside.read_bytes() == b"this was a journal" * 1000


async def test_a_second_service_on_one_journal_is_refused_and_told_who_has_it(serving: Serving, tmp_path: Path) -> None:
    with reserve_port() as other:
        first = serving(tmp_path / "journal")
        await first.start()
        second = Service(other.getsockname()[1], tmp_path / "journal", tmp_path / "second")
        said = await second.refusal()
    assert re.search(r"journal \S+ is held by process \d+ on \S+: stop that process, or give each registry", said)


async def test_a_missing_directory_is_said_before_anything_is_served(
    serving: Serving, port: int, tmp_path: Path
) -> None:
    said = await serving(tmp_path / "missing" / "journal").refusal()
    assert "there is no directory" in said
    assert "Traceback" not in said
    with socket.socket() as sock:
        assert sock.connect_ex(("127.0.0.1", port)) != 0
