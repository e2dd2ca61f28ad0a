"""
Ranks whose rooms can be held at any moment: `python -m tests.faults.room_rank JSON`, driven by JSON lines.

One prefill rank, or several decode ranks, each with an engine, a link and a shell of its own, wired as node.py wires
them; only the model is missing. What is held back is what goes to a link, in the order in which it goes there. Every
table that a room can leave something in is looked through by `left`, and nowhere else.

Pages that are given back are filled at once with what no room sends, so that whoever still writes or reads them shows.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import mmap
import re
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from enum import StrEnum
from random import SystemRandom
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil

from pdctl.arriving import ArrivingRoom
from pdctl.client import RegistryClient
from pdctl.core.address import Endpoint
from pdctl.core.ejection import ProbePolicy
from pdctl.core.layout import Pool, RankPools
from pdctl.core.pairing import Paired
from pdctl.core.route import Announcement, Seat, Shape
from pdctl.core.sessions import SessionTable
from pdctl.core.transfer import RoomTimeouts, Side
from pdctl.core.wire import Metadata, RegisterBuffers, Status, parse_to_decode, parse_to_prefill
from pdctl.device.cpu import Cpu
from pdctl.engine.asking import Asking
from pdctl.engine.base import PeerCard
from pdctl.engine.canary import _CELLS
from pdctl.engine.mooncake import open_mooncake
from pdctl.engine.promises import PromisedEngine
from pdctl.engine.settings import MooncakeSettings
from pdctl.errors import PdctlError
from pdctl.memory import Arena
from pdctl.metrics import Metrics
from pdctl.peer import LinkSettings, PeerLink, open_link
from pdctl.prober import Prober
from pdctl.receiver import Receiver
from pdctl.retry import RetryPolicy
from pdctl.sender import Sender
from pdctl.sending import SendingRoom
from tests.engine.processes import live, obey

Bytes = npt.NDArray[np.uint8]
_libc = ctypes.CDLL(None, use_errno=True)

STALL_S = 1
PROBE = ProbePolicy(interval_s=0.05, max_interval_s=0.2, deadline_s=0.5, hold_s=0.1, max_hold_s=0.2)
RETRY = RetryPolicy(first_wait_s=0.05, max_wait_s=0.2, give_up_after_s=2.0)
SHAPE = Shape(1, 1, 1, 1, 4, "uint8")

N_ENTRIES, PAGE_NBYTES, ROW_NBYTES, N_ROWS = 4, 1024, 48, 64
PAGES_A_ROOM, FIRST_CHUNK = 32, 4
ROOMS_A_RANK = 3  # each with pages of its own: those of a room that failed are given back later
# What stands in a page that nobody has sent; in one that decode was given back; in one that prefill was given back.
ABSENT, GIVEN_BACK, REUSED = 0xEE, 0x5A, 0xA5
ABSENT_FROM = 80  # what is sent is below this, and so below all three


def timeouts(pace: int) -> RoomTimeouts:
    """`pace`: how many times slower than it could be this host is now: what is here is no test of how fast it is."""
    return RoomTimeouts(
        2.5 * pace, 5 * pace, transfer_s=10 * pace, remind_s=0.4 * pace, release_s=0.3, drain_margin_s=0.1
    )


class Moment(StrEnum):
    """Where a room is held, until `go`. In this order they are reached."""

    TELLING = "telling"  # decode is telling prefill of its memory
    NAMING = "naming"  # decode is naming the pages
    EARLY = "early"  # decode has named them, the prefill engine has not opened the room
    HALF_NAMED = "half named"  # one of two decode ranks has named its pages
    NAMED = "named"  # all have, and no chunk is computed
    BETWEEN = "between"  # one chunk has landed, nothing is under way
    MOVING = "moving"  # blocks of a chunk are under way
    FINISHING = "finishing"  # the last block is
    TOLD = "told"  # all has landed, and decode has not heard of it
    ARRIVED = "arrived"  # both have succeeded, and neither has left the room


@dataclass
class Drive:
    """An engine's part in one room; `at`: how far it has come, `going`: it may go on."""

    until: Moment
    going: asyncio.Event = field(default_factory=asyncio.Event)
    at: str = ""
    room: SendingRoom | ArrivingRoom | None = None
    wrong: list[str] = field(default_factory=list)
    task: asyncio.Task[str] | None = None

    async def pause(self, at: Moment) -> None:
        self.at = at
        if self.until is at:
            await self.going.wait()

    @property
    def phase(self) -> str:
        return "" if self.room is None else self.room.phase.name

    @property
    def why(self) -> str:
        return "" if self.room is None else self.room.reason or ""


class Keeper:
    """Stands before a link: keeps back what it is told to, and what goes to the same peer after that."""

    def __init__(self, send: Callable[[Endpoint, Sequence[bytes]], Coroutine[Any, Any, None]]) -> None:
        self._send = send
        self._lines: defaultdict[Endpoint, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._opened = asyncio.Event()
        self.keeps: Callable[[Sequence[bytes]], bool] = lambda _: False
        self.kept = 0

    async def send(self, to: Endpoint, frames: Sequence[bytes]) -> None:
        async with self._lines[to]:
            if self.keeps(frames):
                self.kept += 1
                await self._opened.wait()
        await self._send(to, frames)

    def open(self) -> None:
        self._opened.set()

    def close(self) -> None:
        self._opened.clear()
        self.kept = 0


class Memory:
    """A rank's KV entries and aux rows, and what a page of them must hold."""

    def __init__(self, n_pages: int) -> None:
        self.arena = Arena(N_ENTRIES * (n_pages * PAGE_NBYTES + 64) + N_ROWS * ROW_NBYTES + 64)
        self.kv = [self.arena.array((n_pages, PAGE_NBYTES), np.uint8) for _ in range(N_ENTRIES)]
        self.aux = self.arena.array((N_ROWS, ROW_NBYTES), np.uint8)
        self.pools = RankPools(_pool(self.kv), _pool([self.aux]))

    def set(self, value: int, pages: npt.ArrayLike | None = None, rows: Sequence[int] = ()) -> None:
        at: Any = slice(None) if pages is None else np.asarray(pages)
        for array in self.kv:
            array[at] = value
        self.aux[list(rows)] = value

    def fill(self) -> None:
        for entry, array in enumerate(self.kv):
            array[:] = expected(entry, range(len(array)))
        self.aux[:] = _row(range(N_ROWS))

    def differs(self, pages: list[int], sent: list[int], row: int, sent_row: int, *, partly: bool) -> list[str]:
        """Where something else stands than what was sent; `partly`: or, byte by byte, what was there before."""
        found = []
        for entry, array in enumerate(self.kv):
            have = array[pages]
            if not ((have == expected(entry, sent)) | (partly & (have == ABSENT))).all():
                found.append(f"entry {entry}")
        have = self.aux[row]
        return found + ([] if ((have == _row([sent_row])) | (partly & (have == ABSENT))).all() else ["aux"])


def expected(entry: int, pages: Sequence[int]) -> Bytes:
    """What stands in these pages of the prefill."""
    at = np.asarray(pages, np.uint64)[:, None] * np.uint64(PAGE_NBYTES) + np.arange(PAGE_NBYTES, dtype=np.uint64)
    mixed: Any = at * np.uint64(0x9E37_79B9_7F4A_7C15) + np.uint64(entry * 7919 + 1)
    below: Bytes = ((mixed >> np.uint64(33)) % np.uint64(ABSENT_FROM)).astype(np.uint8)
    return below


def _row(rows: Sequence[int]) -> Bytes:
    return (np.asarray(rows, np.uint8)[:, None] + np.zeros(ROW_NBYTES, np.uint8)) + np.uint8(1)


def _pool(arrays: list[Bytes]) -> Pool:
    return Pool(tuple(a.ctypes.data for a in arrays), tuple(a.shape[1] for a in arrays), len(arrays[0]))


def of_room(number: int, moment: int) -> Iterator[list[int]]:
    """Pages of a room, in no order: those of the prefill, then those of the decode. `number`: its room there."""
    order = np.random.default_rng(moment)
    for first in (moment * ROOMS_A_RANK * PAGES_A_ROOM, 0):
        yield (order.permutation(PAGES_A_ROOM) + first + number * PAGES_A_ROOM).tolist()


class Ranks:
    """What both kinds of process have. Commands are the methods that answer with a dict."""

    def __init__(self, registry: str, pace: int) -> None:
        self.registry, self.timeouts = registry, timeouts(pace)
        self.engine_settings = MooncakeSettings(progress_timeout_s=STALL_S * pace)
        self.drives: dict[str, Drive] = {}

    def start(self, key: str, drive: Drive, work: Coroutine[Any, Any, None]) -> dict[str, Any]:
        self.drives[key] = drive
        drive.task = asyncio.create_task(_outcome(work), name=f"engine of room {key}")
        return {}

    async def go(self, keys: list[str] | None = None) -> dict[str, Any]:
        for key in self.drives if keys is None else keys:
            self.drives[key].going.set()
        return {}

    async def abort(self, keys: list[str]) -> dict[str, Any]:
        for key in keys:
            task = self.drives[key].task
            assert task
            task.cancel()
        return {}

    async def at(self, key: str, phase: str, point: str = "", within_s: float = 15.0) -> dict[str, Any]:
        """Wait until the room is in that phase, and its engine at that point if one is named."""
        drive = self.drives[key]
        await _until(lambda: drive.phase == phase and point in ("", drive.at), within_s)
        return {"phase": drive.phase, "at": drive.at, "why": drive.why}

    async def end(self, key: str, within_s: float) -> dict[str, Any]:
        drive = self.drives[key]
        assert drive.task
        await asyncio.wait([drive.task], timeout=within_s)
        defect = drive.task.result() if drive.task.done() and not drive.task.cancelled() else ""
        told = {"phase": drive.phase, "why": drive.why, "wrong": drive.wrong}
        return told | {"over": drive.task.done(), "defect": defect}

    async def left(self, within_s: float) -> dict[str, Any]:
        """What rooms have left behind, as soon as it is nothing, or when the time is over."""
        await _until(lambda: not self.leftovers(), within_s, every_s=0.2)  # a look takes milliseconds
        return {"left": self.leftovers()}

    def leftovers(self) -> list[str]:
        return [f"{what}: {table}" for what, table in self.tables() if table] or self.half_closed()

    def half_closed(self) -> list[str]:
        """What a peer has closed and we have not: an engine's idle connections to one that is gone count too. Looked at
        last, as it costs the most."""
        here = psutil.Process().net_connections("tcp")
        left = [f"{c.laddr.port}-{c.raddr.port}" for c in here if c.status == psutil.CONN_CLOSE_WAIT]
        return [f"half closed: {left}"] if left else []

    def tables(self) -> Iterator[tuple[str, object]]:
        yield "engines of rooms", [key for key, drive in self.drives.items() if drive.task and not drive.task.done()]
        yield "tasks", sorted(task.get_name() for task in asyncio.all_tasks() if _of_a_room(task))

    async def holds(self) -> dict[str, Any]:
        """Descriptors, threads, and CPU seconds so far."""
        here = psutil.Process()
        cpu = here.cpu_times()
        return {"fds": here.num_fds(), "threads": here.num_threads(), "cpu_s": cpu.user + cpu.system}


def of_engine(engine: Any) -> Iterator[tuple[str, object]]:
    assert isinstance(engine, PromisedEngine)
    yield "transfers", engine._moving
    yield "questions", engine._questions.moving
    yield "cells of questions", _CELLS - len(engine._canary._free)
    yield "askers", [session for session, lock in engine._pins._asking.items() if lock.locked()]
    for motor in engine._carrier._motors.values():  # type: ignore[attr-defined]
        yield "the mover's transfers", [*motor.mover._carried, *motor.mover._inbox]
        yield "the mover's windows", [w for w in list(motor.mover._windows.values()) if not w.empty]


def of_link(link: PeerLink) -> Iterator[tuple[str, object]]:
    yield "messages that wait", {str(to): peer.waiting for to, peer in link._peers.items() if peer.waiting}


def of_rooms(metrics: Metrics, side: Side) -> Iterator[tuple[str, object]]:
    """What an operator would see."""
    text = metrics.exposition()[0].decode()
    for name in ("pdctl_rooms_open", "pdctl_room_pages_quarantined"):
        told = [line for line in text.splitlines() if line.startswith(f'{name}{{side="{side}"}}')]
        yield name, [line for line in told if not line.endswith(" 0.0")]


def _of_a_room(task: asyncio.Task[Any]) -> bool:
    return any(word in task.get_name() for word in ("room", "abort", "status", "check", "turns", "settle", "write"))


class Prefill(Ranks):
    """One prefill rank. `send` drives a room to the moment that is named, and on when it may."""

    async def open(self, stack: AsyncExitStack, n_rooms: int) -> dict[str, Any]:
        self.memory = Memory(ROOMS_A_RANK * n_rooms * PAGES_A_ROOM)
        self.memory.fill()
        self.is_hidden = False
        self.metrics = Metrics()
        self.link, self.engine = await _open(stack, self.engine_settings, self.metrics, self.memory)
        self.sessions: SessionTable[PeerCard] = SessionTable(PROBE, SystemRandom().random)
        asking, known = Asking(self.engine), self.engine.card
        self.prober = Prober(self.sessions, asking, clock=time.monotonic, metrics=self.metrics, known=known)
        self.keeper = Keeper(self.link.send)
        sender = Sender(
            self.engine,
            self.keeper.send,
            self.memory.pools,
            0,
            self.prober,
            self.timeouts,
            time.monotonic,
            self.metrics,
        )
        self.sender = await stack.enter_async_context(sender)
        loops = {"prober": self.prober.run(), "link": self.link.serve(self.sender.handle)}
        self.loops = [asyncio.create_task(loop, name=name) for name, loop in loops.items()]
        client = await stack.enter_async_context(RegistryClient(self.registry))
        await client.register(Announcement(Seat(0, 0, 0, 0), SHAPE, self.link.endpoint))
        return {"session": self.engine.session, "link": str(self.link.endpoint)}

    async def send(self, room: int, moment: Moment, at: int, number: int = 0, key: str = "") -> dict[str, Any]:
        """`at`: which of the moments' pages, `number`: the first or the second room there."""
        drive = Drive(Moment(moment))
        return self.start(key or str(room), drive, self._send(drive, room, at, number))

    async def _send(self, drive: Drive, room: int, at: int, number: int) -> None:
        pages, row = next(of_room(number, at)), ROOMS_A_RANK * at + number
        await drive.pause(Moment.EARLY)
        required = 2 if drive.until is Moment.HALF_NAMED else None
        drive.room = self.sender.open(room, required, self._reuse)
        async with drive.room as sending:
            await sending.peers_ready()
            await drive.pause(Moment.NAMED)
            await sending.send(pages[:FIRST_CHUNK])
            await drive.pause(Moment.BETWEEN)
            await drive.pause(Moment.MOVING)
            await sending.send(pages[FIRST_CHUNK:])
            await drive.pause(Moment.FINISHING)
            await sending.finish(row)
            await drive.pause(Moment.TOLD)
            await drive.pause(Moment.ARRIVED)

    async def keep_statuses(self, rooms: list[int]) -> dict[str, Any]:
        def keeps(frames: Sequence[bytes]) -> bool:
            said = parse_to_decode(frames)
            return isinstance(said, Status) and said.room in rooms

        self.keeper.close()
        self.keeper.keeps = keeps
        return {}

    async def let_out(self) -> dict[str, Any]:
        self.keeper.open()
        return {}

    async def words_lost(self) -> dict[str, Any]:
        """That decode ranks have said again here, or were told again."""
        said = self.metrics.exposition()[0].decode()
        return {
            word: float(count)
            for word, count in re.findall(r'^pdctl_room_words_lost_total{word="(.*)"} (.*)$', said, re.M)
        }

    async def forget_memory(self, gone: bool) -> dict[str, Any]:
        """Our own region is not registered with our engine any more; or it is again."""
        await (self.engine.unregister if gone else self.engine.register)(self.memory.arena.region)
        return {}

    async def hide_memory(self, gone: bool) -> dict[str, Any]:
        """Our own region is registered, and not mapped; or it is again."""
        region, allowed = self.memory.arena.region, 0 if gone else mmap.PROT_READ | mmap.PROT_WRITE
        assert _libc.mprotect(ctypes.c_void_p(region.pointer), ctypes.c_size_t(region.nbytes), allowed) == 0
        self.is_hidden = gone
        return {}

    def _reuse(self, given: npt.NDArray[np.int64]) -> None:
        if not self.is_hidden:
            self.memory.set(REUSED, given)

    async def early(self, room: int) -> dict[str, Any]:
        await _until(lambda: room in self.sender.early, 15.0)
        return {"early": room in self.sender.early}

    async def in_flight(self, sessions: list[str]) -> dict[str, Any]:
        """Wait until each session has a block under way."""
        assert isinstance(self.engine, PromisedEngine)
        moving = self.engine._moving
        await _until(lambda: all(any(t.in_flight for t in moving.get(each, ())) for each in sessions), 3.0)
        return {each: sum(t.in_flight for t in moving.get(each, ())) for each in sessions}

    async def served(self, session: str, within_s: float) -> dict[str, Any]:
        """Wait until the session may be used; why it may not."""
        blocked = self.prober.reason_blocked
        await _until(lambda: blocked(session) is None, within_s)
        return {"blocked": blocked(session)}

    async def restore(self) -> dict[str, Any]:
        self.drives.clear()
        self.memory.fill()
        return {}

    def tables(self) -> Iterator[tuple[str, object]]:
        it, table = self.sender, self.sessions
        yield from super().tables()
        yield from (("rooms", it.rooms), ("early", it.early), ("unsettled", it._unsettled))
        yield "quarantine", [held.room for held in it.quarantine]
        yield from (("rooms of a peer", it.partners.rooms_of), ("lanes", it.lanes._lanes), ("turns", it.lanes._waiting))
        yield from (("errands", len(it.words._errands)), ("settling", len(it.settling)))
        running = {s: r.trial.running for s, r in table._records.items() if r.trial and r.trial.running}
        yield from (("trials", running), ("turns on trial", self.prober._turns))
        yield from of_engine(self.engine)
        yield from of_link(self.link)
        yield from of_rooms(self.metrics, Side.SENDER)


@dataclass
class Rank:
    """One decode rank. `released`: its rooms' pages and rows, as they were given back."""

    memory: Memory
    link: PeerLink
    engine: Any
    keeper: Keeper
    metrics: Metrics
    loop: asyncio.Task[None] | None = None
    receiver: Receiver | None = None
    released: list[tuple[list[int], int]] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)


class Decode(Ranks):
    """Several decode ranks; `wire` makes each one's receiver, which says of itself what it is told to say."""

    async def open(self, stack: AsyncExitStack, n_ranks: int) -> dict[str, Any]:
        self.ranks: list[Rank] = []
        for _ in range(n_ranks):
            memory, metrics = Memory(ROOMS_A_RANK * PAGES_A_ROOM), Metrics()
            link, engine = await _open(stack, self.engine_settings, metrics, memory)
            self.ranks.append(Rank(memory, link, engine, Keeper(link.send), metrics))
        return {
            "sessions": [rank.engine.session for rank in self.ranks],
            "links": [str(rank.link.endpoint) for rank in self.ranks],
        }

    async def wire(self, ways: list[list[str]] | None = None) -> dict[str, Any]:
        """`ways`: session and link of each rank, as prefill shall know them; as they are if there is none."""
        self.drives.clear()
        for number, rank in enumerate(self.ranks):
            await _close(rank)
            session, reply = ways[number] if ways else (rank.engine.session, str(rank.link.endpoint))
            rank.receiver = Receiver(
                session,
                rank.keeper.send,
                Endpoint.parse(reply),
                rank.memory.pools,
                0,
                1,
                self.timeouts,
                time.monotonic,
                rank.metrics,
                rank.link.is_gone,
            )
            rank.memory.set(ABSENT, rows=range(N_ROWS))
            rank.released, rank.foreign = [], []
            rank.keeper.open()
            await rank.receiver.__aenter__()
            rank.loop = asyncio.create_task(rank.link.serve(rank.receiver.handle), name="link")
        return {}

    async def receive(
        self,
        at: int,
        room: int,
        moment: Moment,
        prefill: str | None = None,
        number: int = 0,
        registry: str = "",
        key: str = "",
    ) -> dict[str, Any]:
        """`prefill`: where its control link is to be reached, instead of where the registry says."""
        drive, rank = Drive(Moment(moment)), self.ranks[at]
        if number == 0:
            kept = {Moment.TELLING: RegisterBuffers, Moment.NAMING: Metadata}.get(drive.until)
            rank.keeper.keeps = lambda frames: kept is not None and isinstance(parse_to_prefill(frames), kept)
            if kept:
                rank.keeper.close()
        work = self._receive(drive, rank, room, at, prefill, number, registry or self.registry)
        return self.start(key or f"{at}/{room}", drive, work)

    async def _receive(
        self, drive: Drive, rank: Rank, room: int, at: int, prefill: str | None, number: int, registry: str
    ) -> None:
        assert rank.receiver
        sent, pages = of_room(number, at)
        async with RegistryClient(registry, policy=RETRY) as client:
            found = await client.rank(Seat(0, 0, 0, 0))
        told = found if prefill is None else Endpoint.parse(prefill)

        def release(given: npt.NDArray[np.int64]) -> None:
            self._given_back(rank, given.tolist(), sent, number, ROOMS_A_RANK * at + number)

        drive.room = rank.receiver.open(room, Paired((told,), ranks=(0,)), pages, number, release=release)
        async with drive.room as arriving:
            await arriving.arrived()
            drive.wrong = rank.memory.differs(pages, sent, number, ROOMS_A_RANK * at + number, partly=False)
            await drive.pause(Moment.ARRIVED)

    def _given_back(self, rank: Rank, pages: list[int], sent: list[int], row: int, sent_row: int) -> None:
        """By now there may stand in them what was sent, or nothing, and nothing else."""
        rank.foreign += rank.memory.differs(pages, sent, row, sent_row, partly=True)
        if any(pages == before for before, _ in rank.released):
            rank.foreign.append(f"pages {pages} were given back twice")
        rank.memory.set(GIVEN_BACK, pages, [row])
        rank.released.append((pages, row))

    async def acquaint(self, prefill: str) -> dict[str, Any]:
        """Connections both ways between each rank and `prefill`, and nothing told by them."""
        for rank in self.ranks:
            assert rank.receiver
            await rank.receiver.contacts._ask(Endpoint.parse(prefill), self.timeouts.transfer_s, "whether it is there")
        return {}

    async def kept(self, at: int) -> dict[str, Any]:
        keeper = self.ranks[at].keeper
        await _until(lambda: keeper.kept > 0, 15.0)
        return {"kept": keeper.kept}

    async def let_out(self) -> dict[str, Any]:
        for rank in self.ranks:
            rank.keeper.open()
        return {}

    async def forget_memory(self, at: int, gone: bool) -> dict[str, Any]:
        """That rank's region is not registered with its engine any more; or it is again."""
        rank = self.ranks[at]
        await (rank.engine.unregister if gone else rank.engine.register)(rank.memory.arena.region)
        return {}

    async def quarantine(self) -> dict[str, Any]:
        return {"rooms": [held.room for rank in self.ranks if rank.receiver for held in rank.receiver.quarantine]}

    async def scribbled(self) -> dict[str, Any]:
        """Ranks whose memory holds what no room may have written: in what was given back, or was never named."""
        found = [f"rank {number}: {what}" for number, rank in enumerate(self.ranks) for what in rank.foreign]
        for number, rank in enumerate(self.ranks):
            pages = [page for given, _ in rank.released for page in given]
            others = sorted(set(range(ROOMS_A_RANK * PAGES_A_ROOM)) - set(pages))
            for entry, array in enumerate(rank.memory.kv):
                found += [] if (array[pages] == GIVEN_BACK).all() else [f"rank {number}: entry {entry} given back"]
                found += [] if (array[others] == ABSENT).all() else [f"rank {number}: entry {entry} never named"]
            rows = rank.memory.aux[[row for _, row in rank.released]]
            found += [] if (rows == GIVEN_BACK).all() else [f"rank {number}: aux row given back"]
        return {"scribbled": found, "released": sum(len(rank.released) for rank in self.ranks)}

    def tables(self) -> Iterator[tuple[str, object]]:
        yield from super().tables()
        for number, rank in enumerate(self.ranks):
            of_rank = [*of_engine(rank.engine), *of_link(rank.link), *of_rooms(rank.metrics, Side.RECEIVER)]
            if (it := rank.receiver) is not None:
                of_rank += [("rooms", it.rooms), ("errands", len(it.errands))]
                of_rank += [("quarantine", [held.room for held in it.quarantine])]
                of_rank += [("telling", [at for at, known in it.contacts._contacts.items() if known.lock.locked()])]
            yield from ((f"rank {number}, {what}", table) for what, table in of_rank)


async def _open(stack: AsyncExitStack, how: MooncakeSettings, metrics: Metrics, memory: Memory) -> tuple[PeerLink, Any]:
    link = await stack.enter_async_context(
        open_link("127.0.0.1", metrics=metrics, settings=LinkSettings(send_deadline_s=float(how.progress_timeout_s)))
    )
    engine = await stack.enter_async_context(open_mooncake(how, Cpu()))
    await engine.register(memory.arena.region)
    return link, engine


async def _close(rank: Rank) -> None:
    if rank.receiver is not None and rank.loop is not None:
        rank.loop.cancel()
        await asyncio.wait([rank.loop])
        await rank.receiver.__aexit__()


async def _outcome(work: Coroutine[Any, Any, None]) -> str:
    """What was not to be expected of it."""
    try:
        await work
    except PdctlError as error:
        return "" if type(error).__name__ == "RoomFailed" else f"{type(error).__name__}: {error}"
    return ""


async def _until(true: Callable[[], bool], within_s: float, every_s: float = 0.005) -> None:
    end = time.monotonic() + within_s
    while not true() and time.monotonic() < end:  # noqa: ASYNC110
        await asyncio.sleep(every_s)


async def main(given: dict[str, Any]) -> None:
    async with AsyncExitStack() as stack:
        ranks: Prefill | Decode = (Prefill if given["role"] == "prefill" else Decode)(given["registry"], given["pace"])
        await obey(ranks, await ranks.open(stack, len(Moment)))


if __name__ == "__main__":
    live(main(json.loads(sys.argv[1])))
