"""What can be said of the dashboard without a Prometheus; tests/monitoring/test_fleet.py runs its queries."""

from __future__ import annotations

import re
from itertools import combinations

from tests.monitoring.dashboard import dashboard, panels, queries
from tests.monitoring.prometheus import RULES
from tests.test_metrics import described


def test_the_dashboard_reads_metrics_and_recordings_that_there_are() -> None:
    recorded = set(re.findall(r"record: (\S+)", RULES[0].read_text()))
    read = {name for _, query, _ in queries("1m") for name in re.findall(r"\bpdctl[a-z0-9_]*[_:][a-z0-9_:]+\b", query)}
    read -= recorded
    assert {re.sub(r"_(bucket|sum|count)$", "", name) for name in read} - set(described()) == set()
    assert len(read) > 20


def test_panels_have_an_id_of_their_own_and_stand_beside_each_other() -> None:
    places = dashboard()["panels"]
    assert len({panel["id"] for panel in places}) == len(places)
    for one, other in combinations((panel["gridPos"] for panel in places), 2):
        apart_x = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        apart_y = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert apart_x or apart_y, (one, other)


def test_every_panel_says_what_it_shows_and_asks_the_chosen_datasource() -> None:
    for panel in panels():
        assert panel["description"].endswith("."), panel["title"]
        assert {target["datasource"]["uid"] for target in panel["targets"]} == {"${datasource}"}
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
