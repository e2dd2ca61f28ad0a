"""vLLM's prefills: whole or not shown, restarts without mixing, and whose seat it is."""

from __future__ import annotations

import itertools
from collections.abc import Collection
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdctl.core.fleet import Fleet, FleetPolicy, Place, Row, Sizes, Worker, prefill_of, shown
from pdctl.errors import BadField, LimitReached, Occupied, TooLarge

A, B = "10.0.0.1", "10.0.0.2"
NEVER: Collection[Worker] = ()


def worker(tp: int = 0, *, dp: int = 0, pp: int = 0, port: int = 0, engine: str = "p", host: str = A) -> Worker:
    return Worker(engine, Place(dp, tp, pp), f"tcp://{host}:{port or 4000 + 100 * dp + 10 * pp + tp}", host)


def join(fleet: Fleet, *workers: Worker, gone: Collection[Worker] = NEVER, now: float = 0.0) -> list[Row]:
    rows: list[Row] = []
    for each in workers:
        made = fleet.claim(each, gone, now)
        fleet.apply(made, now)
        rows += made
    return rows


def complete(fleet: Fleet, now: float, name: str = "p") -> bool:
    prefill = fleet.find(name)
    return prefill is not None and fleet.is_complete(prefill, now)


def missing(fleet: Fleet, name: str = "p") -> list[str]:
    prefill = fleet.find(name)
    assert prefill is not None
    return [str(place) for place in prefill.missing(fleet.sizes)]


def held(fleet: Fleet) -> list[Worker]:
    return [each for prefill in fleet for each in prefill.workers.values()]


def test_a_loopback_address_from_another_host_is_refused() -> None:
    with pytest.raises(BadField, match="VLLM_HOST_IP") as refusal:
        Worker("p", Place(0, 0, 0), "tcp://127.0.0.1:4000", A)
    assert refusal.value.field == "addr"
    Worker("p", Place(0, 0, 0), "tcp://127.0.0.1:4000", "127.0.0.1")


def test_every_worker_has_an_epoch_of_its_own_and_a_later_one_a_higher(sized: Fleet) -> None:
    join(sized, worker(0), worker(1), worker(0))  # the third is the first again
    first = {each.place.tp: each.epoch for each in held(sized)}
    join(sized, worker(0, port=5000))
    assert (first, [each.epoch for each in held(sized)]) == ({0: 1, 1: 2}, [3])


def test_epochs_outlive_the_journal_and_rows_of_before_are_given_one(sized: Fleet) -> None:
    notes = [row.to_note()[1] or b"" for row in join(sized, worker(0), worker(1))]
    old = notes[0].replace(b', "epoch": 1', b"")
    assert old != notes[0]
    heir = Fleet(FleetPolicy(sizes="dp=1,tp=2,pp=1"))
    heir.apply([Row.from_note("", note) for note in (notes[1], old)], 0.0)
    assert {each.place.tp: each.epoch for each in held(heir)} == {1: 2, 0: 3}
    join(heir, worker(0, engine="q"))
    assert max(each.epoch for each in held(heir)) == 4


def test_what_was_in_the_seat_is_told_with_what_is(sized: Fleet) -> None:
    join(sized, worker(0))
    (move,) = sized.apply(sized.claim(worker(0, port=5000), [worker(0)], 0.0), 0.0)
    assert move.row.worker is not None
    assert move.before is not None
    assert (move.before.epoch, move.row.worker.epoch) == (1, 2)


@pytest.fixture
def sized() -> Fleet:
    return Fleet(FleetPolicy(sizes="dp=1,tp=2,pp=1"))


def test_with_known_sizes_complete_means_every_seat_and_nothing_waits(sized: Fleet) -> None:
    join(sized, worker(1))
    assert missing(sized) == ["dp0/tp0/pp0"]
    assert not complete(sized, 1e9)
    join(sized, worker(0))
    assert complete(sized, 0.0)


def test_a_repeated_registration_changes_nothing_and_fills_no_second_seat(sized: Fleet) -> None:
    join(sized, worker(0))
    assert join(sized, worker(0), worker(0)) == []
    assert not complete(sized, 1e9)


def test_unknown_sizes_wait_until_nobody_has_joined_for_a_while() -> None:
    fleet = Fleet(FleetPolicy(settle_s=5))
    join(fleet, worker(0), now=100)
    assert not complete(fleet, 104.9)
    join(fleet, worker(1), now=104.9)
    assert not complete(fleet, 109.8)
    assert complete(fleet, 109.9)


@pytest.mark.parametrize(
    "there", [[(0, 1)], [(0, 0), (0, 2)], [(0, 0), (0, 1), (1, 0)]], ids=["first missing", "hole", "ragged"]
)
def test_a_hole_is_never_complete_however_long_it_lasts(there: list[tuple[int, int]]) -> None:
    fleet = Fleet(FleetPolicy(settle_s=0))
    join(fleet, *(worker(tp, dp=dp) for dp, tp in there))
    assert not complete(fleet, 1e9)


def test_what_a_worker_says_of_its_sizes_is_taken_and_the_operators_word_is_above_it() -> None:
    fleet = Fleet(FleetPolicy(settle_s=1e9))
    sizes = Sizes(dp=1, tp=2, pp=1)
    join(fleet, replace(worker(0), sizes=sizes))
    assert missing(fleet) == ["dp0/tp1/pp0"]
    join(fleet, replace(worker(1), sizes=sizes))
    assert complete(fleet, 0)
    strict = Fleet(FleetPolicy(sizes="tp=1"))
    with pytest.raises(BadField, match=r"tp_rank: is 1 and a prefill here has 1 tp ranks"):
        strict.claim(replace(worker(1), sizes=sizes), NEVER, 0)


def test_a_late_worker_disproves_the_guess() -> None:
    fleet = Fleet(FleetPolicy(settle_s=5))
    join(fleet, worker(0), now=0)
    assert complete(fleet, 5)
    late = worker(1)
    assert fleet.rivals(late, 6) == [worker(0)]  # a restart would look the same
    join(fleet, late, now=6)
    assert not complete(fleet, 10)
    assert complete(fleet, 11)
    assert len(held(fleet)) == 2


def test_engines_of_one_prefill_are_one_instance() -> None:
    assert prefill_of("abc_dp12") == prefill_of("abc") == "abc"
    assert prefill_of("_dp1") == "_dp1"
    fleet = Fleet(FleetPolicy(sizes="dp=2,tp=1,pp=1"))
    join(fleet, worker(dp=1, engine="p_dp1"))
    assert not complete(fleet, 1e9)
    join(fleet, worker(dp=0, engine="p_dp0"))
    assert complete(fleet, 0, "p_dp1")


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_a_restart_with_more_ranks_is_whole_in_whatever_order_they_come(order: tuple[int, ...]) -> None:
    fleet = Fleet(FleetPolicy(settle_s=1))
    old = [worker(0), worker(1)]
    join(fleet, *old)
    for n, tp in enumerate(order):
        heir = worker(tp, port=5000 + tp)
        gone = [rival for rival in fleet.rivals(heir, 10 + n / 10) if rival in old]
        join(fleet, heir, gone=gone, now=10 + n / 10)
        assert not set(held(fleet)) & set(old)
    assert complete(fleet, 12)
    assert {each.address.port for each in held(fleet)} == {5000, 5001, 5002, 5003}


def test_a_restart_with_fewer_ranks_leaves_nobody_behind(sized: Fleet) -> None:
    fleet = Fleet(FleetPolicy(settle_s=1))
    old = [worker(tp) for tp in range(4)]
    join(fleet, *old)
    for tp in range(2):
        heir = worker(tp, port=5000 + tp)
        join(fleet, heir, gone=[rival for rival in fleet.rivals(heir, 10) if rival in old], now=10)
    assert complete(fleet, 11)
    assert len(held(fleet)) == 2


def test_on_its_own_host_a_restart_wins_even_over_a_process_that_hangs(sized: Fleet) -> None:
    join(sized, worker(0), worker(1))
    rows = join(sized, worker(0, port=5000))
    assert [(row.place.tp, row.worker is None) for row in rows] == [(1, True), (0, False)]
    assert not complete(sized, 1e9)  # never the heir beside the dead one's other half
    join(sized, worker(1, port=5001))
    assert complete(sized, 0)


def test_a_holder_that_answers_keeps_its_seat_against_another_host(sized: Fleet) -> None:
    join(sized, worker(0))
    thief = worker(0, host=B)
    assert sized.rivals(thief, 0) == [worker(0)]
    with pytest.raises(Occupied) as refused:
        sized.claim(thief, NEVER, 0)
    assert (refused.value.holder, refused.value.claimant) == (A, B)
    assert join(sized, thief, gone=[worker(0)])
    assert held(sized) == [thief]


def test_an_address_belongs_to_who_spoke_from_it_last() -> None:
    """The same host and port under a new engine ID: the process that had it before is no more."""
    fleet = Fleet()
    join(fleet, worker(0, engine="first"))
    join(fleet, worker(0, engine="second"))
    assert [prefill.name for prefill in fleet] == ["second"]


def test_a_first_worker_of_a_new_prefill_asks_after_the_others_where_that_is_wanted() -> None:
    fleet = Fleet(FleetPolicy(ask_others=True))
    join(fleet, worker(0, engine="one"), worker(1, engine="one"))
    assert fleet.strangers(worker(2, engine="one")) == []
    assert fleet.strangers(worker(0, port=5000, engine="two")) == [worker(0, engine="one")]
    quiet = Fleet()
    join(quiet, worker(0, engine="one"))
    assert quiet.strangers(worker(0, port=5000, engine="two")) == []


def test_the_map_is_vllms_and_two_prefills_never_share_a_number() -> None:
    fleet = Fleet()
    join(fleet, worker(0), worker(1), worker(0, port=5000, engine="q_dp0"), worker(dp=1, port=5001, engine="q_dp1"))
    assert shown(fleet) == {
        "0": {"engine_id": "p", "worker_addr": {"0": {"0": f"tcp://{A}:4000"}, "1": {"0": f"tcp://{A}:4001"}}},
        "1": {"engine_id": "q_dp0", "worker_addr": {"0": {"0": f"tcp://{A}:5000"}}},
        "2": {"engine_id": "q_dp1", "worker_addr": {"0": {"0": f"tcp://{A}:5001"}}},
    }


def test_limits_are_named() -> None:
    fleet = Fleet(FleetPolicy(max_workers=1))
    join(fleet, worker(0))
    with pytest.raises(LimitReached, match="max_workers"):
        fleet.claim(worker(1), NEVER, 0)
    join(fleet, worker(0, port=5000))
    with pytest.raises(TooLarge, match="engine_id"):
        worker(engine="x" * 257)


@pytest.mark.parametrize(
    ("field", "make"),
    [
        ("engine_id", lambda: worker(engine="")),
        ("tp_rank", lambda: worker(-1, port=1)),
        ("dp_rank", lambda: worker(dp=65_536, port=1)),
        ("addr", lambda: replace(worker(), addr="10.0.0.1:4000")),
        ("addr", lambda: replace(worker(), addr="tcp://10.0.0.1")),
        ("addr", lambda: replace(worker(), addr="tcp://0.0.0.0:4000")),
        ("addr", lambda: replace(worker(), addr="tcp://[::]:4000")),
        ("tp_size", lambda: Sizes(tp=0)),
        ("sizes", lambda: Sizes.parse("tp=x")),
        ("sizes", lambda: Sizes.parse("ep=2")),
    ],
)
def test_what_cannot_be_used_is_named(field: str, make: object) -> None:
    with pytest.raises(BadField) as bad:
        make()  # type: ignore[operator]
    assert bad.value.field == field


def test_a_rank_far_out_costs_nothing() -> None:
    fleet = Fleet(FleetPolicy(settle_s=0))
    join(fleet, worker(65_535, dp=65_535, pp=65_535, port=1))
    assert not complete(fleet, 1e9)
    prefill = fleet.find("p")
    assert prefill is not None
    assert next(prefill.missing(fleet.sizes)) == Place(0, 0, 0)


@given(st.integers(0, 9), st.text(min_size=1).filter(str.isprintable), st.none() | st.integers(1, 8))
def test_a_worker_comes_back_from_its_json(rank: int, engine: str, size: int | None) -> None:
    made = Worker(engine[:256], Place(rank, rank, 0), "tcp://[fd00::1]:4000", "fd00::1", Sizes(tp=size))
    assert Worker.from_json(made.to_json()) == made
