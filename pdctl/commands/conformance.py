"""`pdctl conformance URL`: does a bootstrap registry keep its promises? 0: all; 1: not all; 69: none is there."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from rich.status import Status

from pdctl.commands import drawing
from pdctl.config import Settings
from pdctl.conformance import course
from pdctl.conformance.course import Course, Report
from pdctl.conformance.promises import PROMISES, Promise, Verdict


async def run(settings: Settings, args: argparse.Namespace) -> int:
    how = Course(args.force, args.from_address, args.rooms, args.idle)
    with drawing.console(sys.stderr).status("") as status:
        report = await course.run(args.url, settings.client, how, lambda promise: _tell(status, promise))
    if args.json:
        print(json.dumps(_document(report)))
    else:
        _show(report)
    return 0 if report.ok else 1


def _tell(status: Status, promise: Promise) -> None:
    """On a terminal only: rich draws no status elsewhere."""
    at = [each.name for each in PROMISES].index(promise.name) + 1
    status.update(f"{at} of {len(PROMISES)}: {promise.says}")


def _show(report: Report) -> None:
    to = drawing.console()
    rows = [(finding.verdict, promise.name, promise.says, finding.found) for promise, finding in report.findings]
    drawing.show(to, ("", "name", "promise", "found"), rows, f"{report.url}: {report.server}")
    counts = [sum(finding.verdict is verdict for _, finding in report.findings) for verdict in Verdict]
    print(", ".join(f"{count} {verdict}" for count, verdict in zip(counts, Verdict, strict=True)))
    for each in report.left:
        print(f"left behind: {drawing.shown(each)}")


def _document(report: Report) -> dict[str, Any]:
    return {
        "url": report.url,
        "server": report.server,
        "ok": report.ok,
        "promises": [
            {
                "name": promise.name,
                "promise": promise.says,
                "asked": promise.asks,
                "verdict": finding.verdict.value,
                "found": finding.found,
            }
            for promise, finding in report.findings
        ],
        "left": list(report.left),
    }
