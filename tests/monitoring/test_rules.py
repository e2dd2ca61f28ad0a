"""Every alert, by promtool: what fires it, what does not, and when it is over. A sample comes every 15 s."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from pdctl.cli import parser
from tests.monitoring.prometheus import DEPLOY, RULES, promtool
from tests.test_metrics import described

RANK = {"job": "pdctl-ranks", "instance": "p0"}
REGISTRY = {"job": "pdctl-registry", "instance": "r0"}
RUNBOOKS = DEPLOY.parents[1] / "docs" / "runbooks.md"


@dataclass(frozen=True)
class Case:
    """`series` are promtool's; `value` is `$value` as the summary shows it, where it shows one."""

    alert: str
    series: Mapping[str, str]
    fires: tuple[str, ...]
    quiet: tuple[str, ...]
    labels: Mapping[str, str] = field(default_factory=dict)
    value: str = ""
    why: str = ""

    def __str__(self) -> str:
        return f"{self.alert}{'-' if self.why else ''}{self.why.replace(' ', '-')}"


def rank(name: str, **labels: str) -> str:
    return _series(name, RANK | labels)


def registry(name: str, **labels: str) -> str:
    return _series(name, REGISTRY | labels)


def _series(name: str, labels: Mapping[str, str]) -> str:
    return f"{{__name__={json.dumps(name)},{','.join(f'{key}={json.dumps(value)}' for key, value in labels.items())}}}"


CASES = [
    Case("PdctlRegistryDown", {registry("up"): "1x8 0x12 1x20"}, ("4m",), ("2m", "2m45s", "6m"), REGISTRY),
    Case("PdctlRankDown", {rank("up"): "1x4 0x16 1x20"}, ("4m",), ("1m", "2m30s", "6m"), RANK),
    Case(
        "PdctlFilesStale",
        {rank("pdctl_access_files_stale", what="certificate"): "0x4 1x30 0x10"},
        *(("7m",), ("5m", "9m"), {**RANK, "what": "certificate"}),
    ),
    Case(
        "PdctlTurnedAway",
        {registry("pdctl_access_denied_total", reason="bad_token"): "0x20 0+2x40 80x100"},
        *(("10m",), ("5m", "30m"), REGISTRY, "38"),
    ),
    Case(
        "PdctlTurnedAway",
        {registry("pdctl_access_denied_total", reason="no_token"): "0+5x80"},
        *((), ("10m", "20m")),
        why="a client that has not got its token yet",
    ),
    Case(
        "PdctlRankUnregistered",
        {rank("pdctl_registered", role="prefill"): "1x8 0x12 1x20"},
        *(("4m",), ("2m", "2m45s", "6m"), {**RANK, "role": "prefill"}),
    ),
    Case(
        "PdctlInstanceIncomplete",
        {registry("pdctl_registry_instances_partial"): "0x4 1x20 0x20"},
        *(("4m",), ("1m", "2m45s", "7m"), REGISTRY, "1"),
    ),
    Case(
        "PdctlNothingReady",
        {
            registry("pdctl_registry_instances", ready="true"): "1x8 0x20 1x20",
            registry("pdctl_registry_instances", ready="false"): "1x8 2x20 1x20",
        },
        *(("5m",), ("2m", "3m30s", "8m"), REGISTRY, "2"),
    ),
    Case(
        "PdctlNothingReady",
        {
            registry("pdctl_registry_instances", ready="true"): "0x40",
            registry("pdctl_registry_instances", ready="false"): "0x40",
        },
        *((), ("5m", "9m")),
        why="a registry that nobody has come to yet",
    ),
    Case(
        "PdctlRanksLost",
        {registry("pdctl_registry_changes_total", kind="expired"): "0x8 2x40"},
        *(("3m",), ("2m", "9m"), REGISTRY, "2"),
    ),
    Case(
        "PdctlRanksLost",
        {registry("pdctl_registry_changes_total", kind="left"): "0+2x40"},
        *((), ("3m", "9m")),
        why="ranks that say goodbye",
    ),
    Case(
        "PdctlClaimsRefused",
        {registry("pdctl_registry_refusals_total", reason="contradiction"): "0x20 1x80"},
        *(("6m",), ("5m", "20m"), REGISTRY, "1"),
    ),
    Case(
        "PdctlClaimsRefused",
        {registry("pdctl_registry_refusals_total", reason="malformed"): "0x20 3x80"},
        *((), ("6m", "20m")),
        why="a scanner that comes by",
    ),
    Case(
        "PdctlSeatFought",
        {registry("pdctl_registry_refusals_total", reason="occupied"): "0x20 0+1x20 20x60"},
        *(("9m",), ("5m", "25m"), {**REGISTRY, "reason": "occupied"}),
    ),
    Case(
        "PdctlSeatFought",
        {
            registry("pdctl_registry_changes_total", kind="replaced"): "0x20 0+1x20 20x60",
            registry("pdctl_registry_seats", state="held"): "2x100",
        },
        *(("9m",), ("5m", "25m"), REGISTRY),
        why="back and forth",
    ),
    Case(
        "PdctlSeatFought",
        {
            registry("pdctl_registry_changes_total", kind="replaced"): "0x20 0+1x16 16x60",
            registry("pdctl_registry_seats", state="held"): "16x100",
        },
        *((), ("9m", "14m")),
        why="a roll-out of sixteen",
    ),
    Case(
        "PdctlAtLimit",
        {registry("pdctl_registry_refusals_total", reason="limit"): "0x20 5x80"},
        *(("6m",), ("5m", "20m"), {**REGISTRY, "reason": "limit"}),
    ),
    Case(
        "PdctlReturnTooSlow",
        {registry("pdctl_admission_registrations_total", lane="leased", result="put_off"): "0x8 0+9x60 540x40"},
        *(("13m",), ("5m", "24m"), REGISTRY),
    ),
    Case("PdctlWitnessDoubts", {registry("pdctl_witness_doubts"): "0x4 1x16 0x9"}, ("4m",), ("2m", "6m"), REGISTRY),
    Case(
        "PdctlVllmIncomplete",
        {registry("pdctl_vllm_prefills", complete="false"): "0x4 1x30 0x10"},
        *(("7m",), ("5m", "9m30s"), {**REGISTRY, "complete": "false"}, "1"),
    ),
    Case(
        "PdctlJournalRefusesWrites",
        {registry("pdctl_journal_trouble"): "0x4 1x8 0x20"},
        *(("2m",), ("1m", "1m15s", "4m"), REGISTRY),
    ),
    Case(
        "PdctlRegistryStale",
        {registry("pdctl_journal_age_seconds"): "0.3x8 15+15x8 0.3x20"},
        *(("3m30s",), ("2m", "2m15s", "5m"), REGISTRY, "1m 30s"),
    ),
    Case(
        "PdctlJournalSlow",
        {
            registry("pdctl_journal_commit_seconds_bucket", le="1.0"): "0x80",
            registry("pdctl_journal_commit_seconds_bucket", le="2.5"): "0+10x80",
            registry("pdctl_journal_commit_seconds_bucket", le="+Inf"): "0+10x80",
        },
        *(("15m",), ("5m", "10m"), {"job": "pdctl-registry"}, "2.485s"),
    ),
    Case(
        "PdctlLinkEjected",
        {rank("pdctl_session_out_seconds"): "0x4 0+15x12 0x20"},
        *(("3m30s",), ("1m", "2m30s", "5m"), RANK, "2m 15s"),
    ),
    Case(
        "PdctlRecoveryFailing",
        {
            rank("pdctl_sessions", state="blocked"): "0x20 2x60 0x20",
            rank("pdctl_session_probes_total", depth="none", result="refused"): "0x20 0+1x60 60x20",
            rank("sglang:failed_session_recoveries_total"): "0x100",
        },
        *(("16m",), ("5m", "14m", "21m"), {**RANK, "state": "blocked"}, "2"),
    ),
    Case(
        "PdctlRecoveryFailing",
        {
            rank("pdctl_sessions", state="blocked"): "2x100",
            rank("pdctl_session_probes_total", depth="none", result="refused"): "0+1x100",
            rank("sglang:failed_session_recoveries_total"): "0+0.1x100",
        },
        *((), ("16m", "24m")),
        why="others are coming back",
    ),
    Case(
        "PdctlLinkFlapping",
        {
            rank("sglang:failed_session_recoveries_total"): "0x20 0+1x10 10x100",
            rank("pdctl_session_ejections_total", cause="timed_out"): "0x20 0+1x10 10x100",
        },
        *(("8m",), ("5m", "30m"), RANK, "10"),
    ),
    Case(
        "PdctlLinkFlapping",
        {
            rank("sglang:failed_session_recoveries_total"): "0x20 10x100",
            rank("pdctl_session_ejections_total", cause="timed_out"): "0x4 2x100",
        },
        *((), ("8m", "15m")),
        why="two that were out are back",
    ),
    Case("PdctlPanic", {rank("pdctl_session_panic_groups"): "0x4 1x12 0x20"}, ("3m",), ("1m30s", "5m"), RANK),
    Case("PdctlSelfDoubt", {rank("pdctl_session_doubt"): "0x4 1x16 0x20"}, ("4m",), ("2m", "6m"), RANK),
    Case(
        "PdctlMessagesLost",
        {rank("pdctl_link_unreachable_total"): "0x4 0+1x40 40x40"},
        *(("8m",), ("4m", "19m"), RANK),
    ),
    Case(
        "PdctlMessagesLost",
        {rank("pdctl_link_messages_dropped_total", kind="malformed"): "0x4 0+1x40 40x40"},
        *(("8m",), ("4m", "19m"), RANK),
        why="a stranger on the port",
    ),
    Case(
        "PdctlRoomsFailing",
        {
            rank("pdctl_rooms_ended_total", side="sender", phase="success"): "0+9x100",
            rank("pdctl_rooms_ended_total", side="sender", phase="failed"): "0x8 0+1x40 40x50",
        },
        *(("11m",), ("3m", "6m", "20m"), {**RANK, "side": "sender"}, "10%"),
    ),
    Case(
        "PdctlRoomsStuck",
        {
            rank("pdctl_rooms_open", side="receiver"): "0x4 3x40 0x20",
            rank("pdctl_rooms_ended_total", side="receiver", phase="success"): "5x64",
        },
        *(("8m",), ("5m", "12m"), {**RANK, "side": "receiver"}, "3"),
    ),
    Case(
        "PdctlRoomsStuck",
        {
            rank("pdctl_rooms_open", side="receiver"): "3x60",
            rank("pdctl_rooms_ended_total", side="receiver", phase="success"): "5+1x60",
        },
        *((), ("8m", "12m")),
        why="one after the other",
    ),
    Case(
        "PdctlTransferSlow",
        {
            rank("pdctl_room_sent_bytes_total"): "0+150e6x80",  # 20 MB in each of 7.5 s of writing every 15 s
            rank("pdctl_room_send_seconds_total"): "0+7.5x80",
        },
        *(("14m",), ("5m",), RANK, "20M"),
    ),
    Case(
        "PdctlTransferSlow",
        {
            rank("pdctl_room_sent_bytes_total"): "0+1e6x80",
            rank("pdctl_room_send_seconds_total"): "0+0.1x80",
        },
        *((), ("5m", "11m", "19m")),
        why="a few small rooms",
    ),
    Case(
        "PdctlTransferSlow",
        {
            **{
                _series("pdctl_room_sent_bytes_total", {**RANK, "instance": f"p{n}"}): f"0+{speed}e9x80"
                for n, speed in enumerate((3, 60, 60, 60))
            },
            **{_series("pdctl_room_send_seconds_total", {**RANK, "instance": f"p{n}"}): "0+7.5x80" for n in range(4)},
        },
        *(("14m",), ("5m",), RANK, "400M"),
        why="one rank of many",
    ),
    Case(
        "PdctlRoomsSlow",
        {
            _series("pdctl_room_seconds_bucket", RANK | {"side": "sender", "le": le, "pdctl_seat": seat}): values
            for seat in ("dp0/cp0/tp0/pp0", "dp0/cp0/tp1/pp0")
            for le, values in (("30.0", "0x80"), ("60.0", "0+10x80"), ("+Inf", "0+10x80"))
        },
        *(("15m",), ("5m",), {"job": "pdctl-ranks", "side": "sender"}, "58.5s"),
    ),
    Case(
        "PdctlPagesQuarantined",
        {rank("pdctl_room_pages_quarantined", side="sender"): "0x4 8x80 0x20"},
        *(("17m",), ("15m", "22m"), {**RANK, "side": "sender"}, "8"),
    ),
    Case(
        "PdctlBytesDiffer",
        {rank("pdctl_room_checksums_total", result="differed"): "0x20 1x300"},
        *(("6m",), ("5m", "1h10m"), {**RANK, "result": "differed"}),
    ),
    Case(
        "PdctlStoreWarmupRetrying",
        {rank("pdctl_store_failed_tries", rank="dp0/cp0/tp3/pp0"): "0x4 1 2 3 4 5 0x40"},
        *(("2m",), ("1m30s", "5m"), {**RANK, "rank": "dp0/cp0/tp3/pp0"}, "4"),
    ),
    Case(
        "PdctlStoreAway",
        {rank("pdctl_store_attached"): "1x8 0x12 1x20", rank("pdctl_store_left_total"): "0x8 1x32"},
        *(("4m",), ("2m", "3m", "6m"), RANK),
    ),
    Case(
        "PdctlStoreAway",
        {rank("pdctl_store_attached"): "0x40", rank("pdctl_store_left_total"): "0x40"},
        *((), ("4m", "9m")),
        why="a process without a store",
    ),
    Case(
        "PdctlStoreFailing",
        {
            rank("pdctl_store_attached"): "1x80",
            rank("pdctl_store_failures_total", cause="no_space"): "0x4 0+15x40 600x40",
        },
        *(("9m",), ("5m", "19m"), RANK, "1"),
    ),
]


def alerts() -> dict[str, dict[str, Any]]:
    groups = yaml.safe_load((DEPLOY / "alerts.rules.yml").read_text())["groups"]
    return {rule["alert"]: rule for group in groups for rule in group["rules"]}


ALERTS = alerts()


def filled(text: str, labels: Mapping[str, str], value: str) -> str:
    """An annotation as Prometheus fills it in."""
    text = re.sub(r"{{ \$labels\.(\w+) }}", lambda found: labels[found[1]], text)
    return re.sub(r"{{ \$value[^}]* }}", value, text)


def expected(case: Case) -> dict[str, Any]:
    rule = ALERTS[case.alert]
    said = {name: filled(text, case.labels, case.value) for name, text in rule["annotations"].items()}
    return {"exp_labels": {**case.labels, **rule["labels"]}, "exp_annotations": said}


def promise(case: Case) -> dict[str, Any]:
    """As promtool wants it written."""
    asked = [
        *({"eval_time": at, "alertname": case.alert, "exp_alerts": [expected(case)]} for at in case.fires),
        *({"eval_time": at, "alertname": case.alert, "exp_alerts": []} for at in case.quiet),
    ]
    series = [{"series": name, "values": values} for name, values in case.series.items()]
    return {"name": str(case), "interval": "15s", "input_series": series, "alert_rule_test": asked}


def test_alerts_fire_when_they_should_and_only_then(tmp_path: Path) -> None:
    """All in one run: promtool takes longer to start than to judge. What it says names the alert and the time."""
    path = tmp_path / "test.yml"
    rules = [str(rule) for rule in RULES]
    path.write_text(
        json.dumps({"rule_files": rules, "evaluation_interval": "30s", "tests": [promise(case) for case in CASES]})
    )
    promtool("test", "rules", str(path))


def test_every_alert_is_shown_to_fire_and_to_stay_quiet() -> None:
    assert {case.alert for case in CASES if case.fires and case.quiet} == set(ALERTS)


def test_promtool_finds_nothing_wrong_with_the_rules() -> None:
    promtool("check", "rules", "--lint=all", "--lint-fatal", *map(str, RULES))


def test_what_alerts_and_recordings_read_is_a_metric_or_a_recording() -> None:
    text = "\n".join(path.read_text() for path in RULES)
    recorded = set(re.findall(r"record: (\S+)", text))
    read = set(re.findall(r"\b(?:pdctl|sglang)[a-z0-9_]*[_:][a-z0-9_:]+(?=[\s{\[)<>]|$)", _expressions(), re.MULTILINE))
    plain = {re.sub(r"_(bucket|sum|count)$", "", name) for name in read - recorded}
    assert plain - set(described()) == set()
    assert len(read) > 30


def _expressions() -> str:
    groups = [group for path in RULES for group in yaml.safe_load(path.read_text())["groups"]]
    return "\n".join(rule["expr"] for group in groups for rule in group["rules"])


@pytest.mark.parametrize("name", ALERTS)
def test_an_alert_says_what_to_do_and_leads_to_its_section_of_the_runbooks(name: str) -> None:
    rule = ALERTS[name]
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert set(rule["annotations"]) == {"summary", "do", "runbook_url"}
    page, _, anchor = rule["annotations"]["runbook_url"].partition("#")
    assert DEPLOY.parents[1] / page == RUNBOOKS
    assert anchor == name.lower(), "a heading's anchor is its text in small letters"
    assert f"\n## {name}\n" in RUNBOOKS.read_text()


def test_the_runbooks_have_a_section_for_every_alert_and_no_other() -> None:
    assert set(re.findall(r"^## (Pdctl\w+)$", RUNBOOKS.read_text(), re.MULTILINE)) == set(ALERTS)


def commands() -> list[list[str]]:
    """Each `pdctl ...` that an alert or a runbook tells to type, its placeholders filled in."""
    said = [f"`{line}`" for line in re.findall(r"^    (pdctl .*?)(?:  #.*)?$", RUNBOOKS.read_text(), re.MULTILINE)]
    said += re.findall(r"`pdctl [^`]*`", RUNBOOKS.read_text())
    filled = [re.sub(r"\b(INSTANCE|REGISTRY|SESSION|P|D)\b", "10.0.0.1:1", line.strip("`")) for line in said]
    return [line.split()[1:] for line in filled]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_what_the_runbooks_tell_to_type_is_understood(words: list[str]) -> None:
    if words != ["serve"] and words != ["drain"]:  # named, not typed
        parser().parse_args(words)


def test_what_alerts_tell_to_type_is_a_command() -> None:
    told = {name for rule in ALERTS.values() for name in re.findall(r"pdctl (\w+)", rule["annotations"]["do"])}
    assert {"status", "explain", "events", "sessions"} <= told
    for name in told:
        with pytest.raises(SystemExit) as done:
            parser().parse_args([name, "--help"])
        assert done.value.code == 0, name
