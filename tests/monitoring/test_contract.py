"""What each kind of process answers at /metrics is what docs/metrics.md says: a name, a type or a label that changes is
a dashboard that breaks. A registry, a prefill and a decode are asked in tests/monitoring/test_fleet.py."""

from __future__ import annotations

import re
from pathlib import Path

import aiohttp
import pytest

from pdctl.agent_client import AgentClient
from pdctl.core.kvstore import KVStoreConfig, StoreRank
from pdctl.core.route import Seat
from pdctl.device.open import open_device
from pdctl.errors import StoreCause
from pdctl.kvstore import open_store
from pdctl.metrics import Metrics
from tests.agent_engine import SHAPE, Memory
from tests.agents import agent
from tests.monitoring.contract import breaches
from tests.monitoring.prometheus import ROOT, promtool
from tests.test_kvstore import PATIENCE, Troubled, failed, means
from tests.test_metrics import described

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NO_METRICS = {"pdctl_http", "pdctl_instance", "pdctl_role", "pdctl_seat", "pdctl_store"}
"""Where a rank answers, in its lease; labels of its target; how names begin."""

STOCKS_OWN = "sglang:failed_session_recoveries_total"


async def test_what_an_agents_rank_answers_is_what_the_page_of_metrics_says(tmp_path: Path) -> None:
    memory = Memory(tmp_path / "pool")
    with agent(tmp_path / "agent", "--registry", "http://127.0.0.1:1") as running:
        async with AgentClient(running.socket) as client, aiohttp.ClientSession() as http:
            handed = client.prefill(memory.pools, [memory.arena.handed], seat=Seat(0, 0, 0, 0), shape=SHAPE)
            async with handed as rank:
                answer = await http.get((await rank.status())["metrics_url"])
                text = await answer.text()
    assert breaches(text) == []
    assert 'pdctl_registered{role="prefill"} 0.0' in text


async def test_what_a_process_with_a_store_answers_is_what_the_page_of_metrics_says() -> None:
    metrics, store = Metrics(), Troubled(put=[failed(StoreCause.NO_SPACE)])
    async with (
        open_device("cpu") as device,
        open_store(
            KVStoreConfig(master_server_address="127.0.0.1:1", protocol="tcp"),
            *(StoreRank(tp=3, tp_size=8), device),
            patience=PATIENCE,
            means=means(store),
            metrics=metrics.store,
            traffic=metrics.store_traffic,
        ),
    ):
        text = metrics.exposition()[0].decode()
    assert breaches(text) == []
    assert 'pdctl_store_warmup_attempts_total{rank="dp0/cp0/tp3/pp0"} 2.0' in text


@pytest.mark.parametrize(
    ("was", "now", "said"),
    [
        ("# TYPE pdctl_journal_trouble gauge", "# TYPE pdctl_journal_trouble untyped", "the page says gauge"),
        ("# TYPE pdctl_journal_trouble gauge\npdctl_journal_trouble 0.0\n", "", "it is on the page only"),
        ('pdctl_rooms_open{side="sender"}', 'pdctl_rooms_open{room="7"}', "labels ['room'] are answered"),
        ('pdctl_rooms_open{side="sender"}', 'pdctl_rooms_open{side="both"}', "side='both' is not on the page"),
        ("pdctl_journal_trouble", "pdctl_journal_worry", "the page does not have it"),
    ],
    ids=["type", "missing", "label", "value", "name"],
)
def test_a_change_of_a_metric_is_found_out(was: str, now: str, said: str) -> None:
    text = Metrics().exposition()[0].decode()
    assert breaches(text) == []
    changed = text.replace("# HELP pdctl_journal_trouble 1 while the journal takes no rows.\n", "").replace(was, now)
    assert said in "; ".join(breaches(changed))


def test_prometheus_own_linter_minds_none_of_our_names() -> None:
    lines = Metrics().exposition()[0].decode().splitlines()
    stocks = [line for line in lines if STOCKS_OWN.removesuffix("_total") in line or "_created" in line]
    promtool("check", "metrics", stdin="\n".join([line for line in lines if line not in stocks] + [""]).encode())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_names_only_metrics_that_there_are(page: Path) -> None:
    named = {name for name in re.findall(r"`(pdctl_[a-z0-9_]*[a-z0-9])\b", page.read_text()) if name not in NO_METRICS}
    assert named - set(described()) == set()
