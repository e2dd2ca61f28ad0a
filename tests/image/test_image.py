"""The image, built from the Dockerfile as it stands and run as strictly as a runtime can be told to."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.image.building import UNWANTED, Image
from tests.image.container import Container, running

pytestmark = pytest.mark.timeout(1200)  # the first one builds
LARGEST_NBYTES = {"cpu": 420e6, "cuda12": 600e6, "cuda13": 600e6}
FROM_THE_HOST = {"libcuda.so.1"}  # the driver's
FROM_PIP = {"libcudart.so.12", "libcudart.so.13"}  # pdctl finds it where pip puts it: device/cuda.py


@pytest.fixture(scope="module")
def container(image: Image, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Container]:
    with running(image, tmp_path_factory.mktemp("volume")) as container:
        container.until_healthy()
        yield container


def test_built_twice_it_is_the_same_to_the_byte(image: Image, image_again: Image) -> None:
    first, second = image.tree(), image_again.tree()
    assert {path for path in first.keys() | second.keys() if first.get(path) != second.get(path)} == set()
    assert image.layers == image_again.layers


def test_it_is_as_small_as_it_is_said_to_be(image: Image, wheel: str, capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print(f"\n{wheel}: {image.nbytes() / 1e6:.0f} MB unpacked, layers {' '.join(image.layers)}")
    assert image.nbytes() < LARGEST_NBYTES[wheel]


def test_it_holds_nothing_that_no_step_names(image: Image) -> None:
    named = [name for name in image.tree() if Path(name).name in {Path(each).name for each in UNWANTED.split()}]
    assert [name for name in named if not name.startswith("usr/")] == []
    assert not [name for name in image.tree() if name.startswith(("build/", "wheels/", "etc/pip.conf", "opt/tools"))]


def test_no_program_in_it_gains_rights_and_its_user_owns_one_folder(image: Image) -> None:
    tree = image.tree()
    assert [path for path, (kind, mode, *_) in tree.items() if kind == "-" and mode & 0o6000] == []
    assert [path for path, (_, _, user, group, _) in tree.items() if 65532 in (user, group)] == ["var/lib/pdctl"]
    others = [path for path, (kind, mode, *_) in tree.items() if kind in "-d" and mode & 0o002 and not mode & 0o1000]
    assert others == []


def test_it_serves_as_its_user_on_a_read_only_root(container: Container) -> None:
    status = Path(f"/proc/{container.pid}/status").read_text()
    assert re.findall(r"^Uid:\s+(\d+)", status, re.MULTILINE) == ["65532"]
    assert re.findall(r"^CapEff:\s+0*(\w)$", status, re.MULTILINE) == ["0"]
    for place in ("/opt/pdctl/lib/x", "/etc/x", "/usr/bin/x", "/x"):
        assert "Read-only file system" in container.run("python", "-c", f"open({place!r}, 'w')").stderr
    asked = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:8998/readyz').status)"
    assert container.run("python", "-c", asked).stdout == "200\n"


def test_what_it_acknowledged_is_on_the_volume(image: Image, tmp_path: Path) -> None:
    claim = ("register", "--rank-host", "10.0.0.7", "--rank-port", "7001", "--max-attempts", "1")
    with running(image, tmp_path) as first:
        first.until_healthy()
        said = first.run("pdctl", *claim)
        assert said.returncode == 0, said.stdout + said.stderr
    asked = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:8998/v1/instances/default').read().decode())"
    with running(image, tmp_path) as second:
        second.until_healthy()
        assert '"address":"10.0.0.7:7001"' in second.run("python", "-c", asked).stdout


def test_its_health_check_tells_a_hung_service(container: Container) -> None:
    assert container.health().returncode == 0
    os.kill(container.pid, signal.SIGSTOP)
    try:
        hung = container.health()
    finally:
        os.kill(container.pid, signal.SIGCONT)
    assert (hung.returncode, "timed out" in hung.stderr) == (1, True), hung
    container.until_healthy()


def test_its_health_check_follows_the_flags(image: Image, tmp_path: Path) -> None:
    with running(image, tmp_path, ["serve", "--host=0.0.0.0", "--port", "9321", "--journal", "memory:"]) as other:
        other.until_healthy()
        os.kill(other.pid, signal.SIGTERM)
        assert other.process.wait(60) == 0


def test_its_libraries_load(image: Image, container: Container, wheel: str) -> None:
    """All that the engine links to is there, but for what comes with a driver."""
    folder = "/opt/pdctl/lib/python3.11/site-packages/mooncake"
    missing = set(re.findall(r"(\S+) => not found", container.run("ldd", f"{folder}/engine.so").stdout))
    assert missing <= (set() if wheel == "cpu" else FROM_THE_HOST | FROM_PIP)
    if wheel == "cpu":
        loaded = container.run("python", "-c", "import mooncake.engine, mooncake.store; print('loaded')")
        assert loaded.stdout == "loaded\n", loaded.stderr
    else:
        names = {Path(path).name for path in image.tree()}
        assert missing & FROM_PIP <= names


def test_its_doctor_finds_it_well(container: Container, wheel: str) -> None:
    """An engine in it writes to itself: without capabilities, on a read-only root."""
    if wheel != "cpu":
        pytest.skip("an engine for CUDA does not start without a driver")
    checks = ("packages", "wheel", "libraries", "shm", "registry", "engine", "journal")
    only = [word for check in checks for word in ("--only", check)]
    said = container.run("pdctl", "doctor", "--registry", "http://127.0.0.1:8998", *only)
    assert said.returncode == 0, said.stdout + said.stderr
    assert {line.split()[1] for line in said.stdout.splitlines() if line.startswith("ok ")} >= {*checks} - {"shm"}
