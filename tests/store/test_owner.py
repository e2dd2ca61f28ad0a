"""What an owner that hung still sends reaches no page that was given back (MOONCAKE_FACTS H1, in the store)."""

from __future__ import annotations

import json
import subprocess
import sys


def owner_hangs() -> dict[str, float]:
    command = [sys.executable, "-m", "tests.store.owner", "16", "1"]
    told: dict[str, float] = json.loads(
        subprocess.check_output(command, timeout=120, stderr=subprocess.DEVNULL).splitlines()[-1]
    )
    return told


def test_nothing_lands_after_a_call_on_an_owner_that_hangs_has_failed() -> None:
    told = [owner_hangs()]
    if told[0]["took_s"] >= 20:  # seen once: on a busy machine the wheel missed a stall, and gave up by its own 60 s
        told.append(owner_hangs())
    for each in told:
        assert (each["kept"], each["hits"], each["landed"]) == (64, 0, 0), told
    assert told[-1]["took_s"] < 20, told
