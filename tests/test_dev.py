"""The `dev` script: what it says, what it skips, and that the lock names no place."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMMANDS = ("bench", "check", "demo", "docs", "gpu", "image-check", "lint", "lock", "setup", "sim", "test")
SCRIPTS = ("dev", ".ci/run")
LOCKS = sorted((ROOT / "deploy/lock").glob("*.txt"))
REQUIREMENT = re.compile(r"(?P<name>[a-z0-9-]+)==(?P<version>[^ ;]+)(?: ; (?P<marker>.+))?")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what `dev` reads, in a path with a space, with an interpreter and without a stamp."""
    root = tmp_path / "a check out"
    for name in ("dev", "pyproject.toml", "deploy/lock/dev.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    (root / ".venv/bin").mkdir(parents=True)
    (root / ".venv/bin/python").symlink_to(sys.executable)
    return root


def dev(*arguments: str, root: Path = ROOT, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return run(str(root / "dev"), *arguments, cwd=cwd)


def with_functions(root: Path, program: str) -> subprocess.CompletedProcess[str]:
    """Run `program` with the script's functions and without its main."""
    return run("bash", "-c", f'source "$0/dev"\n{program}', str(root))


def run(*command: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=60, cwd=cwd, stdin=subprocess.DEVNULL
    )


# --- words


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_executable_and_valid(script: str) -> None:
    assert (ROOT / script).stat().st_mode & 0o111 == 0o111
    assert run("bash", "-n", str(ROOT / script)).stderr == ""


def test_help_lists_every_command_and_no_other() -> None:
    said = dev("--help")
    assert said.returncode == 0
    assert sorted(re.findall(r"^  ([a-z-]+)(?: |$)", said.stdout, re.MULTILINE)) == list(COMMANDS)
    functions = re.findall(r"^do_([a-z_]+)\(", (ROOT / "dev").read_text(), re.MULTILINE)
    assert sorted(name.replace("_", "-") for name in functions) == list(COMMANDS)


def test_help_and_mistakes_need_no_set_up(checkout: Path) -> None:
    shutil.rmtree(checkout / ".venv")
    assert dev("--help", root=checkout).returncode == 0
    assert dev("tset", root=checkout).returncode == 2
    assert not (checkout / ".venv").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["tset"], "[dev] there is no command 'tset': ./dev --help lists them\n"),
        (["setup", "now"], "[dev] setup takes no arguments, got: now\n"),
        ([], "usage: ./dev COMMAND"),
    ],
    ids=["unknown", "too much", "nothing"],
)
def test_a_mistake_ends_with_2_and_a_sentence(arguments: list[str], sentence: str) -> None:
    said = dev(*arguments)
    assert (said.returncode, said.stdout) == (2, "")
    assert said.stderr.startswith(sentence)


# --- set-up


def test_a_second_set_up_has_nothing_to_do(checkout: Path) -> None:
    first = with_functions(checkout, "venv_works() { true; }\npip_install() { true; }\nLIBRARIES=()\nsetup")
    assert (first.returncode, "nothing to do" in first.stderr) == (0, False)
    second = dev("setup", root=checkout, cwd=Path("/"))
    assert (second.returncode, second.stderr) == (0, "[dev] set-up is done: nothing to do\n")


@pytest.mark.parametrize("changed", ["deploy/lock/dev.txt", "pyproject.toml"])
def test_set_up_is_done_again_when_what_it_rests_on_changed(checkout: Path, changed: str) -> None:
    with_functions(checkout, 'stamp >"$STAMP"')
    with (checkout / changed).open("a") as file:
        file.write("# another\n")
    assert "set up" in with_functions(checkout, "set_up() { echo set up; }\nsetup").stdout


def test_set_up_is_done_again_when_the_checkout_has_moved(checkout: Path) -> None:
    with_functions(checkout, 'stamp >"$STAMP"')
    moved = checkout.rename(checkout.with_name("moved"))
    assert "set up" in with_functions(moved, "set_up() { echo set up; }\nsetup").stdout


def test_set_up_is_done_again_when_a_library_has_gone(checkout: Path) -> None:
    said = with_functions(
        checkout, 'LIBRARIES=(libnowhere.so.9:libnowhere9)\nstamp >"$STAMP"\nset_up() { echo set up; }\nsetup'
    )
    assert "set up" in said.stdout


def test_a_set_up_that_fails_leaves_no_stamp(checkout: Path) -> None:
    said = with_functions(
        checkout, "venv_works() { true; }\npip_install() { quietly false; }\nLIBRARIES=()\nsetup\necho went on"
    )
    assert (said.returncode, said.stdout) == (1, "")
    assert "this failed, its own words are above: false" in said.stderr
    assert not (checkout / ".venv/.set-up").exists()


def test_each_step_says_one_line(checkout: Path) -> None:
    steps = """
venv_works() { [[ -n "${made:-}" ]]; }
missing_libraries() { echo libnuma1; }
missing_venv() { echo python3.11-venv; }
is_root() { true; }
quietly() { echo "$*"; made=yes; }
setup
"""
    said = with_functions(checkout, steps)
    assert said.returncode == 0, said.stderr
    lines = said.stderr.splitlines()
    assert lines[0] == "[dev] installing apt packages: libnuma1 python3.11-venv"
    assert [re.sub(r"[0-9.]+", "N", line) for line in lines[1:]] == [
        "[dev] installing N locked dependencies from deploy/lock/devNtxt",
        "[dev] installing pdctl itself, editable",
    ]
    assert "--require-hashes" in said.stdout
    assert "--no-deps --no-build-isolation -e" in said.stdout


def test_apt_is_asked_for_nothing_when_nothing_is_missing(checkout: Path) -> None:
    program = """
quietly() { echo "$*"; }
LIBRARIES=(libc.so.6:libc6)
install_packages $(missing_libraries "$VENV/bin/python")
"""
    said = with_functions(checkout, program)
    assert (said.returncode, said.stdout, said.stderr) == (0, "", "")


@pytest.mark.parametrize(("root_user", "command"), [(True, "apt-get update"), (False, "sudo apt-get update")])
def test_sudo_is_used_only_when_not_root(checkout: Path, root_user: bool, command: str) -> None:
    said = with_functions(
        checkout,
        f"is_root() {{ {str(root_user).lower()}; }}\ncan_sudo() {{ true; }}\nquietly() {{ echo $*; }}\n"
        "install_packages libnuma1",
    )
    assert said.stdout.splitlines()[0] == command


def test_neither_root_nor_sudo_is_a_sentence_with_the_packages(checkout: Path) -> None:
    said = with_functions(
        checkout, "is_root() { false; }\ncan_sudo() { false; }\ninstall_packages libnuma1 libcurl4\necho went on"
    )
    assert (said.returncode, said.stdout) == (1, "")
    assert said.stderr == (
        "[dev] missing here: libnuma1 libcurl4: this is not root and there is no sudo, "
        "let root run: apt-get install libnuma1 libcurl4\n"
    )


def test_no_fit_python_is_a_sentence(checkout: Path) -> None:
    said = with_functions(checkout, 'is_new_enough() { false; }\npython="$(base_python)"\necho went on')
    assert (said.returncode, said.stdout) == (1, "")
    assert "there is no python 3.11 or later" in said.stderr


# --- arguments


@pytest.mark.parametrize(
    ("arguments", "workers"),
    [
        (["tests/core", "-k", "a b"], "-n 4 --dist worksteal "),
        (["-n0"], ""),
        (["-n", "2"], ""),
        (["--numprocesses=2"], ""),
        (["--pdb"], ""),
        (["-p", "no:xdist"], ""),
        ([], "-n 4 --dist worksteal "),
    ],
    ids=["paths", "-n0", "-n 2", "--numprocesses", "--pdb", "no:xdist", "none"],
)
def test_arguments_reach_pytest_and_workers_can_be_chosen(checkout: Path, arguments: list[str], workers: str) -> None:
    python = checkout / ".venv/bin/python"
    python.unlink()
    python.write_text('#!/bin/sh\necho "$@"\n')
    python.chmod(0o755)
    said = run("bash", "-c", 'source "$0/dev"; run_tests "$@"', str(checkout), *arguments)
    assert said.stdout.strip() == f"-m pytest {workers}{' '.join(arguments)}".strip()


def test_the_demo_keeps_the_callers_directory_and_arguments(checkout: Path, tmp_path: Path) -> None:
    pdctl = checkout / ".venv/bin/pdctl"
    pdctl.write_text('#!/bin/sh\npwd\nprintf "<%s>" "$@"\n')
    pdctl.chmod(0o755)
    with_functions(checkout, 'stamp >"$STAMP"')
    said = dev("demo", "--trace", "a file", root=checkout, cwd=tmp_path)
    assert said.stdout == f"{tmp_path}\n<demo><--trace><a file>"


# --- a GPU


def test_a_machine_without_a_driver_is_told_what_is_missing(checkout: Path) -> None:
    said = with_functions(checkout, 'driver_cuda "$VENV/bin/python"; echo went on')
    if said.returncode == 0:
        pytest.skip("this machine has a driver")
    assert said.stdout == ""
    assert said.stderr == (
        "[dev] there is no NVIDIA driver here (libcuda.so.1): install one; ./dev gpu --rehearse goes without\n"
    )


@pytest.mark.parametrize(("version", "wheel"), [("12040", "12"), ("13000", "13"), ("14010", "13"), ("11080", "")])
def test_the_wheel_is_chosen_by_the_drivers_cuda(checkout: Path, tmp_path: Path, version: str, wheel: str) -> None:
    source = f"int cuDriverGetVersion(int *v) {{ *v = {version}; return 0; }}"
    if shutil.which("cc") is None:
        pytest.skip("no C compiler here")
    library = str(tmp_path / "libcuda.so.1")
    command = ["cc", "-shared", "-fPIC", "-xc", "-", "-o", library]
    subprocess.run(command, input=source, text=True, check=True, timeout=60)
    said = with_functions(checkout, f'export LD_LIBRARY_PATH="{tmp_path}"; driver_cuda "$VENV/bin/python"')
    assert said.stdout.strip() == wheel
    assert said.returncode == (0 if wheel else 1)
    assert wheel or "the driver is for CUDA 11: Mooncake's wheels want one for 12 or 13" in said.stderr


def test_the_locks_for_a_gpu_are_the_development_one_with_another_wheel_of_the_same_version() -> None:
    dev_lock = {pin(each) for each in requirements(ROOT / "deploy/lock/dev.txt")}
    (cpu,) = {each for each in dev_lock if each.startswith("mooncake-")}
    for major, wheel, runtime in (
        ("12", "mooncake-transfer-engine", "nvidia-cuda-runtime-cu12"),
        ("13", "mooncake-transfer-engine-cuda13", "nvidia-cuda-runtime"),
    ):
        lock = {pin(each) for each in requirements(ROOT / f"deploy/lock/cuda{major}.txt")}
        assert dev_lock - lock == {cpu}
        assert {each.partition("==")[0] for each in lock - dev_lock} == {wheel, runtime}
        assert f"{wheel}=={cpu.partition('==')[2]}" in lock
        image = {pin(each) for each in requirements(ROOT / f"deploy/lock/image-cuda{major}.txt")}
        cpu_image = {pin(each) for each in requirements(ROOT / "deploy/lock/image-cpu.txt")}
        assert image == cpu_image - {cpu} | (lock - dev_lock)


def test_what_the_image_is_built_with_is_locked_as_the_development_environment_has_it() -> None:
    build = {pin(each): hashes for each, hashes in requirements(ROOT / "deploy/lock/build.txt").items()}
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert {normal(each) for each in asked} <= names(ROOT / "deploy/lock/build.txt")
    dev_lock = {pin(each): hashes for each, hashes in requirements(ROOT / "deploy/lock/dev.txt").items()}
    assert build.items() <= dev_lock.items()


# --- the lock


def requirements(lock: Path) -> dict[str, list[str]]:
    """`name==version[ ; marker]` -> its hashes; any other kind of line is a failure."""
    found: dict[str, list[str]] = {}
    for line in lock.read_text().splitlines():
        text = line.strip().removesuffix("\\").strip()
        if text.startswith("--hash="):
            found[list(found)[-1]].append(text)
        elif not text.startswith("#"):
            assert REQUIREMENT.fullmatch(text), f"{lock.name}: {line}"
            found[text] = []
    return found


def names(lock: Path) -> set[str]:
    return {requirement.partition("==")[0] for requirement in requirements(lock)}


def pin(requirement: str) -> str:
    """Without the marker that says where it is wanted."""
    return requirement.partition(";")[0].strip()


def normal(requirement: str) -> str:
    return re.sub(r"[-_.]+", "-", re.split(r"[ \[<>=!~;]", requirement)[0]).lower()


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.name)
def test_a_lock_has_names_versions_and_hashes_and_no_place(lock: Path) -> None:
    text = lock.read_text()
    assert not re.search(r"://|file:|@|^-|--(?!hash=sha256:)", text, re.MULTILINE)
    found = requirements(lock)
    assert found
    for requirement, hashes in found.items():
        assert hashes, f"{requirement} has no hash"
        assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", each) for each in hashes), requirement


def test_both_locks_are_there_and_agree() -> None:
    dev_lock, cpu_lock = ROOT / "deploy/lock/dev.txt", ROOT / "deploy/lock/image-cpu.txt"
    assert {dev_lock, cpu_lock} <= set(LOCKS)
    dev = {pin(requirement): hashes for requirement, hashes in requirements(dev_lock).items()}
    for requirement, hashes in requirements(cpu_lock).items():  # a development tool may want it on more platforms
        assert dev[pin(requirement)] == hashes, requirement


def test_the_locks_hold_all_that_pyproject_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    runtime = [*project["project"]["dependencies"], *project["project"]["optional-dependencies"]["cpu"]]
    development = [*project["dependency-groups"]["dev"], *project["build-system"]["requires"]]
    assert {normal(each) for each in runtime} <= names(ROOT / "deploy/lock/image-cpu.txt")
    assert {normal(each) for each in (*runtime, *development)} <= names(ROOT / "deploy/lock/dev.txt")
    assert "pytest" not in names(ROOT / "deploy/lock/image-cpu.txt")


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_name_no_place_to_fetch_from(script: str) -> None:
    assert not re.search(r"https?:|ftp:|--(extra-)?index-url|--find-links|--trusted-host", (ROOT / script).read_text())


# --- the browser


@pytest.mark.parametrize(
    ("arguments", "looks"),
    [
        ("", True),
        ("-k plan -x", True),
        ("tests", True),
        ("tests/page/test_page.py::test_one", True),
        ("tests/core tests/page/", True),
        ("tests/core", False),
        ("tests/test_dev.py::test_one -x", False),
    ],
)
def test_a_browser_is_installed_only_where_a_test_may_look_at_the_page(arguments: str, looks: bool) -> None:
    said = with_functions(ROOT, f"if looks_at_the_page {arguments}; then echo looks; fi")
    assert (said.stdout, said.stderr) == ("looks\n" if looks else "", "")


def test_of_the_programs_for_tests_only_those_are_fetched_that_are_missing_and_kubectl_always(checkout: Path) -> None:
    """A kubectl that is on the machine may be somebody's way into a cluster: tests ask Debian's, which knows none."""
    (checkout / "bin").mkdir()
    for name in ("etcd", "prometheus", "kubectl"):
        (checkout / "bin" / name).touch(mode=0o755)
    program = 'fetch_server() { echo "fetched $1"; }\nPATH="$0/bin:$PATH"\nfetch_servers'
    assert with_functions(checkout, program).stdout.split("\n")[:-1] == ["fetched kubernetes-client"]
    unpacked = checkout / ".cache/servers/usr/bin"
    unpacked.mkdir(parents=True)
    (unpacked / "kubectl").touch(mode=0o755)
    assert with_functions(checkout, program).stdout == ""
