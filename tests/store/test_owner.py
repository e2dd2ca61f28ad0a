"""What an owner that hung still sends reaches no page that was given back (MOONCAKE_FACTS H1, in the store)."""

from __future__ import annotations

import json
import os
import subprocess
import sys


def test_nothing_lands_after_a_call_on_an_owner_that_hangs_has_failed() -> None:
    command = [sys.executable, "-m", "tests.store.owner", "16", "1"]
    # An engine that another test opened here has said to its process how many lanes there are.
    environ = {name: value for name, value in os.environ.items() if not name.startswith("MC_")}
    said = subprocess.check_output(command, timeout=120, stderr=subprocess.DEVNULL, env=environ)
    told = json.loads(said.splitlines()[-1])
    assert (told["kept"], told["hits"], told["landed"]) == (64, 0, 0), told
    assert told["took_s"] < 20, told
