"""What a page of the built site leads to and what it loads, as a browser would find it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

_LOADS = {
    "script": "src",
    "img": "src",
    "iframe": "src",
    "source": "src",
    "video": "src",
    "audio": "src",
    "link": "href",
}
_VERBATIM = {"code", "pre", "script", "style"}
_MARKDOWN = re.compile(r"\*\*|```|\]\(|\|-|\n(?:[-*]|\d{1,2}\.) |\n\| ")
_NOT_LOADED = {"canonical", "prev", "next", "alternate"}  # kinds of <link> that no browser follows by itself


@dataclass
class Page(HTMLParser):
    """`anchors` are the places in it that a link may name."""

    anchors: set[str] = field(default_factory=set)
    leads_to: list[str] = field(default_factory=list)
    loads: list[str] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    _verbatim: int = 0

    def __post_init__(self) -> None:
        super().__init__()

    @classmethod
    def read(cls, path: Path) -> Page:
        page = cls()
        page.feed(path.read_text())
        page.close()
        return page

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        said = {name: value or "" for name, value in attrs}
        self._verbatim += tag in _VERBATIM
        self.anchors |= {said[name] for name in ("id", "name") if name in said}
        if tag == "a" and "href" in said:
            self.leads_to.append(said["href"])
        loaded = said.get(_LOADS.get(tag, ""))
        if loaded and not (tag == "link" and set(said.get("rel", "").split()) & _NOT_LOADED):
            self.loads.append(loaded)

    def handle_endtag(self, tag: str) -> None:
        self._verbatim -= tag in _VERBATIM

    def handle_data(self, data: str) -> None:
        if not self._verbatim:
            self.words.append(data)


def broken(site: Path) -> list[str]:
    """Links and pictures of all pages that lead to no file, or to no anchor of it; `page -> target`."""
    pages = {path.resolve(): Page.read(path) for path in site.rglob("*.html")}
    pages.pop(site.resolve() / "404.html", None)  # shown at any path, so that its links begin at the host
    return [
        f"{path.relative_to(site.resolve())} -> {target}"
        for path, page in sorted(pages.items())
        for target in (*page.leads_to, *page.loads)
        if not _stands(path, target, pages)
    ]


def foreign(site: Path) -> list[str]:
    """What any page has a browser load from another host; `page -> target`."""
    pages = {path: Page.read(path) for path in sorted(site.rglob("*.html"))}
    return [
        f"{path.relative_to(site)} -> {target}"
        for path, page in pages.items()
        for target in page.loads
        if urlsplit(target).netloc
    ]


def unread(site: Path) -> list[str]:
    """What was meant as Markdown and stands there as text: the site's reader is stricter about lists than others."""
    texts = {path: "".join(Page.read(path).words) for path in sorted(site.rglob("*.html"))}
    return [
        f"{path.relative_to(site)}: {text[max(0, found.start() - 30) : found.end() + 30]!r}"
        for path, text in texts.items()
        for found in _MARKDOWN.finditer(text)
    ]


def _stands(path: Path, target: str, pages: dict[Path, Page]) -> bool:
    parts = urlsplit(target)
    if parts.scheme or parts.netloc:
        return True  # elsewhere: nobody asks there
    there = (path.parent / unquote(parts.path)).resolve() if parts.path else path
    if there.is_dir():
        there = there / "index.html"
    if there not in pages:
        return there.is_file()
    fragment = unquote(parts.fragment)
    return not fragment or fragment in pages[there].anchors or fragment.startswith("__")
