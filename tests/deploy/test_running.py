"""What deploy/ says, done: real registries with the manifests' own words, asked as a kubelet and an engine would."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pdctl.errors import ConfigError
from pdctl.succession import listening
from tests.deploy.manifests import KUBERNETES, Container, named
from tests.persistence.etcd import binary, cluster
from tests.service import DEADLINE_S, Service, service, until

DRAIN = KUBERNETES / "base" / "sglang" / "drain.py"


def ask(url: str, body: object = None, method: str | None = None) -> tuple[int, Any]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, _read(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, _read(error.read())


def _read(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except ValueError:
        return raw.decode()


@contextmanager
def running(each: Container, tmp_path: Path, journal: str | None = None, host: str = "127.0.0.1") -> Iterator[Service]:
    """The container's own words, at a free port of `host`, with its files below `tmp_path`."""
    kept = [word for word in each.words[2:] if not word.startswith(("--host=", "--port=", "--journal="))]
    journal = journal or each.flag("journal").replace("/var/lib/pdctl", str(tmp_path))
    environ = {name: value for name, value in each.environment.items() if name.startswith("PDCTL_")}
    with service(tmp_path / "log", f"--journal={journal}", f"--host={host}", *kept, **environ) as one:
        yield one


@pytest.fixture(scope="module")
def sidecar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One for all: each test leaves it without a rank."""
    with running(named("sglang", "sglang-prefill/pdctl"), tmp_path_factory.mktemp("sidecar")) as one:
        yield one


def rank(tp: int, port: int = 40000, size: int = 2) -> dict[str, object]:
    """What a stock prefill rank PUTs."""
    return {
        "attn_tp_size": size, "attn_tp_rank": tp, "attn_cp_size": 1, "attn_cp_rank": 0, "attn_dp_size": 1,
        "attn_dp_rank": 0, "pp_size": 1, "pp_rank": 0, "system_dp_size": 1, "system_dp_rank": 0, "rank_ip": "127.0.0.1",
        "rank_port": port + tp, "page_size": 16, "kv_cache_dtype": "auto", "prefill_http_port": 1,
    }  # fmt: skip


TOPOLOGY = "/route?prefill_dp_rank=-1&prefill_cp_rank=-1&target_tp_rank=-1&target_pp_rank=-1"


# --- probes


def assert_probes_are_well(each: Container, one: Service) -> None:
    for probe in each.probes.values():
        assert ask(one.url + probe["httpGet"]["path"])[0] == 200


def test_a_sidecar_answers_every_probe_before_its_engine_has_spoken(sidecar: Service) -> None:
    """One that was not ready without its engine would keep the engine from starting."""
    assert_probes_are_well(named("sglang", "sglang-prefill/pdctl"), sidecar)


def test_a_fleets_registry_stays_in_its_service_when_etcd_is_gone(tmp_path: Path) -> None:
    each = named("fleet", "pdctl-registry/pdctl")
    with cluster(tmp_path) as etcd, running(each, tmp_path, etcd.url("pd")) as one:
        for tp in range(2):
            assert ask(f"{one.url}/route", rank(tp), "PUT")[0] == 200
        etcd.nodes[0].kill()
        until(lambda: ask(f"{one.url}/readyz")[0] == 503)
        assert_probes_are_well(each, one)
        assert ask(one.url + TOPOLOGY)[0] == 200, "and decodes go on finding their prefill"


def test_every_flag_of_etcd_is_one() -> None:
    said = subprocess.run([binary(), "--help"], capture_output=True, text=True, check=False)
    for word in named("fleet", "pdctl-etcd/etcd").words[1:]:
        assert f"{word.partition('=')[0]} " in said.stdout + said.stderr


# --- the end of a prefill's pod


def drained(url: str, grace_s: float = 1) -> subprocess.CompletedProcess[str]:
    """The hook, as the kubelet runs it."""
    [python, script, _, instance, _] = named("sglang", "sglang-prefill/sglang").spec["lifecycle"]["preStop"]["exec"][
        "command"
    ]
    assert (python, Path(script).name) == ("python3", DRAIN.name)
    words = [sys.executable, "-I", str(DRAIN), url, instance, str(grace_s)]
    return subprocess.run(words, capture_output=True, text=True, timeout=DEADLINE_S, check=False)


def test_the_hook_of_a_prefill_ends_when_its_registry_is_empty_and_what_comes_after_it_registers_as_before(
    sidecar: Service,
) -> None:
    """A liveness probe that fails runs the hook too, and the pod stays: its engine is started again."""
    for port in (40000, 50000):
        for tp in range(2):
            assert ask(f"{sidecar.url}/route", rank(tp, port), "PUT")[0] == 200
        assert ask(sidecar.url + TOPOLOGY)[0] == 200
        ended = drained(sidecar.url)
        assert ended.returncode == 0
        assert ended.stdout.startswith("drained after "), ended
        status, left = ask(f"{sidecar.url}/v1/instances/default")
        assert status == 404 or left["alive"] == 0


def test_the_hook_holds_nobody_up_where_there_is_nothing_to_drain(sidecar: Service) -> None:
    assert drained(sidecar.url).stdout == "nobody is registered\n"
    with socket.create_server(("127.0.0.1", 0)) as ended:
        nobody = f"http://127.0.0.1:{ended.getsockname()[1]}"
    failed = drained(nobody)
    assert (failed.returncode, failed.stderr) == (0, "")
    assert "cannot be asked" in failed.stdout


# --- a pod whose containers are restarted


def test_ranks_are_known_after_the_sidecar_alone_was_restarted(tmp_path: Path) -> None:
    """The volume outlives the container: stock ranks register once, and are not asked to do it again."""
    each = named("sglang", "sglang-prefill/pdctl")
    with running(each, tmp_path) as one:
        for tp in range(2):
            ask(f"{one.url}/route", rank(tp), "PUT")
        one.kill()
    with running(each, tmp_path) as one:
        assert ask(one.url + TOPOLOGY)[0] == 200


def test_vllm_under_the_id_that_it_made_up_anew_replaces_the_one_before(tmp_path: Path) -> None:
    def register(engine: str, port: int) -> int:
        worker = {"engine_id": engine, "dp_rank": 0, "tp_rank": 0, "pp_rank": 0, "addr": f"tcp://127.0.0.1:{port}"}
        return ask(f"{one.url}/register", worker)[0]

    def shown() -> set[str]:
        status, body = ask(f"{one.url}/query")
        return {row["engine_id"] for row in body.values()} if status == 200 else set()

    each = named("vllm", "vllm-prefill/pdctl")
    with running(each, tmp_path) as one, socket.create_server(("127.0.0.1", 0)) as lives:
        assert_probes_are_well(each, one)
        with socket.create_server(("127.0.0.1", 0)) as ended:
            assert register("first", ended.getsockname()[1]) == 200
            until(lambda: shown() == {"first"})
        assert register("second", lives.getsockname()[1]) == 200
        until(lambda: shown() == {"second"})


# --- the agent


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    """As the kubelet makes an emptyDir."""
    made = tmp_path / "volume"
    made.mkdir()
    made.chmod(0o777)
    return made


def test_the_agents_socket_is_there_when_the_probe_says_so(volume: Path) -> None:
    each = named("agent", "engine-prefill/pdctl")
    words = [word.replace("/run/pdctl", str(volume)).replace("10.0.0.7", "127.0.0.1") for word in each.words[1:]]
    probe = [word.replace("/run/pdctl", str(volume)) for word in each.spec["startupProbe"]["exec"]["command"]]
    assert subprocess.run(probe, check=False).returncode == 1
    environ = os.environ | {"PDCTL_NODE__HTTP_PORT": "0"}
    with subprocess.Popen([sys.executable, "-m", "pdctl", *words], env=environ, stdout=subprocess.PIPE) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline().startswith(b"serving at unix:")
            assert subprocess.run(probe, check=False).returncode == 0
            assert Path(probe[-1]).parent.stat().st_mode & 0o777 == 0o700
        finally:
            child.terminate()
            assert child.wait(DEADLINE_S) == 0


def test_a_socket_in_the_volume_itself_is_refused(volume: Path) -> None:
    with pytest.raises(ConfigError, match="open to others"), listening(volume / "rank0.sock", for_others=False):
        pass
