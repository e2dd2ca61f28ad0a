"""The policy's arithmetic: waits, holds, memory, panic, doubt; and how often a flapping peer is let back."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdctl.core.ejection import Doubt, Groups, Health, ProbePolicy
from pdctl.core.kinds import Depth
from pdctl.core.sessions import SessionTable
from pdctl.core.standing import ChangeKind, Question, Turn, Unwell, Well
from pdctl.errors import Cause, ConfigError

DEFAULT = ProbePolicy()
chances = st.floats(0, 1, exclude_max=True)


# The policy


@pytest.mark.parametrize(
    "wrong",
    [
        {"interval_s": 0.0}, {"max_interval_s": float("inf")}, {"idle_timeout_s": -1.0}, {"deadline_s": float("nan")},
        {"wanted_interval_s": 0.0}, {"hold_s": -1.0}, {"max_hold_s": 0.0}, {"decay_s": float("nan")},
        {"trial_s": 0.0}, {"lag_s": 0.0}, {"doubt_window_s": float("inf")},
        {"jitter": 1.0}, {"jitter": -0.1}, {"jitter": float("nan")},
        {"multiplier": 0.9}, {"multiplier": float("nan")}, {"stretch": 0.5}, {"stretch": float("inf")},
        {"max_ejected": -0.1}, {"max_ejected": 1.1}, {"max_ejected": float("nan")},
        {"strikes": 0}, {"good_answers": 0}, {"trial_transfers": 0}, {"panic_from": 0}, {"doubt_from": 0},
        {"max_concurrent": 0}, {"max_sessions": 0},
    ],
    ids=str,
)  # fmt: skip
def test_a_policy_that_cannot_work_names_the_setting(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        ProbePolicy(**wrong)


def test_holds_may_be_switched_off() -> None:
    policy = ProbePolicy(hold_s=0.0)
    assert [policy.hold(n, 0.5) for n in range(3)] == [0.0, 0.0, 0.0]
    assert policy.most_relapses == 1


@given(tries=st.integers(0, 5000), away_s=st.floats(-10, 1e6), chance=chances)
def test_a_wait_is_never_longer_than_the_ceiling_nor_shorter_than_the_interval_less_its_jitter(
    tries: int, away_s: float, chance: float
) -> None:
    least = DEFAULT.interval_s * (1 - DEFAULT.jitter)
    assert least <= DEFAULT.wait_s(tries, away_s, chance) <= DEFAULT.max_interval_s


@given(chance=chances)
def test_who_has_been_away_for_a_while_waits_about_half_as_long_again(chance: float) -> None:
    away_s = 0.0
    for tries in range(200):
        wait_s = DEFAULT.wait_s(tries, away_s, chance)
        share_s = DEFAULT.interval_s + (DEFAULT.multiplier - 1) * away_s
        assert 0.8 * min(DEFAULT.max_interval_s, share_s) <= wait_s <= min(DEFAULT.max_interval_s, share_s)
        away_s += wait_s


def test_many_questions_in_a_short_time_do_not_make_the_wait_after_them_long() -> None:
    assert DEFAULT.wait_s(50, 4.0, 0.0) == pytest.approx(2.1)


@given(chance=chances)
def test_holds_double_are_never_shortened_by_chance_and_end_at_the_cap(chance: float) -> None:
    holds = [DEFAULT.hold(n, chance) for n in range(200)]
    assert holds[0] == 0
    for n, least in enumerate([8, 16, 32, 64, 128, 256, 300, 300], start=1):
        assert least <= holds[n] <= min(300, least * (1 + DEFAULT.jitter))
    assert max(holds) == DEFAULT.max_hold_s
    assert DEFAULT.hold(DEFAULT.most_relapses, 0.0) == DEFAULT.max_hold_s


def test_memory_goes_no_further_than_the_longest_hold() -> None:
    health = Health(0.0)
    for _ in range(100):
        health.ejected(DEFAULT.most_relapses)
    assert health.ejections == 7
    health.wear_off(6 * DEFAULT.decay_s, DEFAULT.decay_s)
    assert health.ejections == 1


@given(steps=st.lists(st.floats(0, 500), max_size=30))
def test_health_wears_off_alike_however_often_it_is_looked_at(steps: list[float]) -> None:
    often, once = Health(0.0, strikes=3, ejections=7), Health(0.0, strikes=3, ejections=7)
    now = 0.0
    for step in steps:
        now += step
        often.wear_off(now, 100.0)
    once.wear_off(now, 100.0)
    assert abs(often.ejections - once.ejections) <= (1 if now % 100 < 1e-6 or now % 100 > 100 - 1e-6 else 0)


# How often a flapping peer is let back


def least_seconds(policy: ProbePolicy, times: int) -> float:
    """The shortest time from a first failure to being let back for the `times`th time.

    Whatever the peer, the traffic and the chances do: it fails at once when that is best for it, or is well for as many
    `decay_s` as it likes first, and every question is answered well the moment it may be. A search over all of it.
    """
    heap, seen = [(0.0, 1, 1)], set()  # seconds, times let back, ejections remembered: after the first, without a hold
    while heap:
        at, back, ejections = heapq.heappop(heap)
        if back == times:
            return at
        if (back, ejections) in seen:
            continue
        seen.add((back, ejections))
        for rest in range(ejections + 1):
            left = ejections - rest
            health = Health(0.0, ejections=left)
            health.ejected(policy.most_relapses)
            heapq.heappush(heap, (at + rest * policy.decay_s + policy.hold(left, 0.0), back + 1, health.ejections))
    raise AssertionError


def test_no_peer_is_let_back_a_seventh_time_within_five_minutes_whatever_it_does() -> None:
    assert least_seconds(DEFAULT, 6) <= 300 < least_seconds(DEFAULT, 7)


def test_the_search_sees_a_policy_that_forgets_too_fast() -> None:
    assert least_seconds(replace(DEFAULT, decay_s=40.0), 7) < 300
    assert least_seconds(replace(DEFAULT, hold_s=4.0), 7) < 300


@dataclass(frozen=True)
class Process:
    pid: int = 1

    def same_life(self, later: Process) -> bool:
        return self.pid == later.pid


@dataclass
class Link:
    """One session, its peer and its traffic, in virtual time. `up(now)` is the truth; a transfer takes no time."""

    policy: ProbePolicy
    chance: random.Random
    up: Callable[[float], bool]
    depth: Depth = Depth.DATA
    hangs: bool = True
    request_every_s: float = 0.05
    now: float = 0.0
    request_at: float = 0.0
    asking: tuple[float, Question] | None = None
    table: SessionTable[Process] = field(init=False)
    backs: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.table = SessionTable(self.policy, self.chance.random)
        self.table.registered("s", 0.0, Process())

    def run(self, until: float) -> None:
        """Requests as they come, questions when due, each answered or timed out as the truth is then."""
        while (at := self.next_at()) < until:
            self.now = max(self.now, at)
            if self.asking is not None and self.asking[0] <= self.now:
                question, self.asking = self.asking[1], None
                self.answer(question)
            self.table.tick(self.now)
            for question in self.table.ask_due(self.now, 1):
                hung = self.hangs and not self.up(self.now)
                self.asking = (self.now + (self.policy.deadline_s if hung else 0.0003), question)
            if self.request_at <= self.now:
                self.request()
                self.request_at = self.now + self.chance.uniform(0.5, 1.5) * self.request_every_s
        self.now = until

    def next_at(self) -> float:
        moments = [self.request_at, *([] if self.asking is None else [self.asking[0]])]
        due = self.table.next_due
        return min(moments if due is None else [*moments, due])

    def answer(self, question: Question) -> None:
        up = self.up(self.now)
        verdict = Well(Process(), self.depth) if up else Unwell(Cause.TIMED_OUT if self.hangs else Cause.REFUSED, "")
        changes = self.table.answered(question, verdict, self.now)
        self.backs += [self.now for change in changes if change.kind is ChangeKind.RECOVERED]

    def request(self) -> None:
        self.table.requested("s", self.now)
        entry = self.table.enter("s", self.now)
        if entry.turn is not Turn.GO:
            return
        if self.up(self.now):
            self.table.succeed("s", self.now, entry)
        else:
            self.table.fail("s", Cause.TIMED_OUT if self.hangs else Cause.PEER_GONE, "", self.now, entry)
        self.table.leave(entry)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    jitter=st.sampled_from([0.0, 0.1, 0.5, 0.99]),
    depth=st.sampled_from([Depth.IDENTITY, Depth.DATA]),
    hangs=st.booleans(),
    request_every_s=st.sampled_from([0.1, 0.7, 3.0, 20.0]),
    phase_s=st.floats(0, 2),
)
def test_a_peer_one_second_up_and_one_second_down_for_five_minutes_is_let_back_at_most_six_times(
    seed: int, jitter: float, depth: Depth, hangs: bool, request_every_s: float, phase_s: float
) -> None:
    policy = replace(DEFAULT, jitter=jitter)
    flapping = lambda now: (now + phase_s) % 2 < 1  # noqa: E731
    link = Link(policy, random.Random(seed), flapping, depth, hangs, request_every_s)
    link.run(300.0)
    assert len(link.backs) <= 6


def test_the_flapping_peer_is_seen_to_flap() -> None:
    """That the simulation above could fail: without holds the same peer is let back a hundred times."""
    link = Link(replace(DEFAULT, hold_s=0.0), random.Random(1), lambda now: now % 2 < 1)
    link.run(300.0)
    assert len(link.backs) > 60


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    outages=st.lists(st.tuples(st.floats(0.01, 20), st.floats(0.01, 60)), min_size=1, max_size=4),
    depth=st.sampled_from([Depth.IDENTITY, Depth.DATA]),
    hangs=st.booleans(),
    request_every_s=st.sampled_from([0.3, 3.0, 15.0]),
)
def test_no_healthy_session_is_out_for_longer_than_the_policy_implies(
    seed: int, outages: list[tuple[float, float]], depth: Depth, hangs: bool, request_every_s: float
) -> None:
    """After any history of outages: well for good, it is back after the hold, one wait and the answers."""
    edges, now = [], 0.0
    for up_s, down_s in outages:
        edges.append((now + up_s, now + up_s + down_s))
        now += up_s + down_s
    link = Link(
        DEFAULT,
        random.Random(seed),
        lambda now: not any(down <= now < up for down, up in edges),
        depth,
        hangs,
        request_every_s,
    )
    link.run(now)
    standing = link.table.standing("s", now)
    answers_s = DEFAULT.deadline_s + DEFAULT.good_answers * (DEFAULT.interval_s + 0.001)
    wait_s = min(DEFAULT.max_interval_s, DEFAULT.interval_s + 0.5 * standing.since_s)
    if request_every_s < DEFAULT.wanted_interval_s:
        wait_s = min(wait_s, DEFAULT.wanted_interval_s + 1.5 * request_every_s + DEFAULT.interval_s)
    link.run(now + standing.held_s + wait_s + answers_s)
    assert link.table.reason_blocked("s", link.now) is None


def test_who_was_stopped_for_up_to_five_seconds_is_back_within_a_second_half_of_the_time_and_more() -> None:
    took = []
    for seed in range(40):
        chance = random.Random(seed)
        stop_s = chance.uniform(0.5, 5.0)
        up = lambda now, until=1.0 + stop_s: not 1.0 <= now < until  # noqa: E731
        link = Link(DEFAULT, chance, up)
        link.run(1.0 + stop_s + 10.0)
        took.append(link.backs[-1] - (1.0 + stop_s))
    assert sorted(took)[20] < 0.7
    assert max(took) < 1.5


# Panic


def test_a_group_panics_above_the_share_and_not_at_it() -> None:
    groups = Groups(replace(DEFAULT, max_ejected=0.5, panic_from=3))
    groups.count("g", 4, 2)
    assert groups.weigh() == []
    groups.count("g", 0, 1)
    assert groups.weigh() == [("g", True, "3 of 4 are blocked")]
    assert (groups.in_panic("g"), groups.in_panic("h"), groups.panicking()) == (True, False, ("g",))
    groups.count("g", 2, 0)
    assert groups.weigh() == [("g", False, "3 of 6 are blocked")]


def test_a_share_of_one_never_panics_and_a_share_of_none_at_the_first() -> None:
    never, first = Groups(replace(DEFAULT, max_ejected=1.0)), Groups(replace(DEFAULT, max_ejected=0.0))
    for groups in (never, first):
        groups.count("g", 3, 3)
        groups.weigh()
    assert (never.panicking(), first.panicking()) == ((), ("g",))


def test_a_group_that_nobody_belongs_to_is_gone_and_its_panic_with_it() -> None:
    groups = Groups(DEFAULT)
    groups.count("g", 3, 3)
    groups.weigh()
    groups.count("g", -3, -3)
    assert groups.weigh() == [("g", False, "0 of 0 are blocked")]
    assert len(groups) == 0


# Doubt


@settings(max_examples=200, deadline=None)
@given(
    events=st.lists(
        st.tuples(st.sampled_from("abcdefg"), st.booleans(), st.floats(0, 4), st.floats(0, 12)), max_size=60
    )
)
def test_doubt_is_what_a_search_of_all_words_would_say(events: list[tuple[str, bool, float, float]]) -> None:
    doubt, now = Doubt(replace(DEFAULT, doubt_from=3, doubt_window_s=10.0)), 100.0
    words: dict[str, tuple[bool, float]] = {}
    for session, silent, passed, well_ago in events:
        now += passed
        if silent:
            doubt.silent(session, now - well_ago)
        else:
            doubt.heard(session, now)
        words[session] = (silent, (now - well_ago if silent else now) + 10.0)
        doubt.weigh(now)
        live = [silent for silent, until in words.values() if until > now]
        assert doubt.doubting is (len(live) >= 3 and 2 * sum(live) > len(live))
        assert len(doubt) == len(live)
        assert (doubt.next_at is not None) is doubt.doubting
    if doubt.doubting:
        for _ in range(10):
            now = max(now, doubt.next_at or 0.0)
            doubt.weigh(now)
        assert not doubt.doubting
