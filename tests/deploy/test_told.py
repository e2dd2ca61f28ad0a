"""What the pages on engines and clusters tell people to type is what pdctl takes."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

import pytest

from tests.deploy.manifests import OVERLAYS, ROOT, understood

PAGES = ("docs/sglang.md", "docs/vllm.md", "docs/kubernetes.md")
VARIABLE = re.compile(r"`(PDCTL_[A-Z_]+)(?:=([^`]+)|: ([^`]+))`")


def commands() -> Iterator[tuple[str, str]]:
    """Each `pdctl ...` in a block of a page, one line a command."""
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                if found := re.match(r"(?:kubectl .* -- )?(pdctl .*)", line):
                    yield page, found[1].partition(" #")[0].rstrip(" &")


@pytest.mark.parametrize(("page", "command"), list(commands()))
def test_a_command_that_a_page_tells_is_one(page: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    understood(shlex.split(command)[1:], {}, monkeypatch)


def test_each_page_tells_some() -> None:
    assert {page for page, _ in commands()} == set(PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_a_variable_that_a_page_tells_is_a_setting(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, is_given, as_yaml in VARIABLE.findall((ROOT / page).read_text()):
        understood(["serve"], {name: is_given or as_yaml}, monkeypatch)


def test_every_overlay_has_a_row() -> None:
    text = (ROOT / "docs/kubernetes.md").read_text()
    assert set(re.findall(r"^\| `([a-z-]+)` \|", text, re.MULTILINE)) == set(OVERLAYS)
