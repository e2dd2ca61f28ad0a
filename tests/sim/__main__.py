"""
`./dev sim [--seeds N] [--seed S] [--links PxD] [--hours H] [--gap-s G]`: a fleet's links in virtual time.

300 x 300 links for a simulated day unless told otherwise. A seed that fails is printed with the command that plays it
again. Ends with 1 if any has failed.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Sequence

from tests.sim.fleet import Fleet, Plan
from tests.sim.oracle import Violation


def main(arguments: Sequence[str]) -> int:
    wanted = parsed(arguments)
    seeds = range(wanted.seed, wanted.seed + wanted.seeds)
    failed = [seed for seed in seeds if not played(plan_of(wanted, seed))]
    for seed in failed:
        print(f"FAILED  play it again: {command(wanted, seed)}")
    print(f"{len(seeds) - len(failed)} of {len(seeds)} seeds ok")
    return 1 if failed else 0


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="./dev sim", description="A fleet's links in virtual time.")
    parser.add_argument("--seeds", type=at_least_one, default=1, metavar="N", help="how many seeds (default 1)")
    parser.add_argument("--seed", type=int, default=1, metavar="S", help="the first of them (default 1)")
    parser.add_argument("--links", type=links, default=(300, 300), metavar="PxD", help="ranks (default 300x300)")
    parser.add_argument("--hours", type=above_nought, default=24.0, metavar="H", help="simulated (default 24)")
    parser.add_argument(
        "--gap-s", type=above_nought, default=120.0, metavar="G", help="between misfortunes, on average (default 120)"
    )
    return parser.parse_args(arguments)


def links(text: str) -> tuple[int, int]:
    prefills, _, decodes = text.partition("x")
    return at_least_one(prefills), at_least_one(decodes)


def at_least_one(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is below 1")
    return number


def above_nought(text: str) -> float:
    if not (number := float(text)) > 0:
        raise argparse.ArgumentTypeError(f"{number} is not above 0")
    return number


def plan_of(wanted: argparse.Namespace, seed: int) -> Plan:
    span_s = wanted.hours * 3600.0
    return Plan(seed, wanted.links, span_s, calm_s=min(600.0, span_s / 4), mean_gap_s=wanted.gap_s)


def command(wanted: argparse.Namespace, seed: int) -> str:
    prefills, decodes = wanted.links
    return f"./dev sim --seed {seed} --links {prefills}x{decodes} --hours {wanted.hours:g} --gap-s {wanted.gap_s:g}"


def played(plan: Plan) -> bool:
    """Play one seed and print what it was; False if the oracle has spoken."""
    fleet, began, marks = Fleet(plan), time.process_time(), itertools.count(1)

    def told(now: float) -> None:
        if sys.stderr.isatty() and next(marks) % 6 == 0:
            print(f"  {now / 3600:.0f} h  {speed(fleet, began)}", end="\r", file=sys.stderr)

    print(f"seed {plan.seed}: {plan.counts[0]} x {plan.counts[1]} links, {plan.span_s / 3600:g} h", flush=True)
    try:
        fleet.run(told)
    except Violation as violation:
        print(f"  {violation}\n  {speed(fleet, began)}")
        return False
    print(f"  {speed(fleet, began)}")
    print("\n".join(f"  {line}" for line in fleet.oracle.report()), flush=True)
    return True


def speed(fleet: Fleet, began: float) -> str:
    took_s = time.process_time() - began
    return (
        f"{took_s:.1f} s of CPU: {fleet.now / took_s:,.0f} simulated seconds a second, "
        f"{fleet.events:,} events, {fleet.events / took_s:,.0f} events a second"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
