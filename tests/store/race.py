"""`python -m tests.store.race [ROUNDS]`: eight ranks at once, a master that starts 5 s late, a segment later still.

A round is survived when all eight come up. Prints what each took; exits 1 with the first round that was not.
"""

from __future__ import annotations

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from tests.engine.processes import Child
from tests.store.master import Master

RANKS = 8
MASTER_LATE_S = 5.0
SEGMENT_LATE_S = 2.0  # after the master; until then there is none, and every put is -200


@dataclass(frozen=True)
class Round:
    reports: list[dict[str, Any]]
    seconds: float

    @property
    def survived(self) -> bool:
        return all(report["ready"] for report in self.reports)

    def __str__(self) -> str:
        attempts = [report["attempts"] for report in self.reports]
        waited = [round(report["waited_s"], 1) for report in self.reports]
        lag_ms = max(round(report["lag_s"] * 1e3) for report in self.reports)
        ready = sum(report["ready"] for report in self.reports)
        return f"{ready} of {len(self.reports)} up, attempts {attempts}, waited {waited} s, worst lag {lag_ms} ms"


class Rank(Child):
    """A rank under way; its next line is its report."""

    def __init__(self, master: Master, number: int, of: int, *, segment: int) -> None:
        config = {
            "master_server_address": master.address,
            "master_metrics_port": master.http,
            "local_hostname": "127.0.0.1",
            "protocol": "tcp",
            "global_segment_size": segment * of,
        }
        told = {"config": config, "rank": {"tp": number, "tp_size": of}, "patience": {}}
        super().__init__("tests.store.rank", json.dumps(told))


def run(ranks: int = RANKS, master_late_s: float = MASTER_LATE_S, segment_late_s: float = SEGMENT_LATE_S) -> Round:
    """All but one give no segment: they warm up as soon as the last, which starts late, has mounted its own."""
    since, master = time.monotonic(), Master()
    try:
        with ThreadPoolExecutor(ranks) as at_once, ExitStack() as stack:  # a child dies with the thread that started it
            starting = [at_once.submit(Rank, master, number, ranks, segment=0) for number in range(1, ranks)]
            early = [stack.enter_context(started.result()) for started in starting]
            time.sleep(master_late_s)
            master.start()
            time.sleep(segment_late_s)
            late = stack.enter_context(Rank(master, 0, ranks, segment=32 << 20))
            reports = [rank.line(90.0) for rank in (*early, late)]
            return Round(reports, time.monotonic() - since)
    finally:
        master.kill()


def main(rounds: int) -> int:
    for number in range(1, rounds + 1):
        done = run()
        print(f"round {number}: {done}", flush=True)
        if not done.survived:
            print("\n".join(report["said"] for report in done.reports))
            return 1
    print(f"{rounds} of {rounds} rounds survived")
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 1))
