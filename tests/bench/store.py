"""
By how much the event loop comes late while a store is set up or closed, its master well or in trouble.

The rival is the wheel's own set-up and close on a thread, at our low time-outs (at its own it holds the interpreter for
90 s, for ever, and 62 s). "In between": the master is stopped or killed in the moment between the last question and our
own set-up, by hand; that is what is left.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tests.bench.rivals import Row
from tests.engine.processes import Child
from tests.store.lag import BETWEEN, CLOSING
from tests.store.master import Master, master
from tests.store.test_freeze import blackhole

ROUNDS = 7
CASES = ("well", "refused", "late by 2 s", "hung", "blackholed", *CLOSING, *BETWEEN)


def bench() -> list[Row]:
    return [row(case) for case in CASES]


def row(case: str) -> Row:
    turns = [(late_s("us", case), rival_s(case)) for _ in range(ROUNDS)]
    return Row(case, "ours", "the wheel", tuple(ours for ours, _ in turns), tuple(rival for _, rival in turns))


def rival_s(case: str) -> float:
    """Alone it asks nobody before: what meets it in between meets it at once."""
    return late_s("wheel", {"hung in between": "hung", "killed in between": "refused"}.get(case, case))


def late_s(by: str, case: str) -> float:
    with met(case) as (at, http, pid, late):
        config = {
            "master_server_address": at,
            "master_metrics_port": http,
            "local_hostname": "127.0.0.1",
            "protocol": "tcp",
            "global_segment_size": 64 << 20,
        }
        told = {"by": by, "config": config, "pid": pid, "trouble": case}
        with Child("tests.store.lag", json.dumps(told)) as child:
            if late is not None:
                time.sleep(2.0)
                late.start()
            return float(child.line(200.0)["lag_s"])


@contextmanager
def met(case: str) -> Iterator[tuple[str, int, int, Master | None]]:
    """The master's address, its HTTP port, its process, and whether it has to be started yet."""
    absent = Master()
    if case == "blackholed":
        with blackhole() as port:
            yield f"127.0.0.1:{port}", absent.http, 0, None
    elif case == "refused":
        yield absent.address, absent.http, 0, None
    elif case.startswith("late"):
        try:
            yield absent.address, absent.http, 0, absent
        finally:
            absent.kill()
    else:
        with master() as running:
            if case == "hung":
                running.stop()
            yield running.address, running.http, running.pid, None
