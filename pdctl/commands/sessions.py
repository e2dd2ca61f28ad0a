"""The work of `pdctl sessions`, and of `pdctl probe` where a service is to ask."""

from __future__ import annotations

import argparse
import json

from pdctl import inquiry
from pdctl.config import Settings
from pdctl.inquiry import Verdict


async def run(settings: Settings, args: argparse.Namespace) -> int:
    if args.lift is not None:
        rows = [await inquiry.lift(settings, args.lift)]
    else:
        rows = list(await inquiry.standings(settings, args.state))
    if args.json:
        print(json.dumps({"sessions": rows}))
        return 0
    for row in rows:
        print(f"{row['session']:<24} {row['state']:<8} {row['sentence']}")
    if not rows:
        print("no session is known there" if args.state is None else f"no session is {args.state} there")
    return 0


async def probe(settings: Settings, args: argparse.Namespace) -> int:
    return told(await inquiry.ask_service(settings, args.session))


def told(verdict: Verdict) -> int:
    works = f"works: {verdict.depth}" if verdict.works else "does not work"
    print(f"{verdict.session} {works} ({verdict.detail}), {verdict.seconds * 1e3:.1f} ms")
    return 0 if verdict.works else 1
