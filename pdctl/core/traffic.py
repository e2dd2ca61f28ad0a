"""
Why those who are listed do not serve each other: addresses that lead nowhere, shapes that do not fit, links that are
out, ranks that are not ready, rooms that have failed.

Decides only; `core.explain` puts it together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pdctl.core.address import Endpoint, is_loopback
from pdctl.core.arrivals import MISMATCH, remedy
from pdctl.core.findings import Culprit, Finding, Place, Scope, rank_name
from pdctl.core.layout import Kind
from pdctl.core.naming import SESSION_KEY
from pdctl.core.pairing import check_shapes
from pdctl.core.route import Seat
from pdctl.core.seen import (
    SHOWN,
    Door,
    Knock,
    Row,
    Seen,
    ago,
    endpoint_of,
    role_of,
    said,
    seat_of,
    shape_of,
    sizes,
)
from pdctl.core.warmup import StoreState
from pdctl.errors import BadField, LayoutMismatch

STUCK_S = 30.0
"""A room waits for its peer for a moment where all is well, and for 300 s at most: this is neither."""


# --- addresses


def addresses(seen: Seen, scope: Scope) -> Iterator[Finding]:
    elsewhere = [endpoint_of(row) for row in seen.ranks.values()]
    others = sorted({at.host for at in elsewhere if at is not None and not at.is_loopback})
    for (name, seat), row in seen.ranks.items():
        at = endpoint_of(row)
        if at is None or not scope.covers(name, seat):
            continue
        who = rank_name(name, seat)
        if at.is_loopback and others:
            yield _loopback(who, at, others)
        yield from _at_the_door(seen, who, row, at)


def _loopback(who: str, at: Endpoint, others: Sequence[str]) -> Finding:
    return Finding(
        Culprit.LOOPBACK_ADDRESS,
        who,
        f"{who} is registered at {at}, which leads every other host to itself, and there are ranks at {others[0]}",
        remedy(Culprit.LOOPBACK_ADDRESS, ""),
        (f"ranks: {who} announces {at}", f"ranks elsewhere: {', '.join(others[:SHOWN])}"),
    )


def _at_the_door(seen: Seen, who: str, row: Row, at: Endpoint) -> Iterator[Finding]:
    session = row.get("metadata", {}).get(SESSION_KEY)
    asked = ((f"{at}", "control link"), (str(session), "engine")) if session else ((f"{at}", "control link"),)
    found: dict[Door, list[str]] = {}
    for address, what in asked:
        if (knock := seen.knocks.get(address)) is not None and knock.door is not Door.ANSWERS:
            found.setdefault(knock.door, []).append(f"{what} {address}, asked from {seen.here}: {knock.detail}")
    for door, facts in found.items():
        yield _behind(door, who, row, tuple(facts))


def _behind(door: Door, who: str, row: Row, facts: tuple[str, ...]) -> Finding:
    where, kept = facts[0].partition(",")[0], _how_kept(row)
    match door:
        case Door.REFUSED:
            why = f"{who} is listed as alive, and nobody listens at its {where}: {kept}"
            do = "start the rank again, which registers it anew; or free its seat: DELETE /v1/instances/NAME/ranks/SEAT"
            return Finding(Culprit.STALE_REGISTRATION, who, why, do, facts)
        case Door.ANOTHER:
            why = f"another program has the {where} of {who}: {kept}"
            do = "see who listens there (ss -ltnp on that host), give one of the two another port, start the rank again"
            return Finding(Culprit.PORT_TAKEN, who, why, do, facts)
        case Door.SILENT:
            why = f"{who} takes connections at its {where} and says nothing: its process hangs or has been stopped"
            do = "look at that process (its state in /proc, its stack, its host's load); kill it if it stays so"
            return Finding(Culprit.HANGS, who, why, do, facts)
        case _:
            return _no_way(who, where, row, facts)


def _no_way(who: str, where: str, row: Row, facts: tuple[str, ...]) -> Finding:
    at, came_from = endpoint_of(row), row.get("registered_from")
    if at is not None and came_from and came_from != at.host and not is_loopback(came_from):
        facts = (*facts, f"ranks: {who} announces {at.host} and registered from {came_from}")
        why = f"no way leads from here to the {where} of {who}, and it registered from {came_from}: NAT, or another net"
        do = f"announce an address that peers reach, {came_from} if that is its own: SGLANG_HOST_IP, PDCTL_NODE__HOST"
        return Finding(Culprit.UNREACHABLE_ADDRESS, who, why, do, facts)
    why = f"no way leads from here to the {where} of {who}"
    do = (
        "if peers see the same: a firewall or NetworkPolicy, or an address of another network (NAT, a pod's own): "
        "announce one that peers reach, SGLANG_HOST_IP or PDCTL_NODE__HOST"
    )
    return Finding(Culprit.UNREACHABLE_ADDRESS, who, why, do, facts)


def _how_kept(row: Row) -> str:
    since = f"registered {ago(row['age_s'])}" if "age_s" in row else "registered"
    if row.get("ttl_s") is None:
        return f"it {since} without a lease, as stock engines do, and its row stays until somebody replaces it"
    return f"it {since} with a lease of {row['ttl_s']:g} s and stands {row.get('standing', 'alive')}"


# --- prefill and decode


def pairs(seen: Seen, scope: Scope) -> Iterator[Finding]:
    """Shapes that do not fit each other: of the pair that was asked about, else of whoever fits nobody."""
    names = list(dict.fromkeys(place.instance for place in scope.places if place.instance in seen.instances))
    sides = [
        [name for name in names or seen.instances if role_of(seen, name) == role] for role in ("prefill", "decode")
    ]
    if len(names) == 2 and all(sides):
        yield from filter(None, [_unfit(seen, sides[0][0], sides[1][0])])
    elif len(names) < 2:
        yield from _lonely(seen, names)


def _lonely(seen: Seen, names: Sequence[str]) -> Iterator[Finding]:
    """Who has no rank left is nobody's other side: its shape is of those who were there."""
    there = [name for name, instance in seen.instances.items() if name in names or instance.get("alive", 1)]
    prefills, decodes = ([name for name in there if role_of(seen, name) == role] for role in ("prefill", "decode"))
    for name in names or decodes:
        others = decodes if role_of(seen, name) == "prefill" else prefills
        both = [(name, other) if name in prefills else (other, name) for other in others[:SHOWN]]
        found = [_unfit(seen, *pair) for pair in both]
        if found and all(found):
            yield from filter(None, found[:1])


def _unfit(seen: Seen, prefill: str, decode: str) -> Finding | None:
    try:
        check_shapes(shape_of(seen.instances[prefill]), shape_of(seen.instances[decode]), Kind.MHA)
    except BadField:
        return None  # another wire's, which says less of itself
    except LayoutMismatch as error:
        why, _, do = str(error).partition(": ")
        what = MISMATCH.get(why.partition(" ")[0], Culprit.LAYOUT_MISMATCH)
        facts = tuple(f"instances: {name} has {sizes(seen.instances[name]['shape'])}" for name in (prefill, decode))
        return Finding(what, f"{prefill} and {decode}", f"{prefill} and {decode} cannot be paired: {why}", do, facts)
    return None


# --- links


def links(seen: Seen, scope: Scope) -> Iterator[Finding]:
    for key, report in seen.reports.items():
        yield from _links_of(seen, scope, key, report)
        if scope.covers(*key):
            yield from _own_fault(rank_name(*key), report)
    ours = [row for row in seen.overview.get("sessions", ()) if row.get("state") in ("blocked", "dropped")]
    for row in ours:
        if _leads_to(seen, scope, str(row.get("session"))):
            yield _ejected(seen, f"the service at {seen.registry}", row)


def _links_of(seen: Seen, scope: Scope, key: tuple[str, Seat], report: Row) -> Iterator[Finding]:
    """Of a pair, what is between the two; else what either end of it may be asked about."""
    own = scope.covers(*key)
    for link in report.get("links", ()):
        if link.get("state") not in ("blocked", "dropped"):
            continue
        leads = _leads_to(seen, scope, str(link.get("session")), but=key[0])
        if (own and leads) if _names_two(scope) else (own or leads):
            yield _ejected(seen, rank_name(*key), link)


def _own_fault(who: str, report: Row) -> Iterator[Finding]:
    if report.get("doubt") or report.get("panicking"):
        groups = ", ".join(map(str, report.get("panicking", ())))
        why = f"{who} doubts itself: most of what it asks fails at once" if report.get("doubt") else ""
        why = why or f"more than half of the peers that {who} has in {groups or 'a group'} are in trouble"
        do = f"look at the network and the load of the host of {who} first: the fault may be there, not at its peers"
        yield Finding(Culprit.OWN_FAULT, who, why, do, (f"report of {who}: doubt {bool(report.get('doubt'))}",))


def _ejected(seen: Seen, who: str, link: Row) -> Finding:
    session = str(link.get("session"))
    peer = seen.by_session.get(session)
    name = f"{peer} ({session})" if peer else session
    cause = str(link.get("cause") or "unknown").replace("_", " ")
    facts = [f"link as {who} has it: {link.get('sentence', '')}"]
    knock = seen.knocks.get(session)
    if knock is not None:
        facts.append(f"engine {session}, asked from {seen.here} just now: {knock.detail}")
    verb = "has dropped" if link.get("state") == "dropped" else "has ejected"
    return Finding(
        Culprit.EJECTED_LINK,
        f"{who} -> {peer or session}",
        f"{who} {verb} {name} since {float(link.get('since_s') or 0):.0f} s because of {cause}; {_until(link)}",
        _cure(link, knock),
        tuple(facts),
    )


def _until(link: Row) -> str:
    again_s = link.get("again_in_s", link.get("next_question_s"))
    if again_s is not None:
        return f"asked again in {again_s:.1f} s"
    is_asked = link.get("asking") or "being asked now" in str(link.get("sentence"))
    return "being asked now" if is_asked and link.get("state") == "blocked" else "until the peer registers anew"


def _cure(link: Row, knock: Knock | None) -> str:
    if link.get("state") == "dropped":
        return (
            "that life is over, by its lease's end or as another process answers there: start the peer anew, so that "
            "it registers; or pdctl sessions --lift"
        )
    if knock is not None and knock.door is Door.ANSWERS:
        return (
            "the peer answers again: it is let back by itself when its hold is over; pdctl sessions --lift does so now"
        )
    if knock is not None:
        return "mend the peer (its evidence is above): it is asked again and let back by itself"
    return "look at the peer's process and the way to it: it is let back by itself when it answers twice"


def _leads_to(seen: Seen, scope: Scope, session: str, but: str = "") -> bool:
    """Whether the session is an engine of those who are asked about."""
    name = seen.by_session.get(session)
    if name is None:
        return not scope.places
    place = Place.parse(name)
    return place.instance != but and scope.covers(place.instance, place.seat)


def _names_two(scope: Scope) -> bool:
    return len(scope.places) > 1 and scope.room is None


# --- what ranks say of themselves


def stores(seen: Seen, scope: Scope) -> Iterator[Finding]:
    for (name, seat), report in seen.reports.items():
        store = report.get("store")
        if store and not store.get("attached") and scope.covers(name, seat):
            who = rank_name(name, seat)
            why = f"{who} goes without its shared store: {store.get('sentence', '')}"
            state = str(store.get("state") or "not attached")
            since = "" if store.get("since_s") is None else f" since {store['since_s']:.0f} s"
            fact = f"report of {who}: the store is {state}{since}"
            yield Finding(Culprit.STORE_NOT_READY, who, why, _warm(state), (fact,))


def _warm(state: str) -> str:
    match state:
        case StoreState.FAILED:
            return "mend what it names (pdctl store check on that host says whether it is): then start the rank again"
        case StoreState.CLOSED:
            return "its engine has closed it: see that engine's log"
    return "look at the store's master (pdctl store check on that host, pdctl doctor): it comes back by itself"


def reports(seen: Seen, scope: Scope) -> Iterator[Finding]:
    for (name, seat), report in seen.reports.items():
        if not scope.covers(name, seat):
            continue
        who = rank_name(name, seat)
        for reason in report.get("unready", ()):
            why = f"{who} is not ready: {reason}"
            do = "mend what it names; its own /readyz says when it is over"
            yield Finding(Culprit.RANK_UNREADY, who, why, do, (f"report of {who}, {report.get('age_s')} s old",))


def silent(seen: Seen, scope: Scope) -> Iterator[Finding]:
    """Who holds its seat, and does not tell any more how it is."""
    lost = {(str(event.get("instance")), seat_of(event)): event for event in seen.events if _is_lost(event)}
    for (name, seat), event in lost.items():
        if (
            seat is None
            or (name, seat) not in seen.ranks
            or (name, seat) in seen.reports
            or not scope.covers(name, seat)
        ):
            continue
        who = rank_name(name, seat)
        why = f"{who} holds its seat, and has stopped to tell this registry how it is"
        do = "look at its log and its load; of several registries over one etcd see that each answers (replica_silent)"
        yield Finding(Culprit.REPORT_LOST, who, why, do, (f"event {event.get('id')}: {said(event)}",))


def replicas(seen: Seen, scope: Scope) -> Iterator[Finding]:  # noqa: ARG001 - concerns everybody
    """Other registries of the fleet that say nothing: what their ranks tell is not known."""
    for row in seen.overview.get("service", {}).get("replicas", ()):
        if row.get("answers") is False:
            who = f"registry {row.get('url')}"
            why = f"{who} does not tell this one what its ranks report: {row.get('why')}"
            do = (
                "see whether it runs and can be reached from this registry (firewall, NetworkPolicy), at that address "
                "(PDCTL_ETCD__ADVERTISE there), with a token where there are tokens (PDCTL_CLIENT__TOKEN_FILE here)"
            )
            yield Finding(Culprit.REPLICA_SILENT, who, why, do, (f"overview of {seen.registry}: it does not answer",))


def _is_lost(event: Row) -> bool:
    return event.get("kind") == "report_lost"


# --- rooms


def rooms(seen: Seen, scope: Scope) -> Iterator[Finding]:
    if scope.room is None:
        return
    found = [(key, kind, row) for key, report in seen.reports.items() for kind, row in rooms_of(report, scope.room)]
    for key, kind, row in found:
        finding = (_failed if kind == "failed" else _stuck)(seen, rank_name(*key), row)
        if finding is not None:
            yield finding
    if not found:
        yield Finding(
            Culprit.ROOM_UNKNOWN,
            f"room {scope.room}",
            f"no rank that reports has room {scope.room} open or among its last failures",
            "if its request failed just now, it never reached a prefill: look at the router, and at whether its "
            "bootstrap_host and bootstrap_port are this registry's; stock engines report nothing: read their logs",
            (f"reports: {len(seen.reports)} ranks report", *_announced(seen, scope.room)),
        )


def rooms_of(report: Row, room: int | None) -> list[tuple[str, Row]]:
    return [(kind, row) for kind in ("open", "failed") for row in report.get(kind, ()) if row.get("room") == room]


def _peer(seen: Seen, row: Row) -> str | None:
    address = row.get("peer")
    name = seen.by_address.get(str(address))
    return f"{name} ({address})" if name else address


def _failed(seen: Seen, who: str, row: Row) -> Finding:
    peer = f", with {_peer(seen, row)}" if row.get("peer") else ""
    return Finding(
        Culprit.ROOM_FAILED,
        f"room {row['room']}",
        f"room {row['room']} failed at {who} (its {row['side']}{peer}) after {row['seconds']:.1f} s: {row['sentence']}",
        f"its first cause is {str(row['cause']).replace('_', ' ')}: what is found about {who} and that peer says more",
        (f"report of {who}: failed {ago(row['age_s'])}",),
    )


def _stuck(seen: Seen, who: str, row: Row) -> Finding | None:
    if row["age_s"] < STUCK_S:
        return None
    peer = _peer(seen, row) or "its peer"
    return Finding(
        Culprit.ROOM_STUCK,
        f"room {row['room']}",
        f"room {row['room']} is {str(row['phase']).replace('_', ' ')} at {who} since {row['age_s']:.0f} s, "
        f"and waits for {peer}",
        f"look at {peer}: whether it was sent the same request, with the same room and bootstrap address",
        (f"report of {who}: open, {row['side']}, {row['phase']}",),
    )


def _announced(seen: Seen, room: int) -> Iterator[str]:
    said = seen.overview.get("announced", {}).get(str(room))
    if said is not None:
        yield f"the registry was told of it: DP rank {said} has it"
