"""
The session table in any order of events, against a model that keeps plain fields and searches them.

The clock is turned by hand and chance is fixed, so that the model can say to the second when a session is asked, let
back, past its trial, and when panic and doubt begin and end.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pdctl.core.ejection import ProbePolicy
from pdctl.core.kinds import Depth, State
from pdctl.core.sessions import SessionTable
from pdctl.core.standing import Change, ChangeKind, Entry, Question, Turn, Unwell, Well
from pdctl.errors import Cause

POLICY = ProbePolicy(
    interval_s=1.0, multiplier=2.0, max_interval_s=4.0, wanted_interval_s=2.0, jitter=0.0, good_answers=2,
    hold_s=3.0, max_hold_s=10.0, decay_s=30.0, trial_transfers=1, trial_s=5.0, panic_from=3, max_ejected=0.5,
    doubt_from=3, doubt_window_s=6.0, lag_s=0.25, idle_timeout_s=50.0, max_sessions=4,
)  # fmt: skip
SESSIONS = ("a", "b", "c", "d", "e")
GROUPS = ("", "x")
OUT = (State.BLOCKED, State.DROPPED)


@dataclass(frozen=True)
class Process:
    pid: int

    def same_life(self, later: Process) -> bool:
        return self.pid == later.pid


@dataclass
class Expected:
    """What the model knows of one session. Times are the clock's; `*_no` are places in the order of events."""

    wanted_at: float
    healthy_since: float
    group: str = ""
    state: State = State.TRUSTED
    life: Process | None = None
    cause: Cause | None = None
    asking: Question | None = None
    due: float | None = None
    asked_at: float = 0.0
    tries: int = 0
    good: int = 0
    hold_until: float = 0.0
    relapse: bool = False
    well_at: float | None = None  # when it was well last, as the doubt sees it
    last_well: float | None = None  # as far as anything has shown it
    strikes: int = 0
    ejections: int = 0
    trial_until: float | None = None
    on_trial: set[int] = field(default_factory=set)  # numbers of the entries that hold a place
    out_no: int = 0
    out_since: float = 0.0
    trial_no: int = 0
    lifted_no: int = 0
    returned_no: int = 0


class SessionsAgainstAModel(RuleBasedStateMachine):
    policy = POLICY

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.no = 0
        self.table: SessionTable[Process] = SessionTable(self.policy, lambda: 0.0)
        self.model: dict[str, Expected] = {}
        self.put: list[Question] = []
        self.entered: list[tuple[Entry, int]] = []
        self.words: dict[str, tuple[bool, float]] = {}  # of who was asked: silent?, and until when it counts
        self.late_until = -math.inf
        self.doubting = False
        self.seen: Counter[Cause] = Counter()
        self.states: dict[str, State] = {}
        self.panics: set[str] = set()

    # What the table tells

    def happened(self, changes: list[Change], *, lifts: bool = False) -> None:
        """What the metrics do with changes: their sum must always be what the table holds."""
        for change in changes:
            self.follow(change, lifts)
            if change.before:
                self.seen[change.before] -= 1
            if change.kind in (ChangeKind.BLOCKED, ChangeKind.DROPPED):
                assert change.cause is not None
                self.seen[change.cause] += 1

    def follow(self, change: Change, lifts: bool) -> None:
        if change.kind in (ChangeKind.PANIC_BEGAN, ChangeKind.PANIC_ENDED):
            assert (change.group in self.panics) is (change.kind is ChangeKind.PANIC_ENDED)
            self.panics ^= {change.group}
        if not change.session:
            return
        was = self.states.get(change.session, State.TRUSTED)
        assert change.was is was, f"{change} of a session that was {was}"
        if was is State.DROPPED:
            full = change.kind is ChangeKind.FORGOTTEN and len(self.model) == self.policy.max_sessions
            assert lifts or full, "only a registration, or a hand, lifts a dropped session"
        self.states[change.session] = change.state

    # What the model does

    def order(self) -> int:
        self.no += 1
        return self.no

    def want(self, session: str) -> Expected:
        if session not in self.model and len(self.model) == self.policy.max_sessions:
            # Equal times happen; the order of the dict then is the order of the wants.
            order = sorted(self.model, key=lambda s: (self.model[s].state is State.DROPPED, self.model[s].wanted_at))
            del self.model[order[0]]
        expected = self.model.pop(session, None) or Expected(self.now, self.now)
        expected.wanted_at = self.now
        self.model[session] = expected
        return expected

    def last(self, e: Expected) -> None:
        self.want(next(session for session, each in self.model.items() if each is e))

    def weigh(self) -> None:
        self.words = {s: (silent, until) for s, (silent, until) in self.words.items() if until > self.now}
        silent = sum(silent for silent, _ in self.words.values())
        most = len(self.words) >= self.policy.doubt_from and 2 * silent > len(self.words)
        self.doubting = most or self.now < self.late_until

    def wear_off(self, e: Expected) -> None:
        times = int((self.now - e.healthy_since) / self.policy.decay_s)
        e.strikes, e.ejections = max(0, e.strikes - times), max(0, e.ejections - times)
        e.healthy_since += times * self.policy.decay_s

    def plan(self, e: Expected, wait_s: float) -> None:
        e.asking, e.due = None, max(self.now + wait_s, e.hold_until)

    def wait_s(self, e: Expected) -> float:
        away_s = max(0.0, self.now - max(e.out_since, e.hold_until))
        return min(self.policy.max_interval_s, self.policy.interval_s * 2.0**e.tries, self.policy.interval_s + away_s)

    def soon(self, e: Expected) -> float:
        return max(self.now, e.asked_at + self.policy.wanted_interval_s, e.hold_until)

    def put_out(self, e: Expected, cause: Cause) -> None:
        hold_s = min(self.policy.max_hold_s, 3.0 * 2.0 ** (e.ejections - 1)) if e.ejections else 0.0
        e.relapse, e.hold_until = e.ejections > 0, self.now + hold_s
        e.ejections = min(e.ejections + 1, 3)  # 3, 6, 10 (cut from 12): no more need be remembered
        e.state, e.cause, e.tries, e.good, e.asked_at = State.BLOCKED, cause, 0, 0, self.now
        e.well_at = None if e.last_well is None else self.now
        e.trial_until, e.on_trial, e.out_no, e.out_since = None, set(), self.order(), self.now
        self.plan(e, self.policy.interval_s)

    def drop(self, e: Expected) -> None:
        if e.state is State.DROPPED:
            return
        self.last(e)
        e.state, e.cause, e.due, e.asking = State.DROPPED, Cause.PEER_CHANGED, None, None
        e.trial_until, e.on_trial = None, set()

    def trust(self, e: Expected) -> None:
        e.state, e.cause, e.due, e.asking, e.trial_until = State.TRUSTED, None, None, None, None
        e.on_trial = set()

    def lift(self, e: Expected) -> None:
        if e.state is State.DROPPED:
            e.life = None
        self.trust(e)
        self.last(e)
        e.strikes = e.ejections = 0
        e.healthy_since = self.now
        e.lifted_no = e.returned_no = self.order()

    def let_back(self, e: Expected, depth: Depth) -> None:
        relapse = e.relapse
        self.trust(e)
        e.strikes, e.healthy_since, e.last_well = 0, self.now, self.now
        e.returned_no = self.order()
        if relapse or depth is not Depth.DATA:
            e.state, e.trial_until, e.trial_no = State.TRIAL, self.now + self.policy.trial_s, e.returned_no

    def panicking(self, group: str) -> bool:
        members = [e for e in self.model.values() if e.group == group and e.state is not State.DROPPED]
        blocked = [e for e in members if e.state is State.BLOCKED]
        return len(members) >= self.policy.panic_from and 2 * len(blocked) > len(members)

    def served(self, session: str) -> bool:
        e = self.model.get(session)
        return e is None or e.state not in OUT or (e.state is State.BLOCKED and self.panicking(e.group))

    # What is known

    @rule(seconds=st.sampled_from([0.5, 1.0, 3.0, 7.0, 35.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(session=st.sampled_from(SESSIONS), group=st.sampled_from(GROUPS))
    def a_session_is_announced(self, session: str, group: str) -> None:
        self.happened(self.table.announce(session, self.now, group))
        self.want(session).group = group

    @rule(session=st.sampled_from(SESSIONS), pid=st.integers(0, 2))
    def a_peer_registers(self, session: str, pid: int) -> None:
        life = Process(pid) if pid else None
        self.happened(self.table.registered(session, self.now, life), lifts=True)
        e = self.want(session)
        self.lift(e)
        e.life, e.last_well = life, self.now

    @rule(session=st.sampled_from(SESSIONS))
    def a_hand_lifts(self, session: str) -> None:
        self.happened(self.table.lift(session, "by hand", self.now), lifts=True)
        if session in self.model:
            self.lift(self.model[session])

    @rule(session=st.sampled_from(SESSIONS))
    def the_registry_says_that_its_life_is_over(self, session: str) -> None:
        self.happened(self.table.supersede(session, "replaced", self.now))
        self.drop(self.want(session))

    @rule(session=st.sampled_from(SESSIONS), pid=st.integers(1, 2))
    def a_card_is_seen(self, session: str, pid: int) -> None:
        self.happened(self.table.remember(session, Process(pid), self.now))
        e = self.want(session)
        if e.state not in OUT:
            self.learn(e, Process(pid))

    def learn(self, e: Expected, life: Process) -> None:
        if e.life not in (None, life):
            self.drop(e)
        else:
            e.life, e.last_well = life, self.now

    @rule(session=st.sampled_from(SESSIONS))
    def a_request_wants_it(self, session: str) -> None:
        self.table.requested(session, self.now)
        if session in self.model:
            e = self.want(session)
            if e.due is not None:
                e.due = min(e.due, self.soon(e))

    # Transfers

    @rule(session=st.sampled_from(SESSIONS))
    def a_transfer_wants_to_begin(self, session: str) -> None:
        entry, no = self.table.enter(session, self.now), self.order()
        e = self.model.get(session)
        if not self.served(session):
            assert entry.turn is Turn.NO
        elif e is None or e.state is not State.TRIAL or self.panicking(e.group):
            assert entry.turn is Turn.GO
        else:
            assert entry.turn is (Turn.WAIT if e.on_trial else Turn.GO)
            if entry.turn is Turn.GO:
                e.on_trial.add(no)
        if entry.turn is Turn.GO:
            self.entered.append((entry, no))

    @precondition(lambda self: self.entered)
    @rule(data=st.data(), cause=st.sampled_from([None, None, Cause.TIMED_OUT, Cause.PEER_GONE, Cause.LOCAL]))
    def a_transfer_ends(self, data: st.DataObject, cause: Cause | None) -> None:
        entry, no = self.entered.pop(data.draw(st.integers(0, len(self.entered) - 1)))
        if cause is None:
            self.happened(self.table.succeed(entry.session, self.now, entry))
            self.succeeded(entry.session, no)
        else:
            self.happened(self.table.fail(entry.session, cause, "why", self.now, entry))
            self.failed(entry.session, cause, no)
        self.table.leave(entry)
        if entry.session in self.model:
            self.model[entry.session].on_trial.discard(no)

    @rule(
        session=st.sampled_from(SESSIONS),
        cause=st.sampled_from([Cause.PEER_GONE, Cause.PEER_GONE, Cause.TIMED_OUT, Cause.PEER_CHANGED, Cause.LAYOUT]),
    )
    def somebody_reports_a_failure(self, session: str, cause: Cause) -> None:
        self.happened(self.table.fail(session, cause, "why", self.now))
        self.failed(session, cause, None)

    @rule(session=st.sampled_from(SESSIONS))
    def somebody_reports_a_success(self, session: str) -> None:
        self.happened(self.table.succeed(session, self.now))
        self.succeeded(session, None)

    def succeeded(self, session: str, no: int | None) -> None:
        e = self.model.get(session)
        if e is None or (no is not None and no < e.lifted_no):
            return
        if no is None or no > e.returned_no:
            e.last_well = self.now
        if e.state is State.TRIAL and (no is None or no > e.trial_no):
            self.trust(e)

    def failed(self, session: str, cause: Cause, no: int | None) -> None:
        if not cause.speaks_of_peer:
            return
        self.weigh()
        known = self.model.get(session)
        if known and no is not None and no < known.lifted_no:
            return
        e = self.want(session)
        if cause is Cause.PEER_CHANGED:
            self.drop(e)
        elif (no is not None and no < e.returned_no) or (cause is Cause.TIMED_OUT and self.doubting):
            pass
        elif e.state in OUT:
            self.failed_again(e, no)
        else:
            self.wear_off(e)
            e.strikes, e.healthy_since = e.strikes + 1, self.now
            if e.state is State.TRIAL or e.strikes >= self.policy.strikes:
                self.put_out(e, cause)

    def failed_again(self, e: Expected, no: int | None) -> None:
        if e.state is State.BLOCKED and (no is None or no > e.out_no):
            e.good = 0
            if e.asking:
                self.plan(e, self.wait_s(e))

    # Questions

    def ask(self, question: Question) -> None:
        self.put.append(question)
        if question.session in self.model:
            e = self.model[question.session]
            e.asking, e.due, e.asked_at = question, None, self.now

    @rule(limit=st.integers(0, 3))
    def the_due_are_asked(self, limit: int) -> None:
        due = sorted((e.due, s) for s, e in self.model.items() if e.due is not None and e.due <= self.now)
        questions = self.table.ask_due(self.now, limit)
        asked = [question.session for question in questions]
        assert [self.model[session].due for session in asked] == [at for at, _ in due[:limit]]  # of equals, any
        assert len(set(asked)) == len(asked)
        for question in questions:
            self.ask(question)

    @rule(session=st.sampled_from(SESSIONS))
    def somebody_asks_by_hand(self, session: str) -> None:
        self.ask(self.table.ask_now(session, self.now))

    @precondition(lambda self: self.put)
    @rule(data=st.data(), pid=st.sampled_from([1, 1, 1, 2, None]), depth=st.sampled_from(Depth))
    def a_peer_answers(self, data: st.DataObject, pid: int | None, depth: Depth) -> None:
        question = data.draw(st.sampled_from(self.put[-6:]))  # old ones too: late and repeated answers
        life = Process(pid) if pid else None
        self.happened(self.table.answered(question, Well(life, depth), self.now))
        if (e := self.answered(question, None)) is None:
            return
        if life and e.life not in (None, life):
            self.drop(e)
        elif e.state is not State.BLOCKED:
            if life:
                self.learn(e, life)
        elif life is None or e.life is None or depth is Depth.HANDSHAKE:
            e.good = 0
            self.not_proven(e, None)
        else:
            e.good, e.tries, e.well_at = e.good + 1, 0, self.now
            if e.good >= self.policy.good_answers and self.now >= e.hold_until:
                self.let_back(e, depth)
            else:
                self.plan(e, self.policy.interval_s / 2)

    @precondition(lambda self: self.put)
    @rule(data=st.data(), cause=st.sampled_from([Cause.TIMED_OUT, Cause.REFUSED, Cause.LOCAL, Cause.PEER_CHANGED]))
    def a_question_fails(self, data: st.DataObject, cause: Cause) -> None:
        question = data.draw(st.sampled_from(self.put[-6:]))
        self.happened(self.table.answered(question, Unwell(cause, "why"), self.now))
        if (e := self.answered(question, cause)) is None:
            return
        if cause is Cause.PEER_CHANGED:
            self.drop(e)
        elif e.state is State.BLOCKED:
            e.good = 0 if cause.speaks_of_peer else e.good
            self.not_proven(e, cause)

    def answered(self, question: Question, cause: Cause | None) -> Expected | None:
        """The session, if the answer is news."""
        e = self.model.get(question.session)
        if e is None or e.asking != question:
            return None
        e.asking = None
        well_at = e.well_at if e.state in OUT else e.last_well
        if cause not in (Cause.TIMED_OUT, Cause.LOCAL):
            self.words[question.session] = (False, self.now + self.policy.doubt_window_s)
        elif cause is Cause.TIMED_OUT and well_at is not None:
            self.words[question.session] = (True, well_at + self.policy.doubt_window_s)
        self.weigh()
        return None if e.state is State.DROPPED else e

    def not_proven(self, e: Expected, cause: Cause | None) -> None:
        if not (cause is Cause.TIMED_OUT and self.doubting):
            e.tries += 1
        wait_s = self.wait_s(e)
        if e.wanted_at >= e.asked_at:
            wait_s = min(wait_s, max(self.policy.interval_s, self.soon(e) - self.now))
        self.plan(e, wait_s)

    # Time, and ourselves

    @rule()
    def the_clock_is_looked_at(self) -> None:
        self.happened(self.table.tick(self.now))
        self.weigh()
        for e in self.model.values():
            if e.trial_until is not None and e.trial_until <= self.now:
                self.trust(e)
        idle = [s for s, e in self.model.items() if self.now - e.wanted_at >= self.policy.idle_timeout_s]
        for session in idle:
            if self.model[session].state is not State.DROPPED:
                del self.model[session]

    @rule(lag_s=st.sampled_from([0.2, 0.5]))
    def our_own_loop_is_late(self, lag_s: float) -> None:
        self.happened(self.table.lagged(lag_s, self.now))
        if lag_s > self.policy.lag_s:
            self.late_until = self.now + self.policy.deadline_s
        self.weigh()

    # What must hold

    @invariant()
    def every_session_stands_as_expected(self) -> None:
        for session in SESSIONS:
            standing, e = self.table.standing(session, self.now), self.model.get(session)
            assert standing.state is (e.state if e else State.TRUSTED)
            assert self.states.get(session, State.TRUSTED) is standing.state
            if e is None:
                continue
            if e.state not in OUT:
                self.wear_off(e)
            assert (standing.group, standing.ejections, standing.strikes) == (e.group, e.ejections, e.strikes)
            assert standing.next_question_s == (None if e.due is None else max(0.0, e.due - self.now))
            assert standing.asking is (e.asking is not None)
            if e.state in OUT:
                assert standing.cause is e.cause
            if e.state is State.BLOCKED:
                assert (standing.good, standing.held_s) == (e.good, max(0.0, e.hold_until - self.now))

    @invariant()
    def who_is_served_is_who_may_be(self) -> None:
        for session in SESSIONS:
            reason = self.table.reason_blocked(session, self.now)
            assert (reason is None) is self.served(session) is self.table.standing(session, self.now).served
            if self.model.get(session, Expected(0, 0)).state is State.DROPPED:
                assert reason is not None

    @invariant()
    def panic_and_doubt_are_where_they_should_be(self) -> None:
        expected = {group for group in GROUPS if self.panicking(group)}
        assert set(self.table.panicking()) == expected == self.panics
        assert self.table.doubting is self.doubting
        assert self.table.deadline_s == (4.0 if self.doubting else 1.0)

    @invariant()
    def something_is_due_when_it_should_be(self) -> None:
        due = [at for e in self.model.values() for at in (e.due, e.trial_until) if at is not None]
        if self.doubting:
            due.append(max(self.late_until, min((until for _, until in self.words.values()), default=-math.inf)))
        assert self.table.next_due == min(due, default=None)

    @invariant()
    def the_changes_add_up_to_what_is_blocked(self) -> None:
        assert self.table.blocked() == {s: e.cause for s, e in self.model.items() if e.state in OUT}
        assert +self.seen == Counter(self.table.blocked().values())
        assert min(self.seen.values(), default=0) >= 0

    @invariant()
    def the_table_is_bounded(self) -> None:
        assert len(self.table) == len(self.model) <= self.policy.max_sessions
        assert {each.session for each in self.table.standings(self.now)} == set(self.model)


class WithTwoStrikes(SessionsAgainstAModel):
    policy = replace(POLICY, strikes=2, good_answers=1)


def as_test(machine: type[RuleBasedStateMachine]) -> Any:
    case = machine.TestCase
    case.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
    return case


TestSessionsAgainstAModel = as_test(SessionsAgainstAModel)
TestWithTwoStrikes = as_test(WithTwoStrikes)
