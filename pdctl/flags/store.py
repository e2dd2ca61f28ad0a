"""`pdctl store config|check|warmup`: Mooncake's shared store (docs/store.md)."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from pdctl.flags.base import Commands, add_command, never

if TYPE_CHECKING:
    from pdctl.config import Settings


def add(commands: Commands) -> None:
    what = "Mooncake's shared store: what is configured, whether it can be had, whether it works"
    top = commands.add_parser("store", help=what, description=what)
    inner = top.add_subparsers(metavar="COMMAND", required=True)
    for name, run, about in (
        ("config", _config, "print the store's settings, and where each came from"),
        ("check", _check, "ask the master and try a set-up that gives no memory; exit 0 when both answer"),
        ("warmup", _warmup, "set up, put a key, read it back, remove it; exit 0 when the store works"),
    ):
        command = add_command(inner, name, run, never, about)
        command.add_argument("--extra-config", dest="store.extra", metavar="JSON", help="SGLang's; or @FILE with it")
        command.add_argument(
            "--store-config", dest="store.file", metavar="FILE", help="JSON ($SGLANG_HICACHE_MOONCAKE_CONFIG_PATH)"
        )
        command.add_argument("--local-hostname", dest="store.local_hostname", help="this host, for the other ranks")
        command.add_argument("--device", dest="store.device", help="cpu (default), cuda:N or npu:N")
        for axis in ("tp", "pp"):
            command.add_argument(f"--{axis}-size", dest=f"store.{axis}_size", help=f"{axis} ranks that share it (1)")
        for axis in ("tp", "pp", "dp", "cp"):
            command.add_argument(f"--{axis}-rank", dest=f"store.{axis}", help="this rank among them (0)")
        command.add_argument("--wait", dest="store.wait_s", metavar="SECONDS", help="for a master that is late (60)")
        command.add_argument("--attempts", dest="store.attempts", help="of the warm-up (10)")
        command.add_argument("--json", action="store_true", help="one JSON document")
        command.set_defaults(json=False)


async def _config(settings: Settings, args: argparse.Namespace) -> int:
    from pdctl.commands import store

    return await store.config(settings, args)


async def _check(settings: Settings, args: argparse.Namespace) -> int:
    from pdctl.commands import store

    return await store.check(settings, args)


async def _warmup(settings: Settings, args: argparse.Namespace) -> int:
    from pdctl.commands import store

    return await store.warmup(settings, args)
