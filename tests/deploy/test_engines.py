"""The flags that deploy/ and docs/ give SGLang, held against what the stock wheel declares, which is read here."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.deploy.manifests import OVERLAYS, ROOT, containers
from tests.wire.stock.conftest import installed

pytestmark = pytest.mark.stock

COMPOSE = ROOT / "deploy" / "compose" / "compose.yaml"
PAGES = ("docs/sglang.md", "docs/kubernetes.md")


@dataclass(frozen=True)
class Flag:
    """What `--name` takes; `choices` None: anything."""

    choices: frozenset[str] | None


@pytest.fixture(scope="module")
def wheel() -> Path:
    """Stock SGLang, as tests/wire/stock installs it; skipped where that cannot be had."""
    try:
        return installed() / "sglang" / "srt" / "arg_groups"
    except (OSError, RuntimeError) as error:
        pytest.skip(f"stock SGLang cannot be installed: {error}")


@pytest.fixture(scope="module")
def flags(wheel: Path) -> dict[str, Flag]:
    """Every flag of `python3 -m sglang.launch_server`."""
    lists = dict(_lists((wheel / "choices.py").read_text()))
    found: dict[str, Flag] = {}
    for path in (wheel / "fields").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                flag = Flag(_choices(node.annotation, lists))
                found |= dict.fromkeys([f"--{node.target.id.replace('_', '-')}", *_aliases(node.annotation)], flag)
    return found


def _lists(text: str) -> Iterator[tuple[str, frozenset[str]]]:
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.List) and isinstance(node.targets[0], ast.Name):
            yield node.targets[0].id, frozenset(ast.literal_eval(node.value))


def _choices(annotation: ast.expr, lists: dict[str, frozenset[str]]) -> frozenset[str] | None:
    for node in ast.walk(annotation):
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id == "Literal":
            return frozenset(ast.literal_eval(node.slice))
        if isinstance(node, ast.keyword) and node.arg == "choices" and isinstance(node.value, ast.Name):
            return lists.get(node.value.id)
    return None


def _aliases(annotation: ast.expr) -> list[str]:
    for node in ast.walk(annotation):
        if isinstance(node, ast.keyword) and node.arg == "aliases":
            return list(ast.literal_eval(node.value))
    return []


def commands() -> Iterator[tuple[str, list[str]]]:
    """Every call of sglang.launch_server, and where it stands."""
    for overlay in OVERLAYS:
        for each in containers(overlay):
            if "sglang.launch_server" in each.words:
                yield f"{overlay}:{each.id}", each.words
    for name, service in yaml.safe_load(COMPOSE.read_text())["services"].items():
        if "sglang.launch_server" in service.get("command", []):
            yield f"compose:{name}", service["command"]
    for page in PAGES:
        text = re.sub(r"\\\n\s*", " ", (ROOT / page).read_text())
        for number, line in enumerate(re.findall(r"^.*python3 -m sglang\.launch_server .*$", text, re.MULTILINE)):
            yield f"{page}:{number}", line.partition("#")[0].split()


@pytest.mark.parametrize("words", [pytest.param(words, id=where) for where, words in commands()])
def test_sglang_has_every_flag_that_it_is_given(words: list[str], flags: dict[str, Flag]) -> None:
    given = words[words.index("sglang.launch_server") + 1 :]
    for index, word in enumerate(given):
        if not word.startswith("--"):
            continue
        name, is_given, value = word.partition("=")
        assert name in flags, f"{name} is no flag of SGLang"
        choices = flags[name].choices
        if choices is not None:
            assert (value if is_given else given[index + 1]) in choices


def test_the_table_of_flags_was_read(flags: dict[str, Flag]) -> None:
    """A wheel that declares them in another way would let everything pass, or nothing."""
    assert len(flags) > 300
    assert flags["--disaggregation-mode"].choices == frozenset({"null", "prefill", "decode"})
    assert "--disaggregation-bootstrap-prot" not in flags
