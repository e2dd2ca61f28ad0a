"""
`python -m pdctl.scout`: set a store up once and end, so that another process knows what it would meet (rehearsal.py).

Reads the arguments as JSON from its input, writes one line of JSON, and outlives neither its deadline nor its answer.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from typing import Any

from pdctl.core.kvstore import SetUp
from pdctl.engine.store_wheel import store_class

_LONGEST_S = 120
"""The kernel ends it then, whoever holds the interpreter: its parent may have died."""


def main() -> None:
    signal.alarm(_LONGEST_S)
    plan = SetUp(**json.load(sys.stdin))
    started = time.monotonic()
    code, error = _tried(plan)
    answer = {"code": code, "error": error, "seconds": time.monotonic() - started}
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()
    os._exit(0)  # the wheel's own end takes seconds, and nothing here needs it


def _tried(plan: SetUp) -> tuple[int, str]:
    try:
        store: Any = store_class(plan.protocol)()
        code = store.setup(
            *(plan.local_hostname, plan.metadata_server, plan.segment_nbytes, plan.buffer_nbytes),
            *(plan.protocol, plan.device, plan.master),
            **plan.options,
        )
    except Exception as error:  # whatever it is, the parent's own call would meet it
        return -1, f"{type(error).__name__}: {error}"
    return int(code), ""


if __name__ == "__main__":
    main()
