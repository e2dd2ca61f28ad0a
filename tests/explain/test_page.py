"""docs/explain.md names every culprit and every check, and no other."""

from __future__ import annotations

import re
from pathlib import Path

from pdctl.core.findings import Culprit
from pdctl.doctor.rounds import CHECKS

PAGE = (Path(__file__).parents[2] / "docs/explain.md").read_text()


def test_the_page_tells_of_every_culprit_in_the_order_in_which_they_are_told() -> None:
    table = PAGE.split("## Findings")[1].split("## ")[0]
    rows = [row for row in table.splitlines() if row.startswith("| `") and not row.startswith("| `what`")]
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert named == [culprit.value for culprit in Culprit]


def test_the_page_tells_of_every_check() -> None:
    text = PAGE.split("## What `doctor` looks at")[1]
    assert [name for name in CHECKS if f"`{name}`" not in text] == []
