"""deploy/kubernetes: every overlay builds, Kubernetes takes it, and it says of pdctl and of the engines what is so."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from copy import deepcopy
from typing import Any
from urllib.parse import urlsplit

import kubernetes_validate
import pytest
import yaml

from pdctl.errors import ConfigError
from tests.deploy import manifests
from tests.deploy.manifests import (
    JSON,
    KUBERNETES,
    OVERLAYS,
    ROOT,
    Container,
    built,
    containers,
    named,
    ours,
    workloads,
)

VERSIONS = ("1.30", "1.37")
"""The oldest that has native sidecars and `sleep` in hooks without being asked, and the newest that is known here."""

KNOWN_TO_BOTH = {
    *("apiVersion", "kind", "namespace", "bases", "resources"),
    *("patchesStrategicMerge", "images", "configMapGenerator"),
}
"""Fields that kustomize 2.0.3, which is in Debian's kubectl, takes, and 5, which is in today's."""

ALL = [pytest.param(overlay, each, id=f"{overlay}:{each.id}") for overlay in OVERLAYS for each in containers(overlay)]
OURS = [pytest.param(overlay, each, id=f"{overlay}:{each.id}") for overlay in OVERLAYS for each in ours(overlay)]


def of_kind(overlay: str, kind: str) -> list[JSON]:
    return [each for each in built(overlay) if each["kind"] == kind]


def labels(workload: JSON) -> dict[str, str]:
    found: dict[str, str] = workload["spec"]["template"]["metadata"]["labels"]
    return found


def selects(selector: JSON, has: dict[str, str]) -> bool:
    """As Kubernetes matches labels."""
    plain = selector.get("matchLabels", {})
    among = selector.get("matchExpressions", [])
    assert all(row["operator"] == "In" for row in among)
    return all(has.get(k) == v for k, v in plain.items()) and all(has.get(row["key"]) in row["values"] for row in among)


# --- Kubernetes takes it


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kubernetes_takes_every_object_and_every_field_of_it(overlay: str, version: str) -> None:
    for each in built(overlay):
        kubernetes_validate.validate(each, version, strict=True)


def test_a_field_that_kubernetes_does_not_have_is_found() -> None:
    broken = deepcopy(named("sglang", "sglang-prefill/pdctl").workload)
    broken["spec"]["template"]["spec"]["initContainers"][0]["restartPolicies"] = "Always"
    with pytest.raises(kubernetes_validate.ValidationError, match="restartPolicies"):
        kubernetes_validate.validate(broken, VERSIONS[0], strict=True)


def test_old_and_new_kustomize_take_the_files() -> None:
    for path in KUBERNETES.rglob("kustomization.yaml"):
        assert set(yaml.safe_load(path.read_text())) <= KNOWN_TO_BOTH, path


def test_no_yaml_lies_about_that_nobody_builds() -> None:
    listed = {
        path.parent / name for path in KUBERNETES.rglob("kustomization.yaml") for name in _files_of(path.read_text())
    }
    others = {path for path in KUBERNETES.rglob("*.yaml") if path.name != "kustomization.yaml"}
    assert others == {path for path in listed if path.suffix == ".yaml"}


def _files_of(text: str) -> Iterator[str]:
    table = yaml.safe_load(text)
    yield from table.get("resources", [])
    yield from table.get("patchesStrategicMerge", [])


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_image_is_pinned(overlay: str) -> None:
    for each in containers(overlay):
        name, _, tag = each.spec["image"].rpartition(":")
        assert "/" in name, f"{each.id}: no overlay says where {each.spec['image']} comes from"
        assert re.search(r"\d", tag), f"{each.id}: {tag} says no version"


# --- what it says of pdctl


@pytest.mark.parametrize(("overlay", "each"), OURS)
def test_pdctl_understands_its_words_and_its_variables(
    overlay: str, each: Container, monkeypatch: pytest.MonkeyPatch
) -> None:
    environ = {name: value for name, value in each.environment.items() if name.startswith("PDCTL_")}
    args, settings = manifests.understood(each.words[1:], environ, monkeypatch)
    assert args.lasts(settings), "it would end, and be started again for ever"
    if each.words[1] == "serve":
        assert settings.serve.port == each.ports["pdctl"]
        assert settings.serve.journal, "the file for this port would be written into a home that there is not"
    else:
        assert settings.node.http_port == each.ports["pdctl-rank"]
        assert settings.node.host == manifests.DOWNWARD["status.podIP"]


@pytest.mark.parametrize(("overlay", "each"), OURS)
def test_no_variable_that_kubernetes_makes_of_a_service_reaches_pdctl(
    overlay: str, each: Container, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Service pdctl-registry would become PDCTL_REGISTRY_PORT, which is no setting."""
    assert each.pod["enableServiceLinks"] is False
    with pytest.raises(ConfigError, match="PDCTL_REGISTRY_PORT is no setting"):
        manifests.understood(["serve"], {"PDCTL_REGISTRY_PORT": "tcp://10.96.0.1:8998"}, monkeypatch)


@pytest.mark.parametrize(
    ("overlay", "each"), [*OURS, pytest.param("fleet", named("fleet", "pdctl-etcd/etcd"), id="etcd")]
)
def test_pdctl_and_its_etcd_run_with_no_right_that_they_do_not_need(overlay: str, each: Container) -> None:
    held = (each.pod.get("securityContext") or {}) | each.spec["securityContext"]
    assert held["runAsNonRoot"] is True
    assert held["runAsUser"] == held["runAsGroup"] == 65532
    assert held["readOnlyRootFilesystem"] is True
    assert held["allowPrivilegeEscalation"] is False
    assert held["capabilities"] == {"drop": ["ALL"]}
    assert held["seccompProfile"] == {"type": "RuntimeDefault"}


@pytest.mark.parametrize(("overlay", "each"), ALL)
def test_every_container_says_what_it_needs_and_has_no_token(overlay: str, each: Container) -> None:
    resources = each.spec["resources"]
    assert {"cpu", "memory"} <= set(resources["requests"])
    assert "memory" in resources["limits"]
    assert each.pod["automountServiceAccountToken"] is False
    accounts = {account["metadata"]["name"] for account in of_kind(overlay, "ServiceAccount")}
    assert each.pod["serviceAccountName"] in accounts
    assert each.spec["securityContext"]["allowPrivilegeEscalation"] is False
    assert each.spec["securityContext"]["capabilities"]["drop"] == ["ALL"]


@pytest.mark.parametrize(("overlay", "each"), ALL)
def test_every_volume_is_there_and_what_is_written_to_is_mounted(overlay: str, each: Container) -> None:
    there = {row["name"] for row in each.pod.get("volumes", [])}
    there |= {row["metadata"]["name"] for row in each.workload["spec"].get("volumeClaimTemplates", [])}
    mounts = {row["mountPath"]: row["name"] for row in each.spec.get("volumeMounts", [])}
    assert set(mounts.values()) <= there
    for written in re.findall(r"sqlite:(/\S+)|--data-dir=(/\S+)|--socket=(/\S+)", " ".join(each.words)):
        assert any("".join(written).startswith(f"{mount}/") for mount in mounts), f"{written} is on a read-only disk"


def test_every_writable_place_is_bounded() -> None:
    for overlay in OVERLAYS:
        for each in ours(overlay):
            for row in each.pod["volumes"]:
                assert "emptyDir" not in row or "sizeLimit" in row["emptyDir"] or row["name"] == "models", row


# --- the sidecar and its engine


@pytest.mark.parametrize("overlay", ["sglang", "sglang-rdma"])
def test_the_sidecar_has_the_port_that_sglang_looks_for_before_sglang_starts(overlay: str) -> None:
    """How SGLang takes it is in tests/wire/stock/test_port.py."""
    sidecar, engine = named(overlay, "sglang-prefill/pdctl"), named(overlay, "sglang-prefill/sglang")
    assert sidecar.is_sidecar
    assert sidecar.spec["startupProbe"]["httpGet"]["port"] == "pdctl"
    assert int(engine.flag("disaggregation-bootstrap-port")) == sidecar.ports["pdctl"] == int(sidecar.flag("port"))
    assert (sidecar.flag("host"), engine.flag("host")) == ("0.0.0.0", "0.0.0.0"), (
        "SGLang finds room beside a narrower one"
    )
    assert "SGLANG_RUST_SERVER" not in engine.environment, "its registry is at the API's port"
    annotations = sidecar.workload["spec"]["template"]["metadata"]["annotations"]
    assert annotations["sglang.ai/bootstrap-port"] == sidecar.flag("port")


@pytest.mark.parametrize("overlay", ["sglang", "sglang-rdma"])
def test_prefill_and_decode_agree_on_what_they_have_to(overlay: str) -> None:
    prefill, decode = named(overlay, "sglang-prefill/sglang"), named(overlay, "sglang-decode/sglang")
    for name in ("model-path", "disaggregation-transfer-backend", "disaggregation-bootstrap-port"):
        assert prefill.flag(name) == decode.flag(name)
    assert (prefill.flag("disaggregation-mode"), decode.flag("disaggregation-mode")) == ("prefill", "decode")


def transfer_config(each: Container) -> JSON:
    found: JSON = json.loads(each.flag("kv-transfer-config"))
    assert set(found) <= {"kv_connector", "kv_role", "kv_connector_extra_config"}
    assert set(found["kv_connector_extra_config"]) <= {"bootstrap_server_address", "mooncake_protocol"}
    return found


def test_vllm_registers_with_its_sidecar() -> None:
    sidecar, engine = named("vllm", "vllm-prefill/pdctl"), named("vllm", "vllm-prefill/vllm")
    assert sidecar.is_sidecar
    assert sidecar.spec["startupProbe"]["httpGet"]["port"] == "pdctl"
    address = transfer_config(engine)["kv_connector_extra_config"]["bootstrap_server_address"]
    assert address == f"127.0.0.1:{sidecar.flag('port')}"


def test_vllm_registers_with_the_fleet_and_has_no_sidecar() -> None:
    engine = named("vllm-fleet", "vllm-prefill/vllm")
    assert not engine.pod["initContainers"]
    at = transfer_config(engine)["kv_connector_extra_config"]["bootstrap_server_address"]
    assert_reaches("vllm-fleet", f"http://{at}")


@pytest.mark.parametrize(("overlay", "pdctl"), [("vllm", "vllm-prefill/pdctl"), ("vllm-fleet", "pdctl-registry/pdctl")])
def test_the_sizes_that_pdctl_is_told_are_those_of_the_engine(overlay: str, pdctl: str) -> None:
    told = named(overlay, pdctl)
    sizes = told.environment.get("PDCTL_VLLM__SIZES") or told.flag("vllm-sizes")
    assert sizes == f"dp=1,tp={named(overlay, 'vllm-prefill/vllm').flag('tensor-parallel-size')},pp=1"


@pytest.mark.parametrize("overlay", ["vllm", "vllm-fleet"])
def test_vllms_decode_names_no_registry(overlay: str) -> None:
    decode = transfer_config(named(overlay, "vllm-decode/vllm"))
    prefill = transfer_config(named(overlay, "vllm-prefill/vllm"))
    assert (prefill["kv_role"], decode["kv_role"]) == ("kv_producer", "kv_consumer")
    assert "bootstrap_server_address" not in decode["kv_connector_extra_config"]
    assert len({each["kv_connector_extra_config"]["mooncake_protocol"] for each in (prefill, decode)}) == 1


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_the_agent_and_its_engine_share_pool_socket_and_user(role: str) -> None:
    agent, engine = named("agent", f"engine-{role}/pdctl"), named("agent", f"engine-{role}/engine")
    assert agent.is_sidecar
    mounts = [{row["mountPath"]: row["name"] for row in each.spec["volumeMounts"]} for each in (agent, engine)]
    assert mounts[0]["/run/pdctl"] == mounts[1]["/run/pdctl"]
    assert mounts[0]["/kv"] == mounts[1]["/kv"]
    volumes = {row["name"]: row for row in agent.pod["volumes"]}
    assert volumes[mounts[0]["/kv"]]["emptyDir"]["medium"] == "Memory"
    assert engine.environment["PD_AGENT"] == agent.flag("socket") == agent.spec["startupProbe"]["exec"]["command"][-1]
    assert all("runAsUser" not in each.spec["securityContext"] for each in (agent, engine)), "the pod's, for both"
    assert_reaches("agent", agent.flag("registry"))


# --- who reaches whom


def assert_reaches(overlay: str, url: str) -> None:
    """A Service of that name has that port, and pods behind it that have the port by that name."""
    target = urlsplit(url)
    service = next(each for each in of_kind(overlay, "Service") if each["metadata"]["name"] == target.hostname)
    [port] = [row["targetPort"] for row in service["spec"]["ports"] if row["port"] == target.port]
    assert_selected(overlay, service["spec"]["selector"], port)


def assert_selected(overlay: str, selector: dict[str, str], port: str | int) -> None:
    """A sidecar's port has to be a number: older Kubernetes looks for names among the other containers only."""
    behind = [each for each in containers(overlay) if selects({"matchLabels": selector}, labels(each.workload))]
    by_name = {name for each in behind if not each.is_sidecar for name in each.ports}
    by_number = {number for each in behind for number in each.ports.values()}
    assert port in by_name | by_number, f"{selector} has no port {port}"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_service_and_budget_selects_pods_that_there_are(overlay: str) -> None:
    for service in of_kind(overlay, "Service"):
        for row in service["spec"]["ports"]:
            assert_selected(overlay, service["spec"]["selector"], row["targetPort"])
    for budget in of_kind(overlay, "PodDisruptionBudget"):
        assert any(selects(budget["spec"]["selector"], labels(each)) for each in workloads(overlay)), budget
    covered = {each["metadata"]["name"] for each in of_kind(overlay, "PodDisruptionBudget")}
    assert covered == {each["metadata"]["name"] for each in workloads(overlay)}


def allowed(overlay: str, to: dict[str, str], port: int | str, who: dict[str, str]) -> bool:
    """Whether some policy lets a pod with the labels `who` reach `port` of one with the labels `to`."""
    for policy in of_kind(overlay, "NetworkPolicy"):
        if not selects(policy["spec"]["podSelector"], to):
            continue
        for rule in policy["spec"].get("ingress", []):
            peers = any("podSelector" in peer and selects(peer["podSelector"], who) for peer in rule["from"])
            if peers and any(_covers(row, port) for row in rule["ports"]):
                return True
    return False


def _covers(row: JSON, port: int | str) -> bool:
    if isinstance(port, int) and isinstance(row["port"], int):
        return bool(row["port"] <= port <= row.get("endPort", row["port"]))
    return bool(row["port"] == port)


ROLES = ("prefill", "decode", "router", "registry", "etcd", "stranger")
COMPONENT = "app.kubernetes.io/component"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_everything_is_closed_unless_a_policy_opens_it(overlay: str) -> None:
    everything = [each for each in of_kind(overlay, "NetworkPolicy") if each["spec"]["podSelector"] == {}]
    assert {"Ingress"} == {kind for each in everything for kind in each["spec"]["policyTypes"]}
    assert any(not each["spec"].get("ingress") for each in everything)


@pytest.mark.parametrize(
    ("overlay", "to", "port", "who"),
    [
        ("sglang", "prefill", 15000, {"prefill", "decode"}),
        ("sglang", "decode", 40000, {"prefill", "decode"}),
        ("sglang", "prefill", 8998, {"prefill", "decode", "router"}),
        ("sglang", "decode", "api", {"router"}),
        ("vllm-fleet", "prefill", 15000, {"prefill", "decode", "registry"}),
        ("fleet", "registry", "pdctl", {"prefill", "decode", "router", "registry"}),
        ("fleet", "etcd", "client", {"registry"}),
        ("fleet", "etcd", "peer", {"etcd"}),
        ("agent", "prefill", 15000, {"prefill", "decode"}),
    ],
)
def test_a_port_is_open_to_whom_it_is_for_and_to_nobody_else(overlay: str, to: str, port: Any, who: set[str]) -> None:
    assert {each for each in ROLES if allowed(overlay, {COMPONENT: to}, port, {COMPONENT: each})} == who


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_port_that_a_policy_names_is_some_pods(overlay: str) -> None:
    """A name that no pod has opens nothing, and nobody says so."""
    everything = [each for other in OVERLAYS for each in containers(other)]
    names = {name for each in everything if not each.is_sidecar for name in each.ports}
    numbers = {number for each in everything for number in each.ports.values()}
    for policy in of_kind(overlay, "NetworkPolicy"):
        for rule in policy["spec"].get("ingress", []):
            assert {row["port"] for row in rule["ports"] if "endPort" not in row} <= names | numbers


def test_what_prometheus_is_told_to_scrape_is_there() -> None:
    monitors = list(yaml.safe_load_all((ROOT / "deploy" / "prometheus" / "podmonitor.yaml").read_text()))
    everything = [each for other in OVERLAYS for each in containers(other)]
    for monitor in monitors:
        for endpoint in monitor["spec"]["podMetricsEndpoints"]:
            scraped = [each for each in everything if selects(monitor["spec"]["selector"], labels(each.workload))]
            assert any(endpoint["port"] in each.ports for each in scraped), endpoint


# --- etcd


@pytest.mark.parametrize("overlay", ["fleet", "vllm-fleet", "agent"])
def test_the_registries_know_every_member_of_etcd_and_the_members_each_other(overlay: str) -> None:
    registry, etcd = named(overlay, "pdctl-registry/pdctl"), named(overlay, "pdctl-etcd/etcd")
    members = [f"pdctl-etcd-{k}" for k in range(etcd.workload["spec"]["replicas"])]
    [service] = [each for each in of_kind(overlay, "Service") if each["metadata"]["name"] == "pdctl-etcd"]
    assert etcd.workload["spec"]["serviceName"] == "pdctl-etcd"
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    hosts = ",".join(f"{each}.pdctl-etcd:{etcd.ports['client']}" for each in members)
    assert registry.flag("journal") == f"etcd://{hosts}?prefix=pd"
    peers = ",".join(f"{each}=http://{each}.pdctl-etcd:{etcd.ports['peer']}" for each in members)
    assert etcd.flag("initial-cluster") == peers


def test_no_probe_of_a_registry_asks_what_a_store_in_trouble_would_answer_no_to() -> None:
    """All replicas would leave the Service at once. That it is so is shown in test_running.py."""
    for probe in named("fleet", "pdctl-registry/pdctl").probes.values():
        assert probe["httpGet"]["path"] == "/livez"
    assert set(named("sglang", "sglang-prefill/pdctl").probes) == {"startupProbe", "livenessProbe"}


# --- the end of a pod


@pytest.mark.parametrize(("overlay", "each"), ALL)
def test_a_pod_has_time_for_its_hook_and_for_an_orderly_end(overlay: str, each: Container) -> None:
    hook = each.spec.get("lifecycle", {}).get("preStop", {})
    command = hook.get("exec", {}).get("command", ["0"])
    needs_s = hook.get("sleep", {}).get("seconds", 0) + float(command[-1])
    assert each.pod["terminationGracePeriodSeconds"] >= needs_s + 15
