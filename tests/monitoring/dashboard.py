"""The queries of the Grafana dashboard, as Grafana would send them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from tests.monitoring.prometheus import ROOT

PATH = ROOT / "deploy" / "grafana" / "pdctl.json"


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(PATH.read_text())
    return found


def panels() -> list[dict[str, Any]]:
    """Those that ask for something."""
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def queries(rate_interval: str) -> Iterator[tuple[str, str, str]]:
    """A panel's title, one of its queries with the variables filled in, and its legend."""
    for panel in panels():
        for target in panel["targets"]:
            yield panel["title"], filled(target["expr"], rate_interval), target["legendFormat"]
    for annotation in dashboard()["annotations"]["list"]:
        yield annotation["name"], filled(annotation["expr"], rate_interval), annotation["textFormat"]


def filled(query: str, rate_interval: str) -> str:
    query = query.replace("$__rate_interval", rate_interval).replace("$instance", ".*")
    assert "$" not in query, f"a variable that the dashboard does not define: {query}"
    return query
