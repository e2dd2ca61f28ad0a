"""
What a stock engine's ranks leave in a registry, without the engine: `python -m tests.explain.engine_rank`, JSON lines.

Each rank has a real control socket (ZeroMQ, PULL) and registers once, over HTTP, as stock ranks do; nothing is ever
renewed. It needs a tenth of a second to start, where a rank with an engine needs two.
"""

from __future__ import annotations

import http.client
import json
import sys
from typing import Any
from urllib.parse import urlsplit

import zmq


def main() -> None:
    context = zmq.Context()
    held = []
    print(json.dumps({}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        sock = context.socket(zmq.PULL)
        port = sock.bind_to_random_port("tcp://127.0.0.1")
        held.append(sock)
        body = {"port": port, **asked["body"]}
        status, words = put(asked["registry"], asked["path"], body)
        print(json.dumps({"status": status, "words": words, "port": port}), flush=True)


def put(registry: str, path: str, body: dict[str, Any]) -> tuple[int, str]:
    at = urlsplit(registry)
    connection = http.client.HTTPConnection(at.hostname or "", at.port, timeout=60)
    connection.request("PUT", path, json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    words = answer.read().decode()
    connection.close()
    return answer.status, words


if __name__ == "__main__":
    main()
