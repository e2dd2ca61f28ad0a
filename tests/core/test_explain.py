"""What is told of a fleet, what is not, and in which order: planted overviews, no sockets."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import pytest

from pdctl.core.explain import explain
from pdctl.core.findings import Culprit, Place, Scope, rank_name
from pdctl.core.route import Seat, Shape
from pdctl.core.seen import Astray, Door, Knock, Seen
from pdctl.errors import BadField

NOW = datetime(2026, 11, 22, 3, 0, 0, tzinfo=UTC)
TP0, TP1 = Seat(0, 0, 0, 0), Seat(0, 0, 1, 0)
SHAPE = Shape(2, 1, 1, 1, 64, "bfloat16")


def row(seat: Seat, address: str = "10.0.0.7:5000", **more: Any) -> dict[str, Any]:
    plain = {"seat": str(seat), "address": address, "ttl_s": 15.0, "standing": "alive", "metadata": {}, "age_s": 60.0}
    return plain | more


def instance(name: str, *alive: dict[str, Any], role: str = "prefill", shape: Shape = SHAPE) -> dict[str, Any]:
    held = {each["seat"] for each in alive}
    missing = [{"seat": str(seat)} for seat in sorted(shape.seats()) if str(seat) not in held]
    counts = {"seats": shape.n_seats, "alive": len(alive), "ready": not missing}
    about = {"name": name, "role": role, "shape": asdict(shape), "draining": False, "health": None, "forming": None}
    return {**about, **counts, "alive_seats": list(alive), "missing_seats": missing}


def whole(name: str = "p", **more: Any) -> dict[str, Any]:
    return instance(name, row(TP0), row(TP1, "10.0.0.8:5000"), **more)


def event(number: int, kind: str, sentence: str = "", **more: Any) -> dict[str, Any]:
    return {"id": number, "at": "2026-11-22T02:59:00.000Z", "kind": kind, "sentence": sentence, "instance": "p", **more}


def refused(number: int, field: str, **more: Any) -> dict[str, Any]:
    words = f"10.0.0.8 was refused: {field} is 64 for this prefill but this rank offers 16: start every rank alike"
    return event(number, "refused", words, field=field, reason="contradiction", peer="10.0.0.8", **more)


def found(
    *instances: dict[str, Any], scope: Scope | None = None, events: Any = (), knocks: Any = None, **more: Any
) -> list[tuple[str, str]]:
    overview: dict[str, Any] = {"instances": list(instances)}
    overview |= {name: more.pop(name) for name in ("reports", "sessions", "service") if name in more}
    seen = Seen(overview, events, knocks or {}, NOW, "http://r:8998", **more)
    return [(finding.what.value, finding.who) for finding in explain(seen, scope or Scope())]


# --- what is asked about


@pytest.mark.parametrize(
    ("words", "scope"),
    [
        ([], Scope()),
        (["p"], Scope((Place("p"),))),
        (["p/tp1"], Scope((Place("p", TP1),))),
        (["p", "tp1"], Scope((Place("p", TP1),))),
        (["p", "dp0-cp0-tp1-pp0"], Scope((Place("p", TP1),))),
        (["p", "d"], Scope((Place("p"), Place("d")))),
        (["p/tp1", "d/tp0"], Scope((Place("p", TP1), Place("d", TP0)))),
        (["room", "7"], Scope(room=7)),
        (["vllm:abc"], Scope((Place("vllm:abc"),))),
    ],
    ids=lambda it: " ".join(it) if isinstance(it, list) else "",
)
def test_what_a_person_writes(words: list[str], scope: Scope) -> None:
    assert Scope.parse(words) == scope


@pytest.mark.parametrize("words", [["a", "b", "c"], ["a b"], ["p/xp9"], [""]], ids=str)
def test_what_cannot_be_meant_is_refused(words: list[str]) -> None:
    with pytest.raises(BadField):
        Scope.parse(words)


def test_a_rank_is_named_by_the_axes_that_are_not_0() -> None:
    assert [rank_name("p", seat) for seat in (TP0, TP1, Seat(10, 0, 2, 0))] == ["p/tp0", "p/tp1", "p/dp10-tp2"]


# --- what is told


def test_a_fleet_in_which_all_is_well_has_no_findings() -> None:
    fine = {"10.0.0.7:5000": Knock(Door.ANSWERS, ""), "10.0.0.8:5000": Knock(Door.ANSWERS, "")}
    assert found(whole(), whole("d", role="decode"), knocks=fine) == []


def test_a_registry_without_anybody_says_so_and_one_with_somebody_does_not() -> None:
    assert found() == [("never_registered", "the fleet")]
    assert found(whole()) == []


def test_a_name_that_is_nearly_right_is_asked_back() -> None:
    seen = Seen({"instances": [whole("prefill-a")]}, now=NOW)
    [finding] = explain(seen, Scope.parse(["prefil-a"]))
    assert (finding.what, "did you mean prefill-a?" in finding.do) == (Culprit.NEVER_REGISTERED, True)


def test_a_seat_that_the_instance_does_not_have_is_told() -> None:
    assert found(whole(), scope=Scope.parse(["p/tp9"])) == [("never_registered", "p/tp9")]
    assert found(whole(), scope=Scope.parse(["p/tp1"])) == []


def test_a_process_that_looks_elsewhere_is_blamed_only_for_who_never_came() -> None:
    lost = [Astray("pid 7 (python)", "--registry", "http://r:9")]
    assert found(whole(), scope=Scope.parse(["q"]), astray=lost) == [("wrong_bootstrap_port", "pid 7 (python)")]
    assert found(whole(), scope=Scope.parse(["p"]), astray=lost) == []


def test_the_cause_is_told_before_what_it_causes() -> None:
    half = instance("p", row(TP0))
    assert found(half, events=[refused(1, "page_size", rank="tp1")]) == [
        ("page_size_mismatch", "p/tp1"),
        ("rank_missing", "p/tp1"),
    ]


@pytest.mark.parametrize(
    ("field", "what"),
    [("page_size", "page_size_mismatch"), ("attn_tp_size", "tp_mismatch"), ("kv_cache_dtype", "layout_mismatch")],
)
def test_a_contradiction_is_told_by_its_field(field: str, what: str) -> None:
    assert found(whole(), events=[refused(1, field, rank="tp1")]) == [(what, "p/tp1")]
    assert found(whole(), events=[refused(1, f"shape.{field}", rank="tp1")]) == [(what, "p/tp1")]


def test_a_refusal_that_the_rank_has_overcome_is_no_news() -> None:
    events = [refused(1, "page_size", rank="tp1"), event(2, "seated", rank="tp1", peer="10.0.0.8:5000")]
    assert found(whole(), events=events) == []
    nameless = [refused(1, "page_size"), event(2, "seated", rank="tp1", peer="10.0.0.8:5000")]
    assert found(whole(), events=nameless) == []
    another = [refused(1, "page_size"), event(2, "seated", rank="tp0", peer="10.0.0.7:5000")]
    assert [what for what, _ in found(whole(), events=another)] == ["page_size_mismatch"]


def test_an_old_refusal_is_told_only_of_an_instance_that_does_not_serve() -> None:
    old = refused(1, "page_size", rank="tp1") | {"at": "2026-11-22T01:00:00.000Z"}
    assert found(whole(), events=[old]) == []
    assert [what for what, _ in found(instance("p", row(TP0)), events=[old])] == ["page_size_mismatch", "rank_missing"]


@pytest.mark.parametrize(
    "refusal",
    [
        {"field": "prefill_dp_rank", "reason": "malformed"},
        {"field": "links.session", "reason": "malformed"},
        {"field": None, "reason": "stale"},
    ],
    ids=["look-up", "report", "an old life"],
)
def test_what_is_no_claim_is_no_refused_claim(refusal: dict[str, Any]) -> None:
    assert found(whole(), events=[event(1, "refused", "10.0.0.8 was refused: no: mend it", **refusal)]) == []


def test_who_claims_an_occupied_seat_is_told() -> None:
    words = "10.0.0.8 was refused: seat dp0/cp0/tp0/pp0 of p is held by 10.0.0.7: stop one of the two"
    assert found(whole(), events=[event(1, "refused", words, reason="occupied", rank="tp0")]) == [
        ("seat_occupied", "p/tp0")
    ]


@pytest.mark.parametrize(
    ("kind", "what"), [("expired", "lease_lapsed"), ("lost", "lease_lapsed"), ("left", "rank_missing")]
)
def test_how_a_missing_rank_went_is_told(kind: str, what: str) -> None:
    assert found(instance("p", row(TP0)), events=[event(1, kind, rank="tp1")]) == [(what, "p/tp1")]


def test_an_end_of_many_at_once_names_nobody_and_is_found_all_the_same() -> None:
    assert found(instance("p", row(TP0)), events=[event(1, "expired", count=40)]) == [("lease_lapsed", "p/tp1")]


def test_an_instance_that_is_gone_is_told_from_one_that_never_was() -> None:
    gone = [event(1, "expired", rank="tp0")]
    assert found(scope=Scope.parse(["p"]), events=gone) == [("lease_lapsed", "p")]
    assert found(scope=Scope.parse(["q"]), events=gone) == [("never_registered", "q")]


@pytest.mark.parametrize(
    ("door", "what"),
    [
        (Door.REFUSED, "stale_registration"),
        (Door.ANOTHER, "port_taken"),
        (Door.SILENT, "hangs"),
        (Door.NO_WAY, "unreachable_address"),
    ],
)
def test_what_is_behind_an_address_says_what_is_wrong(door: Door, what: str) -> None:
    assert found(whole(), knocks={"10.0.0.8:5000": Knock(door, "so it is")}) == [(what, "p/tp1")]


def test_an_address_behind_a_nat_is_told_with_where_its_rank_came_from() -> None:
    behind = instance("p", row(TP0, registered_from="10.9.9.9"), row(TP1, "10.0.0.8:5000", registered_from="10.0.0.8"))
    shut = {at: Knock(Door.NO_WAY, "no answer") for at in ("10.0.0.7:5000", "10.0.0.8:5000")}
    nat, plain = explain(Seen({"instances": [behind]}, knocks=shut), Scope())
    assert "registered from 10.9.9.9: NAT" in nat.why
    assert "NAT" not in plain.why


def test_loopback_is_no_fault_of_a_fleet_on_one_host() -> None:
    here = instance("p", row(TP0, "127.0.0.1:5000"), row(TP1, "127.0.0.1:5001"))
    assert found(here) == []
    assert found(here, whole("d", role="decode"), scope=Scope.parse(["p/tp1"])) == [("loopback_address", "p/tp1")]


def test_a_pair_is_held_against_each_other_and_a_fleet_only_where_nobody_fits() -> None:
    small, large = whole("d", role="decode", shape=Shape(2, 1, 1, 1, 16, "bfloat16")), whole("e", role="decode")
    assert found(whole(), small, scope=Scope.parse(["d", "p"])) == [("page_size_mismatch", "p and d")]
    assert found(whole(), large, scope=Scope.parse(["p", "e"])) == []
    assert found(whole(), small, large) == [("page_size_mismatch", "p and d")]
    assert found(whole(), whole("q", shape=small_shape()), small) == []


def test_an_instance_without_a_rank_fits_nobody_and_is_not_held_against_anybody() -> None:
    gone = instance("d", role="decode", shape=small_shape())
    assert [what for what, _ in found(whole(), gone)] == ["rank_missing"]
    assert ("page_size_mismatch", "p and d") in found(whole(), gone, scope=Scope.parse(["p", "d"]))


def small_shape() -> Shape:
    return Shape(2, 1, 1, 1, 16, "bfloat16")


# --- links, stores, rooms


def report(name: str, seat: str = "tp0", **more: Any) -> dict[str, Any]:
    return {"instance": name, "seat": seat, "age_s": 0.5, "session": f"{name}:1", "links": [], "unready": [], **more}


def link(session: str, state: str = "blocked") -> dict[str, Any]:
    return {"session": session, "state": state, "cause": "timed_out", "sentence": "so", "again_in_s": 1.5, "since_s": 9}


def test_a_link_is_told_to_whoever_asks_about_either_end() -> None:
    told: dict[str, Any] = {"reports": [report("p", links=[link("d:1"), link("e:1")]), report("d"), report("e")]}
    fleet = [whole(), whole("d", role="decode"), whole("e", role="decode")]
    both = [("ejected_link", "p/tp0 -> d/tp0"), ("ejected_link", "p/tp0 -> e/tp0")]
    assert found(*fleet, **told) == both
    assert found(*fleet, scope=Scope.parse(["p"]), **told) == both
    assert found(*fleet, scope=Scope.parse(["p", "d"]), **told) == both[:1]
    assert found(*fleet, scope=Scope.parse(["d"]), **told) == both[:1]


def test_a_link_on_trial_is_no_trouble() -> None:
    assert found(whole(), reports=[report("p", links=[link("d:1", "trial")])]) == []


def test_what_a_rank_says_of_itself_is_told() -> None:
    ill = report("p", unready=["not registered"], doubt=True, store={"attached": False, "sentence": "no master"})
    assert [what for what, _ in found(whole(), reports=[ill])] == ["own_fault", "store_not_ready", "rank_unready"]


def test_a_rank_that_stopped_to_report_is_told_until_it_reports_again() -> None:
    lost = [event(1, "report_lost", "p tp0 has not told", rank="tp0")]
    assert found(whole(), events=lost) == [("report_lost", "p/tp0")]
    assert found(whole(), events=lost, reports=[report("p")]) == []
    assert found(instance("p", row(TP1)), events=lost) == [("rank_missing", "p/tp0")]


def test_a_room_is_told_with_the_ranks_that_have_it() -> None:
    failed = {
        "room": 7,
        "side": "sender",
        "age_s": 3.0,
        "seconds": 1.0,
        "cause": "timed_out",
        "sentence": "no",
        "peer": "d",
    }
    told = {"reports": [report("p", failed=[failed], links=[link("d:1")]), report("q", unready=["asleep"])]}
    assert found(whole(), whole("q"), scope=Scope(room=7), **told) == [
        ("ejected_link", "p/tp0 -> d:1"),
        ("room_failed", "room 7"),
    ]


def test_the_peer_of_a_room_is_named_even_if_it_is_gone() -> None:
    ended = {"age_s": 3.0, "seconds": 1.0, "cause": "timed_out", "sentence": "no"}
    failed = {"room": 7, "side": "sender", "peer": "10.0.0.9:5000", **ended}
    overview = {"instances": [whole()], "reports": [report("p", failed=[failed])]}
    gone = event(1, "expired", rank="tp0", peer="10.0.0.9:5000") | {"instance": "d"}
    told = [finding for finding in explain(Seen(overview, [gone]), Scope(room=7)) if finding.who == "room 7"]
    assert "with d/tp0 (10.0.0.9:5000)" in told[0].why


def test_a_room_that_waits_is_stuck_only_after_a_while() -> None:
    def waits(age_s: float) -> dict[str, Any]:
        row = {"room": 7, "side": "sender", "phase": "bootstrapping", "age_s": age_s, "peer": None}
        return {"reports": [report("p", open=[row])]}

    assert found(whole(), scope=Scope(room=7), **waits(60.0)) == [("room_stuck", "room 7")]
    assert found(whole(), scope=Scope(room=7), **waits(1.0)) == []


def test_a_registry_in_trouble_comes_first() -> None:
    told = {"unready": ["the journal takes no rows"], "age_s": 60.0}
    assert [what for what, _ in found(instance("p", row(TP0)), service=told)] == [
        "journal_trouble",
        "journal_trouble",
        "rank_missing",
    ]
