"""Stock ranks in processes of their own die in every way; decodes that ask /health are told the truth."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.service import Service, service, until

RANK = """
import socket, sys, threading
from http.server import BaseHTTPRequestHandler, HTTPServer

class Health(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *args):
        pass

control = socket.create_server(("127.0.0.1", 0))
health = HTTPServer(("127.0.0.1", int(sys.argv[1])), Health)
threading.Thread(target=health.serve_forever, daemon=True).start()
print(control.getsockname()[1], health.server_port, flush=True)
while True:
    control.accept()[0].close()
"""
QUICK = {
    "PDCTL_WITNESS__INTERVAL_S": "0.2",
    "PDCTL_WITNESS__RETRY_S": "0.1",
    "PDCTL_WITNESS__DEADLINE_S": "3",
    "PDCTL_WITNESS__MAX_LAG_S": "30",
}
BY_HTTP = ("--witness-http", "http://{host}:{http_port}/health")


class Rank:
    """A single-rank prefill as stock has it: registers once, listens, and never speaks again."""

    def __init__(self, http_port: int = 0) -> None:
        self.child = subprocess.Popen([sys.executable, "-c", RANK, str(http_port)], stdout=subprocess.PIPE, text=True)
        assert self.child.stdout is not None
        self.port, self.http_port = map(int, self.child.stdout.readline().split())

    def register(self, url: str) -> None:
        sizes = {f"{name}_size": 1 for name in ("attn_tp", "attn_cp", "attn_dp", "pp", "system_dp")}
        ranks = {f"{name}_rank": 0 for name in ("attn_tp", "attn_cp", "attn_dp", "pp", "system_dp")}
        where = {"rank_ip": "127.0.0.1", "rank_port": self.port, "prefill_http_port": self.http_port}
        body = {**sizes, **ranks, **where, "page_size": 16, "kv_cache_dtype": "auto"}
        request = urllib.request.Request(f"{url}/route", json.dumps(body).encode(), method="PUT")
        assert urllib.request.urlopen(request).status == 200

    def end(self) -> None:
        self.child.kill()
        self.child.wait()
        assert self.child.stdout is not None
        self.child.stdout.close()


@pytest.fixture
def rank() -> Iterator[Callable[..., Rank]]:
    with ExitStack() as stack:

        def start(http_port: int = 0) -> Rank:
            started = Rank(http_port)
            stack.callback(started.end)
            return started

        yield start


def health(registry: Service) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"{registry.url}/health") as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as refused:
        return refused.code, refused.read().decode()


def asked(registry: Service, means: str) -> int:
    """How many questions the ranks have answered well."""
    with urllib.request.urlopen(f"{registry.url}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    (line,) = [
        line for line in lines if line.startswith(f'pdctl_witness_questions_total{{means="{means}",sign="well"}}')
    ]
    return int(float(line.split()[1]))


def test_a_killed_rank_is_told_by_health_and_its_successor_is_served(rank: Callable[..., Rank], tmp_path: Path) -> None:
    with service(tmp_path / "log", "--witness-tcp", **QUICK) as registry:
        assert health(registry) == (200, "OK")  # nobody yet: starting
        first = rank()
        first.register(registry.url)
        until(lambda: asked(registry, "tcp") > 0)
        assert health(registry) == (200, "OK")
        first.end()
        until(lambda: health(registry)[0] == 503)
        assert f"127.0.0.1:{first.port} shows no sign of life" in health(registry)[1]
        assert urllib.request.urlopen(f"{registry.url}/livez").status == 200
        rank().register(registry.url)
        assert health(registry) == (200, "OK")


def test_a_stopped_engine_is_told_by_health_and_served_again_when_it_goes_on(
    rank: Callable[..., Rank], tmp_path: Path
) -> None:
    with service(tmp_path / "log", *BY_HTTP, **QUICK) as registry:
        engine = rank()
        engine.register(registry.url)
        until(lambda: asked(registry, "http") > 0)
        engine.child.send_signal(signal.SIGSTOP)
        until(lambda: health(registry)[0] == 503)
        assert "no answer in 3 s, 3 times in a row" in health(registry)[1]
        engine.child.send_signal(signal.SIGCONT)
        until(lambda: health(registry) == (200, "OK"))


def test_a_rank_that_died_while_the_registry_was_down_is_found_out_after_its_return(
    rank: Callable[..., Rank], tmp_path: Path
) -> None:
    journal = ("--journal", f"sqlite:{tmp_path / 'journal'}", "--witness-tcp")
    dead, living = rank(), rank()
    with service(tmp_path / "before", *journal, **QUICK) as registry:
        dead.register(registry.url)
    dead.end()
    with service(tmp_path / "after", *journal, **QUICK) as registry:
        until(lambda: health(registry)[0] == 503)
        living.register(registry.url)
        assert health(registry)[0] == 200


def test_without_a_witness_a_stock_ranks_silence_is_not_its_death(rank: Callable[..., Rank], tmp_path: Path) -> None:
    with service(tmp_path / "log") as registry:
        first = rank()
        first.register(registry.url)
        first.end()
        assert health(registry) == (200, "OK")
