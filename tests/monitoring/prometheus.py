"""
A real Prometheus on a free port of this machine, and its promtool.

    with prometheus(directory, targets, rules) as it:
        it.query("up")          it.alerts()

The rules are those of deploy/prometheus, all their times divided by `quicker`: what waits minutes there waits seconds
here. Nothing else in them is another.
"""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy" / "prometheus"
RULES = (DEPLOY / "recording.rules.yml", DEPLOY / "alerts.rules.yml")
UNPACKED = ROOT / ".cache" / "servers" / "usr" / "bin"  # where `./dev` puts it
UP_S = 60.0
_TIME = re.compile(r"(?<=\[)\d+[smh](?=\])|(?<=for: )\d+[smh]")
_LIMIT = re.compile(r"(?<=_seconds > )\d+")
_SECONDS = {"s": 1, "m": 60, "h": 3600}


def binary(name: str) -> str:
    found = shutil.which(name) or (str(UNPACKED / name) if (UNPACKED / name).exists() else None)
    assert found is not None, f"there is no {name}: ./dev test fetches it"
    return found


def promtool(*words: str, stdin: bytes | None = None) -> str:
    """What it says. AssertionError with it where it says no."""
    done = subprocess.run([binary("promtool"), *words], input=stdin, capture_output=True, timeout=60)
    said = (done.stdout + done.stderr).decode()
    assert done.returncode == 0, said
    return said


def hurried(rules: str, quicker: float) -> str:
    """The same rules with every window, every `for` and every limit of seconds so many times shorter."""
    rules = _TIME.sub(lambda found: _shorter(found[0], quicker), rules)
    return _LIMIT.sub(lambda found: f"{int(found[0]) / quicker:g}", rules)


def seconds(text: str) -> float:
    return int(text[:-1]) * _SECONDS[text[-1]]


def _shorter(text: str, quicker: float) -> str:
    return f"{max(1, round(1000 * seconds(text) / quicker))}ms"


@dataclass(frozen=True)
class Prometheus:
    url: str

    def ask(self, path: str, **parameters: str) -> Any:
        """What the API answers, its `data`. AssertionError with its own words where it refuses."""
        body = urllib.parse.urlencode(parameters).encode() or None
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/{path}", data=body, timeout=60) as answer:
                return json.loads(answer.read())["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{parameters}: {error.read().decode()}") from None

    def query(self, query: str) -> list[tuple[Mapping[str, str], float]]:
        found = self.ask("query", query=query)
        if found["resultType"] == "scalar":
            return [({}, float(found["result"][1]))]
        return [(each["metric"], float(each["value"][1])) for each in found["result"]]

    def query_range(self, query: str, start: float, end: float, step_s: float) -> list[Any]:
        given = {"query": query, "start": str(start), "end": str(end), "step": str(step_s)}
        found: list[Any] = self.ask("query_range", **given)["result"]
        return found

    def firing(self) -> set[str]:
        """The names of the alerts that fire now."""
        return {each["labels"]["alertname"] for each in self.alerts() if each["state"] == "firing"}

    def alerts(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.ask("alerts")["alerts"]
        return found


@contextmanager
def prometheus(
    directory: Path, jobs: Mapping[str, Sequence[str] | str], *, every: str = "250ms", quicker: float = 60.0
) -> Iterator[Prometheus]:
    """`jobs`: host:port of what is scraped, by job; or the URL of who knows."""
    rules = [directory / path.name for path in RULES]
    for copied, path in zip(rules, RULES, strict=True):
        copied.write_text(hurried(path.read_text(), quicker))
    config = directory / "prometheus.yml"
    config.write_text(
        json.dumps(  # which is YAML as well
            {
                "global": {"scrape_interval": every, "scrape_timeout": every, "evaluation_interval": every},
                "rule_files": [str(path) for path in rules],
                "scrape_configs": [{"job_name": job, **_found(targets)} for job, targets in jobs.items()],
            }
        )
    )
    promtool("check", "config", str(config))
    port = _free_port()
    words = [
        *(binary("prometheus"), f"--config.file={config}", f"--storage.tsdb.path={directory / 'data'}"),
        *(f"--web.listen-address=127.0.0.1:{port}", "--storage.tsdb.retention.time=1h", "--log.level=warn"),
    ]
    with (directory / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(words, stdout=log, stderr=log)
    try:
        _await_ready(f"http://127.0.0.1:{port}", process, directory / "prometheus.log")
        yield Prometheus(f"http://127.0.0.1:{port}")
    finally:
        process.kill()
        process.wait()


def _found(targets: Sequence[str] | str) -> dict[str, Any]:
    if isinstance(targets, str):
        return {"http_sd_configs": [{"url": targets, "refresh_interval": "1s"}]}
    return {"static_configs": [{"targets": list(targets)}]}


def _await_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + UP_S
    while True:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, f"Prometheus does not come up: {log.read_text()}"
        try:
            with urllib.request.urlopen(f"{url}/-/ready", timeout=10):
                return
        except OSError:
            time.sleep(0.05)


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
