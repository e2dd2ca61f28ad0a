"""How a store stands, told as it turns: through the chain with a stand-in, and by a real rank with a real master."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import aiohttp
import pytest

from pdctl.config import Settings
from pdctl.core.findings import Culprit, Finding, Scope
from pdctl.core.kvstore import KVStoreConfig
from pdctl.core.report import StoreSeen
from pdctl.core.warmup import StoreState
from pdctl.device.open import open_device
from pdctl.errors import ConfigError, StoreCause, StoreFailed, StoreNotReady, StoreUnusable
from pdctl.explaining import why
from pdctl.kvstore import KVStore, mooncake_means, open_store
from pdctl.node import prefill_node
from pdctl.retry import RetryPolicy
from pdctl.sections import NodeSettings
from pdctl.serving import sidecar
from pdctl.store.patience import StorePatience
from pdctl.store.watch import StoreWatch
from tests.conftest import Clock
from tests.node_rig import FIRST, SHAPE, memory_pools
from tests.store.conftest import SEGMENT
from tests.store.master import Master
from tests.test_kvstore import CONFIG, PATIENCE, RANK, Troubled, failed, means
from tests.test_node import settings, until_registered
from tests.test_reporting import Watch as Fleet

SOON_S = 60.0


class Heard:
    """Every state that a watch has had, each once, and what was seen with it at last."""

    def __init__(self, watch: StoreWatch) -> None:
        self.watch, self.seen = watch, list[StoreSeen]()
        watch.subscribe(self._hear)

    def _hear(self) -> None:
        seen = self.watch.seen()
        assert seen is not None
        if self.seen and self.seen[-1].state is seen.state:
            self.seen.pop()
        self.seen.append(seen)

    @property
    def states(self) -> list[str]:
        return [str(seen.state) for seen in self.seen]


# The chain, with a stand-in


@asynccontextmanager
async def opened(watch: StoreWatch, store: Troubled, **others: Any) -> AsyncIterator[KVStore]:
    async with (
        open_device("cpu") as device,
        open_store(CONFIG, RANK, device, patience=PATIENCE, means=means(store, **others), watch=watch) as it,
    ):
        yield it


async def test_a_store_that_comes_up_late_is_warming_with_its_last_failure_then_ready_then_closed() -> None:
    watch, lags = StoreWatch(), [failed(StoreCause.NO_SPACE, code=-200)] * 4
    assert watch.seen() is None
    heard = Heard(watch)
    async with opened(watch, Troubled(put=lags)):
        assert heard.states == ["warming", "ready"]
        warming, ready = heard.seen
    assert (warming.attached, warming.step, warming.cause, warming.code) == (False, "put", StoreCause.NO_SPACE, -200)
    assert warming.tries == 4
    assert "tried again" in warming.sentence
    assert (ready.attached, ready.step, ready.cause, ready.tries) == (True, None, None, 0)
    assert heard.states == ["warming", "ready", "closed"]


@pytest.mark.parametrize(
    ("cause", "raised", "again"), [("no_space", StoreNotReady, 10), ("wrong_data", StoreUnusable, 1)]
)
async def test_one_that_does_not_come_up_has_failed_with_step_and_code(
    cause: str, raised: type[Exception], again: int
) -> None:
    watch = StoreWatch()
    heard = Heard(watch)
    with pytest.raises(raised):
        async with opened(watch, Troubled(put=[failed(StoreCause(cause), code=-7)] * again)):
            pass
    assert heard.states == ["warming", "failed"]
    last = heard.seen[-1]
    assert (last.attached, last.step, last.cause, last.code) == (False, "put", StoreCause(cause), -7)
    assert "code -7" in last.sentence
    assert "likely" in last.sentence


async def test_one_that_cannot_be_configured_so_has_failed_too() -> None:
    watch, config = StoreWatch(), replace(CONFIG, protocol="rdma", device_name={0: "mlx5_0"})  # none for rank 3
    async with open_device("cpu") as device:
        with pytest.raises(ConfigError):
            async with open_store(config, RANK, device, means=means(Troubled()), watch=watch):
                pass
    seen = watch.seen()
    assert seen is not None
    assert (seen.state, seen.attached) == (StoreState.FAILED, False)
    assert "device" in seen.sentence


async def test_how_long_it_stands_so_begins_anew_only_when_that_turns(clock: Clock) -> None:
    watch = StoreWatch(clock)
    watch.began(RANK)
    clock.forward(2.0)
    watch.tried(failed(StoreCause.TIMED_OUT, "master"), 1.0)
    clock.forward(1.0)
    seen = watch.seen()
    assert seen is not None
    assert (seen.state, seen.since_s) == (StoreState.WARMING, 3.0)
    watch.turned(StoreFailed(StoreCause.MASTER_UNREACHABLE, "get", "gone\nfor now"))
    seen = watch.seen()
    assert seen is not None
    assert (seen.state, seen.since_s, seen.step) == (StoreState.AWAY, 0.0, "get")
    assert seen.sentence.isprintable()


# The real thing: a rank, its registry, a master


class Bench:
    """A registry, a rank that was given a watch, and what is to be seen of them from outside."""

    def __init__(self, url: str, metrics_url: str, http: aiohttp.ClientSession) -> None:
        self.url, self._metrics_url, self._http = url, metrics_url, http
        self._fleet = Fleet(url, http)

    async def store(self, state: str | None) -> Any:
        def stands(report: Any) -> bool:
            return report["store"] is None if state is None else (report["store"] or {}).get("state") == state

        async with asyncio.timeout(SOON_S):
            return (await self._fleet.report("default", stands))["store"]

    async def count(self, name: str, is_so: Callable[[float], bool]) -> None:
        """Until the rank's own /metrics have it so."""
        async with asyncio.timeout(SOON_S):
            while not is_so(await self._sample(name)):  # noqa: ASYNC110  another service's figures
                await asyncio.sleep(0.05)

    async def _sample(self, name: str) -> float:
        async with self._http.get(self._metrics_url) as answer:
            lines = [line for line in (await answer.text()).splitlines() if line.startswith(name)]
        return float(lines[0].rpartition(" ")[2]) if lines else 0.0

    async def findings(self) -> list[Finding]:
        told = await why(Settings(node=NodeSettings(registry=self.url)), Scope.parse(["default"]))
        return [each for each in told.findings if each.what is Culprit.STORE_NOT_READY]


@asynccontextmanager
async def rank(watch: StoreWatch) -> AsyncIterator[Bench]:
    async with (
        sidecar(settings()) as registry,
        prefill_node(settings(registry.url), **memory_pools(), seat=FIRST, shape=SHAPE, store=watch) as node,
        aiohttp.ClientSession() as http,
    ):
        await until_registered(node)
        yield Bench(registry.url, node.metrics_url, http)


def quick(give_up_after_s: float | None) -> StorePatience:
    return StorePatience(
        until_ready=RetryPolicy(first_wait_s=0.2, max_wait_s=0.5, give_up_after_s=give_up_after_s),
        warm_up=RetryPolicy(first_wait_s=0.2, max_wait_s=0.5, give_up_after_s=give_up_after_s),
    )


@asynccontextmanager
async def real(at: Master, watch: StoreWatch, objects: list[Any], patience: StorePatience) -> AsyncIterator[KVStore]:
    config = KVStoreConfig(
        at.address,
        local_hostname="127.0.0.1",
        global_segment_size=SEGMENT,
        protocol="tcp",
        master_metrics_port=at.http,
        check_server=True,
    )
    async with open_device("cpu") as device:
        by = mooncake_means(config, device, patience, keep=objects.append)
        async with open_store(
            config, replace(RANK, tp=0, pp=0), device, patience=patience, means=by, watch=watch
        ) as it:
            yield it


async def test_a_rank_says_how_its_store_stands_from_a_master_that_is_late_to_one_that_dies() -> None:
    watch, master, objects = StoreWatch(), Master(), list[Any]()
    try:
        async with rank(watch) as seen:
            assert await seen.store(None) is None
            assert await seen.findings() == []
            opening = real(master, watch, objects, quick(None))
            coming = asyncio.create_task(opening.__aenter__())
            await seen.count("pdctl_store_failed_tries", lambda tries: tries >= 3)  # as PdctlStoreWarmupRetrying asks
            warming = await seen.store("warming")
            assert (warming["attached"], warming["step"], warming["cause"]) == (False, "master", "master_unreachable")
            (finding,) = await seen.findings()
            assert finding.who == "default/tp0"
            assert "master" in finding.why

            master.start()
            async with asyncio.timeout(SOON_S):
                store = await coming
            assert (await seen.store("ready"))["attached"]
            assert await seen.findings() == []
            await seen.count("pdctl_store_failed_tries", lambda tries: tries == 0)
            await seen.count("pdctl_store_attached", lambda attached: attached == 1)

            master.kill()
            async with asyncio.timeout(SOON_S):
                while store.attachment.is_attached:  # a rank that does not use it does not miss it
                    await store.attachment.get("any")
                    await asyncio.sleep(0.05)
            away = await seen.store("away")
            assert (away["attached"], away["cause"]) == (False, "master_unreachable")
            assert "comes back by itself" in away["sentence"]
            await seen.count("pdctl_store_attached", lambda attached: attached == 0)
            (finding,) = await seen.findings()
            assert "left alone" in finding.why

            master.start()
            assert (await seen.store("ready"))["attached"]
            await opening.__aexit__(None, None, None)
            assert not (await seen.store("closed"))["attached"]
            for each in objects:
                each.close()
    finally:
        master.kill()


async def test_a_rank_whose_store_has_failed_says_at_which_step_and_that_nobody_tries_again() -> None:
    watch, master = StoreWatch(), Master()
    async with rank(watch) as seen:
        with pytest.raises(StoreNotReady):
            async with real(master, watch, [], quick(1.0)):
                pass
        told = await seen.store("failed")
        assert (told["step"], told["cause"]) == ("master", "master_unreachable")
        assert told["tries"] >= 1
        (finding,) = await seen.findings()
        assert "has no store" in finding.why
        assert "start the rank again" in finding.do
