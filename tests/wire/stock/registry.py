"""
Stock SGLang's own bootstrap server in a process of its own: says where it listens, ends when its parent says no more.

Started with the stock wheel on PYTHONPATH, as `child.py`.
"""

from __future__ import annotations

import json
import os
import sys
import time

from tests.wire.stock import surroundings

surroundings.install()

from sglang.srt.disaggregation.common.conn import CommonKVBootstrapServer  # noqa: E402


def main() -> None:
    server = CommonKVBootstrapServer("127.0.0.1", 0)
    deadline = time.monotonic() + 30
    while not (runner := getattr(server, "_runner", None)) or not runner.addresses:
        assert time.monotonic() < deadline, "the stock registry did not start"
        time.sleep(0.01)
    host, port = runner.addresses[0]
    print(json.dumps({"url": f"http://{host}:{port}"}), flush=True)
    sys.stdin.read()
    os._exit(0)  # stock's thread does not end by itself


if __name__ == "__main__":
    main()
