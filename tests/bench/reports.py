"""
What ranks' reports cost the registry that is told: CPU time of `pdctl serve` for each, and for one look at all of them.

2,000 ranks are registered and report in turns over 16 connections; with links to so many peers each, two of them out.
What stands in docs/overview.md comes from here.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import psutil

from tests.bench.rivals import Row
from tests.dialects.test_native import body
from tests.service import Service, service

N_RANKS, N_REPORTS, CONNECTIONS = 2000, 4000, 16


def bench() -> list[Row]:
    for n_links, n_watchers in ((0, 0), (64, 0), (512, 0), (64, 1)):
        sys.stderr.write(f"{n_links} links, {n_watchers} watchers: {asyncio.run(one(n_links, n_watchers))}\n")
    return []


async def one(n_links: int, n_watchers: int) -> str:
    with service(Path(tempfile.mkdtemp(), "log"), "--journal", "memory:", PDCTL_ADMISSION__PER_S="0") as registry:
        connector = aiohttp.TCPConnector(limit=CONNECTIONS + n_watchers)
        async with aiohttp.ClientSession(connector=connector) as http, watchers(registry, http, n_watchers):
            epochs = await gathered([register(registry, http, tp) for tp in range(N_RANKS)])
            bodies = [report(epoch, n_links) for epoch in epochs]
            await gathered([put(registry, http, tp, bodies[tp]) for tp in range(N_RANKS)])
            n_reports = N_REPORTS // (1 + n_links // 256)
            began = cpu_s(registry)
            for start in range(0, n_reports, N_RANKS):
                some = range(start, min(start + N_RANKS, n_reports))
                await gathered([put(registry, http, n % N_RANKS, bodies[n % N_RANKS]) for n in some])
            reports_s, began = cpu_s(registry) - began, cpu_s(registry)
            async with http.get(f"{registry.url}/v1/overview") as answer:
                nbytes = len(await answer.read())
            shown_s = cpu_s(registry) - began
    mean_us = reports_s / n_reports * 1e6
    return (
        f"{mean_us:.0f} us of CPU a report of {len(bodies[0]):,} bytes; "
        f"an overview of {nbytes / 1e6:.1f} MB: {shown_s * 1e3:.0f} ms; load {os.getloadavg()[0]:.1f}"
    )


def report(epoch: int, n_links: int) -> bytes:
    links: list[dict[str, object]] = [{"session": f"10.0.{n // 250}.{n % 250}:15001"} for n in range(n_links)]
    for link in links[:2]:
        link |= {"state": "blocked", "cause": "timed_out", "sentence": "timed out 3.0 s ago", "since_s": 3.0}
    return json.dumps({"role": "prefill", "epoch": epoch, "session": "10.0.0.7:15001", "links": links}).encode()


async def register(registry: Service, http: aiohttp.ClientSession, tp: int) -> int:
    url = f"{registry.url}/v1/instances/p/ranks/tp{tp}"
    async with http.put(url, json=body(tp, N_RANKS, ttl_s=3600.0, port=20_000)) as answer:
        assert answer.status == 200, await answer.text()
        return int((await answer.json())["epoch"])


async def put(registry: Service, http: aiohttp.ClientSession, tp: int, said: bytes) -> int:
    async with http.put(f"{registry.url}/v1/instances/p/ranks/tp{tp}/report", data=said) as answer:
        assert answer.status == 200, await answer.text()
        return len(await answer.read())


async def gathered(work: Sequence[object]) -> list[int]:
    return await asyncio.gather(*work)  # type: ignore[call-overload,no-any-return]  # coroutines of numbers, all of them


@asynccontextmanager
async def watchers(registry: Service, http: aiohttp.ClientSession, number: int) -> AsyncIterator[None]:
    async def watch() -> None:
        async with http.get(f"{registry.url}/v1/overview/watch") as answer:
            async for _ in answer.content.iter_any():
                pass

    async with asyncio.TaskGroup() as tasks:
        watching = [tasks.create_task(watch()) for _ in range(number)]
        yield
        for each in watching:
            each.cancel()


def cpu_s(registry: Service) -> float:
    spent = psutil.Process(registry.pid).cpu_times()
    return float(spent.user + spent.system)
