"""`pdctl conformance` against stock SGLang's own bootstrap servers: what docs/conformance.md says of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pdctl.conformance import course
from pdctl.conformance.course import Course
from pdctl.conformance.promises import PROMISES, Verdict
from pdctl.credentials import Credentials
from tests.engine.processes import Child
from tests.wire.stock.conftest import ROOT, environment

PAGE = ROOT / "docs" / "conformance.md"
ROW = re.compile(r"^\| `([a-z-]+)` \|[^|]+\| (\w+)[^|]*\| (\w+)[^|]*\| (\w+)[^|]*\|", re.MULTILINE)
"""name, promise, ours, stock's in Python, stock's in Rust."""

# The Rust server's /health is the engine's, and there is none behind it
WITHOUT_ENGINE = {"SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0"}


@pytest.mark.parametrize(("module", "column"), [("registry", 2), ("rust_registry", 3)], ids=["python", "rust"])
async def test_a_stock_server_breaks_what_the_page_says_and_nothing_else(
    stock_folder: Path, module: str, column: int
) -> None:
    environ = environment(stock_folder) | WITHOUT_ENGINE
    with Child(f"tests.wire.stock.{module}", environ=environ) as server:
        report = await course.run(server.hello["url"], Credentials(), Course(idle_s=0.1))
    found = {promise.name: finding.verdict for promise, finding in report.findings}
    said = {row[0]: row[column] for row in ROW.findall(PAGE.read_text())}
    assert said.keys() == {promise.name for promise in PROMISES}
    assert {name: verdict for name, verdict in found.items() if verdict is not Verdict.UNTRIED} == {
        name: verdict for name, verdict in said.items() if name != "many-rooms"
    }
    assert any("restart it" in each for each in report.left)


def test_the_page_says_that_ours_keeps_them_all() -> None:
    """`tests/conformance` holds ours to it."""
    assert {row[1] for row in ROW.findall(PAGE.read_text())} == {"kept"}
