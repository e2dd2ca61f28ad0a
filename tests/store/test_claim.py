"""Opening a store that offloads: whose directory it is, when it is entered, and what is handed out."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from pdctl.core.kvstore import KVStoreConfig, SetUp, StoreRank
from pdctl.device.open import open_device
from pdctl.errors import ConfigError
from pdctl.kvstore import KVStore, StoreMeans, open_store
from pdctl.metrics import Metrics
from pdctl.store import master as asking
from pdctl.store.base import Store, StoreAbility
from pdctl.store.memory import MemoryStore, Shelf
from pdctl.store.offloading import offloading
from pdctl.store.patience import StorePatience
from tests.store.conftest import Kept
from tests.store.master import Master

RANK = StoreRank(tp=1, tp_size=2)
PARAMETERS = frozenset({"enable_ssd_offload", "ssd_offload_path"})


class Told:
    """What happened, in order."""

    def __init__(self, root: Path) -> None:
        self.events: list[str] = []
        self.plans: list[SetUp] = []
        self.shelf = Shelf()
        self.config = KVStoreConfig(
            "127.0.0.1:1",
            local_hostname="127.0.0.1",
            protocol="tcp",
            global_segment_size=2 << 20,
            enable_ssd_offload=True,
            ssd_offload_path=str(root),
        )

    @property
    def means(self) -> StoreMeans:
        return StoreMeans(
            ability=lambda: StoreAbility("memory", "", PARAMETERS),
            ask=self._ask,
            rehearse=self._rehearse,
            open=self._open,
            claim=lambda plan, rank: offloading(plan, rank, {}, self._names),
            pieces_at_once=3,
        )

    async def _ask(self, _: object) -> None:
        self.events.append("ask")

    async def _rehearse(self, _: object) -> None:
        self.events.append("rehearse")

    async def _names(self) -> frozenset[str]:
        self.events.append("names")
        return frozenset()

    @asynccontextmanager
    async def _open(self, plan: SetUp) -> AsyncIterator[Store]:
        self.events.append("open")
        self.plans.append(plan)
        yield MemoryStore(self.shelf, "127.0.0.1:12345")


@asynccontextmanager
async def opened(told: Told, metrics: Metrics | None = None) -> AsyncIterator[KVStore]:
    traffic = None if metrics is None else metrics.store_traffic
    async with (
        open_device("cpu") as device,
        open_store(told.config, RANK, device, patience=StorePatience(), means=told.means, traffic=traffic) as it,
    ):
        yield it


async def test_a_rank_enters_its_directory_when_the_master_has_answered_and_asks_again_before_set_up(
    tmp_path: Path,
) -> None:
    (tmp_path / "rank_0_1_0_0").mkdir()
    (tmp_path / "rank_0_1_0_0" / "file").write_text("kept")
    (tmp_path / "rank_0_1_0_0.life").write_text('{"name": "127.0.0.1:11111"}')
    told = Told(tmp_path)
    async with opened(told):
        assert told.events[:6] == ["ask", "rehearse", "names", "names", "ask", "open"]
        assert told.plans[0].options["ssd_offload_path"] == str(tmp_path / "rank_0_1_0_0")
        assert "127.0.0.1:12345" in (tmp_path / "rank_0_1_0_0.life").read_text()
    with pytest.raises(ConfigError, match="is held by process"):
        async with opened(told):
            pass


async def test_a_wheel_that_knows_no_offload_enters_no_directory(tmp_path: Path) -> None:
    told = Told(tmp_path)
    old = replace(told.means, ability=lambda: StoreAbility("memory", "", frozenset()))
    async with open_device("cpu") as device, open_store(told.config, RANK, device, means=old):
        assert told.plans[0].options == {}
    assert not (tmp_path / "rank_0_1_0_0").exists()


async def test_who_opens_a_store_gets_it_as_hits_and_misses_too(tmp_path: Path) -> None:
    told, metrics = Told(tmp_path), Metrics()
    async with opened(told, metrics) as it:
        assert await it.attachment.put("a", b"1")
        told.shelf.away = True
        assert await it.attachment.get("a") is None
        assert not it.attachment.is_attached
    assert b'pdctl_store_keys_total{call="write",end="done"} 1.0' in metrics.exposition()[0]


async def test_a_real_master_tells_the_names_of_segments_while_they_are_mounted(
    running_master: Master, kept: Kept
) -> None:
    config = KVStoreConfig(running_master.address, protocol="tcp", master_metrics_port=running_master.http)
    async with kept.open(running_master) as store:
        assert store.name in (await asking.segments(config, deadline_s=30) or ())
    assert store.name not in (await asking.segments(config, deadline_s=30) or ())
    for silent in (replace(config, master_metrics_port=0), replace(config, master_metrics_port=running_master.rpc)):
        assert await asking.segments(silent, deadline_s=0.3) is None
