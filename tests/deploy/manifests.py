"""
What deploy/kubernetes builds to, as a cluster would be given it: objects, and the words of each container.

Built with Debian's kubectl, which `./dev` unpacks, and with no other: one that is on the machine may be newer, or
somebody's way into a cluster. It reads files here and is given no environment.
"""

from __future__ import annotations

import argparse
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from pdctl import config
from pdctl.cli import parser
from pdctl.config import Settings

ROOT = Path(__file__).parents[2]
KUBERNETES = ROOT / "deploy" / "kubernetes"
KUBECTL = ROOT / ".cache" / "servers" / "usr" / "bin" / "kubectl"
OVERLAYS = tuple(sorted(path.name for path in (KUBERNETES / "overlays").iterdir()))
DOWNWARD = {"status.podIP": "10.0.0.7", "metadata.name": "pod-0"}
"""What the kubelet would put for a field of the pod."""

JSON = dict[str, Any]


@cache
def built(overlay: str) -> list[JSON]:
    """Every object of it. Not to be changed."""
    return list(yaml.load_all(text_of(KUBERNETES / "overlays" / overlay), yaml.CSafeLoader))


def text_of(folder: Path) -> str:
    """What `kubectl apply -k` would send."""
    assert KUBECTL.exists(), "there is no kubectl: ./dev test fetches it"
    done = subprocess.run(
        [str(KUBECTL), "kustomize", str(folder)], capture_output=True, text=True, env={}, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@dataclass(frozen=True)
class Container:
    """One container of a pod template."""

    workload: JSON
    pod: JSON
    spec: JSON

    @property
    def id(self) -> str:
        return f"{self.workload['metadata']['name']}/{self.spec['name']}"

    @property
    def is_sidecar(self) -> bool:
        return bool(self.spec in self.pod.get("initContainers", []) and self.spec.get("restartPolicy") == "Always")

    @property
    def environment(self) -> dict[str, str]:
        return {row["name"]: row.get("value") or _from_the_pod(row) for row in self.spec.get("env", [])}

    @property
    def words(self) -> list[str]:
        """Command and arguments, with $(NAME) put in as the kubelet does."""
        given = self.environment
        words = [*self.spec.get("command", []), *self.spec.get("args", [])]
        return [re.sub(r"\$\((\w+)\)", lambda found: given[found[1]], word) for word in words]

    @property
    def ports(self) -> dict[str, int]:
        return {row["name"]: row["containerPort"] for row in self.spec.get("ports", [])}

    @property
    def probes(self) -> dict[str, JSON]:
        return {
            name: self.spec[name] for name in ("startupProbe", "readinessProbe", "livenessProbe") if name in self.spec
        }

    def flag(self, name: str) -> str:
        """The value of `--name=value`."""
        [found] = [word.partition("=")[2] for word in self.words if word.startswith(f"--{name}=")]
        return found


def _from_the_pod(row: JSON) -> str:
    return DOWNWARD[row["valueFrom"]["fieldRef"]["fieldPath"]]


def workloads(overlay: str) -> list[JSON]:
    return [each for each in built(overlay) if each["kind"] in ("Deployment", "StatefulSet")]


def containers(overlay: str) -> Iterator[Container]:
    for workload in workloads(overlay):
        pod = workload["spec"]["template"]["spec"]
        for spec in [*(pod.get("initContainers") or []), *pod["containers"]]:
            yield Container(workload, pod, spec)


def ours(overlay: str) -> list[Container]:
    """Those that run pdctl."""
    return [each for each in containers(overlay) if each.spec.get("command") == ["pdctl"]]


def named(overlay: str, name: str) -> Container:
    """`workload/container`."""
    [found] = [each for each in containers(overlay) if each.id == name]
    return found


def understood(
    words: list[str], environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> tuple[argparse.Namespace, Settings]:
    """What pdctl makes of these words and variables. Raises SystemExit or ConfigError for what it does not take."""
    with monkeypatch.context() as patch:
        for name, value in environ.items():
            patch.setenv(name, value)
        args = parser().parse_args(words)
        return args, config.load({name: value for name, value in vars(args).items() if "." in name})
