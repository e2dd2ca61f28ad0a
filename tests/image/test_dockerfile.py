"""The Dockerfile as text: what it pins, what it takes, and that who lints it would say so."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from pdctl.cli import parser

ROOT = Path(__file__).parent.parent.parent
DOCKERFILE = (ROOT / "Dockerfile").read_text()
JOINED = re.sub(r"\\\n", " ", DOCKERFILE)
FINAL = JOINED.rpartition("\nFROM ")[2]
HADOLINT = Path(sys.executable).parent / "hadolint"


def lint(path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([HADOLINT, str(path)], capture_output=True, text=True, check=False, timeout=60)


def test_hadolint_finds_nothing() -> None:
    said = lint(ROOT / "Dockerfile")
    assert (said.returncode, said.stdout) == (0, "")


@pytest.mark.parametrize(
    ("was", "becomes", "rule"),
    [
        ("@sha256:[0-9a-f]{64}", "", None),  # hadolint takes a base by build argument on trust: the next test does not
        ("--no-install-recommends ", "", "DL3015"),
        (r"HEALTHCHECK (.*)", r"HEALTHCHECK \1\nHEALTHCHECK \1", "DL3012"),
        (r'ENTRYPOINT \["pdctl"\]', "ENTRYPOINT pdctl", "DL3025"),
        ("USER 65532:65532", "USER root", "DL3002"),
    ],
    ids=["no digest", "recommends", "two checks", "shell form", "root"],
)
def test_hadolint_would_say_so(tmp_path: Path, was: str, becomes: str, rule: str | None) -> None:
    broken = tmp_path / "Dockerfile"
    broken.write_text(re.sub(was, becomes, DOCKERFILE))
    assert broken.read_text() != DOCKERFILE
    said = lint(broken)
    assert (said.returncode, rule in said.stdout) == (1, True) if rule else said.returncode == 0


def test_the_base_is_named_by_its_digest_and_every_stage_stands_on_it() -> None:
    bases = re.findall(r"^ARG BASE=(.+)$", DOCKERFILE, re.MULTILINE)
    assert len(bases) == 1
    assert re.fullmatch(r"debian:bookworm-\d{8}-slim@sha256:[0-9a-f]{64}", bases[0])
    assert re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE) == ["${BASE}", "system", "system"]


def test_what_is_installed_is_locked_with_hashes() -> None:
    installs = [
        line for line in re.findall(r"tools/bin/pip [^;\n]*\binstall\b[^;\n]*", JOINED) if "--no-deps" not in line
    ]
    assert len(installs) == 2
    assert [line for line in installs if "--require-hashes" not in line] == []
    for wheel in ("cpu", "cuda12", "cuda13"):
        assert (ROOT / f"deploy/lock/image-{wheel}.txt").is_file()
    assert (ROOT / "deploy/lock/build.txt").is_file()


def test_a_snapshot_is_taken_from_where_the_base_says(tmp_path: Path) -> None:
    """Debian's base images name the archive of their moment above each URI."""
    sources = tmp_path / "debian.sources"
    sources.write_text("Types: deb\n# http://archive/debian/20260824T000000Z\nURIs: http://mirror/debian\nSuites: x\n")
    (expression,) = re.findall(r"sed -i '([^']+)' /etc/apt/sources\.list\.d/debian\.sources", DOCKERFILE)
    subprocess.run(["sed", "-i", expression, str(sources)], check=True, timeout=60)
    assert sources.read_text() == "Types: deb\nURIs: http://archive/debian/20260824T000000Z\nSuites: x\n"


def test_its_python_is_one_that_the_project_is_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (version,) = set(re.findall(r"python(3\.\d+)", DOCKERFILE))
    assert f"Programming Language :: Python :: {version}" in project["classifiers"]
    assert re.search(rf"^ARG VERSION={re.escape(project['version'])}$", DOCKERFILE, re.MULTILINE)


def test_it_ends_as_a_user_without_a_name_and_starts_a_command_that_there_is() -> None:
    assert re.findall(r"^USER (.+)$", FINAL, re.MULTILINE) == ["65532:65532"]
    (entry,) = re.findall(r"^ENTRYPOINT \[(.+)\]$", FINAL, re.MULTILINE)
    (command,) = re.findall(r"^CMD \[(.+)\]$", FINAL, re.MULTILINE)
    words = re.findall(r'"([^"]+)"', f"{entry} {command}")
    assert words[0] == "pdctl"
    assert vars(parser().parse_args(words[1:]))["serve.host"] == "0.0.0.0"


def test_no_setting_of_ours_is_in_its_environment() -> None:
    """It would overrule a file of settings."""
    assert "PDCTL_" not in FINAL.replace("PDCTL_SERVE__PORT", "")


@pytest.mark.parametrize("named", re.findall(r"^COPY (?!--from)(?:--\S+ )*(.+) \S+$", DOCKERFILE, re.MULTILINE))
def test_what_a_step_copies_is_there_and_not_ignored(named: str) -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for path in named.split():
        assert (ROOT / path).exists()
        assert path.rstrip("/") in allowed or str(Path(path).parent) in allowed
