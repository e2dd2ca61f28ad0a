"""
One side of what `moving` races: `python -m tests.bench.movers JSON`, driven by JSON lines.

Three ways to bring the same rooms across. `pdctl`: the real nodes, as an engine builder opens them. `stock`: SGLang's
own manager, sender and receiver from the wheel. `bare`: the engine driven by hand, a bounded window of blocks each
polled to its end, no peer asked and no address checked: what there is to reach.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
import zlib
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.engine.processes import die_with_parent

N_ROWS, AUX_NBYTES = 64, 256
NAP_S = 200e-6  # MOONCAKE_FACTS 3.6
POLL_S = 500e-6
JSON = dict[str, Any]
SEAT = (0, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class Form:
    """A pool: `n_pages` pages in each of `entries` entries, `nbytes` a page, of `page_size` tokens; of so many heads in
    all, or of none, the first of `tp_size` ranks."""

    nbytes: int
    entries: int
    n_pages: int
    page_size: int = 16
    heads: int = 0
    tp_size: int = 1

    @property
    def size(self) -> int:
        return self.entries * self.n_pages * self.nbytes


@dataclass(frozen=True, slots=True)
class Job:
    """One room of a round: pages `sent` into pages `named`, aux row `row` into the same."""

    sent: list[int]
    named: list[int]
    row: int


class Memory:
    """The entries and the aux rows, in one piece."""

    def __init__(self, form: Form, seed: int | None) -> None:
        size = form.size
        self.form = form
        self.whole = np.zeros(size + N_ROWS * AUX_NBYTES, np.uint8)
        self.whole[:] = 0  # touched: no page fault is timed
        self.kv = self.whole[:size].reshape(form.entries, form.n_pages, form.nbytes)
        self.aux = self.whole[size:].reshape(N_ROWS, AUX_NBYTES)
        if seed is not None:
            words = self.whole[: size // 8 * 8].view(np.uint64)
            words[:] = np.random.default_rng(seed).integers(0, 2**64 - 1, len(words), np.uint64)
            self.aux[:] = 7

    def crc(self, pages: list[int], tp_size: int) -> int:
        """Of what the first of `tp_size` ranks has of these pages."""
        found, form = 0, self.form
        for page in pages:
            for entry in self.kv:
                tokens = entry[page].reshape(form.page_size, tp_size // form.tp_size, -1)
                found = zlib.crc32(tokens[:, 0].tobytes(), found)
        return found

    def wipe(self) -> None:
        self.kv[:] = 0


class Rank:
    """What all sides have. They are asked, in this order: `open`, `ready`, then `arrive` of the decode beside `go` of
    the prefill, and `leave`."""

    def __init__(self, role: str, form: Form) -> None:
        self.role = role
        self.memory = Memory(form, seed=3 if role == "prefill" else None)
        self.jobs: list[Job] = []

    async def take(self, jobs: list[JSON]) -> JSON:
        """What the next rounds move."""
        self.jobs = [Job(**job) for job in jobs]
        return {}

    async def crc(self, tp_size: int) -> JSON:
        pages = [page for job in self.jobs for page in (job.sent if self.role == "prefill" else job.named)]
        return {"crc": self.memory.crc(pages, tp_size)}

    async def wipe(self) -> JSON:
        self.memory.wipe()
        return {}

    async def used(self) -> JSON:
        """Seconds of CPU of this process, all its threads."""
        return {"cpu_s": time.process_time()}

    async def ready(self) -> JSON:
        return {}

    async def open(self, first: int) -> JSON:
        return {}

    async def arrive(self) -> JSON:
        """When each room was known to be over; of the bare engine none is."""
        return {"ends": []}

    async def leave(self) -> JSON:
        return {}


# --- pdctl


class OursPrefill(Rank):
    async def join(self, stack: AsyncExitStack, registry: str) -> None:
        from pdctl.core.route import Seat
        from pdctl.node import prefill_node

        opening = prefill_node(
            _settings(registry),
            pools=_pools(self.memory),
            arena=_region(self.memory),
            seat=Seat(*SEAT),
            shape=_shape(self),
        )
        self.node = await stack.enter_async_context(opening)
        async with asyncio.timeout(20):
            while not self.node.registered:  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    async def open(self, first: int) -> JSON:
        # of a larger TP only the first rank is here
        self.rooms = [self.node.sender.open(first + n, required=1) for n in range(len(self.jobs))]
        for room in self.rooms:
            await room.__aenter__()
        return {}

    async def ready(self) -> JSON:
        for room in self.rooms:
            await room.peers_ready()
        return {}

    async def go(self, **_: Any) -> JSON:
        began = time.monotonic()
        await asyncio.gather(*map(self._send, self.rooms, self.jobs))
        return {"began": began, "ended": time.monotonic()}

    async def _send(self, room: Any, job: Job) -> None:
        await room.finish(job.row, pages=job.sent)

    async def leave(self) -> JSON:
        for room in self.rooms:
            await room.__aexit__(None, None, None)
        return {}


class OursDecode(Rank):
    async def join(self, stack: AsyncExitStack, registry: str) -> None:
        from pdctl.node import decode_node

        settings = _settings(registry)
        opening = decode_node(settings, pools=_pools(self.memory), arena=_region(self.memory), shape=_shape(self))
        self.node = await stack.enter_async_context(opening)
        self.registry = registry

    async def open(self, first: int) -> JSON:
        paired = await self.node.pair(self.registry, first)
        self.rooms = [self.node.receiver.open(first + n, paired, job.named, job.row) for n, job in enumerate(self.jobs)]
        for room in self.rooms:
            await room.__aenter__()
        return {}

    async def arrive(self) -> JSON:
        return {"ends": await asyncio.gather(*map(self._end, self.rooms))}

    async def _end(self, room: Any) -> float:
        await room.arrived()
        return time.monotonic()

    async def leave(self) -> JSON:
        for room in self.rooms:
            await room.__aexit__(None, None, None)
        return {}


def _settings(registry: str) -> Any:
    from pdctl.config import Settings
    from pdctl.sections import NodeSettings, ServeSettings

    return Settings(node=NodeSettings(registry=registry), serve=ServeSettings(port=0, grace_s=0.5))


def _shape(rank: Rank) -> Any:
    from pdctl.core.route import Shape

    form = rank.memory.form
    return Shape(form.tp_size, 1, 1, 1, form.page_size, "bfloat16")


def _region(memory: Memory) -> Any:
    from pdctl.core.layout import Region

    return Region(memory.whole.ctypes.data, memory.whole.nbytes)


def _pools(memory: Memory) -> Any:
    from pdctl.core.layout import Heads, Kind, KvLayout, Pool, RankPools

    form = memory.form
    kv = Pool(tuple(entry.ctypes.data for entry in memory.kv), (form.nbytes,) * form.entries, form.n_pages)
    heads = Heads(form.heads, form.tp_size, 0) if form.heads else None
    return RankPools(
        kv, Pool((memory.aux.ctypes.data,), (AUX_NBYTES,), N_ROWS), KvLayout(Kind.MHA, form.page_size, heads)
    )


# --- bare


class Bare(Rank):
    """Both roles: an engine and its memory."""

    async def join(self, stack: AsyncExitStack, registry: str) -> None:
        from mooncake.engine import TransferEngine

        self.engine = TransferEngine()
        if self.engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", ""):
            raise RuntimeError("the engine cannot be opened")
        whole = self.memory.whole
        if self.engine.register_memory(whole.ctypes.data, whole.nbytes):
            raise RuntimeError("the engine does not register")

    def card(self) -> JSON:
        return {"session": f"127.0.0.1:{self.engine.get_rpc_port()}", "pointer": self.memory.whole.ctypes.data}

    async def meet(self, session: str, pointer: int, form: JSON) -> JSON:
        self.session, self.there, self.theirs = session, pointer, Form(**form)
        return {}

    async def take(self, jobs: list[JSON]) -> JSON:
        await super().take(jobs)
        if self.role == "prefill":
            self.blocks = list(self._blocks())
        return {}

    def _blocks(self) -> Iterator[tuple[int, int, int]]:
        """What `pdctl` and `stock` give the engine for the same rooms, made before the clock runs."""
        from pdctl.core.entries import same_entries
        from pdctl.core.layout import Heads
        from pdctl.core.plan import head_plan, page_plan

        form, theirs = self.memory.form, self.theirs
        here, there = self.memory.whole.ctypes.data, self.there
        pools, pairs = (_pool_at(form, here), _pool_at(theirs, there)), same_entries(form.entries)
        for job in self.jobs:
            pages = (job.sent, job.named)
            if form.heads:
                ours, wanted = Heads(form.heads, form.tp_size, 0), Heads(form.heads, theirs.tp_size, 0)
                plan = head_plan(*pools, pairs, *pages, page_size=form.page_size, ours=ours, theirs=wanted, what="KV")
            else:
                plan = page_plan(*pools, pairs, *pages, "KV")
            yield from zip(plan.src.tolist(), plan.dst.tolist(), plan.nbytes.tolist(), strict=True)
            aux = job.row * AUX_NBYTES
            yield here + form.size + aux, there + theirs.size + aux, AUX_NBYTES

    async def go(self, window: int = 16, **_: Any) -> JSON:
        began = time.monotonic()
        by_hand(self.engine, self.session, self.blocks, window)
        return {"began": began, "ended": time.monotonic()}


def _pool_at(form: Form, base: int) -> Any:
    from pdctl.core.layout import Pool

    step = form.n_pages * form.nbytes
    return Pool(tuple(base + e * step for e in range(form.entries)), (form.nbytes,) * form.entries, form.n_pages)


def by_hand(engine: Any, session: str, blocks: list[tuple[int, int, int]], window: int) -> None:
    """MOONCAKE_FACTS 3.6."""
    submit, check = engine.transfer_submit_write, engine.transfer_check_status
    waiting, flying = deque(blocks), list[int]()
    while waiting or flying:
        while waiting and len(flying) < window:
            ticket = submit(session, *waiting.popleft())
            if ticket == 0:
                raise AssertionError("the engine took no block: nothing here is worth timing")
            flying.append(ticket)
        time.sleep(NAP_S)
        flying = [ticket for ticket in flying if not _landed(check(ticket))]


def _landed(status: int) -> bool:
    if status not in (0, 1):
        raise AssertionError("a block failed: nothing here is worth timing")
    return status == 1


# --- stock


class Stock(Rank):
    """Both roles: a manager of the wheel. Its scheduler polls; here it does so every half millisecond."""

    async def join(self, stack: AsyncExitStack, registry: str) -> None:
        from tests.wire.stock import surroundings

        surroundings.install()
        from tests.wire.stock import ranks

        host, _, port = registry.removeprefix("http://").rpartition(":")
        surroundings.tell("serving", host=host)
        surroundings.tell("disagg", disaggregation_bootstrap_port=int(port))
        ranks.ServerArgs.enable_pd_role_switch = False  # its threads then wait, as they do where nobody switches roles
        self.address = f"{host}:{port}"
        form, memory = self.memory.form, self.memory
        args = ranks.kv_args(
            kv_data_ptrs=[entry.ctypes.data for entry in memory.kv],
            kv_data_lens=[entry.nbytes for entry in memory.kv],
            kv_item_lens=[form.nbytes] * form.entries,
            aux_data_ptrs=[memory.aux.ctypes.data],
            aux_data_lens=[memory.aux.nbytes],
            aux_item_lens=[AUX_NBYTES],
            page_size=form.page_size,
        )
        self.manager = ranks.manager(self.role, args, ranks.real_engine())
        if self.role == "decode" and not self.manager.try_ensure_parallel_info(self.address):
            raise RuntimeError("stock's decode does not find its prefill")

    async def open(self, first: int) -> JSON:
        from sglang.srt.disaggregation.mooncake.conn import MooncakeKVReceiver, MooncakeKVSender

        self.rooms: list[Any] = []
        for n, job in enumerate(self.jobs):
            if self.role == "prefill":
                room = MooncakeKVSender(self.manager, self.address, first + n)
                room.init(len(job.sent), job.row)
            else:
                room = MooncakeKVReceiver(self.manager, self.address, first + n)
                room.init(prefill_dp_rank=0)
                room.send_metadata(np.array(job.named, np.int32), job.row)
            self.rooms.append(room)
        return {}

    async def ready(self) -> JSON:
        _polled(self.rooms, 2)
        return {}

    async def go(self, **_: Any) -> JSON:
        pages = [np.array(job.sent, np.int32) for job in self.jobs]
        began = time.monotonic()
        for room, sent in zip(self.rooms, pages, strict=True):
            room.send(sent)
        _polled(self.rooms, 4)
        return {"began": began, "ended": time.monotonic()}

    async def arrive(self) -> JSON:
        return {"ends": _polled(self.rooms, 4)}

    async def leave(self) -> JSON:
        for room in self.rooms:
            room.clear()
        return {}


def _polled(rooms: list[Any], status: int) -> list[float]:
    """When each was found to be there. Asked about as its scheduler asks: each that is not, again and again."""
    ends = dict.fromkeys(range(len(rooms)), 0.0)
    waiting, until = list(ends), time.monotonic() + 30
    while waiting:
        said = {n: int(rooms[n].poll()) for n in waiting}
        now = time.monotonic()
        if 0 in said.values() or now > until:
            raise AssertionError(f"stock's rooms are at {said}, not {status}: nothing here is worth timing")
        ends.update((n, now) for n in waiting if said[n] == status)
        waiting = [n for n in waiting if said[n] != status]
        if waiting:
            time.sleep(POLL_S)
    return list(ends.values())


SIDES: dict[str, Callable[[str, Form], Any]] = {
    "pdctl prefill": OursPrefill,
    "pdctl decode": OursDecode,
    "bare prefill": Bare,
    "bare decode": Bare,
    "stock prefill": Stock,
    "stock decode": Stock,
}


@asynccontextmanager
async def joined(given: JSON) -> AsyncIterator[Any]:
    rank = SIDES[f"{given['who']} {given['role']}"](given["role"], Form(**given["form"]))
    async with AsyncExitStack() as stack:
        await rank.join(stack, given["registry"])
        yield rank


async def main(given: JSON) -> None:
    reader = asyncio.StreamReader(limit=1 << 24)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    async with joined(given) as rank:
        print(json.dumps(rank.card() if isinstance(rank, Bare) else {}), flush=True)
        while line := await reader.readline():
            asked = json.loads(line)
            try:
                done = await getattr(rank, asked.pop("do"))(**asked)
            except Exception as error:  # told to the bench, which ends by it
                done = {"error": repr(error)}
            print(json.dumps(done), flush=True)


if __name__ == "__main__":
    die_with_parent()
    given = json.loads(sys.argv[1])
    if given["who"] == "pdctl":
        from pdctl import logs
        from pdctl.logs import LogSettings

        logs.configure(LogSettings(level="error"))
    asyncio.run(main(given))
    sys.stdout.flush()
    os._exit(0)
