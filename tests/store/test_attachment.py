"""A store that goes away is misses and drops to who uses it, and comes back by itself."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import numpy as np
import pytest
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from pdctl.counts.store import StoreTrafficMetrics
from pdctl.errors import BadField, ConfigError, StoreCause, StoreFailed
from pdctl.retry import RetryPolicy
from pdctl.store.attachment import Attachment, AttachPolicy, attached
from pdctl.store.base import Each, Ints
from pdctl.store.memory import MemoryStore, Shelf
from tests.store.conftest import Bench, bench

SOON = RetryPolicy(first_wait_s=0.01, multiplier=1.0, max_wait_s=0.01)
KEYS = [f"page{n}" for n in range(8)]


@dataclass
class Watched(MemoryStore):
    """Tells what was asked of it, and fails as it is told."""

    shelf: Shelf
    calls: list[tuple[str, int]] = field(default_factory=list)
    fail: StoreFailed | None = None

    def __post_init__(self) -> None:
        super().__init__(self.shelf)

    async def ask(self) -> None:
        self.calls.append(("ask", 0))
        await self.health()

    async def exists(self, keys: Sequence[str]) -> list[bool]:
        self.calls.append(("exists", len(keys)))
        await asyncio.sleep(0)  # others come meanwhile
        return await super().exists(keys)

    async def get_pages(self, keys: Sequence[str], pointers: Ints, nbytes: Ints) -> Each:
        self.calls.append(("get pages", len(keys)))
        return (self.fail,) * len(keys) if self.fail else await super().get_pages(keys, pointers, nbytes)


@dataclass
class Rig:
    stand: Bench
    store: Watched
    attachment: Attachment
    registry: CollectorRegistry

    def count(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(name, labels) or 0.0

    async def until(self, attached: bool) -> None:
        async with asyncio.timeout(60):
            while self.attachment.is_attached is not attached:  # noqa: ASYNC110  nothing tells of it
                await asyncio.sleep(0.005)


@asynccontextmanager
async def rig(clock: Callable[[], float] = time.monotonic, **policy: float) -> AsyncIterator[Rig]:
    store, registry = Watched(Shelf()), CollectorRegistry()
    chosen = AttachPolicy(until_back=SOON, **policy)  # type: ignore[arg-type]
    async with (
        bench(store) as stand,
        attached(store, store.ask, policy=chosen, metrics=StoreTrafficMetrics(registry), clock=clock) as attachment,
    ):
        yield Rig(stand, store, attachment, registry)


async def test_what_was_put_is_a_hit_and_what_was_not_a_miss() -> None:
    async with rig() as r:
        there, sizes = r.stand.at(*[(n,) for n in range(8)])
        assert await r.attachment.put_pages(KEYS, there, sizes) == [True] * 8
        back, _ = r.stand.at(*[(100 + n,) for n in range(8)])
        assert await r.attachment.get_pages([*KEYS[:7], "other"], back, sizes) == [True] * 7 + [False]
        assert (r.stand.memory[100 * 4096 :][: 7 * 4096] == r.stand.memory[: 7 * 4096]).all()
        assert await r.attachment.exists([*KEYS[:2], "other"]) == [True, True, False]
        assert await r.attachment.put("small", b"1")
        assert (await r.attachment.get("small"), await r.attachment.get("none")) == (b"1", None)
        assert r.attachment.is_attached
        assert r.count("pdctl_store_keys_total", call="read", end="done") == 8
        assert r.count("pdctl_store_keys_total", call="read", end="missing") == 2


async def test_a_store_that_goes_away_is_misses_and_drops_that_are_counted_and_told_once() -> None:
    async with rig() as r:
        at = r.stand.at(*[(n,) for n in range(8)])
        await r.attachment.put_pages(KEYS, *at)
        with capture_logs() as told:
            r.store.shelf.away = True
            for _ in range(3):
                assert await r.attachment.get_pages(KEYS, *at) == [False] * 8
                assert await r.attachment.put_pages(["new"], *r.stand.at((9,))) == [False]
                assert await r.attachment.exists(KEYS) == [False] * 8
                assert not await r.attachment.put("a", b"1")
                assert await r.attachment.get("a") is None
            r.store.shelf.away = False
            await r.until(attached=True)
        assert await r.attachment.get_pages(KEYS, *at) == [True] * 8
        ours = [line["event"] for line in told if line["event"].startswith("store ")]
        assert ours == ["store left alone: reads are misses, writes are dropped", "store is back"]
        ended = {
            call: sum(r.count("pdctl_store_keys_total", call=call, end=end) for end in ("failed", "left_out"))
            for call in ("read", "write", "look_up")
        }
        assert ended == {"read": 27, "write": 6, "look_up": 24}
        assert r.count("pdctl_store_left_total") == 1
        assert r.count("pdctl_store_attached") == 1


async def test_nothing_is_asked_of_a_store_that_is_away() -> None:
    async with rig() as r:
        r.store.fail = StoreFailed(StoreCause.OWNER_UNREACHABLE, "get pages", "it hangs")
        at = r.stand.at((0,))
        await r.attachment.get_pages(["a"], *at)
        r.store.calls.clear()
        for _ in range(5):
            assert await r.attachment.get_pages(["a"], *at) == [False]
        assert r.store.calls == []


async def test_an_owner_that_is_gone_is_left_alone_until_the_master_has_forgotten_it() -> None:
    async with rig(owner_rest_s=0.2) as r:
        r.store.fail = StoreFailed(StoreCause.OWNER_UNREACHABLE, "get pages", "it hangs")
        await r.attachment.get_pages(["a"], *r.stand.at((0,)))
        left = time.monotonic()
        r.store.fail = None
        await r.until(attached=True)
        assert time.monotonic() - left >= 0.2


async def test_a_call_is_not_made_when_the_master_does_not_answer_us() -> None:
    async with rig(fresh_s=0.0) as r:
        r.store.shelf.away = True
        assert await r.attachment.exists(KEYS) == [False] * 8
        assert ("exists", 8) not in r.store.calls


async def test_while_calls_go_well_the_master_is_not_asked_and_after_a_silence_it_is() -> None:
    now = [0.0]
    async with rig(lambda: now[0], fresh_s=1.0) as r:
        for _ in range(5):
            now[0] += 0.9
            await r.attachment.exists(KEYS)
        assert ("ask", 0) not in r.store.calls
        now[0] += 1.1
        await asyncio.gather(*(r.attachment.exists(KEYS) for _ in range(3)))
        assert r.store.calls.count(("ask", 0)) == 1


async def test_calls_that_were_under_way_together_leave_it_once() -> None:
    async with rig(fresh_s=60.0) as r:
        r.store.shelf.away = True
        await asyncio.gather(*(r.attachment.exists(["a"]) for _ in range(3)))
        assert r.count("pdctl_store_keys_total", call="look_up", end="failed") == 3
        assert r.count("pdctl_store_left_total") == 1


async def test_a_page_that_fails_alone_does_not_end_the_others() -> None:
    async with rig() as r:
        r.store.fail = StoreFailed(StoreCause.BAD_ARGUMENT, "get pages", "of another size")
        assert await r.attachment.get_pages(["a", "b"], *r.stand.at((0,), (1,))) == [False, False]
        assert r.attachment.is_attached
        assert r.count("pdctl_store_failures_total", cause="bad_argument") == 2


async def test_no_call_has_more_pieces_than_end_before_the_wheel_gives_up() -> None:
    async with rig(pieces_at_once=6) as r:
        await r.attachment.get_pages(KEYS, *r.stand.at(*[(n, n + 8) for n in range(8)]))
        await r.attachment.get_pages(["wide"], *r.stand.at(tuple(range(9))))
        assert [n for name, n in r.store.calls if name == "get pages"] == [3, 3, 2, 1]


async def test_no_call_has_more_bytes_than_the_offload_buffer_takes() -> None:
    async with rig(nbytes_at_once=3 * 4096) as r:
        await r.attachment.get_pages(KEYS, *r.stand.at(*[(n,) for n in range(8)]))
        await r.attachment.get_pages(["wide"], *r.stand.at(tuple(range(4))))
        assert [n for name, n in r.store.calls if name == "get pages"] == [3, 3, 2, 1]
        assert await r.attachment.get_pages([], *r.stand.at()) == []


async def test_who_asks_to_sees_the_failure_itself() -> None:
    async with rig() as r:
        r.store.shelf.away = True
        for _ in range(2):  # the second is left out
            with pytest.raises(StoreFailed, match="master_unreachable"):
                await r.attachment.get_pages(KEYS[:1], *r.stand.at((0,)), strict=True)
        for work in (r.attachment.get("a", strict=True), r.attachment.exists(["a"], strict=True)):
            with pytest.raises(StoreFailed):
                await work


async def test_a_callers_mistake_is_no_trouble_of_the_store() -> None:
    async with rig() as r:
        with pytest.raises(BadField, match="lie in no registered region"):
            await r.attachment.get_pages(["a"], np.array([[4096]]), np.array([[4096]]))
        there, sizes = r.stand.at(*[(n,) for n in range(40)])
        there[35] = 4096
        with pytest.raises(BadField):  # also beside others
            await r.attachment.put_pages([str(n) for n in range(40)], there, sizes)
        assert r.attachment.is_attached


async def test_a_full_store_is_no_store_that_is_away_and_comes_back_full() -> None:
    async with rig() as r:
        r.store.shelf.nbytes = 1
        assert not await r.attachment.put("a", b"12")
        assert r.attachment.is_attached
        r.store.shelf.away = True
        await r.attachment.exists(["a"])
        r.store.shelf.away = False
        await r.until(attached=True)


async def test_a_closed_store_is_misses() -> None:
    async with rig() as r:
        await r.store.close()
        assert await r.attachment.get_pages(["a"], *r.stand.at((0,))) == [False]


def test_a_policy_without_calls_is_refused() -> None:
    with pytest.raises(ConfigError, match="give at least 1"):
        AttachPolicy(pieces_at_once=0)
