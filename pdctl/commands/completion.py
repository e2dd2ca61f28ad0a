"""`pdctl completion SHELL`: what a shell needs to complete our commands and flags, from the parser itself."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import shtab

_FILES = ("PATH", "FILE")
_FILE_FLAGS = ("_file", ".tls_cert", ".tls_key", ".tls_ca", ".tls_client_ca")


def run(args: argparse.Namespace) -> int:
    whole = args.parser()
    for action in _actions(whole):
        if action.type is Path or action.metavar in _FILES or action.dest.endswith(_FILE_FLAGS):
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(whole, shell=args.shell))
    return 0


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:  # argparse has no other way to its flags, and shtab goes the same
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from _actions(inner)
