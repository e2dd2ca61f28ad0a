"""Commands that go on for as long as they are let: a registry that is away meanwhile is said, and looked at again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import aiohttp
import pytest

from pdctl import config, serving
from pdctl.cli import parser
from tests.commands.conftest import Fleet
from tests.ports import free_port

SOON_S = 60.0


@pytest.mark.parametrize(
    ("words", "there"),
    [
        (("status", "--watch", "--every", "0.1"), "1 of 2 ranks there"),
        (("events", "--follow", "--kind", "seated"), " p tp0: seat taken"),
    ],
    ids=["status", "events"],
)
async def test_a_registry_that_was_away_is_seen_again(
    words: tuple[str, ...], there: str, capsys: pytest.CaptureFixture[str]
) -> None:
    port, heard = free_port(), ""

    def told(what: str) -> bool:
        nonlocal heard
        out, err = capsys.readouterr()
        heard += out + err
        return what in heard

    url = f"http://127.0.0.1:{port}"
    args = parser().parse_args([*words, "--at", url])
    async with registry(port):
        watching = asyncio.ensure_future(args.run(config.load({"node.registry": url}), args))
        await until(lambda: told(there), watching)
    try:
        await until(lambda: told(f"{url} does not answer: connection refused"), watching)
        heard = ""
        async with registry(port):
            await until(lambda: told(there), watching)
    finally:
        watching.cancel()
        await asyncio.wait({watching})
    assert watching.cancelled()


@asynccontextmanager
async def registry(port: int) -> AsyncIterator[None]:
    settings = config.load({"serve.port": port, "serve.journal": "memory:"})
    async with serving.sidecar(settings) as sidecar, aiohttp.ClientSession() as http:
        await Fleet(sidecar.url, http).seat(0)
        yield


async def until(what: Callable[[], bool], task: asyncio.Future[int]) -> None:
    async with asyncio.timeout(SOON_S):
        while not what():
            assert not task.done(), "it has ended"
            await asyncio.sleep(0.02)
