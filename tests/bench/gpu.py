"""
Memory of a device between two processes on it, over TCP, beside the host's by the same engines: what staging costs.

Ours is the device, the rival the host: below 1 x is what a device's memory costs more. Nothing where no device is; on
the driver of paper (./dev gpu --rehearse) it is the processor that is timed, and no device.
"""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests.bench.rivals import ROUNDS, Row
from tests.device.paper import remove_memory
from tests.engine.processes import Child

ROOT = Path(__file__).parent.parent.parent
SIZES = ((4 << 10, 200), (64 << 10, 100), (1 << 20, 20), (2 << 20, 10))
"""Bytes, and how many writes a round."""


def bench() -> list[Row]:
    about = subprocess.run(
        [sys.executable, "-m", "tests.gpu.about"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    print(about.stdout.strip() or about.stderr.strip())
    if about.returncode:
        return []
    with ExitStack() as stack:
        here, there = _rank(stack), _rank(stack)
        _, theirs = here.ask_now("engine"), there.ask_now("engine")
        _, beside = here.ask_now("with_host"), there.ask_now("with_host")
        return [_row(here, theirs, beside["pointer"], nbytes, n) for nbytes, n in SIZES]


def _rank(stack: ExitStack) -> Child:
    child = stack.enter_context(Child("tests.gpu.rank", json.dumps({"role": "", "way": "", "protocol": "tcp"})))
    stack.callback(remove_memory, child.pid)
    return child


def _row(here: Child, theirs: dict[str, Any], host: int, nbytes: int, n: int) -> Row:
    times: dict[bool, list[float]] = {False: [], True: []}
    for number in range(ROUNDS + 1):
        for on_host in (False, True) if number % 2 else (True, False):
            pointer = host if on_host else theirs["pointers"][0]
            asked = {"session": theirs["session"], "pointer": pointer, "nbytes": nbytes, "n": n, "host": on_host}
            seconds = here.ask_now("timed", **asked)["seconds"]
            if number:  # the first one opens the way
                times[on_host].append(seconds)
    size = f"{nbytes >> 10} KiB" if nbytes < 1 << 20 else f"{nbytes >> 20} MiB"
    return Row(f"write {size}, one after another", "device", "host", tuple(times[False]), tuple(times[True]))
