"""The session table's promises one by one. Any order of events, against a plain model, is test_sessions_model.py."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

import pytest

from pdctl.core.ejection import ProbePolicy
from pdctl.core.kinds import Depth, State
from pdctl.core.sessions import AT_ONCE, SessionTable
from pdctl.core.standing import Change, ChangeKind, Entry, Question, Turn, Unwell, Well
from pdctl.errors import Cause

STEADY = ProbePolicy(
    interval_s=1.0, multiplier=2.0, max_interval_s=8.0, wanted_interval_s=2.0, jitter=0.0, idle_timeout_s=600.0
)
A = "10.0.0.1:15001"
B = "10.0.0.2:15001"


@dataclass(frozen=True)
class Process:
    """Stands for a peer's card: a process, and how many regions it has registered by now."""

    pid: int
    regions: int = 0

    def same_life(self, later: Process) -> bool:
        return self.pid == later.pid


SAME, OTHER = Process(7), Process(8)
WELL = Well(SAME, Depth.DATA)
SHOWS_NOTHING: Well[Process] = Well(None, Depth.HANDSHAKE)
HUNG = Unwell(Cause.TIMED_OUT, "no answer")
Table = SessionTable[Process]


def table(policy: ProbePolicy = STEADY, seed: int = 1) -> Table:
    return SessionTable(policy, random.Random(seed).random)


def known(*sessions: str, of: Table | None = None, now: float = 0.0) -> Table:
    of = table() if of is None else of
    for session in sessions or (A,):
        of.registered(session, now, SAME)
    return of


def blocked(sessions: Table | None = None, *names: str, cause: Cause = Cause.PEER_GONE, now: float = 0.0) -> Table:
    sessions = known() if sessions is None else sessions
    for name in names or (A,):
        assert kinds(sessions.fail(name, cause, "connection reset", now))[0] is ChangeKind.BLOCKED
    return sessions


def ask_one(sessions: Table, now: float) -> Question:
    (question,) = sessions.ask_due(now, 1)
    return question


def kinds(changes: list[Change]) -> list[ChangeKind]:
    return [change.kind for change in changes]


def put_out_and_back(sessions: Table, now: float = 0.0, verdict: Well[Process] = WELL) -> float:
    """A failure now, and all that it takes to be let back; when that was."""
    blocked(sessions, now=now)
    for _ in range(20):
        now = sessions.next_due or 0.0
        if kinds(sessions.answered(ask_one(sessions, now), verdict, now)) == [ChangeKind.RECOVERED]:
            return now
    raise AssertionError("nothing lets it back")


def state(sessions: Table, session: str = A, now: float = 0.0) -> State:
    return sessions.standing(session, now).state


# Blocking


def test_one_failure_blocks_with_the_reason() -> None:
    sessions = blocked()
    assert sessions.reason_blocked(A, 0.2) == (
        "peer gone (connection reset) 0.2 s ago, 1 strike; asked 0 times, next question in 0.8 s"
    )
    assert sessions.reason_blocked(B, 0.2) is None


@pytest.mark.parametrize("cause", list(Cause))
def test_only_what_speaks_of_the_peer_blocks(cause: Cause) -> None:
    sessions = table()
    sessions.fail(A, cause, "why", 0.0)
    assert (A in sessions.blocked()) is cause.speaks_of_peer


def test_a_later_failure_does_not_replace_the_first_cause() -> None:
    sessions = blocked()
    assert sessions.fail(A, Cause.TIMED_OUT, "a symptom", 0.5) == []
    assert "connection reset" in (sessions.reason_blocked(A, 0.5) or "")


def test_the_reason_tells_what_the_questions_found() -> None:
    sessions = blocked()
    sessions.answered(ask_one(sessions, 1.0), Unwell(Cause.REFUSED, "nobody listens"), 1.5)
    reason = sessions.reason_blocked(A, 2.0)
    assert reason is not None
    assert reason.endswith("; asked 1 time (last answer: refused), next question in 1.5 s")
    ask_one(sessions, 3.5)
    assert (sessions.reason_blocked(A, 3.6) or "").endswith("asked 2 times (last answer: refused), being asked now")


def test_with_three_strikes_the_third_failure_blocks() -> None:
    sessions = known(of=table(replace(STEADY, strikes=3)))
    assert sessions.fail(A, Cause.PEER_GONE, "reset", 0.0) == []
    assert sessions.fail(A, Cause.PEER_GONE, "reset", 1.0) == []
    assert sessions.reason_blocked(A, 1.0) is None
    assert sessions.standing(A, 1.0).strikes == 2
    assert kinds(sessions.fail(A, Cause.PEER_GONE, "reset", 2.0)) == [ChangeKind.BLOCKED]


def test_strikes_wear_off_with_health() -> None:
    sessions = known(of=table(replace(STEADY, strikes=3)))
    for now in (0.0, 1.0):
        sessions.fail(A, Cause.PEER_GONE, "reset", now)
    later = 1.0 + STEADY.decay_s
    assert sessions.standing(A, later).strikes == 1
    assert sessions.fail(A, Cause.PEER_GONE, "reset", later) == []
    assert sessions.reason_blocked(A, later) is None


# Asking


def test_waits_grow_from_the_first_interval_up_to_the_last() -> None:
    sessions, now, waits = blocked(), 0.0, []
    for _ in range(6):
        due = sessions.next_due
        assert due is not None
        waits.append(due - now)
        now = due
        sessions.answered(ask_one(sessions, now), HUNG, now)
    assert waits == [1.0, 2.0, 4.0, 8.0, 8.0, 8.0]


def test_a_peer_that_is_down_for_days_is_still_asked() -> None:
    sessions, now = blocked(), 0.0
    for _ in range(3000):  # 2.0 ** 1024 is no float any more
        now = sessions.next_due or 0.0
        sessions.answered(ask_one(sessions, now), HUNG, now)
    assert sessions.next_due == now + 8.0


def test_jitter_spreads_the_questions_and_never_lengthens_a_wait() -> None:
    names = [f"10.0.0.{i}:1" for i in range(200)]
    sessions = blocked(known(*names, of=table(replace(STEADY, jitter=0.25))), *names)
    assert sessions.ask_due(0.7499, 200) == []
    early = len(sessions.ask_due(0.875, 200))
    assert 50 < early < 150
    assert early + len(sessions.ask_due(1.0, 200)) == 200


def test_a_good_answer_makes_the_waits_short_again() -> None:
    sessions, now = blocked(), 0.0
    for verdict in (HUNG, HUNG, HUNG, HUNG, WELL, HUNG):
        now = sessions.next_due or 0.0
        sessions.answered(ask_one(sessions, now), verdict, now)
    assert sessions.next_due == now + 2.0


def test_the_most_overdue_is_asked_first() -> None:
    sessions = known("a", "b", "c")
    for now, session in enumerate(["c", "a", "b"]):
        sessions.fail(session, Cause.PEER_GONE, "reset", float(now))
    assert [question.session for question in sessions.ask_due(10.0, 2)] == ["c", "a"]
    assert [question.session for question in sessions.ask_due(10.0, 2)] == ["b"]


def test_nobody_is_asked_twice_at_once() -> None:
    sessions = blocked()
    ask_one(sessions, 1.0)
    assert sessions.next_due is None
    assert sessions.ask_due(1000.0, 10) == []


def test_a_session_that_requests_want_is_asked_soon_however_long_it_has_been_away() -> None:
    sessions, now = blocked(), 0.0
    for _ in range(6):
        now = sessions.next_due or 0.0
        sessions.answered(ask_one(sessions, now), HUNG, now)
    assert sessions.next_due == now + 8.0
    sessions.requested(A, now + 0.5)
    assert sessions.next_due == now + 2.0
    sessions.requested(A, now + 1.0)
    assert sessions.next_due == now + 2.0  # wanting it more does not ask it more often
    ask_one(sessions, now + 2.0)
    sessions.requested(A, now + 2.5)  # while it is being asked
    sessions.answered(Question(A, 0), HUNG, now + 2.6)
    sessions.answered(_asking(sessions), HUNG, now + 3.0)
    assert sessions.next_due == now + 4.0


def _asking(sessions: Table, session: str = A) -> Question:
    asking = sessions._records[session].asking
    assert asking is not None
    return asking


def test_a_request_for_a_session_that_has_just_failed_does_not_hasten_the_first_question() -> None:
    sessions = blocked()
    sessions.requested(A, 0.0)
    assert sessions.next_due == 1.0


def test_who_sets_long_intervals_is_asked_no_more_often_because_somebody_wants_it() -> None:
    sessions = blocked(known(of=table(ProbePolicy(interval_s=60.0, jitter=0.0))))
    sessions.requested(A, 1.0)
    for due in (60.0, 120.0, 180.0):
        assert sessions.next_due == due
        sessions.answered(ask_one(sessions, due), Unwell(Cause.REFUSED, ""), due)
        sessions.requested(A, due)


def test_with_probing_off_nothing_is_asked_or_forgotten_and_a_registration_lifts() -> None:
    sessions = blocked(known(of=table(replace(STEADY, enabled=False))))
    sessions.requested(A, 1.0)
    assert sessions.next_due is None
    assert sessions.ask_due(1e6, 10) == []
    assert sessions.tick(1e6) == []
    assert (sessions.reason_blocked(A, 1e6) or "").endswith("; blocked until the peer registers anew")
    assert kinds(sessions.registered(A, 1e6)) == [ChangeKind.LIFTED]


# Answers


def test_good_answers_in_a_row_let_back_and_tell_how_long_it_took() -> None:
    sessions = blocked()
    assert sessions.answered(ask_one(sessions, 1.0), WELL, 1.25) == []
    assert sessions.next_due == 1.75  # half an interval: a healthy peer is back within two
    (change,) = sessions.answered(ask_one(sessions, 1.75), WELL, 2.0)
    assert (change.kind, change.before, change.blocked_s, change.questions) == (
        ChangeKind.RECOVERED,
        Cause.PEER_GONE,
        2.0,
        2,
    )
    assert (change.was, change.state) == (State.BLOCKED, State.TRUSTED)
    assert sessions.reason_blocked(A, 2.0) is None


@pytest.mark.parametrize(
    "between",
    [HUNG, Unwell(Cause.NO_DATA, "wedged"), Well(SAME, Depth.HANDSHAKE), SHOWS_NOTHING],
    ids=["hung", "no data", "a handshake", "a handshake that shows nothing"],
)
def test_good_answers_count_only_in_a_row(between: Well[Process] | Unwell) -> None:
    sessions = blocked()
    for verdict in (WELL, between, WELL):
        now = sessions.next_due or 0.0
        assert sessions.answered(ask_one(sessions, now), verdict, now) == []
    assert A in sessions.blocked()


def test_our_own_fault_does_not_break_a_row() -> None:
    sessions = blocked()
    for verdict in (WELL, Unwell(Cause.LOCAL, "a defect")):
        now = sessions.next_due or 0.0
        sessions.answered(ask_one(sessions, now), verdict, now)
    now = sessions.next_due or 0.0
    assert kinds(sessions.answered(ask_one(sessions, now), WELL, now)) == [ChangeKind.RECOVERED]


@pytest.mark.parametrize("cause", list(Cause))
def test_no_bad_answer_lifts(cause: Cause) -> None:
    sessions = blocked()
    sessions.answered(ask_one(sessions, 1.0), Unwell(cause, "why"), 1.1)
    assert A in sessions.blocked()


@pytest.mark.parametrize("life", [SAME, None], ids=["that shows the life", "that shows nothing"])
def test_a_handshake_never_lifts(life: Process | None) -> None:
    sessions = blocked()
    for _ in range(20):
        now = sessions.next_due or 0.0
        assert sessions.answered(ask_one(sessions, now), Well(life, Depth.HANDSHAKE), now) == []
    assert "nothing shows that it is the same life" in (sessions.reason_blocked(A, 1e3) or "")


@pytest.mark.parametrize("depth", list(Depth))
def test_without_a_known_life_no_answer_lifts(depth: Depth) -> None:
    sessions = blocked(table())
    for _ in range(20):
        now = sessions.next_due or 0.0
        assert sessions.answered(ask_one(sessions, now), Well(SAME, depth), now) == []
    assert "no life to compare it with" in (sessions.reason_blocked(A, 1e3) or "")


@pytest.mark.parametrize("depth", list(Depth))
def test_another_life_never_lifts_and_is_not_asked_again_until_it_registers(depth: Depth) -> None:
    sessions = blocked(now=1.0)
    (change,) = sessions.answered(ask_one(sessions, 2.0), Well(OTHER, depth), 2.5)
    assert (change.kind, change.cause, change.before) == (ChangeKind.DROPPED, Cause.PEER_CHANGED, Cause.PEER_GONE)
    assert sessions.ask_due(1e6, 10) == []
    assert (sessions.reason_blocked(A, 3.0) or "").endswith("; blocked until the peer registers anew")
    assert kinds(sessions.registered(A, 4.0, OTHER)) == [ChangeKind.LIFTED]
    put_out_and_back(sessions, 5.0, Well(OTHER, Depth.DATA))  # the old life is forgotten


def test_the_card_that_an_answer_showed_is_what_the_next_is_held_against() -> None:
    @dataclass(frozen=True)
    class Announced:
        def same_life(self, later: Process) -> bool:
            return True

    sessions = table()
    sessions.registered(A, 0.0, Announced())
    now = put_out_and_back(sessions)
    blocked(sessions, now=now)
    now = sessions.next_due or 0.0
    assert kinds(sessions.answered(ask_one(sessions, now), Well(OTHER, Depth.DATA), now)) == [ChangeKind.DROPPED]


def test_a_card_seen_after_the_failure_does_not_vouch_for_the_life_that_failed() -> None:
    sessions = blocked(now=1.0)
    sessions.remember(A, OTHER, 1.5)
    assert kinds(sessions.answered(ask_one(sessions, 2.0), Well(OTHER, Depth.DATA), 2.0)) == [ChangeKind.DROPPED]


def test_a_trusted_session_that_shows_another_life_than_it_announced_is_dropped() -> None:
    sessions = known()
    assert kinds(sessions.remember(A, OTHER, 1.0)) == [ChangeKind.DROPPED]


@pytest.mark.parametrize("how", ["a transfer", "a question", "the registry"])
def test_who_sees_another_life_drops_the_session(how: str) -> None:
    sessions = blocked()
    if how == "a transfer":
        changes = sessions.fail(A, Cause.PEER_CHANGED, "regions differ", 1.0)
    elif how == "a question":
        changes = sessions.answered(ask_one(sessions, 1.0), Unwell(Cause.PEER_CHANGED, "regions differ"), 1.0)
    else:
        changes = sessions.supersede(A, "epoch 4 has its seat", 1.0)
    assert kinds(changes) == [ChangeKind.DROPPED]
    assert (changes[0].was, changes[0].state) == (State.BLOCKED, State.DROPPED)
    assert sessions.ask_due(1e6, 10) == []
    assert sessions.fail(A, Cause.PEER_CHANGED, "again", 2.0) == []
    assert sessions.supersede(A, "again", 2.0) == []


def test_a_session_that_nobody_has_used_yet_is_dropped_by_the_registry_too() -> None:
    sessions = table()
    assert kinds(sessions.supersede(A, "epoch 4 has its seat", 0.0)) == [ChangeKind.DROPPED]
    assert "epoch 4 has its seat" in (sessions.reason_blocked(A, 1.0) or "")


def test_an_answer_does_not_speak_for_the_time_after_a_later_failure() -> None:
    sessions = blocked()
    question = ask_one(sessions, 1.0)
    sessions.fail(A, Cause.TIMED_OUT, "another transfer", 1.5)
    assert sessions.answered(question, WELL, 1.6) == []
    assert sessions.standing(A, 1.6).good == 0
    assert sessions.next_due == 2.5


def test_an_answer_from_before_a_registration_is_late_news() -> None:
    sessions = blocked()
    question = ask_one(sessions, 1.0)
    sessions.registered(A, 1.1, OTHER)
    blocked(sessions, now=1.2)
    assert sessions.answered(question, WELL, 1.3) == []
    assert state(sessions) is State.BLOCKED


# By hand


def test_a_question_by_hand_is_put_at_once_and_counts() -> None:
    sessions = blocked()
    for now in (0.1, 0.2):
        changes = sessions.answered(sessions.ask_now(A, now), WELL, now)
    assert kinds(changes) == [ChangeKind.RECOVERED]


def test_a_question_by_hand_takes_the_place_of_the_one_that_is_due() -> None:
    sessions = blocked()
    sessions.ask_now(A, 1.0)
    assert sessions.ask_due(2.0, 10) == []


def test_a_trusted_session_may_be_asked_and_is_dropped_if_another_life_answers() -> None:
    sessions = known()
    assert sessions.answered(sessions.ask_now(A, 1.0), Unwell(Cause.REFUSED, "nobody listens"), 1.0) == []
    assert sessions.answered(sessions.ask_now(A, 2.0), WELL, 2.0) == []
    assert state(sessions) is State.TRUSTED
    assert kinds(sessions.answered(sessions.ask_now(A, 3.0), Well(OTHER, Depth.IDENTITY), 3.0)) == [ChangeKind.DROPPED]


def test_what_a_trusted_session_shows_first_is_the_life_that_it_stands_for() -> None:
    sessions = table()
    sessions.registered(A, 0.0)
    sessions.answered(sessions.ask_now(A, 0.0), Well(SAME, Depth.IDENTITY), 0.1)
    blocked(sessions, now=1.0)
    assert kinds(sessions.answered(ask_one(sessions, 2.0), Well(OTHER, Depth.DATA), 2.0)) == [ChangeKind.DROPPED]


def test_asking_a_session_that_nobody_knows_changes_nothing() -> None:
    sessions = table()
    assert sessions.answered(sessions.ask_now(A, 0.0), Unwell(Cause.REFUSED, "nobody listens"), 0.1) == []
    assert len(sessions) == 0


def test_no_answer_lifts_a_dropped_session_not_even_its_own_life() -> None:
    sessions = known()
    sessions.supersede(A, "epoch 4 has its seat", 0.0)
    for _ in range(5):
        assert sessions.answered(sessions.ask_now(A, 1.0), WELL, 1.0) == []
    assert state(sessions) is State.DROPPED


def test_a_hand_lifts_whatever_there_is_and_says_so() -> None:
    sessions = blocked(known(A, B))
    sessions.supersede(B, "epoch 4 has its seat", 0.0)
    for session, was in ((A, State.BLOCKED), (B, State.DROPPED)):
        (change,) = sessions.lift(session, "by hand", 1.0)
        assert (change.kind, change.was, change.state, change.detail) == (
            ChangeKind.LIFTED,
            was,
            State.TRUSTED,
            "by hand",
        )
    assert sessions.blocked() == {}
    assert sessions.lift("10.9.9.9:1", "by hand", 1.0) == []


def test_of_a_dropped_session_that_a_hand_lifts_another_life_may_be_meant() -> None:
    sessions = known()
    sessions.supersede(A, "epoch 4 has its seat", 0.0)
    sessions.lift(A, "by hand", 1.0)
    assert sessions.remember(A, OTHER, 2.0) == []
    assert state(sessions) is State.TRUSTED


# Relapses, holds and trials


def test_the_first_time_there_is_no_hold_and_each_further_time_it_doubles_up_to_the_cap() -> None:
    sessions, now, held = known(of=table(replace(STEADY, hold_s=8.0, max_hold_s=50.0))), 0.0, []
    for _ in range(6):
        began, now = now, put_out_and_back(sessions, now)
        held.append(now - began)
    assert held == [1.5, 8.5, 16.5, 32.5, 50.5, 50.5]


def test_health_takes_ejections_off() -> None:
    sessions = known()
    now = put_out_and_back(sessions, put_out_and_back(sessions))
    assert sessions.standing(A, now).ejections == 2
    assert sessions.standing(A, now + STEADY.decay_s).ejections == 1
    again = now + 2 * STEADY.decay_s
    assert sessions.standing(A, again).ejections == 0
    assert put_out_and_back(sessions, again) == again + 1.5


def test_to_be_blocked_is_no_health() -> None:
    sessions = known()
    put_out_and_back(sessions)
    blocked(sessions, now=10.0)
    assert sessions.standing(A, 1e4).ejections == 2


def test_health_counts_whether_or_not_somebody_looks() -> None:
    sessions = known()
    again = put_out_and_back(sessions, put_out_and_back(sessions)) + 2 * STEADY.decay_s
    assert put_out_and_back(sessions, again) == again + 1.5


def test_the_time_out_is_no_health_after_it_either() -> None:
    sessions = blocked()
    for now in (1000.0, 1001.0):
        sessions.answered(sessions.ask_now(A, now), WELL, now)
    assert sessions.standing(A, 1001.0).ejections == 1


def test_who_is_let_back_has_all_its_strikes_again() -> None:
    sessions = known(of=table(replace(STEADY, strikes=2)))
    sessions.fail(A, Cause.PEER_GONE, "reset", 0.0)
    now = put_out_and_back(sessions)
    assert sessions.fail(A, Cause.PEER_GONE, "reset", now) == []


def test_nothing_is_held_against_a_life_that_registers() -> None:
    sessions = known()
    now = put_out_and_back(sessions, put_out_and_back(sessions))
    sessions.registered(A, now, OTHER)
    assert put_out_and_back(sessions, now, Well(OTHER, Depth.DATA)) == now + 1.5


def test_while_it_is_held_no_answer_lets_it_back() -> None:
    sessions = known()
    now = put_out_and_back(sessions)
    blocked(sessions, now=now)
    for _ in range(3):
        assert sessions.answered(sessions.ask_now(A, now + 1.0), WELL, now + 1.0) == []
    assert sessions.standing(A, now + 1.0).held_s == STEADY.hold_s - 1.0
    assert "held for 7.0 s; " in (sessions.reason_blocked(A, now + 1.0) or "")
    sessions.requested(A, now + 1.0)
    assert sessions.next_due == now + STEADY.hold_s
    due = now + STEADY.hold_s
    assert kinds(sessions.answered(ask_one(sessions, due), WELL, due)) == [ChangeKind.RECOVERED]


def on_trial(policy: ProbePolicy = STEADY) -> tuple[Table, float]:
    sessions = known(of=table(policy))
    return sessions, put_out_and_back(sessions, 0.0, Well(SAME, Depth.IDENTITY))


def go(sessions: Table, now: float, session: str = A) -> Entry:
    entry = sessions.enter(session, now)
    assert entry.turn is Turn.GO
    return entry


def test_bytes_that_were_read_back_are_a_trial_passed_but_not_after_a_relapse() -> None:
    sessions = known()
    now = put_out_and_back(sessions, 0.0, WELL)
    assert state(sessions) is State.TRUSTED
    put_out_and_back(sessions, now, WELL)
    assert state(sessions) is State.TRIAL


def test_who_is_back_on_its_identity_alone_carries_one_transfer_until_one_succeeds() -> None:
    sessions, now = on_trial()
    assert state(sessions) is State.TRIAL
    assert sessions.reason_blocked(A, now) is None
    first = go(sessions, now)
    assert sessions.enter(A, now).turn is Turn.WAIT
    (change,) = sessions.succeed(A, now, first)
    assert (change.kind, change.was, change.state) == (ChangeKind.TRIAL_PASSED, State.TRIAL, State.TRUSTED)
    for _ in range(3):
        go(sessions, now)


def test_a_place_that_is_left_is_free_for_the_next() -> None:
    sessions, now = on_trial(replace(STEADY, trial_transfers=2))
    first, _ = go(sessions, now), go(sessions, now)
    assert sessions.enter(A, now).turn is Turn.WAIT
    sessions.fail(A, Cause.LOCAL, "a full window", now, first)
    sessions.leave(first)
    go(sessions, now)
    assert sessions.enter(A, now).turn is Turn.WAIT


def test_a_failure_on_trial_is_a_relapse_however_many_strikes_there_are() -> None:
    sessions, now = on_trial(replace(STEADY, strikes=1))
    sessions.policy = replace(STEADY, strikes=3)
    entry = go(sessions, now)
    (change,) = sessions.fail(A, Cause.PEER_GONE, "reset", now, entry)
    sessions.leave(entry)
    assert (change.kind, change.was) == (ChangeKind.BLOCKED, State.TRIAL)
    assert sessions.standing(A, now).held_s == STEADY.hold_s
    assert sessions.enter(A, now).turn is Turn.NO


def test_a_trial_without_a_failure_is_over_after_a_while() -> None:
    sessions, now = on_trial()
    go(sessions, now)
    assert sessions.next_due == now + STEADY.trial_s
    assert sessions.tick(now + STEADY.trial_s - 0.1) == []
    assert kinds(sessions.tick(now + STEADY.trial_s)) == [ChangeKind.TRIAL_PASSED]
    go(sessions, now)
    assert sessions.next_due is None


def test_a_place_of_an_earlier_trial_frees_none_of_this_one() -> None:
    sessions, now = on_trial()
    old = go(sessions, now)
    sessions.fail(A, Cause.PEER_GONE, "reset", now, old)
    now = (sessions.next_due or 0.0) + 1.0
    for _ in range(2):
        sessions.answered(sessions.ask_now(A, now), WELL, now)
    go(sessions, now)
    sessions.leave(old)
    assert sessions.enter(A, now).turn is Turn.WAIT


# News that is older than what it is about


def test_the_end_of_a_transfer_that_began_before_it_came_back_is_no_relapse() -> None:
    sessions = known()
    hung = go(sessions, 0.0)
    now = put_out_and_back(sessions, 1.0)
    assert sessions.fail(A, Cause.TIMED_OUT, "no progress", now + 1.0, hung) == []
    assert state(sessions) is State.TRUSTED


def test_the_end_of_a_transfer_that_began_before_a_registration_says_nothing_of_the_new_life() -> None:
    sessions = known()
    old = go(sessions, 0.0)
    sessions.registered(A, 1.0, OTHER)
    assert sessions.fail(A, Cause.PEER_CHANGED, "regions differ", 2.0, old) == []
    assert sessions.fail(A, Cause.PEER_GONE, "reset", 2.0, old) == []
    assert state(sessions) is State.TRUSTED


def test_an_old_transfer_says_nothing_of_a_life_that_registers_after_the_session_was_forgotten() -> None:
    sessions = known()
    old = go(sessions, 0.0)
    sessions.tick(1e6)
    sessions.registered(A, 1e6, OTHER)
    assert sessions.fail(A, Cause.PEER_CHANGED, "regions differ", 1e6, old) == []


def test_another_life_that_an_old_transfer_met_is_news_all_the_same() -> None:
    sessions = known()
    old = go(sessions, 0.0)
    now = put_out_and_back(sessions, 1.0)
    assert kinds(sessions.fail(A, Cause.PEER_CHANGED, "regions differ", now, old)) == [ChangeKind.DROPPED]


def test_a_success_that_began_before_the_trial_does_not_pass_it() -> None:
    sessions = known()
    old = go(sessions, 0.0)
    put_out_and_back(sessions, 1.0, Well(SAME, Depth.IDENTITY))
    assert sessions.succeed(A, 9.0, old) == []
    assert state(sessions) is State.TRIAL


def test_symptoms_of_the_same_failure_do_not_make_an_answer_void() -> None:
    sessions = known()
    first, second = go(sessions, 0.0), go(sessions, 0.0)
    sessions.fail(A, Cause.TIMED_OUT, "no progress", 0.0, first)
    sessions.answered(ask_one(sessions, 1.0), WELL, 1.0)
    question = ask_one(sessions, 1.5)
    sessions.fail(A, Cause.TIMED_OUT, "no progress", 1.6, second)
    assert kinds(sessions.answered(question, WELL, 1.7)) == [ChangeKind.RECOVERED]


# Panic


def test_when_more_than_half_of_a_group_is_blocked_all_of_it_is_served_but_the_dropped() -> None:
    sessions = known("a", "b", "c", "d", "e")
    sessions.supersede("e", "replaced", 0.0)
    blocked(sessions, "a", "b")
    assert sessions.reason_blocked("a", 0.0) is not None
    blocked_c, panic = sessions.fail("c", Cause.PEER_GONE, "reset", 0.0)
    assert (blocked_c.kind, panic.kind, panic.detail) == (
        ChangeKind.BLOCKED,
        ChangeKind.PANIC_BEGAN,
        "3 of 4 are blocked",
    )
    assert [sessions.enter(name, 0.0).turn for name in "abcde"] == [Turn.GO] * 4 + [Turn.NO]
    assert sessions.reason_blocked("a", 0.0) is None
    assert sessions.standing("a", 0.0).served
    assert sessions.panicking() == ("",)
    assert len(sessions.ask_due(1.0, 10)) == 3  # questions go on


def test_panic_ends_when_enough_are_well() -> None:
    sessions = blocked(known("a", "b", "c", "d"), "a", "b", "c")
    now = 1.0
    for _ in range(2):
        changes = sessions.answered(sessions.ask_now("a", now), WELL, now)
    assert kinds(changes) == [ChangeKind.RECOVERED, ChangeKind.PANIC_ENDED]
    assert sessions.panicking() == ()
    assert sessions.reason_blocked("b", now) is not None


def test_two_peers_can_both_be_down() -> None:
    sessions = blocked(known("a", "b"), "a", "b")
    assert sessions.panicking() == ()


def test_groups_panic_apart_and_a_session_may_change_its_group() -> None:
    sessions = table()
    for name in "abc":
        sessions.announce(name, 0.0, "rack 1")
    for name in "def":
        sessions.announce(name, 0.0, "rack 2")
    blocked(sessions, "a", "b")
    assert sessions.panicking() == ("rack 1",)
    blocked(sessions, "d")
    assert sessions.reason_blocked("d", 0.0) is not None
    assert [(each.kind, each.group) for each in sessions.announce("a", 0.0, "rack 2")] == [
        (ChangeKind.PANIC_ENDED, "rack 1")
    ]
    assert [each.group for each in sessions.fail("e", Cause.PEER_GONE, "reset", 0.0)] == ["", "rack 2"]
    assert sessions.standing("a", 0.0).group == "rack 2"


def test_in_panic_a_session_on_trial_is_not_kept_waiting() -> None:
    sessions = known("a", "b", "c")
    blocked(sessions, "a")
    for now in (1.0, 1.5):
        sessions.answered(sessions.ask_now("a", now), Well(SAME, Depth.IDENTITY), now)
    go(sessions, 2.0, "a")
    assert sessions.enter("a", 2.0).turn is Turn.WAIT
    blocked(sessions, "b", "c", now=2.0)
    go(sessions, 2.0, "a")


def test_a_failure_in_panic_makes_the_answer_void_and_the_row_begin_anew() -> None:
    sessions = blocked(known("a", "b", "c"), "a", "b")
    sessions.answered(sessions.ask_now("a", 1.0), WELL, 1.0)
    question = sessions.ask_now("a", 1.5)
    sessions.fail("a", Cause.PEER_GONE, "reset", 1.6, go(sessions, 1.5, "a"))
    assert sessions.answered(question, WELL, 1.7) == []
    assert sessions.standing("a", 1.7).good == 0


# Doubt of ourselves


def doubting() -> Table:
    names = [f"p{i}" for i in range(12)]
    sessions = known(*names)
    blocked(sessions, *names[:5])
    for _ in range(5):
        changes = sessions.answered(ask_one(sessions, 1.0), HUNG, 2.0)
    assert kinds(changes) == [ChangeKind.DOUBT_BEGAN]
    assert changes[0].detail == "5 of 5 sessions asked have timed out together"
    return sessions


def test_when_most_of_those_asked_fall_silent_together_time_outs_put_nobody_out() -> None:
    sessions = doubting()
    assert sessions.deadline_s == STEADY.deadline_s * STEADY.stretch
    assert sessions.fail("p6", Cause.TIMED_OUT, "no progress", 2.0) == []
    assert sessions.reason_blocked("p6", 2.0) is None
    assert kinds(sessions.fail("p7", Cause.PEER_GONE, "reset", 2.0)) == [ChangeKind.BLOCKED]


def test_doubt_ends_by_itself_and_then_time_outs_count_again() -> None:
    sessions = doubting()
    over = STEADY.doubt_window_s
    assert sessions.tick(over - 0.1) == []
    assert kinds(sessions.fail("p6", Cause.TIMED_OUT, "no progress", over)) == [
        ChangeKind.DOUBT_ENDED,
        ChangeKind.BLOCKED,
    ]
    assert sessions.deadline_s == STEADY.deadline_s


def test_enough_answers_end_doubt_at_once() -> None:
    sessions = doubting()
    for i in range(4):
        assert sessions.answered(sessions.ask_now(f"p{6 + i}", 3.0), WELL, 3.0) == []
    refused = Unwell(Cause.REFUSED, "nobody listens")  # a refusal is heard, too
    assert kinds(sessions.answered(sessions.ask_now("p11", 3.0), refused, 3.0)) == [ChangeKind.DOUBT_ENDED]


def test_peers_that_never_answered_or_have_been_away_for_long_are_no_reason_for_doubt() -> None:
    names = [f"p{i}" for i in range(10)]
    sessions = table()
    blocked(sessions, *names)
    for _ in names:
        sessions.answered(ask_one(sessions, 1.0), HUNG, 2.0)
    assert not sessions.doubting
    sessions = blocked(known(*names), *names)
    late = STEADY.doubt_window_s + 1.0
    for _ in names:
        sessions.answered(ask_one(sessions, late), HUNG, late)
    assert not sessions.doubting


def test_a_question_that_we_failed_to_ask_is_no_answer() -> None:
    sessions = doubting()
    for i in range(6):
        sessions.answered(sessions.ask_now(f"p{5 + i}", 3.0), Unwell(Cause.LOCAL, "a defect"), 3.0)
    assert sessions.doubting


def test_a_late_loop_of_our_own_is_a_reason_for_doubt() -> None:
    sessions = known()
    assert sessions.lagged(STEADY.lag_s, 0.0) == []
    (change,) = sessions.lagged(0.7, 1.0)
    assert (change.kind, change.detail) == (ChangeKind.DOUBT_BEGAN, "our own loop was 0.70 s late")
    assert sessions.fail(A, Cause.TIMED_OUT, "no progress", 1.5) == []
    assert sessions.next_due == 1.0 + STEADY.deadline_s
    assert kinds(sessions.tick(1.0 + STEADY.deadline_s)) == [ChangeKind.DOUBT_ENDED]


def test_time_outs_in_doubt_do_not_lengthen_the_waits() -> None:
    sessions = blocked()
    for now in (1.0, 2.0, 3.0):
        sessions.lagged(1.0, now)
        sessions.answered(ask_one(sessions, now), HUNG, now)
    assert sessions.next_due == 4.0


# Forgetting


def test_a_session_nobody_wants_is_forgotten_and_one_that_is_wanted_is_not() -> None:
    sessions = blocked(known(A, B), A, B)
    sessions.requested(B, 1.0)
    assert sessions.tick(599.9) == []
    (change,) = sessions.tick(600.0)
    assert (change.kind, change.session, change.state) == (ChangeKind.FORGOTTEN, A, State.TRUSTED)
    assert list(sessions.blocked()) == [B]


def test_a_dropped_session_outlives_idleness() -> None:
    sessions = known(A, B)
    sessions.fail(A, Cause.PEER_CHANGED, "regions differ", 0.0)
    blocked(sessions, B)
    assert [change.session for change in sessions.tick(1e6)] == [B]
    assert list(sessions.blocked()) == [A]
    assert sessions.tick(2e6) == []


def test_the_card_of_an_idle_session_goes_without_a_word() -> None:
    sessions = known()
    assert sessions.tick(1e6) == []
    assert len(sessions) == 0


def test_a_crowd_of_idle_sessions_is_forgotten_some_at_a_time() -> None:
    names = [f"s{i}" for i in range(AT_ONCE + 1)]
    sessions = known(*names)
    sessions.tick(1e6)
    assert len(sessions) == 1
    sessions.tick(1e6)
    assert len(sessions) == 0


def test_a_full_table_lets_the_idlest_go_and_the_dropped_last() -> None:
    sessions = table(replace(STEADY, max_sessions=3))
    sessions.fail("dropped", Cause.PEER_CHANGED, "regions differ", 0.0)
    blocked(sessions, A, now=1.0)
    blocked(sessions, B, now=2.0)
    sessions.requested(A, 3.0)
    forgotten, new = sessions.fail("new", Cause.REFUSED, "nobody listens", 4.0)
    assert (forgotten.kind, forgotten.session) == (ChangeKind.FORGOTTEN, B)
    assert (new.kind, new.session) == (ChangeKind.BLOCKED, "new")
    assert set(sessions.blocked()) == {"dropped", A, "new"}


def test_a_table_full_of_dropped_sessions_lets_the_idlest_of_them_go() -> None:
    sessions = table(replace(STEADY, max_sessions=2))
    for now, name in enumerate("ab"):
        sessions.supersede(name, "replaced", float(now))
    sessions.requested("a", 3.0)
    assert [change.session for change in blocked_changes(sessions, "c")] == ["b", "c"]
    assert set(sessions.blocked()) == {"a", "c"}


def blocked_changes(sessions: Table, name: str) -> list[Change]:
    return sessions.fail(name, Cause.REFUSED, "nobody listens", 4.0)


def test_nothing_is_left_of_sessions_that_came_and_went() -> None:
    sessions = table(replace(STEADY, max_sessions=50))
    for i in range(2000):
        name = f"s{i}"
        sessions.announce(name, float(i), f"rack {i % 7}")
        sessions.registered(name, float(i), SAME)
        sessions.fail(name, Cause.REFUSED, "nobody listens", float(i))
        sessions.requested(name, float(i))
        sessions.answered(sessions.ask_now(name, float(i)), HUNG, float(i))
    assert len(sessions) == 50
    assert len(sessions._groups) <= 7
    assert len(sessions._questions) <= 2 * 50 + 64
    sessions.tick(1e6)
    assert (len(sessions), len(sessions._groups), len(sessions._doubt)) == (0, 0, 0)


# Standings


def test_standings_show_every_session_and_agree_with_the_sentence() -> None:
    sessions = blocked(known(A, B))
    sessions.supersede("c", "replaced", 0.0)
    shown = {each.session: each for each in sessions.standings(0.5)}
    assert {name: each.state for name, each in shown.items()} == {
        A: State.BLOCKED,
        B: State.TRUSTED,
        "c": State.DROPPED,
    }
    assert shown[A].sentence == sessions.reason_blocked(A, 0.5)
    assert (shown[A].cause, shown[A].since_s, shown[A].strikes, shown[A].ejections) == (Cause.PEER_GONE, 0.5, 1, 1)
    assert (shown[A].next_question_s, shown[A].served, shown[B].served) == (0.5, False, True)
    assert sessions.standing("10.9.9.9:1", 0.5).state is State.TRUSTED


def test_a_standing_on_trial_says_after_what() -> None:
    sessions, now = on_trial()
    assert sessions.standing(A, now).sentence.startswith("on trial after peer gone (connection reset) ")


def test_a_session_that_the_table_does_not_hold_is_trusted_and_stays_unheld() -> None:
    sessions: SessionTable[Any] = SessionTable(STEADY, lambda: 0.0)
    assert sessions.reason_blocked(A, 0.0) is None
    assert sessions.enter(A, 0.0).turn is Turn.GO
    assert sessions.succeed(A, 0.0) == []
    assert len(sessions) == 0


def test_a_failure_that_voids_a_question_does_not_keep_a_wanted_session_waiting() -> None:
    sessions, now = SessionTable[Any](ProbePolicy(jitter=0.0), random.Random(1).random), 0.0
    sessions.fail(A, Cause.PEER_GONE, "connection reset", now)
    for _ in range(12):  # away for half a minute by now, and asked ever more seldom
        now = sessions.next_due or now
        (question,) = sessions.ask_due(now, 1)
        sessions.answered(question, Unwell(Cause.REFUSED, "nobody listens"), now)
    now = sessions.next_due or now
    sessions.ask_due(now, 1)
    sessions.requested(A, now)
    sessions.fail(A, Cause.PEER_GONE, "served in a panic, and lost", now + 0.5)
    due = sessions.next_due
    assert due is not None
    assert due - now <= ProbePolicy().wanted_interval_s
