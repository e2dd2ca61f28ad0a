"""What `import pdctl` gives and what it does: names, and nothing else. Asked of a new process each time."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pdctl

ROOT = Path(__file__).parent.parent
CORE = sorted(f"pdctl.core.{path.stem}" for path in (ROOT / "pdctl/core").glob("*.py") if path.stem != "__init__")

WATCHED = """
import json, os, signal, sys, threading

DEEDS = ("socket.__new__", "socket.bind", "socket.connect", "subprocess.Popen", "os.fork", "os.system")
deeds, environment, handlers = [], dict(os.environ), [signal.getsignal(s) for s in signal.valid_signals()]
sys.addaudithook(lambda event, args: deeds.append(event) if event in DEEDS else None)

{deed}

import logging
loaded = sys.modules.get("prometheus_client")
print(json.dumps({{
    "deeds": deeds,
    "threads": threading.active_count(),
    "environment changed": dict(os.environ) != environment,
    "signals changed": [signal.getsignal(s) for s in signal.valid_signals()] != handlers,
    "log handlers": len(logging.getLogger().handlers),
    "metrics": [m.name for m in loaded.REGISTRY.collect() if "pdctl" in m.name or "sglang" in m.name] if loaded else [],
    "mooncake": sorted(name for name in sys.modules if name.partition(".")[0] == "mooncake"),
}}))
"""

NOTHING = {
    "deeds": [],
    "threads": 1,
    "environment changed": False,
    "signals changed": False,
    "log handlers": 0,
    "metrics": [],
    "mooncake": [],
}

CORE_ALONE = """
import importlib, json, sys, types

house = types.ModuleType("pdctl")  # the package as a folder: core is asked for, not what the house exports
house.__path__ = [sys.argv[1]]
sys.modules["pdctl"] = house
for name in sys.argv[2:]:
    importlib.import_module(name)
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""

OUTSIDE = {"aiohttp", "fastapi", "zmq", "structlog", "tenacity", "prometheus_client", "uvicorn", "pydantic", "rich"}


def test_public_names_are_sorted_once_each_and_there() -> None:
    assert pdctl.__all__ == sorted(set(pdctl.__all__))
    assert all(getattr(pdctl, name) is not None for name in pdctl.__all__)


def test_a_star_import_gives_what_all_says() -> None:
    given: dict[str, object] = {}
    exec("from pdctl import *", given)
    assert set(given) - {"__builtins__"} == set(pdctl.__all__)


def test_every_public_exception_is_in_the_one_tree() -> None:
    errors = importlib.import_module("pdctl.errors")
    public = [value for name in pdctl.__all__ if isinstance(value := getattr(pdctl, name), type)]
    assert all(issubclass(value, errors.PdctlError) for value in public if issubclass(value, Exception))


def test_importing_pdctl_and_every_public_name_runs_nothing() -> None:
    assert watched("import pdctl\nfor name in pdctl.__all__: getattr(pdctl, name)") == NOTHING


def test_the_watch_sees_what_an_import_must_not_do() -> None:
    seen = watched(
        "import socket, os, threading, prometheus_client\n"
        "s = socket.socket(); s.bind(('127.0.0.1', 0)); os.environ['A'] = 'b'\n"
        "threading.Thread(target=threading.Event().wait, daemon=True).start()\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN); prometheus_client.Counter('pdctl_x', 'x')\n"
        "import logging; logging.basicConfig(); sys.modules['mooncake'] = socket"
    )
    assert [key for key, quiet in NOTHING.items() if seen[key] == quiet] == []


def test_core_is_imported_without_anything_from_outside() -> None:
    loaded = child(CORE_ALONE, str(ROOT / "pdctl"), *CORE)
    assert "pdctl" in loaded
    assert not OUTSIDE & set(loaded)


def watched(deed: str) -> dict[str, Any]:
    seen = child(WATCHED.format(deed=deed))
    assert isinstance(seen, dict)
    return seen


def child(program: str, *arguments: str) -> Any:
    """What `program` printed, read as JSON; anything else that it printed breaks the reading, and should."""
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False, timeout=60, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)
