"""
What a prefill's preStop hook runs in the engine's own container: drain its registry, and wait until it is empty.

    python3 drain.py http://127.0.0.1:8998 default 240

Standard library only, since the image is the engine's. Ends with 0 whatever happens: a hook that fails stops a pod no
later than one that succeeds, and the drain's grace is the registry's to keep.
"""

from __future__ import annotations

import json
import sys
import time
import urllib.error
import urllib.request

ASK_S, EVERY_S = 2.0, 0.5


def ask(url: str, body: dict[str, float] | None = None) -> dict[str, object] | None:
    """The answer; None where nobody knows the instance."""
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data), timeout=ASK_S) as answer:
            said: dict[str, object] = json.load(answer)
            return said
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise


def drain(registry: str, instance: str, grace_s: float) -> str:
    """What became of it, in words."""
    at = f"{registry}/v1/instances/{instance}"
    began = time.monotonic()
    if ask(f"{at}/drain", {"grace_s": grace_s}) is None:
        return "nobody is registered"
    while time.monotonic() - began < grace_s + ASK_S:
        standing = ask(at)
        if standing is None or not standing["alive"]:
            return f"drained after {time.monotonic() - began:.1f} s"
        time.sleep(EVERY_S)
    return f"not drained within {grace_s:g} s"


if __name__ == "__main__":
    try:
        print(drain(sys.argv[1], sys.argv[2], float(sys.argv[3])))
    except (OSError, ValueError, KeyError) as error:
        print(f"the registry cannot be asked ({error}): stopping without a drain")
