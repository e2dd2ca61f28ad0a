"""docs/metrics.md held against what a process answers: every name, type, label and value, in both directions."""

from __future__ import annotations

import re

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from pdctl.errors import Cause, StoreCause
from tests.test_metrics import described, labels_on_the_page

FREE = {"rank": r"dp\d+/cp\d+/tp\d+/pp\d+"}
"""Labels whose values are not listed, and what they look like."""

CAUSES = {str(cause) for cause in (*Cause, *StoreCause)}


def breaches(text: str) -> list[str]:
    """One sentence for each difference between the page and `text`, what /metrics has answered."""
    there = {name: family for name, family in _families(text).items() if not name.endswith("_created")}
    page = described()
    found = [f"{name}: the page does not have it" for name in there.keys() - page.keys()]
    found += [f"{name}: it is on the page only" for name in page.keys() - there.keys()]
    for name in there.keys() & page.keys():
        found += _differences(name, there[name], *page[name][:2])
    return found


def _families(text: str) -> dict[str, Metric]:
    families = text_string_to_metric_families(text)
    return {f"{family.name}_total" if family.type == "counter" else family.name: family for family in families}


def _differences(name: str, family: Metric, kind: str, cell: str) -> list[str]:
    found = [] if kind == family.type else [f"{name}: {family.type} is answered, the page says {kind}"]
    listed = labels_on_the_page(cell)
    for sample in family.samples:
        labels = {label: value for label, value in sample.labels.items() if label != "le"}
        if set(labels) != listed:
            found.append(f"{name}: labels {sorted(labels)} are answered, the page says {sorted(listed)}")
        for label, value in labels.items():
            if not _is_listed(label, value, cell):
                found.append(f"{name}: {label}={value!r} is not on the page")
    return found


def _is_listed(label: str, value: str, cell: str) -> bool:
    if label in FREE:
        return re.fullmatch(FREE[label], value) is not None
    return re.search(rf"\b{re.escape(value)}\b", cell) is not None or ("cause" in cell and value in CAUSES)
