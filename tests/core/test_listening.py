"""What a loop that was stopped has missed, by a clock turned by hand."""

from __future__ import annotations

import math

import pytest

from pdctl.core.address import Endpoint
from pdctl.core.kinds import ChangeKind
from pdctl.core.listening import LOOK_UP_EVERY_S, SHARE, Attention, rest_s
from pdctl.core.lives import Claim, Owner
from pdctl.core.registry import Registry
from pdctl.core.route import Announcement, Seat, Shape

TTLS_S = [0.1, 0.9, 2.0, 15.0, 3600.0]


def leased(registry: Registry, ttl_s: float | None, name: str = "a") -> None:
    shape = Shape(attn_tp_size=1, attn_cp_size=1, dp_size=1, pp_size=1, page_size=16, kv_cache_dtype="auto")
    announcement = Announcement(Seat(0, 0, 0, 0), shape, Endpoint("10.0.0.1", 40000))
    registry.claim(Claim(name, announcement, Owner("10.0.0.1"), ttl_s=ttl_s), now=0.0)


def over(registry: Registry, now: float) -> set[str]:
    return {change.instance for change in registry.tick(now) if change.kind is ChangeKind.EXPIRED}


def test_a_loop_that_keeps_its_time_or_was_never_asked_to_has_missed_nothing() -> None:
    attention = Attention()
    assert attention.missed_s(1e9) == 0
    attention.rests(10.0, 0.5)
    assert attention.missed_s(10.5) == 0
    assert attention.missed_s(11.75) == 1.25
    attention.ends()
    assert attention.missed_s(1e9) == 0


@pytest.mark.parametrize("ttl_s", TTLS_S)
def test_the_loop_looks_up_often_enough_for_the_shortest_lease(ttl_s: float) -> None:
    assert rest_s(ttl_s) == min(LOOK_UP_EVERY_S, ttl_s / 6)
    assert rest_s(math.inf) == LOOK_UP_EVERY_S


@pytest.mark.parametrize("ttl_s", TTLS_S)
@pytest.mark.parametrize("stop", [0.34, 0.67, 1.5, 100.0])
@pytest.mark.parametrize("begins", [0.0, 0.5, 1.0], ids=lambda share: f"{share} into the rest")
def test_a_lease_outlives_a_stop_during_which_its_renewal_was_due(ttl_s: float, stop: float, begins: float) -> None:
    """Its last renewal was answered a third of the lease before the stop, the next one is heard just after it."""
    registry, attention = Registry(), Attention()
    leased(registry, ttl_s)
    rest = rest_s(registry.shortest_ttl_s)
    attention.rests(ttl_s / 3 - begins * rest, rest)
    wakes_at = ttl_s / 3 + stop * ttl_s
    registry.forgive(wakes_at, attention.missed_s(wakes_at))
    assert over(registry, wakes_at + 0.3 * ttl_s) == set()
    assert over(registry, wakes_at + ttl_s) == {"a"}, "and ends, when nobody speaks after all"


def test_a_stop_that_endangers_a_short_lease_does_not_prolong_a_long_one() -> None:
    registry = Registry()
    for name, ttl_s in (("short", 1.0), ("long", 30.0), ("stock", None)):
        leased(registry, ttl_s, name)
    assert registry.forgive(29.0, missed_s=0.5) is True
    assert over(registry, 29.9) == set()
    assert over(registry, 30.0) == {"short", "long"}


def test_a_hiccup_endangers_nobody() -> None:
    registry = Registry()
    leased(registry, 15.0)
    assert registry.forgive(14.9, missed_s=15.0 / SHARE - 0.01) is False
    assert over(registry, 15.0) == {"a"}


def test_the_shortest_lease_is_known_through_drafts_and_restarts_and_forgotten_when_it_is_over() -> None:
    registry = Registry()
    assert registry.shortest_ttl_s == math.inf
    draft = registry.draft()
    leased(draft, 2.0)
    leased(draft, 15.0, "b")
    assert (registry.shortest_ttl_s, draft.shortest_ttl_s) == (math.inf, 2.0)
    registry.adopt(draft)
    assert registry.shortest_ttl_s == 2.0
    again = Registry()
    again.restore([life.record() for view in registry for life in view.lives], 2, 2, now=0.0)
    assert again.shortest_ttl_s == 2.0
    assert over(registry, 2.0) == {"a"}
    registry.forgive(2.0, missed_s=0.5)
    assert registry.shortest_ttl_s == 15.0
