"""
Mooncake's store, made ready: the chain from nothing to a store that has shown that it works.

    ask the master -> rehearse the set-up in a process of its own -> set up -> mount -> warm up

Each step is tried again while it may still come, under one policy, and the end is a Report either way. The event loop
goes on meanwhile: what holds the interpreter is called only after another has shown that it returns (docs/store.md).
"""

from __future__ import annotations

import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar
from uuid import uuid4

import structlog

from pdctl.core.device import DeviceKind
from pdctl.core.kvstore import KVStoreConfig, SetUp, StoreRank, set_up
from pdctl.core.warmup import Report, Result, Step, is_never, key_of, likely, value_of
from pdctl.counts.store import StoreMetrics, StoreTrafficMetrics
from pdctl.device.base import Device
from pdctl.engine import wheel
from pdctl.engine.environment import pieces_at_once
from pdctl.engine.store_wheel import environment, store_class
from pdctl.errors import ConfigError, PdctlError, StoreCause, StoreFailed, StoreNotReady, StoreUnusable
from pdctl.retry import Failure, retrying
from pdctl.spans import Open, Spans, spanned
from pdctl.store import master, rehearsal
from pdctl.store.attachment import Attachment, AttachPolicy, attached
from pdctl.store.base import Store, StoreAbility
from pdctl.store.mooncake import ability_of, open_mooncake_store
from pdctl.store.offloading import Claim, offloading
from pdctl.store.patience import StorePatience
from pdctl.store.watch import StoreWatch

log = structlog.get_logger(__name__)

_T = TypeVar("_T")

ATTACHED = AttachPolicy()
SCOUT = (sys.executable, "-m", "pdctl.scout")


@dataclass(frozen=True, slots=True)
class StoreMeans:
    """By what a store is asked for, tried and opened: the wheel's, unless a test has others.

    claim           this rank's directory on the SSD, where the plan has one
    pieces_at_once  in one call, as this process's engine settings make safe
    """

    ability: Callable[[], StoreAbility]
    ask: Callable[[KVStoreConfig], Awaitable[None]]
    rehearse: Callable[[SetUp], Awaitable[None]]
    open: Callable[[SetUp], AbstractAsyncContextManager[Store]]
    claim: Callable[[SetUp, StoreRank], AbstractAsyncContextManager[Claim]] = lambda plan, _: nullcontext(Claim(plan))
    pieces_at_once: int = ATTACHED.pieces_at_once


def mooncake_means(
    config: KVStoreConfig,
    device: Device,
    patience: StorePatience,
    *,
    wheels: Callable[[str], Callable[[], object]] = store_class,
    keep: Callable[[object], None] = wheel.keep_until_exit,
) -> StoreMeans:
    """The installed wheel. Raises EngineUnavailable naming what to install."""
    device.check_protocol(config.protocol)
    make, version = wheels(config.protocol), wheel.version()
    spares: list[object] = []

    async def rehearse(plan: SetUp) -> None:
        if patience.rehearsal_s and device.spec.kind is not DeviceKind.NPU:  # a scout has set no NPU
            await rehearsal.rehearse(plan, SCOUT, deadline_s=patience.rehearsal_s)

    async def segments() -> frozenset[str] | None:
        return await master.segments(config, deadline_s=patience.ask_s)

    return StoreMeans(
        ability=lambda: ability_of(make, version),
        ask=lambda wanted: master.ask(wanted, deadline_s=patience.ask_s),
        rehearse=rehearse,
        open=lambda plan: open_mooncake_store(
            plan, make, version=version, keep=keep, bind_device=device.bind, spares=spares
        ),
        claim=lambda plan, rank: offloading(plan, rank, environment(), segments, patience.offload),
        pieces_at_once=_pieces_a_call(),
    )


def _pieces_a_call() -> int:
    return max(1, min(ATTACHED.pieces_at_once, pieces_at_once(environment()) // ATTACHED.calls_at_once))


@dataclass(frozen=True, slots=True)
class KVStore:
    """A store that has shown that it works; `report` says how long that took.

    store       which raises StoreFailed whenever it cannot
    attachment  the same as hits and misses: nothing is raised while it is away, and it comes back by itself
    """

    config: KVStoreConfig
    rank: StoreRank
    store: Store
    report: Report
    attachment: Attachment


@asynccontextmanager
async def open_store(
    config: KVStoreConfig,
    rank: StoreRank,
    device: Device,
    *,
    patience: StorePatience | None = None,
    metrics: StoreMetrics | None = None,
    traffic: StoreTrafficMetrics | None = None,
    means: StoreMeans | None = None,
    spans: Spans | None = None,
    watch: StoreWatch | None = None,
) -> AsyncIterator[KVStore]:
    """A store that works, closed at the end of the block.

    device  whose memory it will carry (`open_device`), set on each of its threads
    spans   who wants one of how it came up
    watch   is told how it stands, until the block ends: for the node that reports it and shows its counts
    Raises StoreNotReady when time was up, StoreUnusable where waiting would not help, both with a `report`;
    ConfigError, EngineUnavailable. What the wheel itself raises, a TypeError above all, comes through as it is.
    """
    patience, watch = patience or StorePatience(), watch or StoreWatch()
    metrics, traffic = metrics or watch.counts.warmup, traffic or watch.counts.traffic
    async with AsyncExitStack() as stack:
        stack.callback(watch.closed)
        with _told(watch, rank):
            means = means or mooncake_means(config, device, patience)
        chain = _Chain(config, rank, device, patience, means, metrics, watch)
        metrics.begun(rank)
        try:
            with _told(watch, rank):
                store, report = await spanned(spans, "pdctl.store", partial(chain.climb_seen, stack))
        except StoreFailed as failure:
            report = chain.report(failure)
            watch.ended(report, failure)
            raise (StoreUnusable if report.result is Result.NEVER else StoreNotReady)(report) from failure
        finally:
            if chain.last is not None:
                metrics.opened(chain.last)
        watch.ended(report, None)
        chain.log.info("store ready", attempts=report.attempts, waited_s=round(report.waited_s, 3), store=store.name)
        ask, policy = partial(means.ask, config), replace(ATTACHED, pieces_at_once=means.pieces_at_once)
        async with attached(store, ask, policy=policy, metrics=traffic, turned=watch.turned) as attachment:
            yield KVStore(config, rank, store, report, attachment)


@contextmanager
def _told(watch: StoreWatch, rank: StoreRank) -> Iterator[None]:
    """What keeps it from being tried is told as well."""
    watch.began(rank)
    try:
        yield
    except PdctlError as error:
        watch.broke(error)
        raise


async def check_store(
    config: KVStoreConfig,
    rank: StoreRank,
    device: Device,
    *,
    patience: StorePatience | None = None,
    means: StoreMeans | None = None,
) -> tuple[SetUp, StoreAbility]:
    """Everything that can be known without giving a segment: the plan, and a master and a set-up that have answered.

    Raises as `open_store`.
    """
    patience = patience or StorePatience()
    chain = _Chain(config, rank, device, patience, means or mooncake_means(config, device, patience))
    try:
        plan = await chain.approach()
    except StoreFailed as failure:
        report = chain.report(failure)
        raise (StoreUnusable if report.result is Result.NEVER else StoreNotReady)(report) from failure
    return plan, chain.means.ability()


@dataclass(slots=True)
class _Chain:
    """One climb from nothing to a store that works; `last` is its report, once it has ended."""

    config: KVStoreConfig
    rank: StoreRank
    device: Device
    patience: StorePatience
    means: StoreMeans
    metrics: StoreMetrics | None = None
    watch: StoreWatch | None = None
    last: Report | None = None
    claim: Claim | None = None
    span: Open | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    attempts: int = 0
    started: float = field(default_factory=time.monotonic)

    @property
    def log(self) -> structlog.stdlib.BoundLogger:
        bound: structlog.stdlib.BoundLogger = log.bind(rank=str(self.rank))
        return bound

    async def climb_seen(self, stack: AsyncExitStack, span: Open | None) -> tuple[Store, Report]:
        self.span, began = span, time.monotonic()
        try:
            return await self.climb(stack)
        finally:
            if span is not None:
                span.show(store_rank=str(self.rank), attempts=self.attempts, waited_s=time.monotonic() - began)

    async def climb(self, stack: AsyncExitStack) -> tuple[Store, Report]:
        plan = self._plan()
        policy = self.patience.until_ready
        store = await retrying(policy, lambda: self._open(plan, stack), is_permanent=is_never, on_failure=self._not_yet)
        removed = await self._warm_up(store)
        self.last = replace(self._report(Result.READY), removed=removed)
        return store, self.last

    async def approach(self) -> SetUp:
        plan = self._plan()
        policy = self.patience.until_ready
        await retrying(policy, lambda: self._try(plan), is_permanent=is_never, on_failure=self._not_yet)
        return plan

    def report(self, failure: StoreFailed) -> Report:
        result = Result.NEVER if is_never(failure) else Result.NOT_YET
        self.last = replace(
            self._report(result),
            step=failure.step,
            cause=failure.cause,
            code=failure.code,
            detail=failure.detail,
            likely=likely(failure, self.config.protocol, self.config.device_of(self.rank)),
        )
        return self.last

    def _report(self, result: Result) -> Report:
        return Report(self.rank, result, self.attempts, time.monotonic() - self.started, seconds=self.seconds)

    def _plan(self) -> SetUp:
        if self.config.standalone_storage:
            raise ConfigError(
                "store standalone_storage is on: pdctl opens stores of its own only; switch it off, or let the engine "
                "speak to mooncake_client itself"
            )
        plan, left_out = set_up(self.config, self.rank, self.means.ability().setup)
        if left_out:
            effect = "SSD offload is off: install a newer wheel"
            self.log.warning("the installed mooncake wheel does not know parameters", left_out=left_out, effect=effect)
        return replace(plan, local_hostname=_named(plan.local_hostname, self.device))

    async def _try(self, plan: SetUp) -> None:
        await self._timed(Step.MASTER, self.means.ask(self.config))
        await self._timed("rehearsal", self.means.rehearse(plan))

    async def _open(self, plan: SetUp, stack: AsyncExitStack) -> Store:
        await self._try(plan)
        if self.claim is None:
            self.claim = await self._timed("claim", stack.enter_async_context(self.means.claim(plan, self.rank)))
            await self._timed(Step.MASTER, self.means.ask(self.config))  # that may have taken 12 s
        store = await self._timed(Step.SET_UP, stack.enter_async_context(self.means.open(self.claim.plan)))
        self.claim.keep(store.name)
        return store

    async def _warm_up(self, store: Store) -> bool:
        nonce = uuid4().hex
        policy = self.patience.warm_up

        async def attempt() -> None:
            self.attempts += 1
            await _evidence(store, key_of(nonce), value_of(nonce))

        await self._timed("warm-up", retrying(policy, attempt, is_permanent=is_never, on_failure=self._not_warm))
        return await self._remove(store, key_of(nonce))

    async def _remove(self, store: Store, key: str) -> bool:
        """By force: it was read a moment ago. Of a key that stays behind only 4 KiB are lost, until it is evicted."""
        try:
            await store.remove(key, force=True)
        except StoreFailed as failure:
            self.log.info("warm-up key left behind", key=key, cause=failure.cause, code=failure.code)
            return False
        return True

    async def _timed(self, step: str, work: Awaitable[_T]) -> _T:
        since = time.monotonic()
        if self.watch is not None:
            self.watch.at(str(step))
        try:
            return await work
        finally:
            self.seconds[step] = time.monotonic() - since
            if self.span is not None:
                self.span.say(str(step), seconds=self.seconds[step])

    def _not_yet(self, failure: Failure) -> None:
        self._tell("store not ready yet", failure)

    def _not_warm(self, failure: Failure) -> None:
        self._tell("store not warm yet", failure)

    def _tell(self, event: str, failure: Failure) -> None:
        error = failure.error
        if not isinstance(error, StoreFailed):  # a defect, or the wheel's own: it is raised, and speaks for itself
            return
        if self.metrics is not None:
            self.metrics.failed(self.rank)
        if self.watch is not None and failure.next_wait_s is not None:
            self.watch.tried(error, failure.next_wait_s)
        if failure.next_wait_s is not None:
            wait_s = round(failure.next_wait_s, 3)
            of = {"attempt": failure.attempt, "step": str(error.step), "cause": error.cause, "code": error.code}
            self.log.warning(event, **of, detail=error.detail, next_in_s=wait_s)


async def _evidence(store: Store, key: str, value: bytes) -> None:
    """Raises StoreFailed that names the step. A key that is there already is there from an attempt before."""
    await store.put(key, value)
    if (await store.exists([key])) != [True]:
        raise StoreFailed(StoreCause.MISSING, Step.EXISTS, "it was put, and is not there", key=key)
    if await store.get(key) != value:
        raise StoreFailed(StoreCause.WRONG_DATA, Step.COMPARE, "what came back is not what was put", key=key)


def _named(local_hostname: str, device: Device) -> str:
    """On some devices a store's own name says which card it is."""
    host, _, port = local_hostname.rpartition(":")
    return device.engine_name(host, int(port)) if host and port.isdigit() else device.engine_name(local_hostname)
