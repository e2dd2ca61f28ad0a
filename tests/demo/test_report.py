"""One token that differs fails the check, and one failed check fails the demo."""

from __future__ import annotations

import json

import pytest

from pdctl.demo.report import Check, Moved, Report, all_same_tokens, same_tokens


def test_equal_tokens_pass() -> None:
    check = same_tokens(2, "tokens", [1, 2, 3], [1, 2, 3])
    assert check.ok
    assert check.measured == "3 of 3 equal"


@pytest.mark.parametrize(
    ("got", "first", "equal"),
    [([1, 9, 3], 1, 2), ([1, 2], 2, 2), ([1, 2, 3, 4], 3, 3), ([], 0, 0)],
    ids=["one differs", "one missing", "one too many", "none"],
)
def test_one_unequal_token_fails_and_is_named(got: list[int], first: int, equal: int) -> None:
    check = same_tokens(2, "tokens", [1, 2, 3], got)
    assert not check.ok
    assert f"first difference at token {first}" in check.evidence[0]
    assert check.measured == f"{equal} of 3 equal"


def test_nothing_compared_is_no_success() -> None:
    assert not same_tokens(2, "tokens", [], []).ok
    assert not all_same_tokens(2, "tokens", []).ok
    assert not Report().ok


def test_one_bad_prompt_among_good_ones_fails_the_demo_with_its_evidence() -> None:
    check = all_same_tokens(2, "tokens", [("good", [1, 2], [1, 2]), ("bad", [3, 4], [3, 5])])
    assert check.measured == "4 tokens, 1 of 2 prompts equal"
    assert check.evidence[0].startswith("bad: first difference at token 1")
    report = Report(checks=[Check(1, "fine", True, "1", "1"), check])
    assert report.exit_status == 1
    assert Report(checks=report.checks[:1]).exit_status == 0


def test_the_document_is_json_with_every_check() -> None:
    report = Report(checks=[Check(1, "a", True, "1 ms", "< 2 ms"), Check(2, "b", False, "x", "y", ("log line",))])
    told = json.loads(json.dumps(report.document()))
    assert not told["ok"]
    assert [{key: check[key] for key in ("name", "ok", "measured", "expected")} for check in told["checks"]] == [
        {"name": "a", "ok": True, "measured": "1 ms", "expected": "< 2 ms"},
        {"name": "b", "ok": False, "measured": "x", "expected": "y"},
    ]


def test_what_was_moved_adds_up() -> None:
    total = Moved(1, 10, 2, 4, 2_000_000_000, 64, 0.5) + Moved(1, 6, 1, 1, 1_000_000_000, 64, 0.5)
    assert total == Moved(2, 16, 3, 5, 3_000_000_000, 128, 1.0)
    assert total.gigabytes_per_s == 3.0
    assert Moved().gigabytes_per_s == 0.0
