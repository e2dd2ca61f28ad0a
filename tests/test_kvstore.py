"""The chain from nothing to a store that works, link by link; the wheel's class is a stand-in here, or a dict.

With the real one: tests/store/test_freeze.py and test_race.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from random import Random
from typing import Any

import pytest
from structlog.testing import capture_logs

from pdctl.core.kvstore import KVStoreConfig, SetUp, StoreRank
from pdctl.core.warmup import NBYTES, Report, Result, key_of, value_of
from pdctl.device.open import open_device
from pdctl.errors import ConfigError, EngineUnavailable, StoreCause, StoreFailed, StoreNotReady, StoreUnusable
from pdctl.kvstore import KVStore, StoreMeans, check_store, mooncake_means, open_store
from pdctl.metrics import Metrics
from pdctl.retry import RetryPolicy
from pdctl.store.base import Store, StoreAbility
from pdctl.store.memory import MemoryStore, Shelf
from pdctl.store.patience import WARM_UP, StorePatience
from tests.store.stand_in import Recorded, new_wheel, old_wheel

CONFIG = KVStoreConfig(master_server_address="127.0.0.1:1", protocol="tcp", local_hostname="127.0.0.1")
RANK = StoreRank(tp=3, tp_size=8, pp=1, pp_size=2)
AT_ONCE = RetryPolicy(first_wait_s=0.001, multiplier=1.0, max_wait_s=0.001, even=True)
PATIENCE = StorePatience(until_ready=replace(AT_ONCE, max_attempts=5), warm_up=replace(AT_ONCE, max_attempts=10))


async def works(_: object) -> None:
    pass


def failed(cause: StoreCause, step: str = "put", code: int | None = None) -> StoreFailed:
    return StoreFailed(cause, step, "as the test wants it", code=code)


class Troubled(MemoryStore):
    """A store whose calls fail first, as told; `asked` is what was asked of it."""

    def __init__(self, **troubles: list[StoreFailed]) -> None:
        super().__init__(Shelf())
        self.troubles = troubles
        self.asked: list[str] = []
        self.keys: list[str] = []
        self.values: list[bytes] = []
        self.closed = False

    def _meet(self, what: str) -> None:
        self.asked.append(what)
        if self.troubles.get(what):
            raise self.troubles[what].pop(0)

    async def put(self, key: str, value: bytes) -> None:
        self.keys.append(key)
        self.values.append(value)
        self._meet("put")
        await super().put(key, value)

    async def exists(self, keys: Any) -> list[bool]:
        self._meet("exists")
        return await super().exists(keys)

    async def get(self, key: str) -> bytes:
        self._meet("get")
        return await super().get(key)

    async def remove(self, key: str, *, force: bool = False) -> None:
        self._meet("remove")
        await super().remove(key, force=force)

    async def close(self) -> None:
        self.closed = True


def means(store: Store, **others: Any) -> StoreMeans:
    @asynccontextmanager
    async def opening(_: SetUp) -> AsyncIterator[Store]:
        try:
            yield store
        finally:
            await store.close()

    usual = StoreMeans(lambda: StoreAbility("memory", "", frozenset()), works, works, opening)
    return replace(usual, **others)


@asynccontextmanager
async def opened(store: Store, *, metrics: Metrics | None = None, **others: Any) -> AsyncIterator[KVStore]:
    counts = None if metrics is None else metrics.store
    async with (
        open_device("cpu") as device,
        open_store(CONFIG, RANK, device, patience=PATIENCE, means=means(store, **others), metrics=counts) as it,
    ):
        yield it


async def refused(store: Store, **others: Any) -> Report:
    with pytest.raises((StoreNotReady, StoreUnusable)) as caught:
        async with opened(store, **others):
            pass
    report: object = caught.value.report  # type: ignore[attr-defined]
    assert isinstance(report, Report)
    assert (report.result is Result.NEVER) == isinstance(caught.value, StoreUnusable)
    return report


# --- warm-up


async def test_a_fresh_key_is_put_asked_for_read_back_and_removed() -> None:
    store = Troubled()
    async with opened(store) as it:
        assert store.asked == ["put", "exists", "get", "remove"]
        assert await store.exists(store.keys) == [False]
        assert (it.report.result, it.report.attempts, it.report.removed) == (Result.READY, 1, True)
        assert len(store.values[0]) == NBYTES == 4096


async def test_two_openings_have_different_keys_and_values() -> None:
    """The value is of the key: what comes back for one key cannot pass for another's, nor for zeros."""
    stores = [Troubled(), Troubled()]
    for store in stores:
        async with opened(store):
            pass
    assert stores[0].keys != stores[1].keys
    assert stores[0].values != stores[1].values
    assert stores[0].values[0] not in (bytes(4096), b"")


@pytest.mark.parametrize("step", ["put", "exists", "get"])
@pytest.mark.parametrize(
    "cause",
    [
        *(StoreCause.NO_SPACE, StoreCause.OWNER_UNREACHABLE, StoreCause.MASTER_UNREACHABLE, StoreCause.TIMED_OUT),
        *(StoreCause.MISSING, StoreCause.OTHER),
    ],
)
async def test_what_means_not_yet_is_tried_again(step: str, cause: StoreCause) -> None:
    store = Troubled(**{step: [failed(cause)] * 9})
    async with opened(store) as it:
        assert it.report.attempts == 10


@pytest.mark.parametrize("cause", [StoreCause.BAD_ARGUMENT, StoreCause.WRONG_DATA, StoreCause.CLOSED])
async def test_what_means_never_ends_it_at_once(cause: StoreCause) -> None:
    report = await refused(Troubled(put=[failed(cause, code=-600)] * 2))
    assert (report.result, report.attempts, report.cause, report.code) == (Result.NEVER, 1, cause, -600)


async def test_after_the_last_attempt_the_error_says_which_step_what_code_how_long_and_what_is_likely() -> None:
    store = Troubled(get=[failed(StoreCause.OWNER_UNREACHABLE, "get", -800)] * 99)
    report = await refused(store)
    assert (report.attempts, report.step, report.code) == (10, "get", -800)
    said = str(report)
    assert said.startswith("rank dp0/cp0/tp3/pp1 has no store after 0.")
    for part in (
        "10 attempts",
        "get failed",
        "owner_unreachable",
        "code -800",
        "likely: ",
        "local_hostname, protocol tcp",
    ):
        assert part in said
    assert report.waited_s > 0
    assert store.closed


async def test_other_bytes_than_were_put_are_never_ready() -> None:
    class Liar(Troubled):
        async def get(self, key: str) -> bytes:
            return bytes(NBYTES)

    report = await refused(Liar())
    assert (report.step, report.cause, report.result) == ("compare", StoreCause.WRONG_DATA, Result.NEVER)


async def test_a_key_that_is_put_and_not_there_is_not_taken_for_granted() -> None:
    class Forgetful(Troubled):
        async def exists(self, keys: Any) -> list[bool]:
            return [False]

    report = await refused(Forgetful())
    assert (report.step, report.attempts) == ("exists", 10)


async def test_a_key_that_cannot_be_removed_is_no_reason_to_refuse_a_store_that_works() -> None:
    store = Troubled(remove=[failed(StoreCause.LEASED, "remove", -706)])
    with capture_logs() as logs:
        async with opened(store) as it:
            assert it.report.ready
            assert not it.report.removed
    assert [line["key"] for line in logs if line["event"] == "warm-up key left behind"] == store.keys[:1]


async def test_the_key_is_removed_although_it_was_just_read() -> None:
    """A lease of 10 s holds it: without force it would be left behind each time."""
    shelf = Shelf()
    async with opened(MemoryStore(shelf)) as it:
        assert it.report.removed
        assert shelf.values == {}


def test_by_default_it_is_tried_ten_times_a_second_apart_and_then_less_often() -> None:
    assert StorePatience().warm_up == WARM_UP
    waits = [WARM_UP.wait_s(attempt, Random(1)) for attempt in range(1, 10)]
    assert (waits[0], waits[-1], WARM_UP.max_attempts) == (1.0, 4.0, 10)
    assert 20 < sum(waits) < 25


# --- what is said while it lasts


async def test_every_line_that_is_logged_names_the_rank_from_the_first_attempt_on() -> None:
    store = Troubled(put=[failed(StoreCause.NO_SPACE, code=-200)] * 2)
    with capture_logs() as logs:
        async with opened(store, ask=raising(failed(StoreCause.MASTER_UNREACHABLE, "master"), times=2)):
            pass
    assert [line["event"] for line in logs] == ["store not ready yet"] * 2 + ["store not warm yet"] * 2 + [
        "store ready"
    ]
    assert {line["rank"] for line in logs} == {"dp0/cp0/tp3/pp1"}
    assert [line["code"] for line in logs[2:4]] == [-200, -200]
    assert [line["attempt"] for line in logs[:4]] == [1, 2, 1, 2]


def raising(error: Exception, times: int = 99) -> Callable[[object], Any]:
    left = [error] * times

    async def meet(_: object) -> None:
        if left:
            raise left.pop()

    return meet


async def test_attempts_seconds_and_result_are_counted_by_rank() -> None:
    metrics = Metrics()
    async with opened(Troubled(put=[failed(StoreCause.NO_SPACE)] * 2), metrics=metrics):
        pass
    await refused(Troubled(put=[failed(StoreCause.BAD_ARGUMENT)]), metrics=metrics)
    text = metrics.exposition()[0].decode()
    assert 'pdctl_store_warmup_attempts_total{rank="dp0/cp0/tp3/pp1"} 4.0' in text
    assert 'pdctl_store_openings_total{rank="dp0/cp0/tp3/pp1",result="ready"} 1.0' in text
    assert 'pdctl_store_openings_total{rank="dp0/cp0/tp3/pp1",result="never"} 1.0' in text
    assert 'pdctl_store_opening_seconds{rank="dp0/cp0/tp3/pp1"}' in text


async def test_failed_tries_are_seen_while_the_store_is_still_being_opened() -> None:
    metrics, seen = Metrics(), []

    async def ask(_: object) -> None:
        seen.append(metrics.exposition()[0].decode().count('pdctl_store_failed_tries{rank="dp0/cp0/tp3/pp1"} 2.0'))
        if len(seen) < 4:
            raise failed(StoreCause.MASTER_UNREACHABLE, "master")

    async with opened(Troubled(), metrics=metrics, ask=ask):
        assert seen[:4] == [0, 0, 1, 0]
        assert 'pdctl_store_failed_tries{rank="dp0/cp0/tp3/pp1"} 0.0' in metrics.exposition()[0].decode()


# --- before the warm-up


async def test_a_master_that_is_late_is_waited_for() -> None:
    async with opened(Troubled(), ask=raising(failed(StoreCause.MASTER_UNREACHABLE, "master"), times=4)) as it:
        assert it.report.ready


async def test_a_master_that_never_comes_is_given_up_and_nothing_is_set_up() -> None:
    def opening(_: SetUp) -> Any:
        raise AssertionError("set up against a master that is not there")

    report = await refused(Troubled(), ask=raising(failed(StoreCause.TIMED_OUT, "master")), open=opening)
    assert (report.step, report.attempts, report.result) == ("master", 0, Result.NOT_YET)
    assert "the master hangs" in report.likely


async def test_nothing_is_set_up_here_that_has_not_been_set_up_elsewhere() -> None:
    def opening(_: SetUp) -> Any:
        raise AssertionError("set up although the rehearsal failed")

    report = await refused(Troubled(), rehearse=raising(failed(StoreCause.TIMED_OUT, "set-up")), open=opening)
    assert report.step == "set-up"


async def test_a_set_up_that_can_never_work_is_tried_once() -> None:
    asked: list[object] = []

    async def ask(config: object) -> None:
        asked.append(config)

    refusing = raising(failed(StoreCause.NO_OFFLOAD, "set-up", -1300))
    report = await refused(Troubled(), ask=ask, rehearse=refusing)
    assert len(asked) == 1
    assert "--enable_offload" in report.likely


async def test_a_store_that_did_not_warm_up_is_closed_and_so_is_one_whose_user_fails() -> None:
    cold, warm = Troubled(put=[failed(StoreCause.NO_SPACE)] * 99), Troubled()
    await refused(cold)
    assert cold.closed
    with pytest.raises(ZeroDivisionError):
        async with opened(warm):
            raise ZeroDivisionError
    assert warm.closed


async def test_giving_up_in_the_middle_leaves_nothing_open() -> None:
    store = Troubled(put=[failed(StoreCause.NO_SPACE)] * 9999)
    patience = StorePatience(warm_up=replace(AT_ONCE, max_attempts=None))
    async with open_device("cpu") as device:
        opening = open_store(CONFIG, RANK, device, patience=patience, means=means(store))
        task = asyncio.create_task(opening.__aenter__())
        while len(store.asked) < 3:  # noqa: ASYNC110
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
    assert task.cancelled()
    assert store.closed


async def test_standalone_storage_is_refused_with_a_sentence() -> None:
    config = KVStoreConfig(standalone_storage=True, client_server_address="h:1", protocol="tcp")
    async with open_device("cpu") as device:
        with pytest.raises(ConfigError, match="standalone_storage"):
            await check_store(config, RANK, device, means=means(Troubled()))


# --- with a wheel, of today or old


class Wheel:
    """A stand-in as the installed wheel; `kept` are its objects that are never destroyed."""

    def __init__(self, make: Callable[[Recorded], Any], **answers: Any) -> None:
        self.recorded = Recorded(**answers)
        self.make = make(self.recorded)
        self.kept: list[object] = []

    @asynccontextmanager
    async def opened(self, **changes: Any) -> AsyncIterator[KVStore]:
        config = replace(CONFIG, **changes)
        patience = replace(PATIENCE, rehearsal_s=0.0)
        async with open_device("cpu") as device:
            by_wheel = mooncake_means(config, device, patience, wheels=lambda _: self.make, keep=self.kept.append)
            by_wheel = replace(by_wheel, ask=works)
            async with open_store(config, RANK, device, patience=patience, means=by_wheel) as it:
                yield it

    @property
    def set_up(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        (only,) = self.recorded.named("setup")
        return only


async def test_todays_wheel_is_set_up_without_a_segment_which_is_mounted_and_given_back_apart() -> None:
    wheel = Wheel(new_wheel)
    async with wheel.opened(tenant_id="acme") as it:
        assert it.store.name == "127.0.0.1:12345"
        share = CONFIG.global_segment_size // 16
        assert wheel.set_up[0] == ("127.0.0.1", "P2PHANDSHAKE", 0, 16 << 20, "tcp", "", "127.0.0.1:1")
        assert wheel.set_up[1]["tenant_id"] == "acme"
        assert wheel.recorded.named("mount") == [((share, "tcp"), {})]
        assert wheel.recorded.named("unmount") == []
    assert wheel.recorded.named("unmount") == [((["1-2"],), {})]


async def test_the_wheels_own_close_is_never_called_and_its_object_never_destroyed() -> None:
    """Both hold the interpreter for seconds."""
    wheel = Wheel(new_wheel)
    async with wheel.opened():
        pass
    assert wheel.recorded.named("close") == []
    assert len(wheel.kept) == 1


async def test_an_old_wheel_gets_what_it_knows_and_its_segment_in_set_up() -> None:
    wheel = Wheel(old_wheel)
    async with wheel.opened() as it:
        assert wheel.set_up[0][2] == CONFIG.global_segment_size // 16
        assert it.report.ready
        assert not it.report.removed  # it knows no force, and the lease holds
    assert len(wheel.kept) == 1


async def test_with_an_old_wheel_offload_is_left_out_with_one_warning() -> None:
    wheel = Wheel(old_wheel)
    with capture_logs() as logs:
        async with wheel.opened(enable_ssd_offload=True, ssd_offload_path="/ssd"):
            pass
    (warning,) = [line for line in logs if line["log_level"] == "warning"]
    assert warning["left_out"] == ("enable_ssd_offload", "ssd_offload_path")
    assert warning["rank"] == "dp0/cp0/tp3/pp1"
    assert wheel.set_up[1] == {"engine": None}


async def test_with_an_old_wheel_a_tenant_is_fatal_before_anything_is_called() -> None:
    wheel = Wheel(old_wheel)
    with pytest.raises(ConfigError, match="has no tenant_id"):
        async with wheel.opened(tenant_id="acme"):
            pass
    assert wheel.recorded.calls == []


@pytest.mark.parametrize("make", [old_wheel, new_wheel])
async def test_a_type_error_is_never_swallowed_whatever_it_says(make: Any) -> None:
    """Stock takes one that names a keyword for an old wheel, and tries again without."""
    error = TypeError("setup(): incompatible function arguments: enable_ssd_offload, tenant_id")
    wheel = Wheel(make, setup=error)
    with pytest.raises(TypeError) as caught:
        async with wheel.opened():
            pass
    assert caught.value is error
    assert len(wheel.recorded.named("setup")) == 1


async def test_a_directory_that_the_wheel_does_not_take_is_said_in_its_words() -> None:
    wheel = Wheel(new_wheel, setup=ValueError("Invalid FileStorage configuration"))
    with pytest.raises(StoreUnusable, match="Invalid FileStorage configuration"):
        async with wheel.opened():
            pass


async def test_a_set_up_that_fails_may_be_tried_again_and_makes_no_second_object() -> None:
    wheel = Wheel(new_wheel, setup=[-1, -1, 0])
    async with wheel.opened() as it:
        assert it.report.ready
    assert len(wheel.recorded.named("setup")) == 3
    assert len(wheel.kept) == 1


@pytest.mark.parametrize(
    ("code", "cause", "error"),
    [(-1300, StoreCause.NO_OFFLOAD, StoreUnusable), (-600, StoreCause.BAD_ARGUMENT, StoreUnusable)],
)
async def test_codes_of_set_up_mean_something(code: int, cause: StoreCause, error: type[Exception]) -> None:
    with pytest.raises(error) as caught:
        async with Wheel(new_wheel, setup=code).opened():
            pass
    report = caught.value.report  # type: ignore[attr-defined]
    assert (report.cause, report.code, report.step) == (cause, code, "set-up")


async def test_a_segment_that_cannot_be_mounted_is_no_store() -> None:
    wheel = Wheel(new_wheel, mount={"ret": -600})
    with pytest.raises(StoreUnusable, match=r"set-up failed \(bad_argument, code -600\)"):
        async with wheel.opened():
            pass
    assert wheel.recorded.named("put") == []


async def test_nothing_is_called_before_set_up_has_worked_nor_after_the_end() -> None:
    """There most of the wheel's methods are segmentation faults."""
    wheel = Wheel(new_wheel, setup=-1)
    with pytest.raises(StoreNotReady):
        async with wheel.opened():
            pass
    assert {name for name, _, _ in wheel.recorded.calls} == {"setup"}
    wheel = Wheel(new_wheel)
    async with wheel.opened() as it:
        pass
    so_far = len(wheel.recorded.calls)
    for call in (it.store.put("a", b"1"), it.store.get("a"), it.store.exists(["a"]), it.store.remove("a")):
        with pytest.raises(StoreFailed, match="closed"):
            await call
    assert len(wheel.recorded.calls) == so_far


async def test_a_wheel_without_what_is_needed_is_named_and_nothing_is_tried() -> None:
    class TooOld:
        def setup(self) -> int:
            return 0

    async with open_device("cpu") as device:
        by_wheel = mooncake_means(CONFIG, device, PATIENCE, wheels=lambda _: TooOld)
        with pytest.raises(EngineUnavailable, match="has no put, get"):
            async with open_store(CONFIG, RANK, device, means=replace(by_wheel, ask=works, rehearse=works)):
                pass


def test_the_value_belongs_to_the_key() -> None:
    assert key_of("a") != key_of("b")
    assert value_of("a") == value_of("a") != value_of("b")
    assert len(set(value_of("a"))) > 200
