"""
The store that forgets with the process: for tests, and for engines without Mooncake.

It keeps every promise of the port, with the same errors: capacity, leases, memory that must be registered. Stores of
one `Shelf` share it as clients share a master. Never leaves the process.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pdctl.core.layout import Region
from pdctl.core.warmup import Step
from pdctl.errors import StoreCause, StoreFailed
from pdctl.store.base import Each, Ints, StoreAbility
from pdctl.store.regions import Regions

LEASE_S = 10.0


@dataclass(slots=True)
class Shelf:
    """What the stores of one process share: `nbytes` of room, and a clock that leases go by."""

    nbytes: int = 64 << 20
    clock: Callable[[], float] = time.monotonic
    values: dict[str, bytes] = field(default_factory=dict)
    leases: dict[str, float] = field(default_factory=dict)
    away: bool = False

    @property
    def used(self) -> int:
        return sum(len(value) for value in self.values.values())

    def lease(self, key: str) -> None:
        self.leases[key] = self.clock() + LEASE_S

    def is_leased(self, key: str) -> bool:
        return self.leases.get(key, 0.0) > self.clock()


class MemoryStore:
    """Open from the beginning. While `shelf.away`, its master cannot be reached."""

    def __init__(self, shelf: Shelf, name: str = "127.0.0.1:1", *, buffer_nbytes: int = 16 << 20) -> None:
        self._shelf = shelf
        self._name = name
        self._buffer_nbytes = buffer_nbytes
        self._regions = Regions()
        self._closed = False

    @property
    def name(self) -> str:
        return self._name

    @property
    def ability(self) -> StoreAbility:
        return StoreAbility("memory", "", frozenset())

    async def put(self, key: str, value: bytes) -> None:
        self._reach(Step.PUT)
        if len(value) > self._buffer_nbytes:
            raise _failed(StoreCause.BAD_ARGUMENT, Step.PUT, key)
        self._keep(Step.PUT, key, value)

    async def get(self, key: str) -> bytes:
        self._reach(Step.GET)
        return self._find(Step.GET, key)

    async def exists(self, keys: Sequence[str]) -> list[bool]:
        self._reach(Step.EXISTS)
        there = [key in self._shelf.values for key in keys]
        for key, is_there in zip(keys, there, strict=True):
            if is_there:
                self._shelf.lease(key)
        return there

    async def remove(self, key: str, *, force: bool = False) -> None:
        self._reach(Step.REMOVE)
        if key not in self._shelf.values:
            raise _failed(StoreCause.MISSING, Step.REMOVE, key)
        if self._shelf.is_leased(key) and not force:
            raise _failed(StoreCause.LEASED, Step.REMOVE, key)
        del self._shelf.values[key]

    async def register(self, region: Region) -> None:
        self._regions.check_new(region)
        self._open("register")
        self._regions.add(region)

    async def unregister(self, region: Region) -> None:
        self._regions.check_held(region)
        self._open("unregister")
        self._regions.drop(region)

    async def put_pages(self, keys: Sequence[str], pointers: Ints, nbytes: Ints) -> Each:
        self._regions.check_pages(keys, pointers, nbytes)
        self._open("put pages")
        rows = zip(keys, pointers.tolist(), nbytes.tolist(), strict=True)
        return tuple(self._each(self._put_page, "put pages", *row) for row in rows)

    async def get_pages(self, keys: Sequence[str], pointers: Ints, nbytes: Ints) -> Each:
        self._regions.check_pages(keys, pointers, nbytes)
        self._open("get pages")
        rows = zip(keys, pointers.tolist(), nbytes.tolist(), strict=True)
        return tuple(self._each(self._get_page, "get pages", *row) for row in rows)

    async def health(self) -> None:
        self._reach("health")

    async def close(self) -> None:
        self._closed = True

    def _each(
        self,
        do: Callable[[str, str, list[int], list[int]], None],
        step: str,
        key: str,
        pointers: list[int],
        sizes: list[int],
    ) -> StoreFailed | None:
        try:
            self._reach(step)
            do(step, key, pointers, sizes)
        except StoreFailed as failure:
            return failure
        return None

    def _put_page(self, step: str, key: str, pointers: list[int], sizes: list[int]) -> None:
        pieces = (ctypes.string_at(pointer, size) for pointer, size in zip(pointers, sizes, strict=True))
        self._keep(step, key, b"".join(pieces))

    def _get_page(self, step: str, key: str, pointers: list[int], sizes: list[int]) -> None:
        value = self._find(step, key)
        if len(value) != sum(sizes):
            raise _failed(StoreCause.BAD_ARGUMENT, step, key)
        at = 0
        for pointer, size in zip(pointers, sizes, strict=True):
            ctypes.memmove(pointer, value[at : at + size], size)
            at += size

    def _keep(self, step: str, key: str, value: bytes) -> None:
        if not key or not value:
            raise _failed(StoreCause.BAD_ARGUMENT, step, key)
        if key in self._shelf.values:
            return
        if self._shelf.used + len(value) > self._shelf.nbytes:
            raise _failed(StoreCause.NO_SPACE, step, key)
        self._shelf.values[key] = bytes(value)

    def _find(self, step: str, key: str) -> bytes:
        if key not in self._shelf.values:
            raise _failed(StoreCause.MISSING, step, key)
        self._shelf.lease(key)
        return self._shelf.values[key]

    def _open(self, step: str) -> None:
        if self._closed:
            raise _failed(StoreCause.CLOSED, step, "")

    def _reach(self, step: str) -> None:
        self._open(step)
        if self._shelf.away:
            raise _failed(StoreCause.MASTER_UNREACHABLE, step, "")


def _failed(cause: StoreCause, step: str, key: str) -> StoreFailed:
    return StoreFailed(cause, step, "the store of this process says so", key=key)
