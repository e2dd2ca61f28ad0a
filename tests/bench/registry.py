"""
The registry over HTTP: `pdctl serve` beside stock SGLang's registry and beside the least that uvicorn can do.

Every server is a process of its own on one core, `wrk` (Debian's, one thread) on another. Rounds take turns: in each
one every question is put to every server for a second, and who begins changes. Ours keeps a journal on disk, counts
what it answers and knows who may ask; stock does none of that. `rust` is the registry inside SGLang's Rust server,
for honesty: another language, not a rival. Rates are answers a second, p99 is wrk's.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.bench.rivals import Row
from tests.ports import free_port
from tests.wire.stock.conftest import installed

ROUNDS = 7
ROUND_S = 1.0
START_S = 20.0
CONNECTIONS = 64
SEATS = 64
ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("registry.lua")
WORDS = re.compile(
    r"^\s+(\d+) requests in .*$|^Requests/sec:\s+([\d.]+)$|^\s+99%\s+([\d.]+)(us|ms|s)\s*$|^\s+(Non-2xx.*)$",
    re.MULTILINE,
)
UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}

TOPOLOGY = "/route?prefill_dp_rank=-1&prefill_cp_rank=-1&target_tp_rank=-1&target_pp_rank=-1"
RANK = "/route?prefill_dp_rank=0&prefill_cp_rank=0&target_tp_rank=7&target_pp_rank=0"


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked, with how much faster than stock ours has to answer, and of the ceiling, where that is a target."""

    what: str
    path: str
    kind: str | None = None
    of_stock: float | None = None
    of_ceiling: float | None = None
    rust_knows: bool = True


QUESTIONS = (
    Question("GET /health", "/health", of_stock=1.2, of_ceiling=0.85, rust_knows=False),
    Question("GET /route, one rank", RANK, of_stock=1.2, of_ceiling=0.85),
    Question("GET /route, topology", TOPOLOGY, of_stock=1.2, of_ceiling=0.85),
    Question("PUT /route, new lives", "/route", "restarts", of_stock=1.0),
    Question("PUT /route, known already", "/route", "repeats", of_stock=1.0),
    Question("POST /register_dp_rank", "/register_dp_rank", "rooms", of_stock=1.0),
    Question("POST /query_dp_ranks, 100 rooms", "/query_dp_ranks", "query", of_stock=1.5),
)


@dataclass(frozen=True, slots=True)
class Shot:
    """One second of one question. `cpu_s`: what one answer took of the server's own time, whoever else is busy here."""

    rate: float
    p99_s: float
    cpu_s: float


@dataclass(frozen=True, slots=True)
class Server:
    name: str
    url: str
    pid: int


def bench() -> list[Row]:
    shots = measure(ROUNDS)
    return [row for question in QUESTIONS for row in rows_of(question, shots)]


def measure(rounds: int, questions: Sequence[Question] = QUESTIONS) -> dict[tuple[str, str], list[Shot]]:
    """Shots by (server, what)."""
    if shutil.which("wrk") is None:
        raise SystemExit("there is no wrk: apt-get install wrk (./dev bench does it)")
    shots: dict[tuple[str, str], list[Shot]] = {}
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(start) for start in (ours(), rival("stock"), rival("rust"), rival("bare"))]
        for server in servers[:3]:
            prepare(server)
        for number in range(rounds):
            for question in questions:
                for server in servers if number % 2 else reversed(servers):
                    if asks(question, server):
                        shots.setdefault((server.name, question.what), []).append(shoot(server, question))
    return shots


def asks(question: Question, server: Server) -> bool:
    if server.name == "bare":
        return question.of_ceiling is not None
    return question.rust_knows or server.name != "rust"


def rows_of(question: Question, shots: dict[tuple[str, str], list[Shot]]) -> Iterator[Row]:
    mine = shots["ours", question.what]
    for rival_name in ("stock", "bare", "rust"):
        theirs = shots.get((rival_name, question.what))
        if theirs is None:
            continue
        yield Row(question.what, "pdctl", rival_name, seconds_each(mine), seconds_each(theirs))
        yield Row(f"{question.what}: the server's own time", "pdctl", rival_name, cpu_each(mine), cpu_each(theirs))
        if rival_name == "stock":
            yield Row(f"{question.what}: p99", "pdctl", rival_name, p99s(mine), p99s(theirs))


def seconds_each(shots: Sequence[Shot]) -> tuple[float, ...]:
    return tuple(1 / shot.rate for shot in shots)


def cpu_each(shots: Sequence[Shot]) -> tuple[float, ...]:
    return tuple(shot.cpu_s for shot in shots)


def p99s(shots: Sequence[Shot]) -> tuple[float, ...]:
    return tuple(shot.p99_s for shot in shots)


# --- servers


@contextlib.contextmanager
def ours(*flags: str) -> Iterator[Server]:
    """`pdctl serve` with its journal on disk. Warnings only: stock says nothing of what it takes either."""
    with tempfile.TemporaryDirectory(prefix="pdctl-bench-") as folder:
        port = free_port()
        journal = journal_flags(Path(folder))
        words = ("-m", "pdctl", "serve", "--port", str(port), "--log-level", "warning", *journal, *flags)
        with serving("ours", port, words, dict(os.environ)) as server:
            yield server


def journal_flags(folder: Path) -> tuple[str, ...]:
    return ("--journal", f"sqlite:{folder / 'journal.sqlite'}")


@contextlib.contextmanager
def rival(name: str) -> Iterator[Server]:
    environment = {**os.environ, "PYTHONPATH": f"{installed()}{os.pathsep}{ROOT}"}
    port = free_port()
    with serving(name, port, ("-m", "tests.bench.registries", name, str(port)), environment) as server:
        yield server


@contextlib.contextmanager
def serving(name: str, port: int, words: Sequence[str], environment: dict[str, str]) -> Iterator[Server]:
    process = subprocess.Popen(
        (*pinned(0), sys.executable, *words), cwd=ROOT, env=environment, stdout=subprocess.DEVNULL
    )
    try:
        server = Server(name, f"http://127.0.0.1:{port}", process.pid)
        wait_for(server, process)
        yield server
    finally:
        process.kill()
        process.wait()


def wait_for(server: Server, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port_of(server)), timeout=1):
            return
        time.sleep(0.05)
    raise SystemExit(f"the {server.name} server did not start within {START_S:g} s: its words are above")


def port_of(server: Server) -> int:
    return int(server.url.rpartition(":")[2])


def pinned(core: int) -> tuple[str, ...]:
    """Server and load apart, where there are two cores to pin them to."""
    cores = sorted(os.sched_getaffinity(0))
    return ("taskset", "-c", str(cores[core])) if len(cores) > core and len(cores) > 1 else ()


# --- what is asked


def prepare(server: Server) -> None:
    """A complete instance of 64 ranks, and the hundred rooms that are asked for."""
    seat_all(server)
    for number in range(1, 101):
        room = 4611686018 * 10**9 + number
        send(server, "POST", "/register_dp_rank", {"bootstrap_room": room, "dp_rank": number % 8})


def seat_all(server: Server) -> None:
    for seat in range(SEATS):
        send(server, "PUT", "/route", rank(seat))


def rank(seat: int) -> dict[str, object]:
    """As registry.lua writes it."""
    sizes = {"attn_tp_size": SEATS, "attn_cp_size": 1, "attn_dp_size": 1, "pp_size": 1, "system_dp_size": 1}
    ranks = {"attn_tp_rank": seat, "attn_cp_rank": 0, "attn_dp_rank": 0, "pp_rank": 0, "system_dp_rank": 0}
    address = {"rank_ip": "127.0.0.1", "rank_port": 40000 + seat, "prefill_http_port": 30000}
    return {**sizes, **ranks, **address, "page_size": 16, "kv_cache_dtype": "bfloat16"}


def send(server: Server, method: str, path: str, body: object) -> None:
    request = urllib.request.Request(
        server.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}, method=method
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        answer.read()


def shoot(server: Server, question: Question, seconds: float = ROUND_S) -> Shot:
    script = () if question.kind is None else ("-s", str(SCRIPT))
    arguments = () if question.kind is None else ("--", question.kind)
    load = ("wrk", "-t1", f"-c{CONNECTIONS}", f"-d{seconds:g}s", "--latency", *script, server.url + question.path)
    if question.kind == "repeats":  # the restarts have moved every rank
        seat_all(server)
    spent_s = cpu_s(server.pid)
    done = subprocess.run(
        (*pinned(1), *load, *arguments), capture_output=True, text=True, check=True, timeout=seconds + 60
    )
    return read(done.stdout, f"{server.name}: {question.what}", cpu_s(server.pid) - spent_s)


def cpu_s(pid: int) -> float:
    """What a process and its threads have had of the cores so far; the kernel counts it in nanoseconds."""
    threads = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(thread.read_text().split()[0]) for thread in threads) / 1e9


def read(said: str, what: str, spent_s: float) -> Shot:
    """wrk's own words. An answer that is no 2xx makes the figure worthless: it raises."""
    answers = rate = p99_s = None
    for found in WORDS.finditer(said):
        count, per_second, p99, unit, wrong = found.groups()
        if wrong:
            raise SystemExit(f"{what}: {wrong}")
        answers = int(count) if count else answers
        rate = float(per_second) if per_second else rate
        p99_s = float(p99) * UNITS[unit] if p99 else p99_s
    if not answers or rate is None or p99_s is None:
        raise SystemExit(f"{what}: wrk said\n{said}")
    return Shot(rate, p99_s, spent_s / answers)


def medians(shots: dict[tuple[str, str], list[Shot]]) -> Iterator[str]:
    """One line a question, for reading: of each server the rate, its own time for an answer, and p99."""
    for question in QUESTIONS:
        there = {name: shots.get((name, question.what)) for name in ("ours", "stock", "bare", "rust")}
        yield question.what + ": " + "; ".join(f"{name} {figures(each)}" for name, each in there.items() if each)


def figures(shots: Sequence[Shot]) -> str:
    rate, cpu, p99 = (statistics.median(values) for values in zip(*map(astuple_ordered, shots), strict=True))
    return f"{rate:,.0f}/s, {cpu * 1e6:.0f} us, p99 {p99 * 1e3:.1f} ms"


def astuple_ordered(shot: Shot) -> tuple[float, float, float]:
    return shot.rate, shot.cpu_s, shot.p99_s


if __name__ == "__main__":
    print(*medians(measure(int(sys.argv[1]) if sys.argv[1:] else ROUNDS)), sep="\n")
