"""`pdctl status [INSTANCE]`: how the fleet is: who serves, who is missing, what flows, which links are out."""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from pdctl.commands import drawing
from pdctl.config import Settings
from pdctl.errors import BadField, Unreachable
from pdctl.onlooker import Onlooker, Row

RANKS_SHOWN = 64
"""So many ranks are shown without being asked for; of more, those in trouble."""
LINKS_SHOWN = 40
MISSING_SHOWN = 4

Rows = list[Sequence[object]]
_CALM = ("trusted", "trial")


@dataclass(slots=True)
class Section:
    """One table: `note` stands below it."""

    title: str
    columns: Sequence[str]
    rows: Rows
    note: str = ""


@dataclass(slots=True)
class Rates:
    """Bytes a second of each instance, from one look to the next."""

    now: Mapping[str, float] = field(default_factory=dict)
    _at: float = 0.0
    _before: Mapping[tuple[str, str, object], int] = field(default_factory=dict)

    def look(self, reports: Iterable[Row], at: float) -> None:
        counts = {(row["instance"], row["seat"], row.get("epoch")): int(row["bytes"]) for row in reports}
        passed_s = at - self._at
        rates: dict[str, float] = {}
        for who, count in counts.items():
            if who in self._before and passed_s > 0:
                rates[who[0]] = rates.get(who[0], 0.0) + max(0, count - self._before[who]) / passed_s
        self.now, self._at, self._before = rates, at, counts


async def run(settings: Settings, args: argparse.Namespace) -> int:
    if not 0.1 <= args.every <= 3600:
        raise BadField("every", f"is {args.every:g}: give 0.1 to 3600 seconds")
    async with Onlooker(settings) as onlooker:
        if args.watch:
            await _watch(onlooker, args)
        overview = of(await onlooker.overview(), args.instance)
        if args.json:
            print(json.dumps(overview))
        else:
            _print(drawing.console(), list(sections(overview, onlooker.url, every_rank=_all(args))))
    return 0


def _all(args: argparse.Namespace) -> bool:
    return bool(args.ranks or args.instance)


async def _watch(onlooker: Onlooker, args: argparse.Namespace) -> None:
    """For ever. What cannot be had now is said, and asked for again."""
    to, rates = drawing.console(), Rates()
    live = Live(console=to, screen=True, auto_refresh=False, vertical_overflow="ellipsis")
    is_drawn = to.is_terminal and not args.json
    if is_drawn:
        live.start()
    try:
        while True:
            try:
                overview = of(await onlooker.overview(), args.instance)
            except Unreachable as error:
                shown = [Section(f"pdctl: {error}", (), [])]
            else:
                rates.look(overview["reports"], time.monotonic())
                if args.json:
                    print(json.dumps(overview), flush=True)
                shown = list(sections(overview, onlooker.url, every_rank=_all(args), rates=rates.now))
            if is_drawn:
                live.update(Group(*_drawn(shown)), refresh=True)
            elif not args.json:
                _print(to, [*shown, Section("", (), [])])
            await asyncio.sleep(args.every)
    finally:
        if is_drawn:
            live.stop()


def of(overview: Row, instance: str | None) -> Row:
    """Of one instance alone. Raises BadField for one that is not there."""
    if instance is None:
        return overview
    names = sorted(str(row["name"]) for row in overview["instances"])
    if instance not in names:
        raise BadField("instance", f"{instance!r} is not known there: there is {', '.join(names[:20]) or 'none'}")
    kept = {
        "instances": [row for row in overview["instances"] if row["name"] == instance],
        "reports": [row for row in overview["reports"] if row["instance"] == instance],
    }
    return {**overview, **kept}


def sections(
    overview: Row, url: str, *, every_rank: bool = False, rates: Mapping[str, float] | None = None
) -> Iterator[Section]:
    """What is shown, as text."""
    yield _head(overview["service"], url)
    reports = {(row["instance"], row["seat"]): row for row in overview["reports"]}
    yield _instances(overview["instances"], reports.values(), rates or {})
    yield from _ranks(overview["instances"], reports, every_rank=every_rank)
    yield from _links(overview)


def _head(service: Row, url: str) -> Section:
    counts, up = service["counts"], drawing.seconds(service["uptime_s"])
    said = (
        f"registry {url}, pdctl {service['version']}, journal {service['journal']}, up {up}: "
        f"{counts['ready']} of {counts['instances']} instances ready, "
        f"{counts['alive']} of {counts['seats']} ranks there, {counts['rooms']} rooms known"
    )
    troubles = [str(reason) for reason in service["unready"]]
    if service["age_s"] > 1:
        troubles.insert(0, f"its answers are {drawing.seconds(service['age_s'])} old")
    troubles += [
        f"registry {each['url']} does not tell what its ranks report: {each['why'] or 'not asked yet'}"
        for each in service.get("replicas", ())
        if not each["answers"]
    ]
    return Section(said, (), [], "; ".join(troubles))


def state(row: Row) -> str:
    """Of an instance, in one word."""
    if row.get("dead"):
        return "dead"
    if row.get("draining"):
        return "draining"
    return "ready" if row["ready"] else "not ready"


def _instances(instances: Iterable[Row], reports: Iterable[Row], rates: Mapping[str, float]) -> Section:
    by_name: dict[str, list[Row]] = {}
    for report in reports:
        by_name.setdefault(report["instance"], []).append(report)
    rows: Rows = []
    for row in sorted(instances, key=lambda row: str(row["name"])):
        name = str(row["name"])
        told = by_name.get(name, [])
        moved = drawing.nbytes(sum(report["bytes"] for report in told)) if told else "-"
        flow = f"{moved}, {drawing.nbytes(rates[name])}/s" if name in rates else moved
        ended = [sum(report["ended"][how] for report in told) for how in ("success", "failed")]
        rooms = f"{sum(map(_open, told))} open, {ended[0]} done, {ended[1]} failed" if told else "-"
        missing = ", ".join(short(seat["seat"]) for seat in row.get("missing_seats", ())[:MISSING_SHOWN])
        more = max(0, row.get("missing", 0) - MISSING_SHOWN)
        forming = "" if row.get("forming") is None else "; a new one forms"
        gone = (f"{missing} and {more} more" if more > 0 and missing else missing) + forming
        rows.append((name, row["role"], state(row), f"{row['alive']}/{row['seats']}", gone, rooms, flow))
    return Section("instances", ("name", "role", "state", "ranks", "missing", "rooms", "moved"), rows)


def _ranks(instances: Iterable[Row], reports: Mapping[tuple[str, str], Row], *, every_rank: bool) -> Iterator[Section]:
    rows: Rows = []
    troubled: Rows = []
    for instance in sorted(instances, key=lambda row: str(row["name"])):
        groups = [instance, *([instance["forming"]] if instance.get("forming") else [])]
        for rank in (rank for group in groups for rank in group["alive_seats"]):
            report = reports.get((str(instance["name"]), short(rank["seat"])))
            line, is_well = _rank(str(instance["name"]), rank, report)
            rows.append(line)
            if not is_well:
                troubled.append(line)
    columns = ("rank", "address", "state", "lease", "rooms", "links out", "moved", "trouble")
    if every_rank or len(rows) <= RANKS_SHOWN:
        yield Section("ranks", columns, rows)
    else:
        note = f"{len(rows) - len(troubled)} ranks without trouble are not shown: --ranks"
        yield Section("ranks in trouble", columns, troubled, note)


def _rank(instance: str, rank: Row, report: Row | None) -> tuple[Sequence[object], bool]:
    name = f"{instance}/{short(rank['seat'])}"
    lease = "-" if rank.get("ttl_s") is None else drawing.seconds(rank["ttl_s"])
    if report is None:
        return (name, rank["address"], rank["standing"], lease, "-", "-", "-", ""), rank["standing"] == "alive"
    out = sum(link["state"] not in _CALM for link in report["links"])
    troubles = [str(reason) for reason in report["unready"]]
    if report["quarantined"]:
        troubles.append(f"{report['quarantined']} pages in quarantine")
    if report["doubt"]:
        troubles.append("doubts itself: its time-outs blame nobody")
    if report["store"] is not None and not report["store"]["attached"]:
        troubles.append(f"store: {report['store']['sentence']}")
    moved = drawing.nbytes(report["bytes"])
    line = (name, rank["address"], rank["standing"], lease, _phases(report), out, moved, "; ".join(troubles))
    return line, not troubles and not out and rank["standing"] == "alive"


def _links(overview: Row) -> Iterator[Section]:
    """Links that are not trusted: as ranks see them, and as this registry does of engines that move their own."""
    rows: Rows = []
    for report in overview["reports"]:
        for link in report["links"]:
            if link["state"] != "trusted":
                rows.append((f"{report['instance']}/{report['seat']}", *_link(link)))
    rows += [("registry", *_link(link)) for link in overview["sessions"] if link["state"] != "trusted"]
    if rows:
        more = len(rows) - LINKS_SHOWN
        note = f"and {more} more: pdctl status --json" if more > 0 else ""
        columns = ("seen by", "peer", "state", "for", "again in", "why")
        yield Section("links that are out", columns, rows[:LINKS_SHOWN], note)


def _link(link: Row) -> Sequence[object]:
    again, since = link.get("again_in_s"), link.get("since_s")
    return (
        link["session"],
        link["state"],
        "-" if since is None else drawing.seconds(since),
        "-" if again is None else drawing.seconds(again),
        link["sentence"],
    )


def _open(report: Row) -> int:
    return sum(number for phases in report["rooms"].values() for number in phases.values())


def _phases(report: Row) -> str:
    phases: dict[str, int] = {}
    for side in report["rooms"].values():
        for phase, number in side.items():
            phases[phase] = phases.get(phase, 0) + number
    return ", ".join(f"{number} {phase.replace('_', ' ')}" for phase, number in phases.items() if number) or "0"


def short(seat: str) -> str:
    """`dp0/cp0/tp1/pp0` as `tp1`: reports and people name a rank by the axes that are not 0."""
    axes = [axis for axis in seat.replace("-", "/").split("/") if axis[2:] != "0"]
    return "-".join(axes) or "tp0"


def _print(to: Console, shown: Iterable[Section]) -> None:
    if to.is_terminal:
        for each in _drawn(shown):
            to.print(each)
        return
    for section in shown:
        if section.columns:
            print("", file=to.file)
            drawing.show(to, section.columns, section.rows, section.title)
        else:
            print(drawing.shown(section.title), file=to.file)
        if section.note:
            print(drawing.shown(section.note), file=to.file)
    to.file.flush()


def _drawn(shown: Iterable[Section]) -> Iterator[Any]:
    for section in shown:
        if section.columns:
            yield drawing.table(section.columns, section.rows, section.title)
        else:
            yield Text(drawing.shown(section.title), style="bold")
        if section.note:
            yield Text(drawing.shown(section.note), style="yellow")
