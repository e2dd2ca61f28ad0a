"""
Seeds of the simulation, and tables broken on purpose that it has to catch.

The full seeds are 30 x 30 links for an hour. The dense ones are small and short, with something new every few seconds
and policies off the beaten track: what full seeds reach by length, they reach by crowding.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace

import pytest

from pdctl.core.ejection import ProbePolicy
from pdctl.core.kinds import Depth
from pdctl.core.sessions import SessionTable
from pdctl.core.standing import Change, Entry, Question, Turn, Unwell, Well
from pdctl.core.standing import Life as AnyLife
from pdctl.errors import Cause
from tests.sim.bounds import hold_s, lifts_within, unwanted_wait_s
from tests.sim.fleet import Fleet, MakeTable, Plan
from tests.sim.network import Life
from tests.sim.oracle import Violation

FULL = Plan(0, counts=(30, 30), span_s=3600.0, calm_s=600.0, mean_gap_s=300.0)
DENSE = Plan(0, counts=(3, 12), span_s=600.0, calm_s=330.0, mean_gap_s=5.0)
FULL_SEEDS = [range(first, first + 10) for first in range(1, 201, 10)]
DENSE_SEEDS = range(1, 13)
POLICIES = {
    "as it ships": ProbePolicy(),
    "three strikes": ProbePolicy(strikes=3),
    "one good answer": ProbePolicy(good_answers=1),
    "three of all": ProbePolicy(good_answers=3, trial_transfers=3),
    "no jitter": ProbePolicy(jitter=0.0),
    "two places": ProbePolicy(max_concurrent=2),
    "a small table": ProbePolicy(max_sessions=8),
    "slow questions": ProbePolicy(interval_s=1.0, deadline_s=3.0),
    "no panic": ProbePolicy(max_ejected=1.0),
    "nobody asks": ProbePolicy(enabled=False),
}


def seeds_of(chunk: range) -> str:
    return f"{chunk.start}-{chunk.stop - 1}"


def played(plan: Plan, make_table: MakeTable = SessionTable) -> Fleet:
    fleet = Fleet(plan, make_table)
    fleet.run()
    return fleet


def first_violation(seeds: Iterable[int], plan: Plan, make_table: MakeTable) -> str:
    """What the oracle says of such a table first; empty if it has nothing to say."""
    for seed in seeds:
        try:
            played(replace(plan, seed=seed), make_table)
        except Violation as violation:
            return str(violation)
    return ""


def sparse(plan: Plan) -> Plan:
    """The same with fewer misfortunes, and time between them."""
    return replace(plan, span_s=2400.0, mean_gap_s=80.0)


# The table as it is


@pytest.mark.parametrize("chunk", FULL_SEEDS, ids=seeds_of)
def test_an_hour_of_900_links_breaks_no_promise(chunk: range) -> None:
    print("play one again: ./dev sim --links 30x30 --hours 1 --gap-s 300 --seed", *chunk)
    for seed in chunk:
        played(replace(FULL, seed=seed))


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
def test_no_policy_breaks_a_promise_in_a_crowd_of_misfortunes(policy: ProbePolicy) -> None:
    print("seeds", *DENSE_SEEDS)
    for seed in DENSE_SEEDS:
        played(replace(DENSE, seed=seed, policy=policy))


def test_the_seeds_see_everything_that_can_happen() -> None:
    seen = Counter[str]()
    for seed in range(1, 9):
        seen += played(replace(DENSE, seed=seed, span_s=1500.0, calm_s=700.0)).oracle.seen
    for what in (
        "blocked", "dropped", "recovered", "trial_passed", "lifted", "forgotten", "panic_began", "panic_ended",
        "doubt_began", "doubt_ended", "flaps", "questions", "transfers", "failed transfers",
    ):  # fmt: skip
        assert seen[what] > 5, f"{what} was seen {seen[what]} times"


def test_a_seed_gives_the_same_run_again() -> None:
    one, again = (played(replace(DENSE, seed=7)) for _ in range(2))
    assert (one.events, one.oracle.report()) == (again.events, again.oracle.report())


# The oracle's own arithmetic, by hand


def test_a_flapping_link_may_be_let_back_six_times_in_five_minutes() -> None:
    assert [hold_s(ProbePolicy(), k) for k in range(1, 9)] == [0, 8, 16, 32, 64, 128, 256, 300]
    assert lifts_within(replace(ProbePolicy(), decay_s=1e9), 300.0) == 6


def test_an_unwanted_link_waits_about_half_the_time_that_it_was_away() -> None:
    policy = ProbePolicy()
    assert unwanted_wait_s(policy, 10.0) == pytest.approx(5.1)
    assert unwanted_wait_s(policy, 1e6) == policy.max_interval_s


# Tables that are broken


Table = SessionTable[Life]


class Knowing(Table):
    """Remembers which life a session was registered with, for those below that lie about it."""

    def __init__(self, policy: ProbePolicy, random: Callable[[], float]) -> None:
        super().__init__(policy, random)
        self.registered_as: dict[str, Life] = {}

    def registered(self, session: str, now: float, life: AnyLife[Life] | None = None) -> list[Change]:
        assert isinstance(life, Life)
        self.registered_as[session] = life
        return super().registered(session, now, life)

    def believe(self, question: Question, depth: Depth, now: float) -> list[Change]:
        return super().answered(question, Well(self.registered_as[question.session], depth), now)


class BelievesHandshakes(Knowing):
    """Takes whoever answers the handshake for the life that is known."""

    def answered(self, question: Question, verdict: Well[Life] | Unwell, now: float) -> list[Change]:
        if isinstance(verdict, Well) and verdict.depth is Depth.HANDSHAKE:
            return self.believe(question, Depth.IDENTITY, now)
        return super().answered(question, verdict, now)


class BelievesAnyLife(Knowing):
    """Does not compare lives: whoever answers well is the one that is meant."""

    def answered(self, question: Question, verdict: Well[Life] | Unwell, now: float) -> list[Change]:
        if isinstance(verdict, Well) and verdict.depth > Depth.HANDSHAKE:
            return self.believe(question, verdict.depth, now)
        return super().answered(question, verdict, now)


class TakesSilenceForHealth(Knowing):
    """Takes a time-out for a good answer."""

    def answered(self, question: Question, verdict: Well[Life] | Unwell, now: float) -> list[Change]:
        if isinstance(verdict, Unwell) and verdict.cause is Cause.TIMED_OUT:
            return self.believe(question, Depth.DATA, now)
        return super().answered(question, verdict, now)


class LosesAWakeUp(Table):
    """Of a hundred questions one is never put."""

    def ask_due(self, now: float, limit: int) -> list[Question]:
        return [question for question in super().ask_due(now, limit) if question.number % 100]


class AsksOnce(Table):
    """Does not ask again whom it has asked in vain."""

    def answered(self, question: Question, verdict: Well[Life] | Unwell, now: float) -> list[Change]:
        return [] if isinstance(verdict, Unwell) else super().answered(question, verdict, now)


class OverlooksWishes(Table):
    """That requests want a session does not make it ask sooner."""

    def requested(self, session: str, now: float) -> None:
        pass


class KeepsTurns(Table):
    """A trial's place is never given back."""

    def leave(self, entry: Entry) -> None:
        pass


class TriesWithoutBound(Table):
    """On trial everybody may pass."""

    def enter(self, session: str, now: float) -> Entry:
        entry = super().enter(session, now)
        return replace(entry, turn=Turn.GO) if entry.turn is Turn.WAIT else entry


class ServesTheDropped(Table):
    """In a panic it serves really everybody."""

    def enter(self, session: str, now: float) -> Entry:
        entry = super().enter(session, now)
        panics = self.standing(session, now).group in self.panicking()
        return replace(entry, turn=Turn.GO) if panics and entry.turn is Turn.NO else entry


class PanicsInSilence(Table):
    """Serves nobody more in a panic than else."""

    def enter(self, session: str, now: float) -> Entry:
        out = session in self.blocked()
        entry = super().enter(session, now)
        return replace(entry, turn=Turn.NO) if out else entry


class NeverStopsPanicking(Table):
    """A panic that has begun goes on."""

    _ever: tuple[str, ...] = ()

    def panicking(self) -> tuple[str, ...]:
        self._ever = self._ever or super().panicking()
        return self._ever


class SparesTheFirst(Table):
    """Does not hear of every tenth failure."""

    _failures = 0

    def fail(self, session: str, cause: Cause, detail: str, now: float, entry: Entry | None = None) -> list[Change]:
        self._failures += 1
        return [] if self._failures % 10 == 0 else super().fail(session, cause, detail, now, entry)


class ForgivesTheDropped(Table):
    """Lets time heal also those whose life is over."""

    def tick(self, now: float) -> list[Change]:
        forgiven = [session for session, cause in self.blocked().items() if cause is Cause.PEER_CHANGED]
        changes = [change for session in forgiven for change in self.lift(session, "time has gone by", now)]
        return [*changes, *super().tick(now)]


class HearsNoRegistry(Table):
    """Whom the registry says to be over it does not drop, and not lift whom it announces anew."""

    def registered(self, session: str, now: float, life: AnyLife[Life] | None = None) -> list[Change]:
        return super().registered(session, now, life) if now == 0 else []


def other_policy(**changes: float) -> MakeTable:
    """A table that goes by another policy than the one that it was given, and that the oracle goes by."""
    return lambda policy, random: SessionTable(replace(policy, **changes), random)  # type: ignore[arg-type]


BROKEN: dict[str, tuple[MakeTable, str]] = {
    "believes handshakes": (BelievesHandshakes, "came back after 0 good answers"),
    "believes any life": (BelievesAnyLife, "came back|another life"),
    "takes silence for health": (TakesSilenceForHealth, "came back"),
    "loses a wake-up": (LosesAWakeUp, "still out"),
    "asks once": (AsksOnce, "still out"),
    "overlooks wishes": (OverlooksWishes, "still out"),
    "keeps turns": (KeepsTurns, "a turn that nobody has"),
    "tries without bound": (TriesWithoutBound, "transfers at once"),
    "serves the dropped": (ServesTheDropped, r"is served although it was dropped \(in a panic\)"),
    "forgives the dropped": (ForgivesTheDropped, "another life's memory"),
    "panics in silence": (PanicsInSilence, "is refused in a panic"),
    "never stops panicking": (NeverStopsPanicking, "has told panics"),
    "spares the first": (SparesTheFirst, "stays in after a transfer that failed"),
    "hears no registry": (HearsNoRegistry, ""),
    "never holds": (other_policy(hold_s=0.0), "of a hold of"),
    "holds three times as long": (other_policy(hold_s=24.0), "still out"),
    "forgets no ejection": (other_policy(decay_s=1e6), "still out"),
    "forgets ejections at once": (other_policy(decay_s=1.0), "of a hold of"),
    "is content with one answer": (other_policy(good_answers=1), "after 1 good answers"),
    "waits long": (other_policy(multiplier=4.0), "still out"),
    "is deaf for a minute": (other_policy(wanted_interval_s=60.0), "still out"),
    "panics late": (other_policy(max_ejected=0.9), "has told panics"),
    "never doubts": (other_policy(doubt_from=10_000, lag_s=100.0), "doubt"),
    "doubts for long": (other_policy(doubt_window_s=60.0), "doubt"),
    "forgets early": (other_policy(idle_timeout_s=5.0), ""),
    "knows no limit": (other_policy(max_sessions=65_536), "holds [0-9]+ sessions"),
}


UNDER = {"knows no limit": ProbePolicy(max_sessions=8), "serves the dropped": ProbePolicy(max_ejected=0.1)}
"""Policies under which a fault shows soon."""


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_table_is_caught(what: str) -> None:
    make_table, words = BROKEN[what]
    dense = replace(DENSE, policy=UNDER.get(what, ProbePolicy()))
    said = first_violation(range(1, 11), dense, make_table) or first_violation(range(1, 11), sparse(dense), make_table)
    assert said, f"a table that {what} passed"
    assert re.search(words, said), said
