"""The session table: first its promises one by one, then any order of events against a simple model."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pdctl.core.sessions import Change, ChangeKind, ProbePolicy, Question, SessionTable, Unwell, Well
from pdctl.errors import Cause, ConfigError

STEADY = ProbePolicy(interval_s=1.0, max_interval_s=8.0, idle_timeout_s=600.0, jitter=0.0)
A = "10.0.0.1:15001"
B = "10.0.0.2:15001"


@dataclass(frozen=True)
class Process:
    """Stands for a peer's card: a process, and how many regions it has registered by now."""

    pid: int
    regions: int = 0

    def same_life(self, later: Process) -> bool:
        return self.pid == later.pid


Table = SessionTable[Process]


def table(policy: ProbePolicy = STEADY, seed: int = 1) -> Table:
    return SessionTable(policy, random.Random(seed).random)


def blocked(sessions: Table, session: str = A, cause: Cause = Cause.PEER_GONE, now: float = 0.0) -> Table:
    assert [change.kind for change in sessions.fail(session, cause, "connection reset", now)] == [ChangeKind.BLOCKED]
    return sessions


def ask_one(sessions: Table, now: float) -> Question:
    (question,) = sessions.ask_due(now, 1)
    return question


def kinds(changes: list[Change]) -> list[ChangeKind]:
    return [change.kind for change in changes]


# Blocking


def test_one_failure_blocks_with_the_reason() -> None:
    sessions = blocked(table())
    assert sessions.reason_blocked(A, 3.2) == (
        "peer gone (connection reset) 3.2 s ago; asked 0 times, next question in 0.0 s"
    )
    assert sessions.reason_blocked(B, 3.2) is None


@pytest.mark.parametrize("cause", list(Cause))
def test_only_what_speaks_of_the_peer_blocks(cause: Cause) -> None:
    sessions = table()
    sessions.fail(A, cause, "why", 0.0)
    assert (A in sessions.blocked()) is cause.speaks_of_peer


def test_a_later_failure_does_not_replace_the_first_cause() -> None:
    sessions = blocked(table())
    assert sessions.fail(A, Cause.TIMED_OUT, "a symptom", 0.5) == []
    assert "connection reset" in (sessions.reason_blocked(A, 0.5) or "")


def test_the_reason_tells_what_the_questions_found() -> None:
    sessions = blocked(table())
    sessions.answered(ask_one(sessions, 1.0), Unwell(Cause.REFUSED, "nobody listens"), 1.5)
    reason = sessions.reason_blocked(A, 2.0)
    assert reason is not None
    assert reason.endswith("; asked 1 time (last answer: refused), next question in 1.5 s")
    ask_one(sessions, 3.5)
    assert (sessions.reason_blocked(A, 3.6) or "").endswith("asked 2 times (last answer: refused), being asked now")


# Asking


def test_waits_double_from_the_first_interval_up_to_the_last() -> None:
    sessions, now, waits = blocked(table()), 0.0, []
    for _ in range(6):
        due = sessions.next_due
        assert due is not None
        waits.append(due - now)
        now = due
        sessions.answered(ask_one(sessions, now), Unwell(Cause.TIMED_OUT, "no answer"), now)
    assert waits == [1.0, 2.0, 4.0, 8.0, 8.0, 8.0]


def test_a_peer_that_is_down_for_days_is_still_asked() -> None:
    sessions, now = blocked(table()), 0.0
    for _ in range(2000):  # 2.0 ** 1024 is no float any more
        now = sessions.next_due or 0.0
        sessions.requested(A, now)
        sessions.answered(ask_one(sessions, now), Unwell(Cause.REFUSED, "nobody listens"), now)
    assert sessions.next_due == now + 8.0


def test_jitter_spreads_the_questions_and_never_lengthens_a_wait() -> None:
    sessions = table(replace(STEADY, jitter=0.25))
    for i in range(200):
        sessions.fail(f"10.0.0.{i}:1", Cause.PEER_GONE, "reset", 0.0)
    assert sessions.ask_due(0.7499, 200) == []
    early = len(sessions.ask_due(0.875, 200))
    assert 50 < early < 150
    assert early + len(sessions.ask_due(1.0, 200)) == 200


def test_the_most_overdue_is_asked_first() -> None:
    sessions = table()
    for now, session in enumerate(["c", "a", "b"]):
        sessions.fail(session, Cause.PEER_GONE, "reset", float(now))
    assert [question.session for question in sessions.ask_due(10.0, 2)] == ["c", "a"]
    assert [question.session for question in sessions.ask_due(10.0, 2)] == ["b"]


def test_nobody_is_asked_twice_at_once() -> None:
    sessions = blocked(table())
    ask_one(sessions, 1.0)
    assert sessions.next_due is None
    assert sessions.ask_due(1000.0, 10) == []


def test_with_probing_off_nothing_is_asked_or_forgotten_and_a_registration_lifts() -> None:
    sessions = blocked(table(replace(STEADY, enabled=False)))
    assert sessions.next_due is None
    assert sessions.ask_due(1e6, 10) == []
    assert sessions.forget_idle(1e6) == []
    assert (sessions.reason_blocked(A, 1e6) or "").endswith("; blocked until the peer registers anew")
    assert kinds(sessions.registered(A, 1e6)) == [ChangeKind.LIFTED]


# Answers


def test_a_good_answer_lifts_and_tells_how_long_it_took() -> None:
    sessions = blocked(table())
    (change,) = sessions.answered(ask_one(sessions, 1.0), Well(Process(7)), 1.25)
    assert (change.kind, change.before, change.blocked_s, change.questions) == (
        ChangeKind.RECOVERED,
        Cause.PEER_GONE,
        1.25,
        1,
    )
    assert sessions.reason_blocked(A, 1.25) is None


@pytest.mark.parametrize("verdict", [Unwell(cause, "why") for cause in Cause], ids=lambda v: v.cause.value)
def test_no_bad_answer_lifts(verdict: Unwell) -> None:
    sessions = blocked(table())
    sessions.answered(ask_one(sessions, 1.0), verdict, 1.1)
    assert A in sessions.blocked()


def test_another_life_never_lifts_and_is_not_asked_again_until_it_registers() -> None:
    sessions = table()
    sessions.remember(A, Process(7), 0.0)
    blocked(sessions, now=1.0)
    (change,) = sessions.answered(ask_one(sessions, 2.0), Well(Process(8)), 2.5)
    assert (change.kind, change.cause, change.before) == (ChangeKind.DROPPED, Cause.PEER_CHANGED, Cause.PEER_GONE)
    assert sessions.ask_due(1e6, 10) == []
    assert (sessions.reason_blocked(A, 3.0) or "").endswith("; blocked until the peer registers anew")
    assert kinds(sessions.registered(A, 4.0)) == [ChangeKind.LIFTED]
    blocked(sessions, now=5.0)  # the old life is forgotten: the new one may answer for itself
    assert kinds(sessions.answered(ask_one(sessions, 6.0), Well(Process(8)), 6.0)) == [ChangeKind.RECOVERED]


def test_the_card_of_the_first_lifting_answer_is_what_the_next_is_held_against() -> None:
    sessions = blocked(table())
    sessions.answered(ask_one(sessions, 1.0), Well(Process(7)), 1.0)
    blocked(sessions, now=2.0)
    assert kinds(sessions.answered(ask_one(sessions, 3.0), Well(Process(8)), 3.0)) == [ChangeKind.DROPPED]


def test_a_card_seen_after_the_failure_does_not_vouch_for_the_life_that_failed() -> None:
    sessions = table()
    sessions.remember(A, Process(7), 0.0)
    blocked(sessions, now=1.0)
    sessions.remember(A, Process(8), 1.5)
    assert kinds(sessions.answered(ask_one(sessions, 2.0), Well(Process(8)), 2.0)) == [ChangeKind.DROPPED]


@pytest.mark.parametrize("how", ["a transfer", "a question"])
def test_an_engine_that_sees_another_life_drops_the_session(how: str) -> None:
    sessions = blocked(table())
    if how == "a transfer":
        changes = sessions.fail(A, Cause.PEER_CHANGED, "regions differ", 1.0)
    else:
        changes = sessions.answered(ask_one(sessions, 1.0), Unwell(Cause.PEER_CHANGED, "regions differ"), 1.0)
    assert kinds(changes) == [ChangeKind.DROPPED]
    assert sessions.ask_due(1e6, 10) == []
    assert sessions.fail(A, Cause.PEER_CHANGED, "again", 2.0) == []


def test_an_answer_does_not_speak_for_the_time_after_a_later_failure() -> None:
    sessions = blocked(table())
    question = ask_one(sessions, 1.0)
    sessions.fail(A, Cause.TIMED_OUT, "another transfer", 1.5)
    assert sessions.answered(question, Well(Process(7)), 1.6) == []
    assert A in sessions.blocked()
    assert kinds(sessions.answered(ask_one(sessions, 3.5), Well(Process(7)), 3.5)) == [ChangeKind.RECOVERED]


def test_an_answer_from_before_a_registration_is_late_news() -> None:
    sessions = blocked(table())
    question = ask_one(sessions, 1.0)
    sessions.registered(A, 1.1)
    blocked(sessions, now=1.2)
    assert sessions.answered(question, Well(Process(7)), 1.3) == []
    assert A in sessions.blocked()


# Forgetting


def test_a_session_nobody_wants_is_forgotten_and_one_that_is_wanted_is_not() -> None:
    sessions = blocked(blocked(table(), A), B)
    sessions.requested(B, 1.0)
    assert sessions.forget_idle(599.9) == []
    (change,) = sessions.forget_idle(600.0)
    assert (change.kind, change.session) == (ChangeKind.FORGOTTEN, A)
    assert list(sessions.blocked()) == [B]


def test_a_dropped_session_outlives_idleness() -> None:
    sessions = table()
    sessions.fail(A, Cause.PEER_CHANGED, "regions differ", 0.0)
    blocked(sessions, B)
    assert [change.session for change in sessions.forget_idle(1e6)] == [B]
    assert list(sessions.blocked()) == [A]
    assert sessions.forget_idle(1e6) == []


def test_the_card_of_an_idle_session_goes_without_a_word() -> None:
    sessions = table()
    sessions.remember(A, Process(7), 0.0)
    assert sessions.forget_idle(1e6) == []
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


# The policy


@pytest.mark.parametrize(
    "wrong",
    [
        {"interval_s": 0.0},
        {"max_interval_s": float("inf")},
        {"idle_timeout_s": -1.0},
        {"deadline_s": float("nan")},
        {"jitter": 1.0},
        {"jitter": -0.1},
        {"max_concurrent": 0},
        {"max_sessions": 0},
    ],
    ids=str,
)
def test_a_policy_that_cannot_work_names_the_setting(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        ProbePolicy(**wrong)


def test_a_first_wait_above_the_ceiling_is_kept_for_every_question() -> None:
    sessions: SessionTable[Any] = SessionTable(ProbePolicy(interval_s=60.0, jitter=0.0), lambda: 0.0)
    sessions.fail(A, Cause.REFUSED, "", 0.0)
    for due in (60.0, 120.0, 180.0):
        assert sessions.next_due == due
        (question,) = sessions.ask_due(due, 1)
        sessions.answered(question, Unwell(Cause.REFUSED, ""), due)


# Any order of events


@dataclass
class Expected:
    """What the model knows of one session."""

    wanted_at: float
    life: Process | None = None
    cause: Cause | None = None
    due: float | None = None
    asking: Question | None = None
    questions: int = 0


SESSIONS = st.sampled_from(["a", "b", "c", "d", "e"])
POLICY = ProbePolicy(interval_s=1.0, max_interval_s=4.0, idle_timeout_s=20.0, jitter=0.0, max_sessions=4)


class SessionsAgainstAModel(RuleBasedStateMachine):
    """The model keeps one plain dict and searches it; the table must look the same from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.table: Table = SessionTable(POLICY, random.Random(0).random)
        self.model: dict[str, Expected] = {}
        self.put: list[Question] = []
        self.seen: Counter[Cause] = Counter()

    def happened(self, changes: list[Change]) -> None:
        """What the metrics do with changes: the sum must always be what the table holds."""
        for change in changes:
            if change.before:
                self.seen[change.before] -= 1
            if change.kind in (ChangeKind.BLOCKED, ChangeKind.DROPPED):
                self.seen[change.cause] += 1

    def want(self, session: str) -> Expected:
        if session not in self.model and len(self.model) == POLICY.max_sessions:
            # Equal times happen; the order of the dict then is the order of the wants.
            order = sorted(self.model, key=lambda s: (self.dropped(s), self.model[s].wanted_at))
            del self.model[order[0]]
        expected = self.model.pop(session, Expected(self.now))
        expected.wanted_at = self.now
        self.model[session] = expected
        return expected

    def dropped(self, session: str) -> bool:
        return self.model[session].cause is Cause.PEER_CHANGED

    def wait_s(self, expected: Expected) -> float:
        return min(4.0, 2.0**expected.questions)

    def drop(self, expected: Expected) -> None:
        expected.cause, expected.due, expected.asking = Cause.PEER_CHANGED, None, None

    @rule(seconds=st.sampled_from([0.5, 1.0, 3.0, 25.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(session=SESSIONS, cause=st.sampled_from([Cause.PEER_GONE, Cause.TIMED_OUT, Cause.PEER_CHANGED, Cause.LOCAL]))
    def a_transfer_fails(self, session: str, cause: Cause) -> None:
        self.happened(self.table.fail(session, cause, "why", self.now))
        if cause is Cause.LOCAL:
            return
        expected = self.want(session)
        if cause is Cause.PEER_CHANGED:
            self.drop(expected)
        elif expected.cause is None:
            expected.cause, expected.questions = cause, 0
            expected.due = self.now + self.wait_s(expected)
        elif expected.asking:
            expected.asking, expected.due = None, self.now + self.wait_s(expected)

    @rule(session=SESSIONS)
    def a_peer_registers(self, session: str) -> None:
        self.happened(self.table.registered(session, self.now))
        self.model.pop(session, None)

    @rule(session=SESSIONS, pid=st.integers(1, 2))
    def a_card_is_seen(self, session: str, pid: int) -> None:
        self.happened(self.table.remember(session, Process(pid), self.now))
        expected = self.want(session)
        if expected.cause is None:
            expected.life = Process(pid)

    @rule(session=SESSIONS)
    def a_request_wants_it(self, session: str) -> None:
        self.table.requested(session, self.now)
        if session in self.model:
            self.want(session)

    @rule(limit=st.integers(0, 3))
    def the_due_are_asked(self, limit: int) -> None:
        questions = self.table.ask_due(self.now, limit)
        due = sorted((e.due, s) for s, e in self.model.items() if e.due is not None and e.due <= self.now)
        assert [question.session for question in questions] == [session for _, session in due[:limit]]
        for question in questions:
            expected = self.model[question.session]
            expected.asking, expected.due, expected.questions = question, None, expected.questions + 1
        self.put += questions

    @precondition(lambda self: self.put)
    @rule(data=st.data(), pid=st.integers(1, 2))
    def a_peer_answers(self, data: st.DataObject, pid: int) -> None:
        question = data.draw(st.sampled_from(self.put))  # old ones too: late and repeated answers
        self.happened(self.table.answered(question, Well(Process(pid)), self.now))
        expected = self.model.get(question.session)
        if expected is None or expected.asking != question:
            return
        if expected.life and expected.life != Process(pid):
            self.drop(expected)
        else:
            expected.cause = expected.asking = None
            expected.life = Process(pid)

    @precondition(lambda self: self.put)
    @rule(data=st.data(), cause=st.sampled_from([Cause.TIMED_OUT, Cause.LOCAL, Cause.PEER_CHANGED]))
    def a_question_fails(self, data: st.DataObject, cause: Cause) -> None:
        question = data.draw(st.sampled_from(self.put))
        self.happened(self.table.answered(question, Unwell(cause, "why"), self.now))
        expected = self.model.get(question.session)
        if expected is None or expected.asking != question:
            return
        if cause is Cause.PEER_CHANGED:
            self.drop(expected)
        else:
            expected.asking, expected.due = None, self.now + self.wait_s(expected)

    @rule()
    def the_idle_are_forgotten(self) -> None:
        self.happened(self.table.forget_idle(self.now))
        for session in [s for s, e in self.model.items() if self.now - e.wanted_at >= POLICY.idle_timeout_s]:
            if self.dropped(session):
                self.want(session)
            else:
                del self.model[session]

    @invariant()
    def the_same_sessions_are_blocked_for_the_same_causes(self) -> None:
        expected = {session: e.cause for session, e in self.model.items() if e.cause}
        assert self.table.blocked() == expected
        for session in ["a", "b", "c", "d", "e"]:
            assert (self.table.reason_blocked(session, self.now) is not None) is (session in expected)

    @invariant()
    def the_next_question_is_due_at_the_same_time(self) -> None:
        assert self.table.next_due == min((e.due for e in self.model.values() if e.due is not None), default=None)

    @invariant()
    def the_changes_add_up_to_what_is_blocked(self) -> None:
        assert +self.seen == Counter(self.table.blocked().values())
        assert min(self.seen.values(), default=0) >= 0

    @invariant()
    def the_table_is_bounded(self) -> None:
        assert len(self.table) == len(self.model) <= POLICY.max_sessions


TestSessionsAgainstAModel = SessionsAgainstAModel.TestCase
TestSessionsAgainstAModel.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
