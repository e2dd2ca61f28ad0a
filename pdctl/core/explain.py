"""
Why something cannot serve: what a registry knows, and what was found out by asking, made into findings.

Decides only. Nothing is asked here: `Seen` holds every answer. A question that nobody has put blames nobody, and news
that has been overtaken is no news.
"""

from __future__ import annotations

from pdctl.core.arrivals import absent, incomplete, refusals, service
from pdctl.core.findings import Finding, Place, Scope, in_order
from pdctl.core.seen import Seen
from pdctl.core.traffic import addresses, links, pairs, replicas, reports, rooms, rooms_of, silent, stores

_RULES = (service, refusals, absent, incomplete, addresses, pairs, links, stores, reports, silent, replicas)


def explain(seen: Seen, scope: Scope) -> list[Finding]:
    """What is wrong there, causes first; empty where nothing is known to be wrong."""
    asked = scope if scope.room is None else with_ranks_of(seen, scope)
    return in_order([*rooms(seen, scope), *(finding for rule in _RULES for finding in rule(seen, asked))])


def with_ranks_of(seen: Seen, scope: Scope) -> Scope:
    """A room is asked about together with the ranks that have it."""
    ranks = [Place(*key) for key, report in seen.reports.items() if rooms_of(report, scope.room)]
    return Scope((*scope.places, *ranks), scope.room) if ranks or scope.places else scope
