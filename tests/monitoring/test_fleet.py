"""A real fleet and a real Prometheus: every query of the dashboard finds something, and a real fault fires the alert
that is meant, until it is over. The rules are those of deploy/prometheus, sixty times as quick."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from collections.abc import Iterator
from functools import partial
from typing import Any
from urllib.error import HTTPError

import pytest

from pdctl.core.address import Endpoint
from pdctl.core.native import Registration
from pdctl.core.route import Announcement, Seat, Shape
from tests.monitoring.contract import breaches
from tests.monitoring.dashboard import queries
from tests.monitoring.fleet import Fleet, watched
from tests.monitoring.prometheus import Prometheus
from tests.service import until

HALF = Shape(attn_tp_size=2, attn_cp_size=1, dp_size=1, pp_size=1, page_size=16, kv_cache_dtype="float16")
EMPTY_IF_WELL = {
    "Alerts": "none fires",
    "Failing": "no room has failed",
    "Journal: trouble and age": "the journal takes rows",
    "Store: hits": "no store is opened",
    "Store: attached": "no store is opened",
    "Store: failures": "no store is opened",
    "Answers and recoveries": "no link was out",
}
"""Panels of which a query finds nothing in a fleet that is well, and why."""

Seen = tuple[Fleet, Prometheus]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seen]:
    with watched(tmp_path_factory.mktemp("fleet")) as both:
        yield both


@pytest.mark.parametrize("who", ["serve", "prefill", "decode"])
def test_what_a_process_answers_is_what_the_page_of_metrics_says(seen: Seen, who: str) -> None:
    running, _ = seen
    running.move()
    with urllib.request.urlopen(running.metrics_urls[who], timeout=60) as answer:
        text = answer.read().decode()
    assert breaches(text) == []
    assert ("pdctl_registered{" in text) == (who != "serve")


def test_ranks_at_any_port_are_scraped_under_their_names_because_the_registry_says_where_they_are(seen: Seen) -> None:
    running, prometheus = seen
    told = {labels["instance"]: labels for labels, _ in prometheus.query('up{job="pdctl-ranks"}')}
    for role, instance in (("prefill", "default"), ("decode", "decode")):
        labels = told[running.metrics_urls[role].split("/")[2]]
        assert (labels["pdctl_role"], labels["pdctl_instance"]) == (role, instance)
        assert labels["pdctl_seat"] == "dp0/cp0/tp0/pp0"
    until(lambda: [value for _, value in prometheus.query('up{job="pdctl-ranks"}')] == [1, 1])


def test_every_query_of_the_dashboard_finds_what_there_is(seen: Seen) -> None:
    running, prometheus = seen
    for _ in range(5):
        running.move()
    until(lambda: bool(prometheus.query("pdctl:room_send_bytes_per_second > 0")))
    for title, query, legend in queries("2s"):
        found = of_late(prometheus, query)
        if not found and title not in EMPTY_IF_WELL:  # a busy machine misses scrapes, of which a rate needs two
            until(partial(is_found, prometheus, query), title=f"{title}: {query}")
            found = of_late(prometheus, query)
        for series in found:
            assert set(re.findall(r"{{(\w+)}}", legend)) <= set(series["metric"]), f"{title}: {legend}"


def test_a_decode_that_stops_fires_and_clears_when_it_goes_on(seen: Seen) -> None:
    running, prometheus = seen
    room, meant = running.hold(), {"PdctlLinkEjected", "PdctlRankDown"}
    until(lambda: not meant & prometheus.firing())  # a scrape that a busy machine misses fires them too
    running.decode.stop()
    running.prefill.ask_now("go", room=room)
    assert "timed_out" in running.prefill.ask_now("end", room=room)["why"]
    until(lambda: meant <= prometheus.firing())
    (link,) = alerts(prometheus, "PdctlLinkEjected")
    assert link["labels"]["instance"] == running.metrics_urls["prefill"].split("/")[2]
    assert "a link has been out for" in link["annotations"]["summary"]
    running.decode.resume()
    until(lambda: not meant & prometheus.firing())
    running.move()


def test_a_rank_that_never_comes_fires_and_clears_when_it_does(seen: Seen) -> None:
    running, prometheus = seen
    assert "PdctlInstanceIncomplete" not in prometheus.firing()
    assert claim(running, tp=0) == 200
    until(lambda: "PdctlInstanceIncomplete" in prometheus.firing())
    assert claim(running, tp=1) == 200
    until(lambda: "PdctlInstanceIncomplete" not in prometheus.firing())


def test_a_journal_that_is_moved_away_fires_and_clears_when_it_is_put_back(seen: Seen) -> None:
    running, prometheus = seen
    aside = running.journal.with_suffix(".aside")
    running.journal.rename(aside)
    assert claim(running, tp=0, instance="late") == 503
    until(lambda: "PdctlJournalRefusesWrites" in prometheus.firing())
    assert "PdctlRankUnregistered" not in prometheus.firing(), "who is there is not put out by it"
    aside.rename(running.journal)
    until(lambda: "PdctlJournalRefusesWrites" not in prometheus.firing())
    assert [claim(running, tp, instance="late") for tp in (0, 1)] == [200, 200]


def test_a_registry_that_is_killed_fires_for_it_and_for_its_ranks_and_clears_when_it_is_back(seen: Seen) -> None:
    running, prometheus = seen
    meant = {"PdctlRegistryDown", "PdctlRankUnregistered"}
    until(lambda: not meant & prometheus.firing())  # a scrape that a busy machine misses fires them too
    running.registry.kill()
    until(lambda: meant <= prometheus.firing())
    until(lambda: {each["labels"]["role"] for each in alerts(prometheus, "PdctlRankUnregistered")} == BOTH)
    running.start_registry_again()
    until(lambda: not meant & prometheus.firing())


BOTH = {"prefill", "decode"}


def of_late(prometheus: Prometheus, query: str) -> list[Any]:
    now = time.time()
    return prometheus.query_range(query, now - 5, now, 0.25)


def is_found(prometheus: Prometheus, query: str) -> bool:
    return bool(of_late(prometheus, query))


def alerts(prometheus: Prometheus, name: str) -> list[dict[str, dict[str, str]]]:
    return [each for each in prometheus.alerts() if each["labels"]["alertname"] == name]


def claim(running: Fleet, tp: int, instance: str = "half") -> int:
    """What is answered to a rank of another instance that registers."""
    body = Registration.of(Announcement(Seat(0, 0, tp, 0), HALF, Endpoint("127.0.0.1", 9000 + tp)), 60.0).to_body()
    request = urllib.request.Request(
        f"{running.registry.url}/v1/instances/{instance}/ranks/dp0-cp0-tp{tp}-pp0",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
        method="PUT",
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return int(answer.status)
    except HTTPError as error:
        with error:
            return error.code
