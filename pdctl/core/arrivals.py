"""
Why a rank is not where it should be: refused, never seen, gone, or one of too few. And the registry itself.

Decides only; `core.explain` puts it together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

from pdctl.core.address import Endpoint
from pdctl.core.findings import Culprit, Finding, Place, Scope, rank_name
from pdctl.core.native import Registration
from pdctl.core.route import Announcement, Seat, Shape
from pdctl.core.seen import LEFT, SHOWN, Row, Seen, ago, host_of, missing_seats, said, seat_of, shape_of, sizes
from pdctl.errors import BadField

STILL_NEWS_S = 600.0
"""A refusal of an instance that serves is told for so long; of one that does not, until the rank is there."""

STALE_S = 5.0

_ANNOUNCED = Announcement(Seat(0, 0, 0, 0), Shape(1, 1, 1, 1, 1, None), Endpoint("localhost", 1)).to_body()


# --- the registry itself


def service(seen: Seen, scope: Scope) -> Iterator[Finding]:  # noqa: ARG001 - concerns everybody
    told = seen.overview.get("service", {})
    for reason in told.get("unready", ()):
        yield Finding(
            Culprit.JOURNAL_TROUBLE,
            f"registry {seen.registry}",
            f"the registry is not ready: {reason}",
            "mend what it names (pdctl doctor on its host looks at the journal's place); look-ups go on meanwhile",
            (f"its /readyz: {reason}",),
        )
    age_s = told.get("age_s") or 0.0
    if age_s > STALE_S:
        yield Finding(
            Culprit.JOURNAL_TROUBLE,
            f"registry {seen.registry}",
            f"its answers may be {age_s:.0f} s old: it does not hear the journal that it shares",
            "look at etcd, and at the way to it",
            (f"overview: age_s {age_s:.1f}",),
        )


# --- registration


def refusals(seen: Seen, scope: Scope) -> Iterator[Finding]:
    """What was claimed and refused, and has not been put right since; the last of each kind."""
    yield from (_refusal(seen, event) for event in _refused(seen, scope))


def _refused(seen: Seen, scope: Scope) -> list[Row]:
    last: dict[tuple[Any, ...], Row] = {}
    for event in seen.events:
        if event.get("kind") in ("refused", "denied") and _is_of_a_claim(event) and _is_asked_about(event, scope):
            last[event.get("instance"), event.get("rank"), host_of(event), _blamed(event)] = event
    return [event for event in last.values() if not _is_put_right(seen, event)]


def _is_asked_about(event: Row, scope: Scope) -> bool:
    """Of a claim that could not be read nobody knows whose it was."""
    instance = event.get("instance")
    return instance is None or scope.covers(str(instance), seat_of(event))


def _is_put_right(seen: Seen, event: Row) -> bool:
    """Whether whoever was refused has come in since, or the instance serves and it is long ago."""
    name, seat, host = event.get("instance"), seat_of(event), host_of(event)
    for number, came_to, came_from in seen.came.get(str(name), ()):
        same = came_to == seat if seat is not None else bool(host) and came_from == host
        if same and number > event.get("id", 0):
            return True
    instance = None if name is None else seen.instances.get(str(name))
    serves = bool(instance and instance.get("ready")) or name is None
    age_s = seen.age_s(event)
    return serves and age_s is not None and age_s > STILL_NEWS_S


def _refusal(seen: Seen, event: Row) -> Finding:
    told = said(event).partition(f" was {event['kind']}")[2].partition(": ")[2] or said(event)
    what, (why, _, do) = _blamed(event), told.rpartition(": ")
    if what is Culprit.ACCESS_REFUSED:
        why = told.partition(": ")[0]
    rank = seat_of(event)
    who = "a rank" if event.get("instance") is None else str(Place(str(event["instance"]), rank))
    at = f" from {event['peer']}" if event.get("peer") else ""
    age_s = seen.age_s(event)
    times = f", {event['count']} times" if (event.get("count") or 1) > 1 else ""
    when = "" if age_s is None else f" {ago(age_s)}"
    return Finding(
        what,
        who,
        f"the registration of {who}{at} was refused: {why or told}",
        remedy(what, do),
        (f"event {event.get('id')}{when}{times}: {told}",),
    )


def _is_of_a_claim(event: Row) -> bool:
    """Look-ups, rooms and reports are refused as well, and keep nobody from registering."""
    if event.get("kind") == "denied":
        return str(event.get("offered")).startswith(("PUT ", "POST "))
    field = str(event.get("field") or "").partition(".")[0]
    return event.get("reason") != "stale" and (not field or field in _CLAIMED)


_CLAIMED = frozenset({*_ANNOUNCED, *(each.name for each in fields(Registration)), "seat", "body", "layout"})


def _blamed(event: Row) -> Culprit:
    """By what the event names, and by the registry's own sentences: `core.route`, `core.access`."""
    told, reason = said(event), event.get("reason")
    if event.get("kind") == "denied":
        return Culprit.ACCESS_REFUSED
    if "is every interface" in told:
        return Culprit.WILDCARD_ADDRESS
    if "only the rank's own host reaches it" in told:
        return Culprit.LOOPBACK_ADDRESS
    if reason == "contradiction":
        field = str(event.get("field") or "").removeprefix("shape.")
        return MISMATCH.get(field, Culprit.LAYOUT_MISMATCH)
    return Culprit.SEAT_OCCUPIED if reason == "occupied" else Culprit.CLAIM_REFUSED


MISMATCH = {"page_size": Culprit.PAGE_SIZE_MISMATCH, "attn_tp_size": Culprit.TP_MISMATCH}


def remedy(what: Culprit, otherwise: str) -> str:
    match what:
        case Culprit.WILDCARD_ADDRESS | Culprit.LOOPBACK_ADDRESS:
            return (
                "start the rank with the address by which peers reach its host: SGLANG_HOST_IP=ADDRESS for SGLang, "
                "PDCTL_NODE__HOST=ADDRESS for pdctl; pdctl doctor there lists the host's addresses"
            )
        case Culprit.ACCESS_REFUSED:
            return (
                "give the rank the token of a name that this registry knows (--token-file, PDCTL_CLIENT__TOKEN_FILE), "
                "or let it come from a network that --trust names (docs/security.md)"
            )
        case _:
            return otherwise


def absent(seen: Seen, scope: Scope) -> Iterator[Finding]:
    """What was asked about and the registry has never heard of, or does not know any more."""
    for place in scope.places:
        came = any(event.get("instance") == place.instance for event in _refused(seen, Scope((place,))))
        instance = seen.instances.get(place.instance)
        if instance is None and not came:
            yield _gone(seen, place) or _never_came(seen, place)
        elif instance is not None and place.seat is not None and not _has_seat(instance, place.seat):
            yield _no_such_seat(place, instance)
    if (words := seen.overview.get("stock")) is not None:
        yield _stock(seen, str(words))
    elif not scope.places and scope.room is None and not seen.ranks:
        yield _never_came(seen, None)


def _has_seat(instance: Row, seat: Seat) -> bool:
    try:
        return seat in shape_of(instance)
    except BadField:
        return True  # another wire's, which tells no shape


def _no_such_seat(place: Place, instance: Row) -> Finding:
    why = f"{place.instance} has no seat of that name: its sizes are {sizes(instance.get('shape', {}))}"
    do = "compare the rank's own sizes with those: ranks count from 0"
    facts = (f"instances: {instance.get('alive', 0)} of {instance.get('seats', 0)} seats are held",)
    return Finding(Culprit.NEVER_REGISTERED, str(place), why, do, facts)


def _stock(seen: Seen, words: str) -> Finding:
    """SGLang's own server counts registrations; who is missing it cannot say."""
    nobody = "(0 workers" in words
    do = "see each prefill rank's log for its registration; pdctl serve in this server's place names who is missing"
    return Finding(
        Culprit.NEVER_REGISTERED if nobody else Culprit.RANK_MISSING,
        f"the instance of {seen.registry}",
        f"{'no rank' if nobody else 'not every rank'} has registered with SGLang's own bootstrap server",
        do,
        (f"GET /route: {words}",),
    )


def _gone(seen: Seen, place: Place) -> Finding | None:
    last = next((event for event in reversed(seen.events) if event.get("instance") == place.instance), None)
    return None if last is None or last.get("kind") not in LEFT else _ended(seen, str(place), last)


def _never_came(seen: Seen, place: Place | None) -> Finding:
    who = "no rank" if place is None else f"no rank of {place.instance}"
    about = "the fleet" if place is None else str(place)
    known = sorted(seen.instances)
    facts = [f"the registry at {seen.registry} knows {', '.join(known[:SHOWN]) if known else 'no instance'}"]
    if seen.astray:
        one = seen.astray[0]
        facts += [f"{each.who} was started with {each.flag} {each.value}" for each in seen.astray[:SHOWN]]
        return Finding(
            Culprit.WRONG_BOOTSTRAP_PORT,
            one.who,
            f"{who} is registered: {one.who} looks for its registry at {one.value}, and it is at {seen.registry}",
            f"start it with {one.flag} of {seen.registry}, and the same at every prefill, decode and router",
            tuple(facts),
        )
    near = get_close_matches(place.instance, known, 1) if place is not None else []
    first = f"did you mean {near[0]}? Else see" if near else "see"
    return Finding(
        Culprit.NEVER_REGISTERED,
        about,
        f"{who} is registered there, and the registry has heard of none",
        f"{first} that the engine runs and was told of {seen.registry} (--disaggregation-bootstrap-port for SGLang, "
        "node.registry for pdctl): pdctl doctor on its host shows where the way ends. A stock decode registers nowhere",
        tuple(facts),
    )


def incomplete(seen: Seen, scope: Scope) -> Iterator[Finding]:
    for name, instance in seen.instances.items():
        if not scope.covers(name):
            continue
        yield from _missing(seen, scope, instance)
        if instance.get("draining") and not missing_seats(instance):
            why = f"{name} drains: it gets no new requests, and is gone when what is under way is done"
            do = "wait, or register its ranks anew: a rank that registers after a drain serves again"
            yield Finding(Culprit.DRAINING, name, why, do, (f"instances: {name} is draining",))


def _missing(seen: Seen, scope: Scope, instance: Row) -> Iterator[Finding]:
    name = str(instance["name"])
    seats = [seat for seat in missing_seats(instance) if scope.covers(name, seat)]
    never: list[Seat] = []
    for seat in seats:
        last = _last_of(seen, name, seat)
        if last is not None and last.get("kind") in LEFT:
            yield _ended(seen, rank_name(name, seat), last)
        else:
            never.append(seat)
    if never:
        yield _never_sat(instance, never)


def _never_sat(instance: Row, never: Sequence[Seat]) -> Finding:
    name, alive, n_seats = str(instance["name"]), instance.get("alive", 0), instance.get("seats", 0)
    who = ", ".join(rank_name(name, seat) for seat in never[:SHOWN])
    more = f" and {len(never) - SHOWN} more" if len(never) > SHOWN else ""
    facts = [f"instances: {alive} of {n_seats} seats are held; free: {', '.join(map(str, never[:SHOWN]))}{more}"]
    if health := instance.get("health"):
        facts.append(f"health: {health}")
    if forming := instance.get("forming"):
        n = len(forming.get("alive_seats", ()))
        facts.append(f"another incarnation forms, with {n} ranks of another shape: {sizes(forming.get('shape', {}))}")
    return Finding(
        Culprit.RANK_MISSING,
        who,
        f"{who}{more} did not register: {name} has {alive} of the {n_seats} ranks that its sizes "
        f"({sizes(instance.get('shape', {}))}) ask for, and serves nobody until all are there",
        "look at the log of that rank, or whether it was started at all; pdctl doctor on its host shows whether the "
        "registry can be reached from there",
        tuple(facts),
    )


def _ended(seen: Seen, who: str, event: Row) -> Finding:
    kind, age_s = str(event.get("kind")), seen.age_s(event)
    when = "some time ago" if age_s is None else ago(age_s)
    evidence = (f"event {event.get('id')}, {kind} {when}: {said(event)}",)
    if kind in ("left", "drained"):
        why = f"{who} has {'said goodbye' if kind == 'left' else 'been drained'} {when}, and has not come back"
        return Finding(Culprit.RANK_MISSING, who, why, "start it again", evidence)
    why = f"{who} was registered, and its lease lapsed {when}: it does not renew any more"
    if kind == "lost":
        why = f"{who} was registered, and the witness has found it dead {when}"
    do = "look whether its process lives and stands still (its log, and its host); started again it registers by itself"
    return Finding(Culprit.LEASE_LAPSED, who, why, do, evidence)


def _last_of(seen: Seen, name: str, seat: Seat) -> Row | None:
    """The last thing that happened to the seat, or to many of which it may have been one."""
    own, crowd = seen.last.get((name, seat)), seen.last.get((name, None))
    if own is None or crowd is None:
        return own or crowd
    return max(own, crowd, key=lambda event: int(event.get("id", 0)))
