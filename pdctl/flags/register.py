"""`pdctl register`: for an engine that has no client of its own."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from pdctl.flags.base import Commands, add_command, add_credentials

if TYPE_CHECKING:
    from pdctl.config import Settings


def add(commands: Commands) -> None:
    command = add_command(
        commands, "register", _register, _if_held, "register one prefill rank for an engine that cannot"
    )
    command.add_argument("--registry", dest="node.registry", help="the registry's URL (http://127.0.0.1:8998)")
    add_credentials(command)
    command.add_argument("--rank-host", dest="rank.host", help="where decode reaches the rank's control port")
    command.add_argument("--rank-port", dest="rank.port", help="the rank's control port (ZMQ)")
    for axis in ("tp", "cp", "dp", "pp"):
        command.add_argument(f"--{axis}-size", dest=f"rank.{axis}_size", help=f"{axis} ranks in the instance (1)")
        command.add_argument(f"--{axis}-rank", dest=f"rank.{axis}_rank", help="this rank among them (0)")
    command.add_argument("--page-size", dest="rank.page_size", help="tokens in a KV page (1)")
    command.add_argument("--kv-cache-dtype", dest="rank.kv_cache_dtype", help="as the engine names it (auto)")
    command.add_argument("--prefill-http-port", dest="rank.prefill_http_port", help="the engine's own API port")
    command.add_argument(
        "--hold",
        dest="rank.hold",
        action="store_true",
        help="stay and hold a lease: the rank is known to live as long as this does",
    )
    command.add_argument("--instance", dest="node.instance", help="the instance that the rank belongs to (default)")
    command.add_argument("--ttl", dest="node.ttl_s", help="seconds of the lease, renewed every third of it (15)")
    command.add_argument("--on-exhaustion", dest="node.exhaustion", help="raise (default), exit or keep-trying")
    command.add_argument("--max-attempts", dest="retry.max_attempts", help="give up after so many (never)")
    command.add_argument("--give-up-after", dest="retry.give_up_after_s", help="give up after so many seconds (never)")


def _if_held(settings: Settings) -> bool:
    return settings.rank.hold


async def _register(settings: Settings, args: argparse.Namespace) -> int:
    from pdctl.commands import register

    return await register.run(settings, args)
