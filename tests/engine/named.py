"""
A bare engine in metadata-server mode: `python -m tests.engine.named NAME METADATA_URL`, driven by JSON lines.

First line out: {"code": 0, "pid": ..., "pointer": ...}; `code` is what the engine's own start returned.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from typing import Any

from tests.engine.processes import die_with_parent

NBYTES = 1 << 20
ENVIRON = {"MC_FORCE_TCP": "1", "MC_TCP_BIND_ADDRESS": "127.0.0.1", "MC_LOG_LEVEL": "ERROR"}


def main(name: str, url: str) -> None:
    from mooncake.engine import TransferEngine

    memory = ctypes.create_string_buffer(NBYTES)
    at = ctypes.addressof(memory)
    engine: Any = TransferEngine()
    code = engine.initialize(name, url, "tcp", "") or engine.register_memory(at, NBYTES)
    print(json.dumps({"code": code, "pid": os.getpid(), "pointer": at}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        match asked["do"]:
            case "write":  # one byte, `value`, to the first buffer of `peer`
                ctypes.memset(at, asked["value"], 1)
                to = engine.get_first_buffer_address(asked["peer"])
                answer = {"code": engine.transfer_sync_write(asked["peer"], at, to, 1), "to": to}
            case "first":
                answer = {"value": memory[0][0]}
            case "leave":
                del engine
                print(json.dumps({}), flush=True)
                return
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    die_with_parent()
    main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)
