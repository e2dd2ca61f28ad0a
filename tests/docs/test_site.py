"""The documentation as a site: it builds strictly, every link and anchor stands, and no browser asks another host."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from tests.docs.links import broken, foreign, unread

ROOT = Path(__file__).parent.parent.parent
DRAWINGS = sorted((ROOT / "docs/img").glob("*.svg"))
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `./dev docs` builds it."""
    folder = tmp_path_factory.mktemp("site")
    # not --quiet: who is told no warnings counts none either, and nothing is strict
    command = (sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", "deploy/mkdocs.yml")
    done = subprocess.run(
        (*command, "--site-dir", str(folder)), capture_output=True, text=True, check=False, timeout=150,
        cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_page_is_in_it(site: Path) -> None:
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")}
    assert pages <= {path.stem for path in site.glob("*.html")}


def test_every_link_leads_to_a_page_and_a_place_in_it(site: Path) -> None:
    assert broken(site) == []


def test_nothing_in_it_was_meant_otherwise(site: Path) -> None:
    assert unread(site) == []


def test_it_loads_nothing_from_another_host(site: Path) -> None:
    assert foreign(site) == []
    elsewhere = re.compile(r"url\(\s*[\"']?(https?:)?//|@import")
    assert [path for path in site.rglob("*.css") if elsewhere.search(path.read_text())] == []


@pytest.mark.parametrize(
    ("html", "finds"),
    [
        ('<a href="gone.html">', ["page.html -> gone.html"]),
        ('<a href="other.html#gone">', ["page.html -> other.html#gone"]),
        ('<a href="#gone">', ["page.html -> #gone"]),
        ('<img src="gone.svg">', ["page.html -> gone.svg"]),
        ('<a href="other.html#there"><a href="#here"><b id="here"><a href="https://elsewhere">', []),
    ],
    ids=["no page", "no anchor there", "no anchor here", "no picture", "all stand"],
)
def test_a_link_that_leads_nowhere_is_found(tmp_path: Path, html: str, finds: list[str]) -> None:
    (tmp_path / "page.html").write_text(html)
    (tmp_path / "other.html").write_text('<h2 id="there">')
    assert broken(tmp_path) == finds


def test_what_another_host_would_be_asked_for_is_found(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(
        '<script src="//cdn.example/x.js"></script><link rel="stylesheet" href="a.css">'
    )
    assert foreign(tmp_path) == ["page.html -> //cdn.example/x.js"]


def test_a_list_that_became_text_is_found(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text("<p>a line:\n- an item</p><pre>\n- code</pre>")
    assert unread(tmp_path) == ["page.html: 'a line:\\n- an item'"]


@pytest.mark.parametrize("drawing", DRAWINGS, ids=lambda path: path.name)
def test_a_drawing_says_what_it_shows_and_needs_no_other_file(drawing: Path) -> None:
    root = ElementTree.parse(drawing).getroot()
    for part in ("title", "desc"):
        assert root.findtext(f"{SVG}{part}", "").strip(), part
    assert not re.search(r"(href|src)=|url\((?!#)|<script|<image|@import", drawing.read_text())


def test_both_drawings_are_where_concepts_are_explained() -> None:
    shown = re.findall(r"!\[([^\]]+)\]\(img/([^)]+)\)", (ROOT / "docs/concepts.md").read_text())
    assert {name for _, name in shown} == {path.name for path in DRAWINGS} >= {"house.svg", "room.svg"}
    assert all(len(text) > 8 for text, _ in shown)
