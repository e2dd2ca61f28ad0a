"""What README and docs say that can be held against the code: where links lead, what there is, and by what name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pdctl.cli import main
from pdctl.core.ejection import ProbePolicy

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = PAGES[0].read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_a_file(page: Path) -> None:
    targets = [target for target in re.findall(r"\]\(([^)#]+)", page.read_text()) if "://" not in target]
    assert [target for target in targets if not (page.parent / target).is_file()] == []


def test_every_page_can_be_reached_from_the_site() -> None:
    """The site's own strictness holds the other direction, and every anchor: tests/docs."""
    nav = set(re.findall(r"^ +- (?:[\w ]+: )?(\w+\.md)$", (ROOT / "deploy/mkdocs.yml").read_text(), re.MULTILINE))
    assert [page.name for page in PAGES[1:] if page.name not in nav] == []


def test_the_readme_leads_into_the_site() -> None:
    assert {name for name in ("index", "quickstart", "concepts") if f"](docs/{name}.md)" not in README} == set()


def test_the_readme_shows_every_room_of_the_house_and_no_other() -> None:
    house = README.split("## The house")[1].split("```")[1]
    there = {path.name for path in (ROOT / "pdctl").glob("*.py") if not path.name.startswith("__")}
    assert set(re.findall(r"\b\w+\.py\b", house)) == there


def test_the_readme_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    commands = set(re.findall(r"^    (\w+) ", capsys.readouterr().out, re.MULTILINE))
    assert commands >= {"serve", "sessions", "probe"}
    assert {name for name in commands if f"`pdctl {name}" not in README} == set()


def test_the_defaults_of_links_are_those_of_the_policy() -> None:
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| ([\d., ]+) \|", (ROOT / "docs/links.md").read_text(), re.MULTILINE)
    said = {
        name: float(value)
        for names, values in rows
        for name, value in zip(re.findall(r"`(\w+)`", names), values.split(", "), strict=True)
    }
    assert len(said) >= 20
    assert said == {name: getattr(ProbePolicy(), name) for name in said}
