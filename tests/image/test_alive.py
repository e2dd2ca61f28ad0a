"""The image's health check, against real services: it must find a hung one, and ask where this one listens."""

from __future__ import annotations

import importlib.util
import socket
import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType

import pytest
import trustme

SCRIPT = Path(__file__).parent.parent.parent / "deploy/image/alive.py"


class Answers(BaseHTTPRequestHandler):
    """200 for /livez, 404 for all else, as a service that is well."""

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/livez" else 404)
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def alive() -> ModuleType:
    spec = importlib.util.spec_from_file_location("alive", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def said(alive: ModuleType, monkeypatch: pytest.MonkeyPatch, *command: str, **environ: str) -> str | None:
    monkeypatch.setattr(alive, "_command", lambda: ["python", "pdctl", *command, ""])
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    answer = alive.main()
    assert answer is None or isinstance(answer, str)
    return answer


@pytest.mark.parametrize("flags", ["--host 0.0.0.0 --port {}", "--port=1 --port={} --host=", "--port {}"])
def test_the_port_of_the_flags_is_asked(
    alive: ModuleType, server: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch, flags: str
) -> None:
    assert said(alive, monkeypatch, "serve", *flags.format(server.server_port).split()) is None


def test_the_port_of_the_environment_is_asked(
    alive: ModuleType, server: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert said(alive, monkeypatch, "serve", PDCTL_SERVE__PORT=str(server.server_port)) is None


@pytest.mark.timeout(30)
def test_nobody_there_and_a_hung_service_are_sentences(alive: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alive, "DEADLINE_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as hung:  # takes connections and never answers
        port = hung.getsockname()[1]
        assert "timed out" in str(said(alive, monkeypatch, "serve", "--port", str(port)))
    assert "refused" in str(said(alive, monkeypatch, "serve", "--port", str(port)))


def test_another_service_at_that_port_is_not_this_one(
    alive: ModuleType, server: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Answers, "do_GET", lambda self: self.send_error(503))
    assert "answered 503" in str(said(alive, monkeypatch, "serve", "--port", str(server.server_port)))


@pytest.mark.parametrize("clients", [False, True], ids=["tls", "certificates of clients"])
def test_tls_is_spoken_where_the_service_speaks_it(
    alive: ModuleType, server: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch, clients: bool
) -> None:
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    if clients:
        authority.configure_trust(context)
        context.verify_mode = ssl.CERT_REQUIRED
    server.socket = context.wrap_socket(server.socket, server_side=True)
    port = str(server.server_port)
    secured = ("--tls-cert", "chain.pem", *(["--tls-client-ca", "ca.pem"] if clients else []))
    assert said(alive, monkeypatch, "serve", "--port", port, *secured) is None
    assert said(alive, monkeypatch, "serve", "--port", port) is not None


def test_a_container_that_runs_something_else_is_alive_while_it_runs(
    alive: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert said(alive, monkeypatch, "agent", "--socket", "/run/kv/rank0.sock") is None
