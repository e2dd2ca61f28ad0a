"""
10,000 leased ranks of 500 instances at one `pdctl serve`, its journal on disk, 100 watchers listening.

`python -m tests.bench.fleet [WATCHERS]` says how long all of them take to register, how soon every watcher has heard of
the last one, and how long a restart takes, from the start of the process to /readyz. No admission: this is
about what it can do. It has no rival and so no row in `./dev bench`.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import aiohttp

from pdctl.core.native import Registration
from pdctl.core.route import Shape
from tests.bench.registry import cpu_s
from tests.ports import free_port

N_INSTANCES, N_SEATS = 500, 20
AT_ONCE = 64
START_S = 60.0
ROOT = Path(__file__).parents[2]
SHAPE = Shape(attn_tp_size=N_SEATS, attn_cp_size=1, dp_size=1, pp_size=1, page_size=16, kv_cache_dtype="bfloat16")


async def main(n_watchers: int) -> None:
    with tempfile.TemporaryDirectory(prefix="pdctl-bench-") as folder:
        port = free_port()
        with serving(Path(folder), port) as (url, _):
            await until_there(url)
            await filled(url, n_watchers)
        began = time.perf_counter()
        with serving(Path(folder), port) as (url, pid):
            await until_there(url)
            took_s, own_s = time.perf_counter() - began, cpu_s(pid)
            n_there = await held(url)
            print(f"restart: ready with {n_there} ranks {took_s:.2f} s after the start, {own_s:.2f} s of its own time")


async def filled(url: str, n_watchers: int) -> None:
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None)) as session:
        watchers = [asyncio.create_task(heard_all(session, url)) for _ in range(n_watchers)]
        await asyncio.sleep(1.0 if watchers else 0.0)
        began = time.perf_counter()
        await register_all(session, url)
        took_s = time.perf_counter() - began
        n_ranks = N_INSTANCES * N_SEATS
        print(f"registered {n_ranks} ranks in {took_s:.2f} s, {n_ranks / took_s:,.0f}/s, {n_watchers} watchers")
        for watcher in watchers:
            await watcher
        print(f"all watchers have heard of all {time.perf_counter() - began - took_s:.2f} s after the last answer")


async def register_all(session: aiohttp.ClientSession, url: str) -> None:
    places = iter([(instance, seat) for instance in range(N_INSTANCES) for seat in range(N_SEATS)])

    async def some() -> None:
        for instance, seat in places:
            body = Registration("127.0.0.1", 20_000 + seat, SHAPE, ttl_s=3600.0).to_body()
            async with session.put(f"{url}/v1/instances/i{instance}/ranks/tp{seat}", json=body) as answer:
                assert answer.status == 200, await answer.text()

    await asyncio.gather(*(some() for _ in range(AT_ONCE)))


async def heard_all(session: aiohttp.ClientSession, url: str) -> None:
    """Return when every instance has been seen to become complete."""
    complete = 0
    async with session.get(f"{url}/v1/watch") as stream:
        assert stream.status == 200, await stream.text()
        async for chunk in stream.content.iter_any():
            complete += chunk.count(b'"completed"')
            if complete >= N_INSTANCES:
                return


async def held(url: str) -> int:
    async with aiohttp.ClientSession() as session, session.get(f"{url}/v1/instances") as answer:
        listed = json.loads(await answer.text())["instances"]
    return sum(each["alive"] for each in listed)


async def until_there(url: str) -> None:
    async with asyncio.timeout(START_S), aiohttp.ClientSession() as session:
        while True:
            try:
                async with session.get(f"{url}/readyz") as answer:
                    if answer.status == 200:
                        return
            except aiohttp.ClientError:
                await asyncio.sleep(0.02)


@contextmanager
def serving(folder: Path, port: int) -> Iterator[tuple[str, int]]:
    words = ("-m", "pdctl", "serve", "--port", str(port), "--log-level", "warning")
    journal = ("--journal", f"sqlite:{folder / 'journal.sqlite'}")
    environment = {**os.environ, "PDCTL_ADMISSION__PER_S": "0"}
    process = subprocess.Popen((sys.executable, *words, *journal), cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    try:
        yield f"http://127.0.0.1:{port}", process.pid
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]) if sys.argv[1:] else 100))
