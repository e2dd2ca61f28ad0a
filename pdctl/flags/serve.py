"""`pdctl serve`: the sidecar."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from pdctl.flags.base import Commands, add_command, always, on_uvloop

if TYPE_CHECKING:
    from pdctl.config import Settings


def add(commands: Commands) -> None:
    command = add_command(commands, "serve", _serve, always, "serve the bootstrap registry, and what stands beside it")
    command.set_defaults(loop=on_uvloop)
    command.add_argument("--host", dest="serve.host", help="address to listen at (127.0.0.1)")
    command.add_argument("--port", dest="serve.port", help="port to listen at; 0 takes any free one (8998)")
    command.add_argument(
        "--witness-tcp",
        dest="witness.tcp",
        action="store_true",
        help="tell by their control ports whether stock ranks live",
    )
    command.add_argument(
        "--witness-http", dest="witness.http_url", help="stock engines' health: http://{host}:{http_port}/health"
    )
    command.add_argument(
        "--listen", dest="serve.listen", action="append", metavar="NAME=HOST:PORT",
        help="a further address, which speaks for the instance NAME; may be given again",
    )  # fmt: skip
    command.add_argument(
        "--map-host", dest="serve.map_host", action="append", metavar="NAME=HOST",
        help="a host name that stands for the instance NAME, or '*.suffix' for its first label; may be given again",
    )  # fmt: skip
    command.add_argument("--vllm-sizes", dest="vllm.sizes", help="ranks of every vLLM prefill, as dp=1,tp=8,pp=1")
    _add_access(command)
    command.add_argument(
        "--journal",
        dest="serve.journal",
        help="where the rows live: sqlite:PATH, etcd://HOST:PORT or memory: (a file for this port)",
    )


def _add_access(command: argparse.ArgumentParser) -> None:
    """Who may speak to `pdctl serve`: docs/security.md."""
    command.add_argument(
        "--trust", dest="access.trust", help="networks that need no token, by commas; or private (default), any"
    )
    command.add_argument("--token-file", dest="access.token_file", help="name:token a line; with it, /v1 needs a token")
    command.add_argument("--tls-cert", dest="access.tls_cert", help="certificate chain, PEM; with it, TLS only")
    command.add_argument("--tls-key", dest="access.tls_key", help="its key, PEM, where the chain's file has none")
    command.add_argument("--tls-client-ca", dest="access.tls_client_ca", help="clients need a certificate of these")


async def _serve(settings: Settings, args: argparse.Namespace) -> int:
    from pdctl.commands import serve

    return await serve.run(settings, args)
