"""`pdctl events`: what has happened in the fleet of late, and with --follow what happens."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Iterable

from rich.text import Text

from pdctl.commands import drawing
from pdctl.config import Settings
from pdctl.errors import BadField, Unreachable
from pdctl.onlooker import Following, Onlooker, Row

EVERY_S = 1.0

_BAD = {
    *("refused", "denied", "ejected", "dropped", "room_failed", "report_lost", "journal_trouble", "expired", "lost"),
    "panic",
}
_GOOD = {"readmitted", "journal_well", "completed", "recovered"}


async def run(settings: Settings, args: argparse.Namespace) -> int:
    if args.since < 0 or (args.last is not None and args.last < 0):
        raise BadField("since" if args.since < 0 else "last", "is below 0: give an id or a number of events")
    async with Onlooker(settings) as onlooker:
        following = Following(onlooker)
        found = _wanted(await following.more(args.since), args)
        _show(found if args.last is None else found[len(found) - min(args.last, len(found)) :], as_json=args.json)
        if args.follow:
            await _follow(following, args)
    return 0


async def _follow(following: Following, args: argparse.Namespace) -> None:
    """For ever. A registry that does not answer is said once, and asked on."""
    is_lost = False
    while True:
        await asyncio.sleep(EVERY_S)
        try:
            found = await following.more()
        except Unreachable as error:
            if not is_lost:
                print(f"pdctl: {error}; still trying", file=sys.stderr)
            is_lost = True
            continue
        is_lost = False
        _show(_wanted(found, args), as_json=args.json)


def _wanted(events: Iterable[Row], args: argparse.Namespace) -> list[Row]:
    return [
        event
        for event in events
        if (not args.kind or event["kind"] in args.kind) and args.instance in (None, event["instance"])
    ]


def _show(events: Iterable[Row], *, as_json: bool) -> None:
    to = drawing.console()
    for event in events:
        if as_json:
            print(json.dumps(event))
        elif to.is_terminal:
            to.print(_styled(event), soft_wrap=True)
        else:
            print(_line(event))
    sys.stdout.flush()


def _line(event: Row) -> str:
    times = f" ({event['count']} times)" if event.get("count", 1) > 1 else ""
    where = f" (at {event['registry']})" if event.get("registry") else ""
    return drawing.shown(f"{event['id']:>5} {event['at']} {event['kind']:<15} {event['sentence']}{times}{where}")


def _styled(event: Row) -> Text:
    kind = event["kind"]
    style = "red" if kind in _BAD else "green" if kind in _GOOD else ""
    text = Text(_line(event))
    text.highlight_words([kind], style=style) if style else None
    return text
