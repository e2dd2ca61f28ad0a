"""
The floors of the house, read from the source with `ast`: an import goes downstairs or the test says why not.

`violations(name, source)` is pure, so that every rule is also shown a planted breach and has to bite.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

FLOORS = {
    **dict.fromkeys(["pdctl", "pdctl.__main__", "pdctl.cli", "pdctl.demo", "pdctl.commands", "pdctl.flags"], 6),
    **dict.fromkeys(["pdctl.handed", "pdctl.dismissal", "pdctl.onlooker"], 5),
    **dict.fromkeys([f"pdctl.{shell}" for shell in ("agent_client", "succession", "scout", "traced")], 4),
    **dict.fromkeys(["pdctl.node", "pdctl.wires", "pdctl.door", "pdctl.links", "pdctl.inquiry", "pdctl.config"], 5),
    "pdctl.firsthand": 5,
    "pdctl.sections": 5,
    "pdctl.serving": 5,
    **dict.fromkeys([f"pdctl.{shell}" for shell in ("server", "guard", "dialects", "client", "prober", "peer")], 4),
    **dict.fromkeys([f"pdctl.{shell}" for shell in ("sender", "sending", "receiver", "arriving")], 4),
    **dict.fromkeys([f"pdctl.{shell}" for shell in ("agent", "kvstore", "lease")], 4),
    **dict.fromkeys([f"pdctl.{shell}" for shell in ("admission", "dated", "witness", "drainer", "conformance")], 4),
    **dict.fromkeys(
        [
            f"pdctl.{room}"
            for room in (
                "engine",
                "persistence",
                "store",
                "registrar",
                "keyring",
                "roster",
                "watching",
                "telling",
                "lastwords",
                "contacts",
                "partners",
                "writing",
                "tracing",
                "device",
                "memory",
            )
        ],
        3,
    ),
    **dict.fromkeys(
        [
            f"pdctl.{room}"
            for room in (
                "engine.base",
                "persistence.base",
                "device.base",
                "store.base",
                "retry",
                "metrics",
                "logs",
                "errands",
                "spans",
                "together",
            )
        ],
        2,
    ),
    "pdctl.arrays": 3,
    "pdctl.courier": 3,
    "pdctl.beside": 2,
    "pdctl.lookout": 3,
    "pdctl.looking": 5,
    "pdctl.reporting": 4,
    "pdctl.holding": 5,
    "pdctl.journals": 5,
    "pdctl.replicas": 5,
    "pdctl.answers": 2,
    "pdctl.persistence.lock": 2,
    "pdctl.counts": 2,
    "pdctl.credentials": 2,
    "pdctl.explaining": 5,
    "pdctl.doctor": 5,
    "pdctl.identity": 4,
    "pdctl.lag": 2,
    "pdctl.listeners": 2,
    "pdctl.lanes": 2,
    "pdctl.pace": 2,
    "pdctl.herald": 2,
    "pdctl.several": 2,
    "pdctl.shortcut": 2,
    "pdctl.tenancy": 2,
    "pdctl.waiting": 2,
    "pdctl.core": 1,
    "pdctl.errors": 0,
}
"""A room -> its floor. A folder's floor holds for its files, unless a file has a row of its own."""

FOLDERS = (
    "pdctl.commands",
    "pdctl.conformance",
    "pdctl.counts",
    "pdctl.demo",
    "pdctl.device",
    "pdctl.dialects",
    "pdctl.doctor",
    "pdctl.engine",
    "pdctl.flags",
    "pdctl.persistence",
    "pdctl.store",
    "pdctl.core",
)
WHO = ("errors", "core", "ports", "adapters", "shells", "the wiring", "the entrance")
CLOSED_FLOORS = {2: "ports", 3: "adapters", 4: "shells"}
"""Floors whose rooms do not import each other."""

MAY_ANYWAY = {
    ("pdctl.server", "pdctl.dialects"),
    ("pdctl.metrics", "pdctl.counts"),
    ("pdctl.sender", "pdctl.sending"),
    ("pdctl.receiver", "pdctl.arriving"),
}

RESERVED = {
    "tenacity": ("pdctl.retry", "retrying has one home"),
    "prometheus_client": ("pdctl.metrics", "metrics have one home"),
    "opentelemetry": ("pdctl.tracing", "everyone else speaks to the port for spans"),
    "mooncake": ("pdctl.engine.mooncake", "everyone else speaks to the engine port"),
}
"""A package -> the only file that may import it, and why."""

ALSO = {"prometheus_client": "pdctl.counts"}
"""A package -> the folder whose files may import it as well."""

PICKLES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve"}
PICKLING = {"send_pyobj", "recv_pyobj", "allow_pickle"}

NOT_IN_CORE = {
    **dict.fromkeys(["time", "datetime.datetime.now", "datetime.datetime.utcnow"], "`now` is an argument"),
    **dict.fromkeys(["datetime.datetime.today", "datetime.date.today"], "`now` is an argument"),
    **dict.fromkeys(["random", "secrets", "uuid", "numpy.random", "os.urandom"], "chance is an argument"),
    **dict.fromkeys(["asyncio", "threading", "concurrent", "multiprocessing", "queue", "sched"], "core never waits"),
    **dict.fromkeys(["logging", "warnings", "print"], "core says it with values"),
    **dict.fromkeys(
        ["socket", "socketserver", "ssl", "select", "selectors", "http", "urllib.request"], "no I/O in core"
    ),
    **dict.fromkeys(
        ["os", "io", "subprocess", "pathlib", "shutil", "tempfile", "mmap", "signal", "sqlite3"], "no I/O in core"
    ),
    **dict.fromkeys(["open", "input", "numpy.load", "numpy.save", "numpy.fromfile", "numpy.memmap"], "no I/O in core"),
}
AS_A_TYPE = {"random.Random"}
"""To name the type of an argument is no breach; to make one is."""

KNOWN_TO_CORE = {*sys.stdlib_module_names, "numpy", "pdctl"}

ENVIRONMENT = ("os.environ", "os.environb", "os.getenv", "os.getenvb", "os.putenv", "os.unsetenv")
ENVIRONMENT_READERS = ("pdctl.config", "pdctl.engine.mooncake", "pdctl.engine.store_wheel")
"""The second puts the engine's own variables there before its import: it reads them once, at load."""

UNREADABLE = ("importlib.import_module", "importlib.util", "importlib.__import__")
UNREADABLE_IN = ("pdctl.engine.mooncake", "pdctl.engine.store_wheel", "pdctl")
"""Where the target need not stand in the text: the engine, whose absence is a sentence, and lazy exports."""

THREADS = ("threading", "concurrent.futures", "multiprocessing.pool", "asyncio.to_thread")

NO_ROOM = re.compile(r"(.*_)?(utils?|helpers?|common|types|models|constants|misc|managers?|base_?classes)")
NO_CLASS = re.compile(r".*(Manager|Mixin|Helper|Utils?)")
UNFINISHED = re.compile(r"\b(TODO|FIXME|XXX)\b")


# --- the checker


def violations(name: str, source: str) -> list[str]:
    """One sentence for each breach in the module `name` (dotted, without `__init__`) whose text is `source`."""
    tree = ast.parse(source)
    uses = sorted({*imported(tree), *touched(tree)})
    found = [*misnamed(name, tree), *unfinished(name, tree, source), *passed_on(name, tree)]
    if floor_of(name) is None:
        found.append(f"{short(name)} has no floor: a new file is a decision, give it a row in FLOORS")
    else:
        found += [said for target in sorted(set(imported(tree))) if (said := misplaced(name, target))]
    for target in uses:
        found += [said for rule in RULES if (said := rule(name, target))]
    return list(dict.fromkeys(found))


def floor_of(name: str) -> int | None:
    """The floor of a module, or of a name inside one (`pdctl.retry.RetryPolicy`); None for a room that is not there."""
    if name in FLOORS:
        return FLOORS[name]
    parent = name.rpartition(".")[0]
    return FLOORS.get(parent) if parent in FOLDERS or not parent else None


def room_of(name: str) -> str:
    """`pdctl.core.plan` -> `pdctl.core`; `pdctl.retry` -> itself; rooms with a row of their own stay themselves."""
    return name if name in FLOORS else ".".join(name.split(".")[:2])


def short(name: str) -> str:
    return name.removeprefix("pdctl.")


def misplaced(name: str, target: str) -> str | None:
    """Whether `name` may import `target`, a module or a name in one."""
    if target.partition(".")[0] != "pdctl":
        return None
    module = module_of(target)
    here, there = floor_of(name), floor_of(module)
    if here is None or there is None:
        return f"{short(name)} imports {short(target)}: no such room in FLOORS"
    if room_of(name) == room_of(module) or (room_of(name), room_of(module)) in MAY_ANYWAY:
        return None
    if there > here:
        return f"{short(name)} imports {short(module)}: {WHO[here]} may not know {WHO[there]}"
    if there == here and here in CLOSED_FLOORS:
        return f"{short(name)} imports {short(module)}: {CLOSED_FLOORS[here]} do not import each other, pass a callable"
    return None


def module_of(target: str) -> str:
    """The longest beginning of `target` that is a room; `pdctl` itself is one only for what it exports."""
    parts = target.split(".")
    for size in range(len(parts), 1, -1):
        if floor_of(".".join(parts[:size])) is not None:
            return ".".join(parts[:size])
    exported = len(parts) < 2 or not parts[1].islower()
    return "pdctl" if exported else target


def reserved(name: str, target: str) -> str | None:
    if begins(target, "mooncake.store"):
        return f"{short(name)} imports mooncake.store: its calls can end the process, everyone speaks to the store port"
    for package, (owner, why) in RESERVED.items():
        if begins(target, package) and name != owner and not begins(name, ALSO.get(package, owner)):
            return f"{short(name)} imports {package}: only {short(owner)} may, {why}"
    return None


def pickled(name: str, target: str) -> str | None:
    if target.partition(".")[0] in PICKLES or target.rpartition(".")[2] in PICKLING:
        return f"{short(name)} uses {target}: a pickle from a peer is a program from a peer"
    return None


def environment(name: str, target: str) -> str | None:
    if any(begins(target, way) for way in ENVIRONMENT) and name not in ENVIRONMENT_READERS:
        return f"{short(name)} uses {target}: only config reads the environment, take a value"
    return None


def unreadable(name: str, target: str) -> str | None:
    if any(begins(target, way) for way in UNREADABLE) and name not in UNREADABLE_IN:
        return f"{short(name)} uses {target}: write the import out, so that it can be read"
    return None


def threads(name: str, target: str) -> str | None:
    in_engine = begins(name, "pdctl.engine") or begins(name, "pdctl.store")
    if not in_engine and any(begins(target, way) for way in THREADS):
        return f"{short(name)} uses {target}: threads live in an executor of engine/ or store/"
    return None


def impure(name: str, target: str) -> str | None:
    """What core may not touch. `target` is an import or a dotted use."""
    if not begins(name, "pdctl.core"):
        return None
    for banned, why in NOT_IN_CORE.items():
        if begins(target, banned) and target not in AS_A_TYPE:
            return f"{short(name)} uses {target}: {why}"
    return None


RULES = (reserved, pickled, environment, unreadable, threads, impure)


def foreign_to_core(name: str, tree: ast.Module) -> Iterator[str]:
    if begins(name, "pdctl.core"):
        for package in sorted({target.partition(".")[0] for target in imported(tree)} - KNOWN_TO_CORE):
            yield f"{short(name)} imports {package}: core knows numpy and the standard library"


def misnamed(name: str, tree: ast.Module) -> Iterator[str]:
    for part in name.split("."):
        if NO_ROOM.fullmatch(part):
            yield f"{short(name)} is named {part}: say what is in it"
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and NO_CLASS.fullmatch(node.name):
            yield f"{short(name)} has a class {node.name}: say what it decides or does"
        if isinstance(node, ast.ImportFrom) and node.level:
            yield f"{short(name)} imports relatively: write the whole name"
    yield from foreign_to_core(name, tree)


def passed_on(name: str, tree: ast.Module) -> Iterator[str]:
    """A name is taken from where it stands; only the package itself lists what others have."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom | ast.Import):
            for each in node.names:
                if each.asname == each.name and name != "pdctl":
                    yield f"{short(name)} passes on {each.name}: take it from where it stands"
        if isinstance(node, ast.Name) and node.id == "__all__" and name != "pdctl":
            yield f"{short(name)} has an __all__: only pdctl itself lists names"


def unfinished(name: str, tree: ast.Module, source: str) -> Iterator[str]:
    for number, line in enumerate(source.splitlines(), 1):
        if UNFINISHED.search(line):
            yield f"{short(name)} line {number} is marked unfinished: do it or say in the docs that it is not there"
    if any(isinstance(node, ast.Name) and node.id == "NotImplementedError" for node in ast.walk(tree)):
        yield f"{short(name)} has a NotImplementedError: what is not there has no function"


def begins(dotted: str, prefix: str) -> bool:
    return dotted == prefix or dotted.startswith(f"{prefix}.")


# --- reading a tree


def imported(tree: ast.Module) -> Iterator[str]:
    """Every module that the text imports, wherever it stands, and every name that it takes from one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call):
            yield from imported_by_name(node)


def imported_by_name(call: ast.Call) -> Iterator[str]:
    """`import_module("x")`, `__import__("x")`."""
    function = dotted(call.func, {}) or ""
    if function.rpartition(".")[2] in ("import_module", "__import__") and call.args:
        argument = call.args[0]
        if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
            yield argument.value


def touched(tree: ast.Module) -> Iterator[str]:
    """Every dotted use, its first name resolved through the imports: `np.random.rand` -> `numpy.random.rand`."""
    names = {**dict(aliases(tree)), **{builtin: builtin for builtin in ("open", "print", "input")}}
    for node in ast.walk(tree):
        is_given = isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
        if isinstance(node, ast.Attribute | ast.Name) and not is_given and (use := dotted(node, names)):
            yield use
        if isinstance(node, ast.Call) and (use := dotted(node.func, names)) in AS_A_TYPE:
            yield f"{use}()"
        if isinstance(node, ast.keyword) and node.arg in PICKLING and constant(node.value) is not False:
            yield node.arg
        if isinstance(node, ast.Attribute) and node.attr in PICKLING:
            yield node.attr


def aliases(tree: ast.Module) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (
                (a.asname or a.name.partition(".")[0], a.name if a.asname else a.name.partition(".")[0])
                for a in node.names
            )
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from ((a.asname or a.name, f"{node.module}.{a.name}") for a in node.names)


def dotted(node: ast.expr, names: dict[str, str]) -> str | None:
    """The dotted text of `a.b.c`, `a` replaced by what it was imported as; None for what hangs on no import."""
    if isinstance(node, ast.Attribute):
        base = dotted(node.value, names)
        return f"{base}.{node.attr}" if base else None
    if isinstance(node, ast.Name):
        return names.get(node.id) if names else node.id
    return None


def constant(node: ast.expr) -> object:
    return node.value if isinstance(node, ast.Constant) else None


# --- the house


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


HOUSE = {module_name(path): path for path in sorted((ROOT / "pdctl").rglob("*.py"))}


@pytest.mark.parametrize("name", HOUSE)
def test_every_room_keeps_to_its_floor(name: str) -> None:
    assert violations(name, HOUSE[name].read_text()) == []


def test_the_house_was_found() -> None:
    assert {"pdctl", "pdctl.errors", "pdctl.core.plan", "pdctl.engine.base"} <= set(HOUSE)


@pytest.mark.parametrize("folder", [folder for folder in FOLDERS if folder != "pdctl.demo"])
def test_a_folder_itself_is_empty_because_importing_its_lowest_file_runs_it(folder: str) -> None:
    body = ast.parse(HOUSE[folder].read_text()).body
    assert all(isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) for node in body)


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_test_patches(path: Path) -> None:
    assert not [target for target in imported(ast.parse(path.read_text())) if begins(target, "unittest.mock")]


# --- the checker bites


PLANTED = [
    ("client", "from pdctl.node import PrefillNode", "imports node: shells may not know the wiring"),
    ("client", "import pdctl.node", "imports node: shells may not know the wiring"),
    ("client", "from pdctl import node", "imports node: shells may not know the wiring"),
    ("client", "def f():\n    from pdctl.config import Settings", "imports config: shells may not know the wiring"),
    (
        "client",
        "import importlib\nimportlib.import_module('pdctl.cli')",
        "imports cli: shells may not know the entrance",
    ),
    ("client", "from pdctl import RegistryClient", "imports pdctl: shells may not know the entrance"),
    ("sender", "from pdctl.peer import open_link", "imports peer: shells do not import each other"),
    ("dialects.sglang", "from pdctl.server import app", "imports server: shells do not import each other"),
    ("client", "from pdctl.dialects import sglang", "imports dialects.sglang: shells do not import each other"),
    ("registrar", "import pdctl.engine.mooncake", "imports engine.mooncake: adapters do not import each other"),
    ("retry", "from pdctl.metrics import Metrics", "imports metrics: ports do not import each other"),
    ("engine.base", "from pdctl.engine import loopback", "imports engine.loopback: ports may not know adapters"),
    ("core.plan", "from pdctl.engine.base import Engine", "imports engine.base: core may not know ports"),
    ("core.plan", "from pdctl import retry", "imports retry: core may not know ports"),
    ("errors", "from pdctl.core.plan import CopyPlan", "imports core.plan: errors may not know core"),
    ("core.plan", "from pdctl.elsewhere import x", "imports elsewhere.x: no such room in FLOORS"),
    ("core.plan", "from . import layout", "imports relatively: write the whole name"),
    ("novelty", "", "has no floor: a new file is a decision"),
    ("client", "from tenacity import retry", "imports tenacity: only retry may"),
    ("server", "import prometheus_client as p", "imports prometheus_client: only metrics may"),
    ("sender", "from mooncake.engine import TransferEngine", "imports mooncake: only engine.mooncake may"),
    ("engine.loopback", "__import__('mooncake')", "imports mooncake: only engine.mooncake may"),
    ("engine.mooncake", "from mooncake.store import Store", "imports mooncake.store: its calls can end the process"),
    ("engine.mooncake", "from mooncake import store", "imports mooncake.store: its calls can end the process"),
    ("peer", "import pickle", "uses pickle: a pickle from a peer"),
    ("peer", "from pickle import loads", "uses pickle.loads: a pickle from a peer"),
    ("peer", "async def f(s):\n    return await s.recv_pyobj()", "uses recv_pyobj: a pickle from a peer"),
    ("memory", "import numpy as np\nnp.load('f', allow_pickle=True)", "uses allow_pickle: a pickle from a peer"),
    ("client", "import os\nx = os.environ['A']", "uses os.environ: only config reads the environment"),
    ("engine.wheel", "import os\nos.environ.update({})", "uses os.environ.update: only config reads the environment"),
    ("client", "from importlib import import_module as i\ni(n)", "uses importlib.import_module: write the import out"),
    ("node", "from os import getenv", "uses os.getenv: only config reads the environment"),
    ("cli", "import os as o\no.environ.get('A')", "uses os.environ.get: only config reads the environment"),
    ("prober", "import threading", "uses threading: threads live in an executor of engine/ or store/"),
    (
        "node",
        "import asyncio\nasyncio.to_thread(f)",
        "uses asyncio.to_thread: threads live in an executor of engine/ or store/",
    ),
    ("core.rooms", "import time\nnow = time.monotonic()", "uses time.monotonic: `now` is an argument"),
    ("core.rooms", "from time import monotonic", "uses time.monotonic: `now` is an argument"),
    ("core.rooms", "from datetime import datetime\ndatetime.now()", "uses datetime.datetime.now: `now` is an argument"),
    ("core.rooms", "import datetime as d\nd.datetime.now()", "uses datetime.datetime.now: `now` is an argument"),
    ("core.sessions", "import random\nrandom.random()", "uses random.random: chance is an argument"),
    ("core.sessions", "from random import Random\nRandom(7)", "uses random.Random(): chance is an argument"),
    ("core.sessions", "import numpy as np\nnp.random.rand()", "uses numpy.random.rand: chance is an argument"),
    ("core.wire", "import asyncio", "uses asyncio: core never waits"),
    ("core.wire", "import logging", "uses logging: core says it with values"),
    ("core.wire", "print('x')", "uses print: core says it with values"),
    ("core.wire", "import socket", "uses socket: no I/O in core"),
    ("core.wire", "with open('x') as f: pass", "uses open: no I/O in core"),
    ("core.wire", "import structlog", "imports structlog: core knows numpy and the standard library"),
    ("core.wire", "import aiohttp", "imports aiohttp: core knows numpy and the standard library"),
    ("core.wire", "import zmq", "imports zmq: core knows numpy and the standard library"),
    ("core.utils", "", "is named utils: say what is in it"),
    ("engine.tcp_helpers", "", "is named tcp_helpers: say what is in it"),
    ("peer", "class LinkManager: ...", "has a class LinkManager: say what it decides or does"),
    ("core.early", "from pdctl.core.route import Seat as Seat", "passes on Seat: take it from where it stands"),
    ("store.mooncake", "__all__ = ['f']", "has an __all__: only pdctl itself lists names"),
    ("peer", "x = 1  # TODO: later", "line 1 is marked unfinished"),
    ("peer", "def f():\n    raise NotImplementedError", "has a NotImplementedError"),
]


def last_line(value: str) -> str:
    return value.rpartition("\n")[2] or "(empty)"


@pytest.mark.parametrize(("name", "source", "sentence"), PLANTED, ids=last_line)
def test_a_planted_breach_is_named(name: str, source: str, sentence: str) -> None:
    said = violations(f"pdctl.{name}", source)
    assert [line for line in said if line.startswith(f"{name} {sentence}")], said


ALLOWED = [
    ("pdctl.node", "from pdctl.client import RegistryClient\nfrom pdctl.config import Settings\nimport os\nos.kill"),
    ("pdctl.__main__", "from pdctl.cli import main"),
    ("pdctl", "from pdctl.client import RegistryClient\nfrom pdctl.errors import PdctlError"),
    ("pdctl.server", "from pdctl.dialects import sglang\nfrom pdctl.registrar import Registrar"),
    ("pdctl.engine.mooncake", "import importlib, os\nprepare(os.environ, importlib.import_module)"),
    ("pdctl.cli", "from importlib.metadata import version"),
    ("pdctl.engine.mooncake", "from pdctl.engine.handshake import ask\nimport mooncake.engine\nimport threading"),
    ("pdctl.core.plan", "import numpy as np\nfrom pdctl.core.layout import Pool\nfrom pdctl.errors import Refused"),
    ("pdctl.core.rooms", "def f(time, self):\n    return time.time(self.open)"),
    ("pdctl.core.rooms", "from datetime import timedelta"),
    ("pdctl.core.sessions", "from random import Random\ndef f(chance: Random) -> float:\n    return chance.random()"),
    ("pdctl.memory", "import numpy as np\nnp.load('f', allow_pickle=False)"),
    ("pdctl.core.plan", "class Row:\n    open: int"),
    ("pdctl.retry", "import tenacity"),
    ("pdctl.metrics", "from prometheus_client import Counter"),
    ("pdctl.counts.nodes", "from prometheus_client import Gauge"),
    ("pdctl.config", "import os\nos.environ"),
]


@pytest.mark.parametrize(("name", "source"), ALLOWED, ids=last_line)
def test_what_the_house_allows_is_not_a_breach(name: str, source: str) -> None:
    assert violations(name, source) == []
