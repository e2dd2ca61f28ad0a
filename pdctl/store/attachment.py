"""
A store that may go away without anybody above noticing more than misses.

    ATTACHED --the master, or an owner of bytes, is gone or hangs--> AWAY
    AWAY --the master answers, and a fresh key comes back--> ATTACHED

While it is away nothing is asked of it: a call to a master that was killed takes 4.4 s, and one to a master that hangs
1 s (measured; none holds the interpreter). Reads are misses, writes are dropped, both are counted; that it left and
that it is back are logged once each. Raised is only a mistake of the caller (memory that is not registered), unless
`strict` is asked for.

Pages go in calls of a bounded number of pieces: the wheel gives a call up after 60 s while the engine goes on with what
it still has queued. Of 64 reads of 1 MiB from an owner that hung, 24 landed in the caller's memory after the call had
failed; with so few pieces that all end before, none did.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar
from uuid import uuid4

import structlog

from pdctl.core.layout import Region
from pdctl.core.seconds import check_seconds
from pdctl.counts.store import StoreCall, StoreEnd, StoreTrafficMetrics
from pdctl.errands import Errands
from pdctl.errors import ConfigError, StoreCause, StoreFailed
from pdctl.retry import RetryPolicy, retrying
from pdctl.store.base import Each, Ints, Store

log = structlog.get_logger(__name__)

T = TypeVar("T")

Turned = Callable[[StoreFailed | None], None]

UNTIL_BACK = RetryPolicy(first_wait_s=0.5, multiplier=1.5, max_wait_s=2.0)
_OF_THE_MASTER = frozenset({StoreCause.MASTER_UNREACHABLE, StoreCause.TIMED_OUT})
_QUIET = frozenset({StoreCause.MISSING, StoreCause.CLOSED})  # no trouble
_PROOF = b"pdctl" * 16
_FULL_AFTER = 5  # attempts, 6 s at our policy


@dataclass(frozen=True, slots=True)
class AttachPolicy:
    """When a store is asked, and when it is left alone.

    fresh_s          a master not heard of for so long is asked before a call; our question takes 0.3 ms, and a call to
                     a killed master 4.4 s
    owner_rest_s     how long to leave it alone when the owner of a segment does not answer: until then each call to
                     that owner costs 1 to 5 s, and after 10 s (client_ttl) the master has forgotten it
    pieces_at_once   in one call; an object is never cut. What all calls together may have is
                     `environment.pieces_at_once`: 96 where a store has its own engine settings
    nbytes_at_once   in one call: with SSD offload all that a call reads from the disk has to fit the offload buffer
                     (64 MiB for all calls together), or none of it comes
    calls_at_once    as many as the store has threads: one more would wait where it cannot be taken back
    until_back       how often a store that is away is tried
    """

    fresh_s: float = 0.25
    owner_rest_s: float = 10.0
    pieces_at_once: int = 16
    nbytes_at_once: int = 16 << 20
    calls_at_once: int = 4
    until_back: RetryPolicy = UNTIL_BACK

    def __post_init__(self) -> None:
        check_seconds(self, "attachment", or_zero=("fresh_s", "owner_rest_s"))
        if min(self.pieces_at_once, self.nbytes_at_once, self.calls_at_once) < 1:
            raise ConfigError("attachment pieces, bytes or calls at once are below 1: give at least 1")

    def keys_at_once(self, nbytes: Ints) -> int:
        """Of objects whose pieces have these lengths."""
        if not nbytes.size:
            return 1
        largest = int(nbytes.sum(axis=1).max())
        fit = min(self.pieces_at_once // int(nbytes.shape[1]), self.nbytes_at_once // max(1, largest))
        return max(1, fit)


@asynccontextmanager
async def attached(
    store: Store,
    ask: Callable[[], Awaitable[None]],
    *,
    policy: AttachPolicy | None = None,
    metrics: StoreTrafficMetrics | None = None,
    clock: Callable[[], float] = time.monotonic,
    turned: Turned = lambda _: None,
) -> AsyncIterator[Attachment]:
    """`ask`: our own question to the master, bounded; raises StoreFailed where it does not answer. `turned` is told why
    the store is left alone, and None when it is back."""
    attachment = Attachment(store, ask, policy or AttachPolicy(), metrics, clock, turned)
    try:
        yield attachment
    finally:
        await attachment.aclose()


class Attachment:
    """Made by `attached`. What is asked of the store, as an engine wants it: hits and misses."""

    def __init__(
        self,
        store: Store,
        ask: Callable[[], Awaitable[None]],
        policy: AttachPolicy,
        metrics: StoreTrafficMetrics | None,
        clock: Callable[[], float],
        turned: Turned = lambda _: None,
    ) -> None:
        self._store = store
        self._turned = turned
        self._ask = ask
        self._policy = policy
        self._metrics = metrics
        self._clock = clock
        self._turns = asyncio.Semaphore(policy.calls_at_once)
        self._errands = Errands()
        self._away: StoreFailed | None = None
        self._heard = clock()
        self._asking: asyncio.Task[StoreFailed | None] | None = None
        self._left_out = 0
        if metrics is not None:
            metrics.follow(lambda: self._away is None)

    @property
    def is_attached(self) -> bool:
        return self._away is None

    @property
    def away(self) -> StoreFailed | None:
        """Why the store is left alone; None while it is not."""
        return self._away

    async def exists(self, keys: Sequence[str], *, strict: bool = False) -> list[bool]:
        """Which keys are there; none, while the store is away. `strict`, here as below: raise StoreFailed instead."""
        found = await self._one(StoreCall.LOOK_UP, len(keys), lambda: self._store.exists(keys), strict)
        return [False] * len(keys) if found is None else found

    async def get(self, key: str, *, strict: bool = False) -> bytes | None:
        """None for a miss."""
        return await self._one(StoreCall.READ, 1, lambda: self._store.get(key), strict)

    async def put(self, key: str, value: bytes, *, strict: bool = False) -> bool:
        """Whether it is kept; False where it was dropped."""

        async def kept() -> bool:
            await self._store.put(key, value)
            return True

        return bool(await self._one(StoreCall.WRITE, 1, kept, strict))

    async def register(self, region: Region) -> None:
        await self._store.register(region)

    async def unregister(self, region: Region) -> None:
        await self._store.unregister(region)

    async def get_pages(self, keys: Sequence[str], pointers: Ints, nbytes: Ints, *, strict: bool = False) -> list[bool]:
        """Which of the objects are in their pieces now. What the pieces of a miss hold is not known."""
        return await self._pages(StoreCall.READ, self._store.get_pages, keys, pointers, nbytes, strict)

    async def put_pages(self, keys: Sequence[str], pointers: Ints, nbytes: Ints, *, strict: bool = False) -> list[bool]:
        """Which of the objects are kept now; the others were dropped."""
        return await self._pages(StoreCall.WRITE, self._store.put_pages, keys, pointers, nbytes, strict)

    async def aclose(self) -> None:
        """Before the store is closed: nothing of ours asks it any more."""
        await self._errands.aclose(0.0)
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.wait([self._asking])

    async def _pages(
        self,
        what: StoreCall,
        call: Callable[[Sequence[str], Ints, Ints], Awaitable[Each]],
        keys: Sequence[str],
        pointers: Ints,
        nbytes: Ints,
        strict: bool,
    ) -> list[bool]:
        step = self._policy.keys_at_once(nbytes)
        parts = [slice(at, at + step) for at in range(0, len(keys), step)]
        batches = [_Batch(call, keys[part], pointers[part], nbytes[part]) for part in parts]
        try:
            async with asyncio.TaskGroup() as calls:  # whose end means that the memory is at rest, however it ends
                made = [calls.create_task(self._call(what, len(batch.keys), batch)) for batch in batches]
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None
        each = [failure for done in made for failure in done.result()]
        if strict and (failures := [failure for failure in each if failure is not None]):
            raise failures[0]
        return [failure is None for failure in each]

    async def _one(self, what: StoreCall, n: int, call: Callable[[], Awaitable[T]], strict: bool) -> T | None:
        made: list[T] = []

        async def once() -> Each:
            made.append(await call())
            return (None,) * n

        each = await self._call(what, n, once)
        if strict and each and each[0] is not None:
            raise each[0]
        return made[0] if made else None

    async def _call(self, what: StoreCall, n: int, call: Callable[[], Awaitable[Each]]) -> Each:
        """What became of each of `n` keys; never raises StoreFailed."""
        async with self._turns:
            reason = await self._reason_to_leave_it()
            if reason is not None:
                self._count(what, StoreEnd.LEFT_OUT, n)
                self._left_out += n
                return (reason,) * n
            try:
                each = await call()
            except StoreFailed as failure:
                each = (failure,) * n
        self._judge(what, each)
        return each

    async def _reason_to_leave_it(self) -> StoreFailed | None:
        if self._away is None and self._clock() - self._heard > self._policy.fresh_s:
            failure = await self._asked()
            if failure is not None:
                self._leave(failure)
        return self._away

    async def _asked(self) -> StoreFailed | None:
        """One question for all who want to know at once."""
        if self._asking is None:
            self._asking = asyncio.create_task(self._answer(), name="ask the store's master")
            self._asking.add_done_callback(self._forget_question)
        return await asyncio.shield(self._asking)

    async def _answer(self) -> StoreFailed | None:
        try:
            await self._ask()
        except StoreFailed as failure:
            return failure
        self._heard = self._clock()
        return None

    def _forget_question(self, _: asyncio.Task[StoreFailed | None]) -> None:
        self._asking = None

    def _judge(self, what: StoreCall, each: Each) -> None:
        failures = [failure for failure in each if failure is not None]
        missing = sum(failure.cause is StoreCause.MISSING for failure in failures)
        self._count(what, StoreEnd.DONE, len(each) - len(failures))
        self._count(what, StoreEnd.MISSING, missing)
        self._count(what, StoreEnd.FAILED, len(failures) - missing)
        trouble = [failure for failure in failures if failure.cause not in _QUIET]
        for failure in trouble:
            if self._metrics is not None:
                self._metrics.failed(failure.cause)
        grave = [f for f in trouble if f.cause in _OF_THE_MASTER or f.cause is StoreCause.OWNER_UNREACHABLE]
        if grave:
            self._leave(grave[0])
        elif each:
            self._heard = self._clock()

    def _count(self, what: StoreCall, end: StoreEnd, times: int) -> None:
        if self._metrics is not None and times:
            self._metrics.ended(what, end, times)

    def _leave(self, failure: StoreFailed) -> None:
        if self._away is not None:  # calls that were under way say it again
            return
        self._away = failure
        self._left_out = 0
        if self._metrics is not None:
            self._metrics.left()
        self._turned(failure)
        log.warning("store left alone: reads are misses, writes are dropped", cause=failure.cause, why=str(failure))
        self._errands.spawn("come back to the store", self._come_back(failure, self._clock()))

    async def _come_back(self, failure: StoreFailed, since: float) -> None:
        if failure.cause is StoreCause.OWNER_UNREACHABLE:
            await asyncio.sleep(self._policy.owner_rest_s)
        proof = _Proof(self._store, self._ask)
        await retrying(self._policy.until_back, proof.attempt, keep_trying=True)
        self._away = None
        self._heard = self._clock()
        self._turned(None)
        log.info("store is back", after_s=round(self._heard - since, 3), keys_left_out=self._left_out)


@dataclass(slots=True)
class _Proof:
    """The master answers us, and a fresh key comes back. Not earlier: after a restart the master answers for up to 3 s
    before the segment is mounted again, and there is no space. A store that has none for longer is full, and reads."""

    store: Store
    ask: Callable[[], Awaitable[None]]
    without_space: int = 0

    async def attempt(self) -> None:
        await self.ask()
        key = f"pdctl-back-{uuid4().hex}"
        try:
            await self.store.put(key, _PROOF)
        except StoreFailed as failure:
            self.without_space += failure.cause is StoreCause.NO_SPACE
            if failure.cause is StoreCause.NO_SPACE and self.without_space > _FULL_AFTER:
                return
            raise
        if await self.store.get(key) != _PROOF:
            raise StoreFailed(StoreCause.WRONG_DATA, "come back", "what came back is not what was put", key=key)
        await self.store.remove(key, force=True)


@dataclass(frozen=True, slots=True)
class _Batch:
    """One call for some of the pages."""

    call: Callable[[Sequence[str], Ints, Ints], Awaitable[Each]]
    keys: Sequence[str]
    pointers: Ints
    nbytes: Ints

    async def __call__(self) -> Each:
        return await self.call(self.keys, self.pointers, self.nbytes)
