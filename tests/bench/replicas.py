"""
One registry on etcd beside one on SQLite and one in memory: registrations, renewals, look-ups; then three that are one.

`python -m tests.bench.replicas` has besides: how soon what one registry was told is known at another one, 2,000 ranks
that renew through three registries, and how soon 90 watchers of three registries hear of a rank.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import aiohttp

from pdctl.core.native import Registration
from pdctl.core.route import Shape
from tests.bench.registry import cpu_s
from tests.bench.rivals import Row
from tests.persistence.etcd import Cluster, cluster
from tests.service import Service, service

ROUNDS = 7
AT_ONCE = 32
CALLS = 400
RANKS, RENEWED_FOR_S, TTL_S, EVERY_S = 2000, 20.0, 60.0, 5.0
WATCHERS = 90
SHAPE = Shape(attn_tp_size=8, attn_cp_size=1, dp_size=1, pp_size=1, page_size=16, kv_cache_dtype="bfloat16")
FREE = {"PDCTL_ADMISSION__PER_S": "0"}

Call = Callable[[aiohttp.ClientSession, str, int], Awaitable[None]]


@dataclass
class Store:
    """A registry, by where its rows are."""

    name: str
    at: Service
    times: dict[str, list[float]] = field(default_factory=dict)
    numbers: Iterator[int] = field(default_factory=count)


def bench() -> list[Row]:
    with tempfile.TemporaryDirectory(prefix="pdctl-bench-") as folder, ExitStack() as stack:
        stores = [Store(name, stack.enter_context(at)) for name, at in _stores(Path(folder), stack)]
        asyncio.run(_race(stores))
        return list(_rows(stores))


def _stores(where: Path, stack: ExitStack) -> Iterator[tuple[str, AbstractContextManager[Service]]]:
    one, three = (where / name for name in ("one", "three"))
    one.mkdir()
    three.mkdir()
    urls = {
        "memory": "memory:",
        "SQLite": f"sqlite:{where / 'journal'}",
        "etcd, 1 node": stack.enter_context(cluster(one)).url("bench"),
        "etcd, 3 nodes": stack.enter_context(cluster(three, 3)).url("bench"),
    }
    for n, (name, url) in enumerate(urls.items()):
        yield name, service(where / f"{n}.log", "--journal", url, "--log-level", "warning", **FREE)


async def _race(stores: list[Store]) -> None:
    async with _session() as session:
        for _ in range(ROUNDS + 1):  # the first one is cold
            for what, call in CALLED.items():
                for store in stores:
                    took_s = await _timed(session, store, call)
                    store.times.setdefault(what, []).append(took_s / CALLS)


async def _timed(session: aiohttp.ClientSession, store: Store, call: Call) -> float:
    numbers = iter([next(store.numbers) for _ in range(CALLS)])

    async def some() -> None:
        for number in numbers:
            await call(session, store.at.url, number)

    began = time.perf_counter()
    await asyncio.gather(*(some() for _ in range(AT_ONCE)))
    return time.perf_counter() - began


async def _new_life(session: aiohttp.ClientSession, url: str, number: int) -> None:
    await _take(session, url, f"i{number % 50}", number % 8, 1024 + number % 60_000)


async def _known(session: aiohttp.ClientSession, url: str, number: int) -> None:
    await _take(session, url, "known", number % 8, 999)


async def _room(session: aiohttp.ClientSession, url: str, number: int) -> None:
    await _said(session.post(f"{url}/register_dp_rank", json={"bootstrap_room": number, "dp_rank": 0}))


async def _look_up(session: aiohttp.ClientSession, url: str, number: int) -> None:
    await _said(session.get(f"{url}/v1/instances/known"))


CALLED: dict[str, Call] = {
    "a new life": _new_life,
    "a claim known already": _known,
    "a room": _room,
    "a look-up": _look_up,
}


def _rows(stores: list[Store]) -> Iterator[Row]:
    memory, sqlite, one, three = stores
    for what in CALLED:
        for ours, rival in ((one, sqlite), (three, sqlite), (one, memory)):
            yield Row(what, ours.name, rival.name, tuple(ours.times[what][1:]), tuple(rival.times[what][1:]))


# --- several that are one


async def main() -> None:
    with tempfile.TemporaryDirectory(prefix="pdctl-bench-") as folder, ExitStack() as stack:
        where = Path(folder)
        etcd = stack.enter_context(cluster(where, 3))
        words = ("--journal", etcd.url("bench"), "--log-level", "warning")
        opened = [service(where / f"{n}.log", *words, **FREE) for n in range(3)]
        registries = [stack.enter_context(each) for each in opened]
        async with _session() as session:
            print(await _known_elsewhere(session, registries))
            print(await _heard_by_all(session, registries))
            print(await _renewed(session, registries, etcd))


async def _known_elsewhere(session: aiohttp.ClientSession, registries: list[Service]) -> str:
    waited = []
    for n in range(200):
        at, other = registries[n % 3].url, registries[(n + 1) % 3].url
        await _take(session, at, f"new{n}", 0, 1024)
        began = time.perf_counter()
        while not await _is_there(session, f"{other}/v1/instances/new{n}"):
            pass
        waited.append(time.perf_counter() - began)
    return f"acknowledged at one, known at another: {_spread(waited)} of 200 (one question included)"


async def _heard_by_all(session: aiohttp.ClientSession, registries: list[Service]) -> str:
    opened = [asyncio.Event() for _ in range(WATCHERS)]
    heard: list[asyncio.Queue[float]] = [asyncio.Queue() for _ in range(WATCHERS)]

    async def watch(n: int) -> None:
        async with session.get(f"{registries[n % 3].url}/v1/watch") as stream:
            async for chunk in stream.content.iter_any():
                if b"synced" in chunk:
                    opened[n].set()
                for _ in range(chunk.count(b'"seated"')):
                    heard[n].put_nowait(time.perf_counter())

    async with asyncio.TaskGroup() as group:
        watching = [group.create_task(watch(n)) for n in range(WATCHERS)]
        for each in opened:
            await each.wait()
        first, last = [], []
        for n in range(30):
            began = time.perf_counter()
            await _take(session, registries[n % 3].url, f"told{n}", 0, 1024)
            times = [await queue.get() - began for queue in heard]
            first.append(min(times))
            last.append(max(times))
        for task in watching:
            task.cancel()
    return f"{WATCHERS} watchers of three: first {_spread(first)}, last {_spread(last)} after the claim was sent"


async def _renewed(session: aiohttp.ClientSession, registries: list[Service], etcd: Cluster) -> str:
    epochs: dict[int, int] = {}

    async def join(numbers: Iterator[int]) -> None:
        for n in numbers:
            epochs[n] = await _take(session, registries[n % 3].url, f"fleet{n // 8}", n % 8, 1024 + n, TTL_S)

    numbers = iter(range(RANKS))
    began = time.perf_counter()
    await asyncio.gather(*(join(numbers) for _ in range(AT_ONCE)))
    joined_s = time.perf_counter() - began
    pids = {f"registry {n}": each.pid for n, each in enumerate(registries)}
    pids |= {node.name: node.process.pid for node in etcd.nodes if node.process is not None}
    before = {name: cpu_s(pid) for name, pid in pids.items()}
    answers = await _renew_all(session, registries, epochs)
    shares = ", ".join(f"{name} {(cpu_s(pid) - before[name]) / RENEWED_FOR_S:.0%}" for name, pid in pids.items())
    lost = sum(status != 200 for status in answers)
    return (
        f"{RANKS} ranks joined in {joined_s:.1f} s; {len(answers)} renewals in {RENEWED_FOR_S:g} s, each at another "
        f"registry than the last: {lost} refused; of one core: {shares}"
    )


async def _renew_all(session: aiohttp.ClientSession, registries: list[Service], epochs: dict[int, int]) -> list[int]:
    """Each rank every EVERY_S, at the registries in turn."""
    answers: list[int] = []
    over = time.perf_counter() + RENEWED_FOR_S

    async def renew(n: int, epoch: int) -> None:
        turn = n
        await asyncio.sleep(EVERY_S * n / RANKS)
        while time.perf_counter() < over:
            turn += 1
            url = f"{registries[turn % 3].url}/v1/instances/fleet{n // 8}/ranks/tp{n % 8}/renew"
            async with session.post(url, json={"epoch": epoch}) as answer:
                answers.append(answer.status)
            await asyncio.sleep(EVERY_S)

    await asyncio.gather(*(renew(n, epoch) for n, epoch in epochs.items()))
    return answers


async def _take(session: aiohttp.ClientSession, url: str, name: str, tp: int, port: int, ttl_s: float = 3600.0) -> int:
    body = Registration("127.0.0.1", port, SHAPE, ttl_s=ttl_s).to_body()
    async with session.put(f"{url}/v1/instances/{name}/ranks/tp{tp}", json=body) as answer:
        assert answer.status == 200, await answer.text()
        epoch: int = (await answer.json())["epoch"]
        return epoch


async def _is_there(session: aiohttp.ClientSession, url: str) -> bool:
    async with session.get(url) as answer:
        return answer.status == 200


async def _said(asked: aiohttp.client._RequestContextManager) -> None:
    async with asked as answer:
        assert answer.status == 200, await answer.text()


@asynccontextmanager
async def _session() -> AsyncIterator[aiohttp.ClientSession]:
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None)) as session:
        yield session


def _spread(seconds: list[float]) -> str:
    ordered = sorted(seconds)
    p99 = ordered[min(len(ordered) - 1, round(0.99 * len(ordered)))]
    return f"p50 {statistics.median(ordered) * 1e3:.1f} ms, p99 {p99 * 1e3:.1f} ms"


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
