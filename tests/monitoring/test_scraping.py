"""Where Prometheus is told to look: the ports and labels that deploy/kubernetes gives its pods, and two jobs of it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tests.monitoring.prometheus import DEPLOY, ROOT, promtool

JOB_OF_PORT = {"pdctl": "pdctl-registry", "pdctl-rank": "pdctl-ranks"}


def pods() -> Iterator[tuple[dict[str, str], set[str]]]:
    """Labels and names of ports of every pod of ours, init containers included: native sidecars are such."""
    for path in sorted((ROOT / "deploy" / "kubernetes").rglob("*.yaml")):
        for document in yaml.safe_load_all(path.read_text()):
            template = ((document or {}).get("spec") or {}).get("template")
            if isinstance(template, dict) and "labels" in template.get("metadata", {}):
                spec = template["spec"]
                containers = [*spec.get("initContainers", []), *spec.get("containers", [])]
                ports = {port["name"] for each in containers for port in each.get("ports", [])}
                yield template["metadata"]["labels"], ports


def monitors() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / "podmonitor.yaml").read_text()))


def selects(monitor: dict[str, Any], labels: dict[str, str]) -> bool:
    wanted = monitor["spec"]["selector"]["matchExpressions"]
    assert {each["operator"] for each in wanted} == {"In"}
    return all(labels.get(each["key"]) in each["values"] for each in wanted)


def job_of(endpoint: dict[str, Any]) -> str:
    (job,) = (each["replacement"] for each in endpoint["relabelings"] if each["targetLabel"] == "job")
    return str(job)


def test_the_pod_monitors_find_each_of_our_ports_in_one_job_and_no_other() -> None:
    there = [(labels, port) for labels, ports in pods() for port in ports if port in JOB_OF_PORT]
    assert {port for _, port in there} == set(JOB_OF_PORT)
    for labels, port in there:
        found = [
            job_of(endpoint)
            for monitor in monitors()
            for endpoint in monitor["spec"]["podMetricsEndpoints"]
            if selects(monitor, labels) and endpoint["port"] == port
        ]
        assert found == [JOB_OF_PORT[port]], (labels, port)


def test_pod_monitors_and_files_scrape_as_often() -> None:
    every = {
        yaml.safe_load((DEPLOY / name).read_text())["global"]["scrape_interval"]
        for name in ("prometheus.yml", "kubernetes.yml")
    }
    every |= {endpoint["interval"] for each in monitors() for endpoint in each["spec"]["podMetricsEndpoints"]}
    assert every == {"15s"}


def test_promtool_takes_the_configuration_with_what_is_offered_in_comments(tmp_path: Path) -> None:
    promtool("check", "config", str(DEPLOY / "prometheus.yml"))
    text = (DEPLOY / "prometheus.yml").read_text()
    text = (
        text.replace("    # http_sd", "    http_sd")
        .replace("    #   - url", "      - url")
        .replace("    #     ", "        ")
    )
    text = text.replace("  - recording", f"  - {DEPLOY}/recording").replace("  - alerts", f"  - {DEPLOY}/alerts")
    (tmp_path / "prometheus.yml").write_text(text)
    said = yaml.safe_load(text)["scrape_configs"][1]["http_sd_configs"]
    assert [each["url"] for each in said] == ["http://10.0.0.1:8998/v1/targets"]
    promtool("check", "config", str(tmp_path / "prometheus.yml"))


def test_without_the_operator_the_same_ports_become_the_same_jobs(tmp_path: Path) -> None:
    """Debian's Prometheus is built without Kubernetes: what it would find is written down, the rest is the file's."""
    config = yaml.safe_load((DEPLOY / "kubernetes.yml").read_text())
    (job,) = config["scrape_configs"]
    assert job.pop("kubernetes_sd_configs") == [{"role": "pod"}]
    job["static_configs"] = [
        found("10.0.0.1:8998", "pdctl", "Running"),
        found("10.0.0.2:9001", "pdctl-rank", "Running"),
        found("10.0.0.2:8000", "api", "Running"),
        found("10.0.0.3:8998", "pdctl", "Succeeded"),
    ]
    config["rule_files"] = [str(DEPLOY / name) for name in config["rule_files"]]
    path = tmp_path / "kubernetes.json"
    path.write_text(json.dumps(config))
    promtool("check", "config", str(path))
    said = json.loads(promtool("check", "service-discovery", "--timeout=5s", str(path), "pdctl"))
    kept = {each["labels"]["instance"]: each["labels"] for each in said if each.get("labels")}
    assert {instance: labels["job"] for instance, labels in kept.items()} == {
        "10.0.0.1:8998": "pdctl-registry",
        "10.0.0.2:9001": "pdctl-ranks",
    }
    assert {(labels["namespace"], labels["pod"], labels["node"]) for labels in kept.values()} == {("pd", "p-0", "n7")}


def found(address: str, port: str, phase: str) -> dict[str, Any]:
    pod = "__meta_kubernetes_pod"
    meta = {"__meta_kubernetes_namespace": "pd", f"{pod}_name": "p-0", f"{pod}_node_name": "n7", f"{pod}_phase": phase}
    return {"targets": [address], "labels": {**meta, f"{pod}_container_port_name": port}}


def test_what_the_operator_is_given_by_the_page_is_the_rules(tmp_path: Path) -> None:
    """The page's own command, with `cat` for kubectl."""
    page = (ROOT / "docs" / "metrics.md").read_text()
    command = page[page.index("    kubectl create -f - <<END") :].partition("\nand another")[0]
    script = "\n".join(line.removeprefix("    ") for line in command.splitlines()).replace("kubectl create -f -", "cat")
    made = yaml.safe_load(subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, check=True).stdout)
    assert (made["kind"], made["spec"]) == (
        "PrometheusRule",
        yaml.safe_load((DEPLOY / "alerts.rules.yml").read_text()),
    )
