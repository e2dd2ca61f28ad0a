"""
Stock SGLang's own pass over blacklisted sessions, with the real engine: `python -m tests.bench.stock_probe`.

Reads {"sessions": [...]} from stdin and runs `MooncakeKVManager._run_one_probe_pass` of the wheel on it, once; says
{"lifted": {session: seconds}, "pass_s": seconds}. Runs with the stock wheel on PYTHONPATH, imports nothing of pdctl.
"""

from __future__ import annotations

import importlib
import json
import sys
import threading
import time
from collections import defaultdict
from typing import Any


def prober_class() -> Any:
    from tests.wire.stock import surroundings

    surroundings.install()
    conn: Any = importlib.import_module("sglang.srt.disaggregation.mooncake.conn")
    ranks: Any = importlib.import_module("tests.wire.stock.ranks")

    class Prober(conn.MooncakeKVManager):  # type: ignore[misc]  # what it is is known where the wheel is
        """A manager that has a table and an engine, and nothing else of a rank."""

        def __init__(self, sessions: list[str]) -> None:
            self.engine = ranks.real_engine()
            self.session_lock = threading.Lock()
            self.failed_sessions = set(sessions)
            self.session_failures: defaultdict[str, int] = defaultdict(int)
            self.failed_session_probes: dict[str, object] = {}
            self.failed_session_probe_interval = 30.0
            self.failed_session_probe_max_interval = 300.0
            self.failed_session_idle_timeout = 600.0
            self.lifted: dict[str, float] = {}
            self.began = time.monotonic()

        def _unblacklist_session(self, session_id: str) -> None:
            super()._unblacklist_session(session_id)
            self.lifted[session_id] = time.monotonic() - self.began

    return Prober


def main() -> None:
    prober = prober_class()(json.loads(sys.stdin.readline())["sessions"])
    print(json.dumps({"ready": True}), flush=True)
    sys.stdin.readline()
    prober.began = time.monotonic()
    prober._run_one_probe_pass()
    took_s = time.monotonic() - prober.began
    print(json.dumps({"lifted": prober.lifted, "pass_s": took_s}), flush=True)


if __name__ == "__main__":
    main()
