"""`pdctl events`: what has happened in the fleet of late, and with --follow what happens."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Iterable

from rich.text import Text

from pdctl.commands import drawing
from pdctl.commands.base import Commands, add_command, add_service, never
from pdctl.config import Settings
from pdctl.core.chronicle import Kind
from pdctl.core.lives import ChangeKind
from pdctl.errors import BadField, Unreachable
from pdctl.onlooker import Following, Onlooker, Row

EVERY_S = 1.0
KINDS = sorted({*(kind.value for kind in Kind), *(kind.value for kind in ChangeKind)})

_BAD = {
    *("refused", "denied", "ejected", "dropped", "room_failed", "report_lost", "journal_trouble", "expired", "lost"),
    "panic",
}
_GOOD = {"readmitted", "journal_well", "completed", "recovered"}


def add(commands: Commands) -> None:
    about = "list what has happened in the fleet of late, oldest first; exit 0 told, 69 no registry"
    command = add_command(commands, "events", _events, never, about)
    add_service(command, "the registry (http://127.0.0.1:8998)")
    command.add_argument("--follow", "-f", action="store_true", help="and what happens from now on, until SIGINT")
    command.add_argument("--since", type=int, metavar="ID", help="from this id on (the oldest that is known)")
    command.add_argument("--last", type=int, metavar="N", help="the last N of them only")
    command.add_argument(
        "--kind", action="append", choices=KINDS, metavar="KIND",
        help=f"only these; may be given again: {', '.join(KINDS)}",
    )  # fmt: skip
    command.add_argument("--instance", metavar="NAME", help="only what is about this one")
    command.add_argument("--json", action="store_true", help="one JSON document a line")
    command.set_defaults(follow=False, since=0, last=None, kind=None, instance=None, json=False)


async def _events(settings: Settings, args: argparse.Namespace) -> int:
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
    return drawing.shown(f"{event['id']:>5} {event['at']} {event['kind']:<15} {event['sentence']}{times}")


def _styled(event: Row) -> Text:
    kind = event["kind"]
    style = "red" if kind in _BAD else "green" if kind in _GOOD else ""
    text = Text(_line(event))
    text.highlight_words([kind], style=style) if style else None
    return text
