"""`pdctl conformance` against stock SGLang's own bootstrap server: what docs/conformance.md says of it."""

from __future__ import annotations

import re
from pathlib import Path

from pdctl.conformance import course
from pdctl.conformance.course import Course
from pdctl.conformance.promises import PROMISES, Verdict
from pdctl.credentials import Credentials
from tests.engine.processes import Child
from tests.wire.stock.conftest import ROOT, environment

PAGE = ROOT / "docs" / "conformance.md"
ROW = re.compile(r"^\| `([a-z-]+)` \|[^|]+\| (\w+)[^|]*\| (\w+)[^|]*\|", re.MULTILINE)
"""name, promise, ours, stock's."""


async def test_the_stock_server_breaks_what_the_page_says_and_nothing_else(stock_folder: Path) -> None:
    with Child("tests.wire.stock.registry", environ=environment(stock_folder)) as server:
        report = await course.run(server.hello["url"], Credentials(), Course(idle_s=0.1))
    found = {promise.name: finding.verdict for promise, finding in report.findings}
    said = {name: stock for name, _, stock in ROW.findall(PAGE.read_text())}
    assert said.keys() == {promise.name for promise in PROMISES}
    assert {name: verdict for name, verdict in found.items() if verdict is not Verdict.UNTRIED} == {
        name: verdict for name, verdict in said.items() if name != "many-rooms"
    }
    assert any("restart it" in each for each in report.left)
