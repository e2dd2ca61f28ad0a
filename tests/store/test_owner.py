"""What an owner that hung still sends reaches no page that was given back (MOONCAKE_FACTS H1, in the store)."""

from __future__ import annotations

import json
import subprocess
import sys


def test_nothing_lands_after_a_call_on_an_owner_that_hangs_has_failed() -> None:
    command = [sys.executable, "-m", "tests.store.owner", "16", "1"]
    told = json.loads(subprocess.check_output(command, timeout=120, stderr=subprocess.DEVNULL).splitlines()[-1])
    assert told["kept"] == 64
    assert told["hits"] == 0
    assert told["took_s"] < 20
    assert told["landed"] == 0
