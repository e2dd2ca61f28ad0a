"""
deploy/compose/compose.yaml: what Compose would refuse, and what it says of pdctl, without a container in sight.

Compose itself is not asked: it is a plugin that few machines have. The keys that stand here are those of its
specification that the file uses, each with the type that it must have.
"""

from __future__ import annotations

import json
import re
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from tests.deploy.manifests import JSON, ROOT, understood

PATH = ROOT / "deploy" / "compose" / "compose.yaml"
FILE: JSON = yaml.safe_load(PATH.read_text())
SERVICES: dict[str, JSON] = FILE["services"]

TOP = {"name": str, "services": dict, "networks": dict, "volumes": dict}
SERVICE: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("image", "restart", "user", "network_mode", "mem_limit", "shm_size"), str),
    **dict.fromkeys(
        ("cap_drop", "security_opt", "tmpfs", "entrypoint", "command", "profiles", "ports", "volumes"), list
    ),
    **dict.fromkeys(("healthcheck", "depends_on", "environment", "deploy", "networks"), dict),
    "read_only": bool,
}
HEALTH = {"test": list, "interval": str, "timeout": str, "retries": int, "start_period": str, "start_interval": str}
SPAN = re.compile(r"(\d+(ms|s|m|h))+")


def only(table: JSON, known: dict[str, Any]) -> None:
    for key, value in table.items():
        assert key in known, f"{key} is not among what is known of Compose here"
        assert isinstance(value, known[key]), f"{key} is {value!r}"


def ours() -> list[str]:
    """Services of our image: its entry point is pdctl, and `command` its arguments."""
    return [name for name, service in SERVICES.items() if "pdctl" in service["image"]]


def words(name: str) -> list[str]:
    """Its command, with variables of the shell that nobody has set."""
    return [re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", word) for word in SERVICES[name].get("command", [])]


def flag(name: str, wanted: str) -> str:
    [found] = [word.partition("=")[2] for word in words(name) if word.startswith(f"--{wanted}=")]
    return found


def test_the_file_has_nothing_that_compose_does_not_know() -> None:
    only({key: value for key, value in FILE.items() if not key.startswith("x-")}, TOP)
    for service in SERVICES.values():
        only(service, SERVICE)
        if check := service.get("healthcheck"):
            only(check, HEALTH)
            assert check["test"][0] == "CMD"
            assert all(SPAN.fullmatch(check[key]) for key in check if isinstance(check[key], str))


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_refers_to_what_there_is(name: str) -> None:
    service = SERVICES[name]
    assert re.search(r":\S*\d", service["image"]), f"{service['image']} says no version"
    for other, how in service.get("depends_on", {}).items():
        assert set(SERVICES[other]["profiles"]) >= set(service["profiles"])
        assert how == {"condition": "service_healthy"}
        assert "healthcheck" in SERVICES[other], f"{name} would wait for {other} for ever"
    if mode := service.get("network_mode"):
        assert SERVICES[mode.removeprefix("service:")]["profiles"] == service["profiles"]
        assert not {"ports", "networks"} & set(service), "those of the service whose network it joins"
    for mount in service.get("volumes", []):
        assert mount.partition(":")[0] in FILE["volumes"]
    for network in service.get("networks", {}):
        assert network in FILE["networks"]


@pytest.mark.parametrize("name", ours())
def test_pdctl_understands_what_compose_gives_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    args, settings = understood(words(name), SERVICES[name].get("environment", {}), monkeypatch)
    assert args.lasts(settings)
    written = settings.serve.journal or f"sqlite:{settings.agent.sockets[0]}"
    mounts = [mount.partition(":")[2] for mount in SERVICES[name]["volumes"]]
    assert any(written.removeprefix("sqlite:").startswith(f"{mount}/") for mount in mounts), "the rest is read-only"


@pytest.mark.parametrize("name", ours())
def test_pdctl_runs_with_no_right_that_it_does_not_need(name: str) -> None:
    service = SERVICES[name]
    assert (service["user"], service["read_only"], service["cap_drop"]) == ("65532:65532", True, ["ALL"])
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "mem_limit" in service


@pytest.mark.parametrize("engine", ["sglang", "vllm"])
def test_a_prefill_finds_its_registry_in_its_own_network(engine: str) -> None:
    prefill, registry = f"{engine}-prefill", f"{engine}-registry"
    assert SERVICES[prefill]["network_mode"] == SERVICES[registry]["network_mode"] == f"service:{engine}-pod"
    assert SERVICES[f"{engine}-pod"]["networks"]["default"]["aliases"] == [prefill], "by which the others find it"
    assert registry in SERVICES[prefill]["depends_on"]
    port = flag(registry, "port")
    if engine == "sglang":
        assert flag(prefill, "disaggregation-bootstrap-port") == port
        assert flag(prefill, "host") == flag(registry, "host") == "0.0.0.0"
    else:
        given = json.loads(flag(prefill, "kv-transfer-config"))
        assert given["kv_connector_extra_config"]["bootstrap_server_address"] == f"127.0.0.1:{port}"
        assert SERVICES[registry]["environment"]["PDCTL_VLLM__SIZES"] == "dp=1,tp=1,pp=1"


def test_the_router_knows_where_both_are() -> None:
    given = words("sglang-router")
    prefill, port = given[given.index("--prefill") + 1 :][:2]
    decode = given[given.index("--decode") + 1]
    assert [urlsplit(url).hostname for url in (prefill, decode)] == ["sglang-prefill", "sglang-decode"]
    assert port == flag("sglang-registry", "port")
    assert urlsplit(prefill).port == int(flag("sglang-prefill", "port"))
    assert urlsplit(decode).port == int(flag("sglang-decode", "port"))


def test_nothing_is_open_to_other_machines() -> None:
    for service in SERVICES.values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))


def test_the_agent_announces_the_address_that_it_has() -> None:
    assert flag("agent", "host") == SERVICES["agent"]["networks"]["default"]["ipv4_address"]
    registry = urlsplit(flag("agent", "registry"))
    assert (registry.hostname, registry.port) == ("registry", int(flag("registry", "port")))
