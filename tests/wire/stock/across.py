"""An instance of stock ranks, all in the stock child, across from one of ours, all in the test's own process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict
from typing import Any, TypeVar

from pdctl.core.transfer import RoomTimeouts
from tests.e2e.instance import Decode, Prefill, settings_at
from tests.e2e.model import Model, Split
from tests.engine.processes import Child

SENT, NAMED = [[5, 6, 7], [20], [12, 11]], [9, 10, 11, 3, 23, 0]
SEED = 5

One = TypeVar("One", Prefill, Decode)


class StockInstance:
    """The instance of the stock child; what stock code raised is raised here."""

    def __init__(self, child: Child) -> None:
        self.child = child

    async def __call__(self, do: str, **given: Any) -> Any:
        answer = await self.child.ask(do, **given)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["result"]

    async def does(self, do: str, **given: Any) -> Any:
        return await self("instance_does", what=do, **given)

    @asynccontextmanager
    async def seated(self, role: str, address: str, model: Model, split: Split, **more: Any) -> AsyncIterator[None]:
        given = {"model": asdict(model), "split": asdict(split)}
        await self("seat", role=role, registry=address, **given, **more)
        async with AsyncExitStack() as stack:
            stack.push_async_callback(self.child.ask, "unseat")
            yield


@asynccontextmanager
async def opened(one: One, registry: str, split: Split, timeouts: RoomTimeouts | None = None) -> AsyncIterator[One]:
    settings = settings_at(registry)
    if timeouts is not None:
        settings = settings.model_copy(update={"room": timeouts})
    async with AsyncExitStack() as stack:
        await one.open(stack, settings, split)
        yield one


def flat(chunks: list[list[int]]) -> list[int]:
    return [page for chunk in chunks for page in chunk]


async def both(one: Coroutine[Any, Any, Any], other: Coroutine[Any, Any, Any]) -> tuple[Any, Any]:
    """What both come to; the first to fail fails the test."""
    async with asyncio.TaskGroup() as group:
        tasks = group.create_task(one), group.create_task(other)
    return tasks[0].result(), tasks[1].result()


def named_by(decode: Decode) -> list[int]:
    return NAMED[: decode.nodes[0][0].n_named(len(NAMED))]


async def into_ours(stock: StockInstance, decode: Decode, room: int, dp: int = 0, prefix: int = 0) -> None:
    told, found = await both(
        stock.does("send", room=room, dp=dp, chunks=SENT, row=1),
        decode.receive(room, named_by(decode), flat(SENT), prefix=prefix),
    )
    assert (told, found) == ({"reasons": []}, {"wrong": []})


async def into_stock(
    stock: StockInstance, prefill: Prefill, room: int, dp: int = 0, prefix: int = 0, dcp: int = 1
) -> None:
    given = {"pages": NAMED[: 6 // dcp], "sent": flat(SENT), "row": 3, "prefix": prefix, "seed": SEED}
    told, found = await both(
        prefill.send(room, dp, SENT, groups=1 + room % 2),
        stock.does("receive", room=room, **given),
    )
    assert (told, found) == ({}, {"reasons": [], "wrong": []})
