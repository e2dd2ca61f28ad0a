"""What is counted keeps its names, and the operators' page describes exactly what /metrics answers."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Metric
from prometheus_client.parser import text_string_to_metric_families

from pdctl.core.kinds import Depth, State
from pdctl.core.standing import Change, ChangeKind
from pdctl.errors import Cause
from pdctl.metrics import Metrics

PAGE = Path(__file__).parent.parent / "docs" / "metrics.md"
ROW = re.compile(r"^\| `(?P<name>[a-zA-Z_:]+)` \|(?P<cells>.*)\|$", re.MULTILINE)


def described() -> dict[str, list[str]]:
    """Each metric's cells: type, labels, counts, when it moves, what to do."""
    return {row["name"]: [cell.strip() for cell in row["cells"].split("|")] for row in ROW.finditer(PAGE.read_text())}


def answered() -> dict[str, Metric]:
    """What /metrics answers, by the name that the page uses."""
    families = list(text_string_to_metric_families(Metrics().exposition()[0].decode()))
    named = {f"{family.name}_total" if family.type == "counter" else family.name: family for family in families}
    return {name: family for name, family in named.items() if not name.endswith("_created")}


def labels_in(family: Metric) -> set[str]:
    return {label for sample in family.samples for label in sample.labels} - {"le"}


def labels_on_the_page(cell: str) -> set[str]:
    """`side: sender, receiver; phase: success` -> side, phase."""
    return {part.split(":")[0].strip() for part in cell.split(";")} - {""}


def test_the_page_describes_every_metric_and_no_other() -> None:
    assert set(answered()) == set(described())


def test_the_page_gives_each_metric_its_type_and_labels() -> None:
    for name, family in answered().items():
        assert described()[name][0] == family.type, name
        if family.samples:  # what is read at the scrape has no series before there is something to read
            assert labels_on_the_page(described()[name][1]) == labels_in(family), name


def test_the_page_gives_each_label_its_values() -> None:
    for name, family in answered().items():
        cell = described()[name][1]
        for value in {v for sample in family.samples for label, v in sample.labels.items() if label != "le"}:
            assert value in cell or "cause" in cell, f"{name}: the page does not list {value}"


def test_the_page_says_what_each_metric_means_and_what_to_do() -> None:
    for name, cells in described().items():
        assert len(cells) == 5, f"{name}: a row has name, type, labels, counts, when it moves, what to do"
        assert all(cells[2:]), f"{name}: an empty cell"


def test_every_help_text_is_a_sentence() -> None:
    for name, family in answered().items():
        assert family.documentation.endswith("."), name


def test_importing_creates_no_metric() -> None:
    program = "import pdctl.metrics, prometheus_client as p; print(*p.REGISTRY._names_to_collectors)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "pdctl" not in done.stdout
    assert "sglang" not in done.stdout


def test_two_in_one_process_do_not_share_a_count() -> None:
    one, other = CollectorRegistry(), CollectorRegistry()
    Metrics(one).sessions.answered(Depth.DATA, None, 0.001)
    Metrics(other)
    assert one.get_sample_value("pdctl_session_probes_total", {"depth": "data", "result": "well"}) == 1
    assert other.get_sample_value("pdctl_session_probes_total", {"depth": "data", "result": "well"}) == 0


@pytest.mark.parametrize(
    ("kind", "before", "held"),
    [
        (ChangeKind.RECOVERED, Cause.TIMED_OUT, None),
        (ChangeKind.LIFTED, Cause.TIMED_OUT, None),
        (ChangeKind.FORGOTTEN, Cause.TIMED_OUT, None),
        (ChangeKind.DROPPED, Cause.TIMED_OUT, Cause.PEER_CHANGED),
    ],
    ids=lambda value: str(value),
)
def test_a_session_is_counted_as_blocked_under_one_cause_at_a_time(
    kind: ChangeKind, before: Cause, held: Cause | None
) -> None:
    registry = CollectorRegistry()
    sessions = Metrics(registry).sessions
    after = State.DROPPED if held else State.TRUSTED
    sessions.changed(Change(ChangeKind.BLOCKED, "a:1", before, None, "why", state=State.BLOCKED))
    sessions.changed(Change(kind, "a:1", held or before, before, "why", 2.0, 1, State.BLOCKED, after))
    blocked = {cause: registry.get_sample_value("pdctl_session_blocked", {"cause": cause}) for cause in Cause}
    assert {cause for cause, n in blocked.items() if n} == ({held} if held else set())
    recoveries = registry.get_sample_value("sglang:failed_session_recoveries_total")
    assert recoveries == (1 if kind is ChangeKind.RECOVERED else 0)
    assert registry.get_sample_value("pdctl_session_recovery_seconds_count") == recoveries
    assert registry.get_sample_value("pdctl_session_ejections_total", {"cause": before}) == 1
    states = {state: registry.get_sample_value("pdctl_sessions", {"state": state}) for state in State}
    assert {state for state, n in states.items() if n} == ({after} if held else set())


def test_what_is_followed_is_read_at_the_scrape() -> None:
    registry = CollectorRegistry()
    sessions = Metrics(registry).sessions
    sessions.follow(known=lambda: 5, panicking=lambda: 2, doubting=lambda: True, threads_held=lambda: 3)
    sessions.changed(Change(ChangeKind.BLOCKED, "a:1", Cause.REFUSED, None, "why", state=State.BLOCKED))
    assert registry.get_sample_value("pdctl_sessions", {"state": "trusted"}) == 4
    assert registry.get_sample_value("pdctl_sessions", {"state": "blocked"}) == 1
    assert registry.get_sample_value("pdctl_session_panic_groups") == 2
    assert registry.get_sample_value("pdctl_session_doubt") == 1
    assert registry.get_sample_value("pdctl_session_probe_threads_held") == 3
