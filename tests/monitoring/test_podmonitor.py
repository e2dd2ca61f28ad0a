"""
deploy/prometheus/podmonitor.yaml against the operator's own schema of a PodMonitor, as far as we use it.

FIELDS is written from example/prometheus-operator-crd/monitoring.coreos.com_podmonitors.yaml of prometheus-operator
v0.91.0 (v1, openAPIV3Schema): names, types, patterns and what is required of the fields that stand in our file. The API
server drops a field that the schema does not know and says nothing, so that here everything else is refused: whoever
writes a new field into the file looks it up there, and adds it here.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]

from tests.monitoring.prometheus import DEPLOY

TEXT = {"type": "string"}
DURATION = {
    "type": "string",
    "pattern": "^(0|(([0-9]+)y)?(([0-9]+)w)?(([0-9]+)d)?(([0-9]+)h)?(([0-9]+)m)?(([0-9]+)s)?(([0-9]+)ms)?)$",
}
ACTIONS = ("Replace", "Keep", "Drop", "HashMod", "LabelMap", "LabelDrop", "LabelKeep", "Lowercase", "Uppercase")


def thing(required: tuple[str, ...] = (), /, **properties: object) -> dict[str, Any]:
    """An object that has these fields and no others."""
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


def several(of: object) -> dict[str, Any]:
    return {"type": "array", "items": of}


RELABELING = thing(
    sourceLabels=several(TEXT),
    targetLabel=TEXT,
    separator=TEXT,
    regex=TEXT,
    replacement=TEXT,
    action={"enum": [*ACTIONS, *map(str.lower, ACTIONS)]},
)
ENDPOINT = thing(port=TEXT, path=TEXT, interval=DURATION, scrapeTimeout=DURATION, relabelings=several(RELABELING))
REQUIREMENT = thing(("key", "operator"), key=TEXT, operator=TEXT, values=several(TEXT))
LABELS = {"type": "object", "additionalProperties": TEXT}
SELECTOR = thing(matchLabels=LABELS, matchExpressions=several(REQUIREMENT))
SPEC = thing(("selector",), selector=SELECTOR, podMetricsEndpoints=several(ENDPOINT))
FIELDS = thing(
    ("apiVersion", "kind", "metadata", "spec"),
    apiVersion={"const": "monitoring.coreos.com/v1"},
    kind={"const": "PodMonitor"},
    metadata=thing(("name",), name=TEXT, labels=LABELS),
    spec=SPEC,
)
MONITORS = list(yaml.safe_load_all((DEPLOY / "podmonitor.yaml").read_text()))


def wrong(monitor: object) -> list[str]:
    """What the operator, or the API server, would refuse or drop, by where it stands."""
    return [f"{error.json_path}: {error.message}" for error in Draft202012Validator(FIELDS).iter_errors(monitor)]


def seconds(duration: str) -> int:
    found = re.fullmatch(r"(?:(\d+)m)?(?:(\d+)s)?", duration)
    assert found, f"{duration}: teach this test the unit"
    return 60 * int(found[1] or 0) + int(found[2] or 0)


@pytest.mark.parametrize("monitor", MONITORS, ids=lambda each: each["metadata"]["name"])
def test_the_operator_knows_every_field_of_ours(monitor: dict[str, Any]) -> None:
    assert wrong(monitor) == []


@pytest.mark.parametrize("monitor", MONITORS, ids=lambda each: each["metadata"]["name"])
def test_what_the_operator_checks_besides_its_schema_holds(monitor: dict[str, Any]) -> None:
    """It rejects the whole resource otherwise: so its own descriptions of these fields."""
    for requirement in monitor["spec"]["selector"]["matchExpressions"]:
        assert requirement["operator"] in ("In", "NotIn", "Exists", "DoesNotExist")
        assert bool(requirement.get("values")) == (requirement["operator"] in ("In", "NotIn"))
    assert monitor["spec"]["podMetricsEndpoints"], "else nothing is scraped"
    for endpoint in monitor["spec"]["podMetricsEndpoints"]:
        assert 0 < seconds(endpoint["scrapeTimeout"]) <= seconds(endpoint["interval"])
        for relabeling in endpoint["relabelings"]:
            assert relabeling["targetLabel"], "mandatory for Replace, which it is unless said"


@pytest.mark.parametrize(
    ("breach", "where"),
    [
        (lambda it: it["spec"].pop("selector"), "selector"),
        (lambda it: it["spec"]["podMetricsEndpoints"][0].update(targetport="pdctl"), "targetport"),
        (lambda it: it["spec"]["podMetricsEndpoints"][0].update(interval="15 s"), "15 s"),
        (lambda it: it["spec"]["podMetricsEndpoints"][0].update(port=8998), "8998"),
        (lambda it: it["spec"]["podMetricsEndpoints"][0]["relabelings"][0].update(target_label="job"), "target_label"),
        (lambda it: it["spec"]["podMetricsEndpoints"][0]["relabelings"][0].update(action="rename"), "rename"),
        (lambda it: it["spec"]["selector"]["matchExpressions"][0].pop("operator"), "operator"),
        (lambda it: it.update(apiVersion="monitoring.coreos.com/v1alpha1"), "apiVersion"),
    ],
)
def test_a_field_that_the_operator_does_not_know_is_found(breach: Any, where: str) -> None:
    planted = copy.deepcopy(MONITORS[0])
    breach(planted)
    (found,) = wrong(planted)
    assert where in found
