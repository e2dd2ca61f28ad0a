"""A registry as `pdctl serve` runs it, in the test's own process, and commands run as `pdctl` runs them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import aiohttp
import pytest
from structlog.testing import capture_logs

from pdctl import config, serving
from pdctl.cli import parser

SHAPE = {"attn_tp_size": 2, "attn_cp_size": 1, "dp_size": 1, "pp_size": 1, "page_size": 1, "kv_cache_dtype": "auto"}
BLOCKED = {
    "session": "10.0.0.9:16001",
    "state": "blocked",
    "cause": "timed_out",
    "sentence": "blocked after 3 failures",
    "again_in_s": 1.5,
    "since_s": 12.0,
}


class Fleet:
    """`p`, a prefill of two ranks, which sit down and tell of themselves when they are told to."""

    def __init__(self, url: str, http: aiohttp.ClientSession) -> None:
        self.url = url
        self._http = http

    async def seat(self, tp: int) -> None:
        await self._put(f"ranks/tp{tp}", {"host": "127.0.0.1", "port": 40300 + tp, "shape": SHAPE})

    async def report(self, tp: int, **said: Any) -> None:
        await self._put(f"ranks/tp{tp}/report", {"role": "prefill", **said})

    async def refused(self) -> None:
        async with self._http.put(f"{self.url}/v1/instances/p/ranks/tp1", json={"host": "0.0.0.0"}) as answer:
            assert answer.status == 400

    async def instance(self) -> dict[str, Any]:
        async with self._http.get(f"{self.url}/v1/instances/p") as answer:
            return dict(await answer.json())

    async def _put(self, path: str, body: dict[str, Any]) -> None:
        async with self._http.put(f"{self.url}/v1/instances/p/{path}", json=body) as answer:
            assert answer.status == 200, await answer.text()


@pytest.fixture
async def fleet() -> AsyncIterator[Fleet]:
    settings = config.load({"serve.port": 0, "serve.journal": "memory:"})
    with capture_logs():  # what it logs on a busy machine is not what a command has printed
        async with serving.sidecar(settings) as sidecar, aiohttp.ClientSession() as http:
            yield Fleet(sidecar.url, http)


@pytest.fixture
def pdctl_here(fleet: Fleet) -> Callable[..., Awaitable[int]]:
    """`await pdctl_here("status", "--json")`: the command's exit status; what it raises is raised here."""

    async def run(*words: str) -> int:
        args = parser().parse_args([*words, "--at", fleet.url])
        flags = {name: value for name, value in vars(args).items() if "." in name}
        return int(await args.run(config.load(flags), args))

    return run
