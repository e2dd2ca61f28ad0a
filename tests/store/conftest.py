"""Both stores behind one face, and one master for the tests that only need some master."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import Any
from uuid import uuid4

import numpy as np
import pytest

from pdctl.core.kvstore import SetUp
from pdctl.engine.store_wheel import store_class
from pdctl.errors import StoreFailed
from pdctl.memory import Arena
from pdctl.store.base import Ints, Store
from pdctl.store.memory import MemoryStore, Shelf
from pdctl.store.mooncake import MooncakeStore, open_mooncake_store
from tests.store.master import Master, master

SEGMENT = 64 << 20


@pytest.fixture(scope="module")
def running_master() -> Iterator[Master]:
    with master() as running:
        yield running


def plan(at: Master, **changes: object) -> SetUp:
    usual = SetUp("127.0.0.1", "P2PHANDSHAKE", SEGMENT, 16 << 20, "tcp", "", at.address)
    return replace(usual, **changes)  # type: ignore[arg-type]


class Kept:
    """Store objects that pdctl leaves to the process's end; here they end with their master alive.

    At the end of a process each costs 1 s with its master, and 7 s where the master is gone.
    """

    def __init__(self) -> None:
        self._objects: list[Any] = []

    def open(self, at: Master, **changes: object) -> AbstractAsyncContextManager[MooncakeStore]:
        return open_mooncake_store(plan(at, **changes), store_class("tcp"), keep=self._objects.append)

    def end(self) -> None:
        for held in self._objects:
            held.close()


@pytest.fixture(scope="module")
def kept(running_master: Master) -> Iterator[Kept]:
    held = Kept()
    yield held
    held.end()


@pytest.fixture(scope="module")
def real_store(running_master: Master, kept: Kept) -> Iterator[MooncakeStore]:
    """For all tests of a module: it is bound to no loop between two calls."""
    loop, opening = asyncio.new_event_loop(), kept.open(running_master)
    yield loop.run_until_complete(opening.__aenter__())
    loop.run_until_complete(opening.__aexit__(None, None, None))
    loop.close()


class Bench:
    """One store, 1 MiB of registered memory, and keys that no other test uses."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.arena = Arena(1 << 20)
        self.memory = self.arena.array(1 << 20, np.uint8)
        self._prefix = uuid4().hex

    def key(self, name: str) -> str:
        return f"{self._prefix}-{name}"

    def at(self, *rows: tuple[int, ...], nbytes: int = 4096) -> tuple[Ints, Ints]:
        """For each row the pointers of its pieces, given as numbers of 4 KiB pages of the memory."""
        pointers = np.array(rows, np.int64) * 4096 + self.arena.region.pointer
        return pointers, np.full(pointers.shape, nbytes, np.int64)


@asynccontextmanager
async def bench(store: Store) -> AsyncIterator[Bench]:
    made = Bench(store)
    await store.register(made.arena.region)
    made.memory[:] = np.random.default_rng(7).integers(0, 256, 1 << 20, np.uint8)
    yield made
    with contextlib.suppress(StoreFailed):  # the test has closed it
        await store.unregister(made.arena.region)


KINDS = ("mooncake", "memory")


@pytest.fixture(params=KINDS)
def store(request: pytest.FixtureRequest) -> Store:
    made: Store
    made = request.getfixturevalue("real_store") if request.param == "mooncake" else MemoryStore(Shelf(SEGMENT))
    return made


@pytest.fixture
async def stand(store: Store) -> AsyncIterator[Bench]:
    async with bench(store) as made:
        yield made


@pytest.fixture(params=KINDS)
async def own_stand(request: pytest.FixtureRequest) -> AsyncIterator[Bench]:
    """A store that the test may close."""
    async with AsyncExitStack() as stack:
        store: Store = MemoryStore(Shelf(SEGMENT))
        if request.param == "mooncake":
            opening = request.getfixturevalue("kept").open(request.getfixturevalue("running_master"))
            store = await stack.enter_async_context(opening)
        yield await stack.enter_async_context(bench(store))
