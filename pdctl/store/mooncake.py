"""
The store port over the wheel's MooncakeDistributedStore. Its return codes end here.

What may touch the object is in `_Calls`, on our own threads, and only between a set-up that succeeded and the end: most
of its methods are a segmentation fault outside (MOONCAKE_FACTS H10). Never calls its `close()`: that holds the
interpreter for 0.7 to 1.7 s with a healthy master and for 4 s with a hung one (docs/store.md has the figures). The
segment is mounted and given back by two calls that hold nothing, and the empty object is left to the process's end.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, Final, TypeVar

import structlog

from pdctl.core.kvstore import SetUp
from pdctl.core.layout import Region
from pdctl.core.warmup import Step
from pdctl.errors import EngineUnavailable, StoreCause, StoreFailed
from pdctl.store.base import Each, Ints, StoreAbility
from pdctl.store.regions import Regions
from pdctl.store.signature import parameters

log = structlog.get_logger(__name__)

T = TypeVar("T")

_THREADS = 4
_CAUSES: Final = {
    -200: StoreCause.NO_SPACE,
    -600: StoreCause.BAD_ARGUMENT,
    -704: StoreCause.MISSING,
    -706: StoreCause.LEASED,
    -800: StoreCause.OWNER_UNREACHABLE,
    -900: StoreCause.MASTER_UNREACHABLE,
    -901: StoreCause.TIMED_OUT,
    -1300: StoreCause.NO_OFFLOAD,
}
_SENTENCES: Final = {
    StoreCause.NO_SPACE: "no segment has room, or none is mounted yet",
    StoreCause.BAD_ARGUMENT: "the value is empty, too large, or not as large as what is stored",
    StoreCause.MISSING: "there is no such key",
    StoreCause.LEASED: "the key was read or asked for in the last 10 s",
    StoreCause.OWNER_UNREACHABLE: "the process that owns the segment does not answer",
    StoreCause.MASTER_UNREACHABLE: "there is no connection to the master",
    StoreCause.TIMED_OUT: "the master did not answer in time",
    StoreCause.NO_OFFLOAD: "the master does not offload",
    StoreCause.OTHER: "the wheel gives no other reason",
}
_NEEDED = ("setup", "put", "get", "get_size", "batch_is_exist", "remove", "register_buffer", "unregister_buffer")
_PAGES = ("batch_put_from", "batch_get_into", "batch_put_from_multi_buffers", "batch_get_into_multi_buffers")
_MOUNTS = ("allocate_and_mount_segment", "unmount_and_free_segment")


def cause_of(code: int) -> StoreCause:
    return _CAUSES.get(code, StoreCause.OTHER)


def ability_of(make: Callable[[], Any], version: str) -> StoreAbility:
    """What the wheel's class can do, read from it without making an object. Raises EngineUnavailable."""
    missing = [name for name in (*_NEEDED, *_PAGES) if not hasattr(make, name)]
    if missing:
        raise EngineUnavailable(f"the installed Mooncake wheel's store has no {', '.join(missing)}: install 0.3.13")
    return StoreAbility("mooncake", version, parameters(make.setup))  # type: ignore[attr-defined]


@asynccontextmanager
async def open_mooncake_store(
    plan: SetUp,
    make: Callable[[], Any],
    *,
    version: str = "unknown",
    keep: Callable[[Any], None],
    bind_device: Callable[[], None] = lambda: None,
    spares: list[Any] | None = None,
) -> AsyncIterator[MooncakeStore]:
    """A store that is set up, with this rank's segment mounted. Raises StoreFailed, and what the wheel itself raises.

    make         the wheel's class; `keep` gives an object to the process, so that it is never destroyed before its end
    bind_device  runs first on each of our threads
    spares       objects whose set-up has failed, for the next attempt: they take it, and none is ever destroyed
    Set-up holds the interpreter while it asks the master: ask that first (kvstore.py does).
    """
    ability = ability_of(make, version)
    executor = ThreadPoolExecutor(_THREADS, "pdctl-store", initializer=bind_device)
    store = MooncakeStore(_Calls(make, keep, [] if spares is None else spares), ability, executor)
    try:
        await store.set_up(plan)
        yield store
    finally:
        await store.close()
        executor.shutdown(wait=False)


class _Calls:
    """The only calls that are ever made on a store object."""

    def __init__(self, make: Callable[[], Any], keep: Callable[[Any], None], spares: list[Any]) -> None:
        self._make = make
        self._keep = keep
        self._spares = spares
        self._store: Any = None
        self._segments: list[str] = []
        self.splits = all(hasattr(make, name) for name in _MOUNTS)
        self.forces = "force" in parameters(make.remove)  # type: ignore[attr-defined]

    def set_up(self, plan: SetUp) -> int:
        """The code."""
        store = self._spares.pop() if self._spares else self._made()
        nbytes = 0 if self.splits else plan.segment_nbytes
        try:
            code = store.setup(
                *(plan.local_hostname, plan.metadata_server, nbytes, plan.buffer_nbytes),
                *(plan.protocol, plan.device, plan.master),
                **plan.options,
            )
        except BaseException:
            self._spares.append(store)
            raise
        if code == 0:
            self._store = store
        else:
            self._spares.append(store)
        return int(code)

    def _made(self) -> Any:
        store = self._make()
        self._keep(store)
        return store

    def mount(self, plan: SetUp) -> int:
        """Apart from set-up, because that would hold the interpreter while it allocates and pins the segment."""
        if not self.splits or not plan.segment_nbytes:
            return 0
        mounted = self._store.allocate_and_mount_segment(plan.segment_nbytes, plan.protocol)
        self._segments = list(mounted.get("segment_ids", ()))
        return int(mounted["ret"])

    def unmount(self) -> int:
        segments, self._segments = self._segments, []
        return int(self._store.unmount_and_free_segment(segments)) if segments else 0

    def name(self) -> str:
        return str(self._store.get_hostname()) if hasattr(self._store, "get_hostname") else ""

    def put(self, key: str, value: bytes) -> int:
        return int(self._store.put(key, value))

    def get(self, key: str) -> tuple[bytes, int]:
        """The value and 0, or nothing and a code: the wheel's own get returns nothing for every failure."""
        if value := self._store.get(key):
            return bytes(value), 0
        size = int(self._store.get_size(key))
        return b"", size if size < 0 else -800  # it is there, and could not be fetched

    def exist(self, keys: list[str]) -> list[int]:
        return list(self._store.batch_is_exist(keys))

    def remove(self, key: str, force: bool) -> int:
        return int(self._store.remove(key, True) if force and self.forces else self._store.remove(key))

    def register(self, region: Region) -> int:
        return int(self._store.register_buffer(region.pointer, region.nbytes))

    def unregister(self, region: Region) -> int:
        return int(self._store.unregister_buffer(region.pointer))

    def put_pages(self, keys: list[str], pointers: Ints, nbytes: Ints) -> list[int]:
        """0 or a code for each."""
        if pointers.shape[1] == 1:
            return list(self._store.batch_put_from(keys, pointers[:, 0].tolist(), nbytes[:, 0].tolist()))
        return list(self._store.batch_put_from_multi_buffers(keys, pointers.tolist(), nbytes.tolist()))

    def get_pages(self, keys: list[str], pointers: Ints, nbytes: Ints) -> list[int]:
        """0 or a code for each: a value of another size than asked for is no success."""
        if pointers.shape[1] == 1:
            sizes = self._store.batch_get_into(keys, pointers[:, 0].tolist(), nbytes[:, 0].tolist())
        else:
            sizes = self._store.batch_get_into_multi_buffers(keys, pointers.tolist(), nbytes.tolist())
        wanted = nbytes.sum(axis=1).tolist()
        return [0 if size == want else min(int(size), 0) or -600 for size, want in zip(sizes, wanted, strict=True)]

    def health(self) -> int:
        return int(self._store.health_check()) if hasattr(self._store, "health_check") else 0


class MooncakeStore:
    """Made by `open_mooncake_store`."""

    def __init__(self, calls: _Calls, ability: StoreAbility, executor: ThreadPoolExecutor) -> None:
        self._calls = calls
        self._ability = ability
        self._executor = executor
        self._regions = Regions()
        self._under_way: set[asyncio.Future[Any]] = set()
        self._ready = False
        self._closed = False
        self._name = ""

    @property
    def name(self) -> str:
        return self._name

    @property
    def ability(self) -> StoreAbility:
        return self._ability

    async def set_up(self, plan: SetUp) -> None:
        """Only `open_mooncake_store` calls it. Raises StoreFailed with the step SET_UP."""
        try:
            code = await self._run(self._calls.set_up, plan)
        except ValueError as cause:  # the wheel's word for a directory that it does not take
            raise StoreFailed(StoreCause.SET_UP_REFUSED, Step.SET_UP, str(cause)) from cause
        if code == 0:
            self._ready = True
            self._name = await self._run(self._calls.name)
            code = await self._run(self._calls.mount, plan)
        if code != 0:
            what = f"{plan.segment_nbytes} bytes at {plan.local_hostname} over {plan.protocol} with {plan.master}"
            raise StoreFailed(cause_of(code), Step.SET_UP, what, code=code)

    async def put(self, key: str, value: bytes) -> None:
        _check(Step.PUT, key, await self._call(Step.PUT, self._calls.put, key, value))

    async def get(self, key: str) -> bytes:
        value, code = await self._call(Step.GET, self._calls.get, key)
        _check(Step.GET, key, code)
        return value

    async def exists(self, keys: Sequence[str]) -> list[bool]:
        codes = await self._call(Step.EXISTS, self._calls.exist, list(keys))
        for key, code in zip(keys, codes, strict=True):
            _check(Step.EXISTS, key, min(code, 0))
        return [code == 1 for code in codes]

    async def remove(self, key: str, *, force: bool = False) -> None:
        _check(Step.REMOVE, key, await self._call(Step.REMOVE, self._calls.remove, key, force))

    async def register(self, region: Region) -> None:
        self._regions.check_new(region)
        _check("register", str(region), await self._call("register", self._calls.register, region))
        self._regions.add(region)

    async def unregister(self, region: Region) -> None:
        self._regions.check_held(region)
        _check("unregister", str(region), await self._call("unregister", self._calls.unregister, region))
        self._regions.drop(region)

    async def put_pages(self, keys: Sequence[str], pointers: Ints, nbytes: Ints) -> Each:
        return await self._pages("put pages", self._calls.put_pages, keys, pointers, nbytes)

    async def get_pages(self, keys: Sequence[str], pointers: Ints, nbytes: Ints) -> Each:
        return await self._pages("get pages", self._calls.get_pages, keys, pointers, nbytes)

    async def health(self) -> None:
        code = await self._call("health", self._calls.health)
        if code != 0:
            cause = StoreCause.MASTER_UNREACHABLE
            raise StoreFailed(cause, "health", _SENTENCES[cause], code=code)

    async def close(self) -> None:
        """Waits for the calls under way: after it the memory of the caller is at rest."""
        if self._closed:
            return
        self._closed = True
        while self._under_way:
            await _outlast(asyncio.gather(*self._under_way, return_exceptions=True))
        if self._ready:
            await _outlast(asyncio.ensure_future(self._give_back()))

    async def _give_back(self) -> None:
        for region in self._regions.held:  # else who reaches the engine's port could still write there (H7)
            await self._run(self._calls.unregister, region)
        if not self._calls.splits:
            log.info("this wheel gives no segment back before the process ends", store=self._name)
            return
        code = await self._run(self._calls.unmount)
        if code != 0:
            said = "the master forgets the segment by itself, 10 s after this process has ended"
            log.warning("segment not given back", store=self._name, cause=cause_of(code), code=code, effect=said)

    async def _pages(
        self,
        step: str,
        call: Callable[[list[str], Ints, Ints], list[int]],
        keys: Sequence[str],
        pointers: Ints,
        nbytes: Ints,
    ) -> Each:
        self._regions.check_pages(keys, pointers, nbytes)
        codes = await self._call(step, call, list(keys), pointers, nbytes) if keys else []
        return tuple(_failure(step, key, code) for key, code in zip(keys, codes, strict=True))

    async def _call(self, step: str, call: Callable[..., T], *arguments: Any) -> T:
        if self._closed or not self._ready:
            raise StoreFailed(StoreCause.CLOSED, step, "this store was closed: open another")
        return await self._run(call, *arguments)

    async def _run(self, call: Callable[..., T], *arguments: Any) -> T:
        """On a thread of ours. Cancelled, it waits for the thread: it has the caller's memory in its hands."""
        future = asyncio.get_running_loop().run_in_executor(self._executor, call, *arguments)
        self._under_way.add(future)
        future.add_done_callback(self._under_way.discard)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            await _outlast(future)
            raise


def _check(step: str, key: str, code: int) -> None:
    failure = _failure(step, key, code)
    if failure is not None:
        raise failure


def _failure(step: str, key: str, code: int) -> StoreFailed | None:
    if code == 0:
        return None
    cause = cause_of(code)
    return StoreFailed(cause, step, _SENTENCES[cause], key=key, code=code)


async def _outlast(rest: asyncio.Future[Any]) -> None:
    """Wait for `rest` even through further cancellations."""
    while not rest.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait([rest])
