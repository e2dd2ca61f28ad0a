"""
Says where a table was wrong, knowing the truth that the table cannot see.

1. No link that is well is out for longer than `bound_s`; on trial it is waited for only while a transfer is under way.
2. No dead link is in: its first failed transfer puts it out, and nothing but a true recovery brings it back: enough
   good answers of the same life, after its hold, from a peer that lives.
3. Nothing is ever written to a life under the session of another.
4. Tables stay within their limits, and what they hold besides within what the sessions explain.
5. A dropped session is never served, panic or not; a panic is what the policy says, begins and ends with it.
6. In doubt of itself a table puts nobody out for a time-out, and it does not doubt without reason.

It keeps an account of its own from the changes that a table reports, with arithmetic of its own for what the policy
means by them. Of a table's view of itself (`standings`) it only asks that it agrees with what was reported.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sized
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pdctl.core.ejection import ProbePolicy
from pdctl.core.kinds import Depth, State
from pdctl.core.standing import Change, ChangeKind, Entry, Question, Standing, Turn, Unwell, Well
from pdctl.errors import Cause
from tests.sim.bounds import SLACK_S, bound_s, hold_s, lifts_within, unwanted_wait_s
from tests.sim.network import Answer, Life, Link, Port, Process, Truth

if TYPE_CHECKING:
    from tests.sim.fleet import Fleet, Shell

PATIENCE_S = 6.0
"""Longer than any transfer of the simulated engine takes to fail."""


class Violation(AssertionError):
    """A promise is broken. The text names the seed and the moment."""


@dataclass(slots=True, eq=False)
class Case:
    """What the oracle has seen of one session at one prefill rank.

    well_since, struck_at: when it came back, and when a transfer last failed. at_least, at_most: ejections that count,
    as health since the one or the other has worn them off. asked, asked_at: the last question. good: good answers in a
    row. free_at, limit_s: from when on its bound runs, and the bound. asked_for: when a request has wanted it since it
    is well. lifts: when it was let back.
    """

    link: Link
    port: Port
    life: Life
    wanted_at: float
    well_since: float
    struck_at: float
    state: State = State.TRUSTED
    out_since: float = 0.0
    at_least: int = 0
    at_most: int = 0
    asked: int = 0
    asked_at: float = 0.0
    good: int = 0
    free_at: float = 0.0
    limit_s: float = math.inf
    asked_for: float = -1.0
    lifts: list[float] = field(default_factory=list)

    @property
    def out(self) -> bool:
        return self.state in (State.BLOCKED, State.DROPPED)

    @property
    def current(self) -> bool:
        return self.link.port is self.port

    @property
    def well(self) -> bool:
        """Whether it is out without a reason that still holds, and whether questions can show that."""
        return self.current and self.link.truth is Truth.HEALTHY and self.link.rank.depth > Depth.HANDSHAKE


@dataclass(slots=True)
class View:
    """What the oracle has seen of one prefill rank's table. panics: the groups that do; doubt_until: the last
    moment of doubt; late_at: when our own loop was last late."""

    cases: dict[str, Case] = field(default_factory=dict)
    panics: set[str] = field(default_factory=set)
    doubting: bool = False
    doubt_until: float = -math.inf
    late_at: float = -math.inf
    stirred_at: float = 0.0


class Oracle:
    """Told of everything that happens in a fleet; raises Violation."""

    def __init__(self, fleet: Fleet, policy: ProbePolicy) -> None:
        self._fleet = fleet
        self._policy = policy
        self._views = [View() for _ in fleet.network.prefills]
        self._n_told = 0
        self.seen: Counter[str] = Counter()
        self.longest_out_s = 0.0
        self.tightest = 0.0

    def report(self) -> list[str]:
        """What there was to see: a run that saw nothing has shown nothing."""
        seen = ", ".join(f"{n:,} {what.replace('_', ' ')}" for what, n in sorted(self.seen.items()))
        return [
            seen,
            f"a link that was well was out for {self.longest_out_s:.2f} s at most; {self.tightest:.0%} of the bound",
        ]

    # What is told: the network

    def announced(self, shell: Shell, link: Link) -> None:
        """Before the table hears of it: a life of which nothing is known, or the same again."""
        view = self._views[shell.index]
        before = view.cases.get(link.port.session)
        case = view.cases[link.port.session] = Case(
            link, link.port, link.life, self._now, well_since=self._now, struck_at=self._now
        )
        if before is not None:
            case.state = before.state

    def truth_changed(self, shell: Shell, link: Link) -> None:
        self._views[shell.index].stirred_at = self._now
        case = self._views[shell.index].cases[link.port.session]
        if case.state is State.BLOCKED:
            self._expect_back(shell, case)

    def superseded(self, shell: Shell, session: str) -> None:
        case = self._views[shell.index].cases[session]
        if case.state is not State.DROPPED:
            self._violated(shell, case, "is not dropped although the registry says that its life is over")

    def flaps(self, shell: Shell, link: Link, until: float) -> None:
        """This link comes and goes from now on, about as long up as down."""
        case = self._views[shell.index].cases[link.port.session]
        self._fleet.at(until, self._count_lifts, shell, case, self._now)

    # What is told: the table

    def changed(self, shell: Shell, change: Change) -> None:
        """One change that a table reports: into the account, and held against the truth."""
        self.seen[change.kind.value] += 1
        view = self._views[shell.index]
        if not change.session:
            self._changed_mood(shell, view, change)
            return
        case = view.cases[change.session]
        if change.was is not case.state:
            self._violated(shell, case, f"was {change.was}, it says, and had told {case.state}")
        case.state = change.state
        view.stirred_at = self._now
        if change.kind is ChangeKind.BLOCKED:
            self._blocked(shell, view, case, change)
        elif change.kind is ChangeKind.DROPPED:
            self._dropped(shell, case)
        elif change.kind is ChangeKind.RECOVERED:
            self._recovered(shell, case, change)
        elif change.kind is ChangeKind.FORGOTTEN:
            self._forgotten(shell, case, change)
        elif change.kind is ChangeKind.LIFTED:
            case.at_least = case.at_most = 0
            case.well_since = case.struck_at = self._now

    def told(self, shell: Shell) -> None:
        """All changes of one event have been told: now and then, hold the table's view against them."""
        self._n_told += 1
        if self._n_told % 8 == 0:
            self._judge_panics(shell, self._views[shell.index], shell.table.standings(self._now))

    def lagged(self, shell: Shell, lag_s: float) -> None:
        """Our own loop came so late, and the table has heard of it."""
        if lag_s > self._policy.lag_s:
            self._views[shell.index].late_at = self._now

    def entered(self, shell: Shell, link: Link, entry: Entry) -> None:
        """The table has let a transfer pass, or wait, or has refused it."""
        view = self._views[shell.index]
        case = view.cases[entry.session]
        if self._now - case.wanted_at >= self._policy.idle_timeout_s and not case.out:
            case.at_least = 0  # it may have been forgotten: nobody tells of one that was trusted
        case.wanted_at = self._now
        served, panicking = entry.turn is not Turn.NO, link.rank.group in view.panics
        if served and case.state is State.DROPPED:
            self._violated(shell, case, "is served although it was dropped" + " (in a panic)" * panicking)
        if served is case.out and not (case.state is State.BLOCKED and panicking):
            self._violated(shell, case, f"is {case.state}, and the answer to a request is {entry.turn} {entry.reason}")
        if not served and case.state is State.BLOCKED and panicking:
            self._violated(shell, case, "is refused in a panic")
        if case.state is State.TRIAL and not panicking:
            self._tried(shell, case, entry)
        if case.state is State.BLOCKED:
            self._expect_back_soon(shell, case)

    def submitted(self, shell: Shell, link: Link, process: Process) -> None:
        if process.life is not link.life:
            case = self._views[shell.index].cases[link.port.session]
            self._violated(shell, case, "lets a write reach another life's memory")

    def asked(self, shell: Shell, question: Question) -> None:
        case = self._views[shell.index].cases[question.session]
        case.asked, case.asked_at = question.number, self._now

    def answered(
        self, shell: Shell, question: Question, answer: Answer, verdict: Well[Life] | Unwell, changes: list[Change]
    ) -> None:
        """A question has ended, and this is what the table made of it; `changed` hears of it next."""
        self.seen["questions"] += 1
        case = self._views[shell.index].cases[question.session]
        if question.number < case.asked:
            if any(change.session for change in changes):
                self._violated(shell, case, "listens to an answer although it has asked again since")
            return
        proves = isinstance(verdict, Well) and verdict.depth > Depth.HANDSHAKE and verdict.life is case.life
        case.good = case.good + 1 if proves and case.asked_at >= case.out_since else 0
        back = [change for change in changes if change.kind is ChangeKind.RECOVERED]
        if not back:
            return
        if case.good < self._policy.good_answers:
            self._violated(shell, case, f"came back after {case.good} good answers, the last of them {verdict}")
        if answer.depth < Depth.DATA and back[0].state is not State.TRIAL:
            self._violated(shell, case, f"came back without a trial, on an answer that is {answer.depth.name}")

    def ended(self, shell: Shell, entry: Entry, began: float, cause: Cause | None) -> None:
        """A transfer is over, and the table has been told."""
        self.seen["transfers" if cause is None else "failed transfers"] += 1
        view = self._views[shell.index]
        case = view.cases[entry.session]
        if cause is None or not cause.speaks_of_peer:
            return
        if (
            case.state is State.BLOCKED
            and case.out_since == self._now
            and began < case.well_since
            and not self._is_full(shell)
        ):
            self._violated(shell, case, "was put out by a transfer that had begun before it came back")
        if case.state is State.TRUSTED and not (cause is Cause.TIMED_OUT and view.doubting):
            self._judge_trust(shell, case, cause)
            self._wear_off(case)

    # At leisure

    def look_over(self, shells: Iterable[Shell]) -> None:
        """What holds at any moment."""
        for shell in shells:
            view, table = self._views[shell.index], shell.table
            self._judge_size(shell, view)
            standings = table.standings(self._now)
            states = {standing.session: standing.state for standing in standings}
            for session, case in view.cases.items():
                if states.get(session, State.TRUSTED) is not case.state:
                    self._violated(shell, case, f"is {states.get(session)}, and {case.state} is what was told")
            self._judge_panics(shell, view, standings)
            self._judge_doubt(shell, view)

    def at_the_end(self, shells: Iterable[Shell]) -> None:
        """After the calm every link that is well is in, and nothing is left of any panic or doubt."""
        shells = list(shells)
        self.look_over(shells)
        for shell in shells:
            view = self._views[shell.index]
            if view.doubting or (view.panics and self._policy.enabled):
                raise self._violation(f"prefill {shell.index} still panics, or doubts itself, after the calm")
            for case in view.cases.values():
                late = self._now > case.free_at + case.limit_s
                if self._policy.enabled and case.well and case.state is State.BLOCKED and late:
                    self._violated(shell, case, "is still out after the calm")

    # Into the account

    @property
    def _now(self) -> float:
        return self._fleet.now

    def _changed_mood(self, shell: Shell, view: View, change: Change) -> None:
        if change.kind in (ChangeKind.PANIC_BEGAN, ChangeKind.PANIC_ENDED):
            (view.panics.add if change.kind is ChangeKind.PANIC_BEGAN else view.panics.discard)(change.group)
        else:
            self._judge_doubt(shell, view)
            view.doubting = change.kind is ChangeKind.DOUBT_BEGAN
            view.doubt_until = math.inf if view.doubting else self._now

    def _blocked(self, shell: Shell, view: View, case: Case, change: Change) -> None:
        if change.cause is Cause.TIMED_OUT and (view.doubting or self._is_late(view)):
            self._violated(shell, case, "was put out for a time-out while the table doubts itself, or should")
        self._wear_off(case)
        decayed = math.floor((self._now - case.well_since) / self._policy.decay_s + 1e-6)
        case.at_least = 1 if self._is_full(shell) else max(0, case.at_least - decayed) + 1
        case.at_most += 1
        case.out_since, case.good, case.asked_for = self._now, 0, -1.0
        self._expect_back(shell, case)

    def _dropped(self, shell: Shell, case: Case) -> None:
        process = case.port.process
        if case.current and process is not None and process.life is case.life:
            self._violated(shell, case, "was dropped although its life goes on")

    def _is_late(self, view: View) -> bool:
        return self._now < view.late_at + self._policy.deadline_s

    def _wear_off(self, case: Case) -> None:
        """Health has lasted until now; every failure, also one that put nobody out, makes it begin anew."""
        decayed = math.floor((self._now - case.struck_at) / self._policy.decay_s)
        case.at_most = max(0, case.at_most - decayed)
        case.struck_at = self._now

    def _recovered(self, shell: Shell, case: Case, change: Change) -> None:
        out_for_s, held_s = self._now - case.out_since, hold_s(self._policy, case.at_least)
        if out_for_s < held_s - 1e-6:
            self._violated(shell, case, f"came back after {out_for_s:.2f} s of a hold of {held_s:.2f} s")
        if case.at_least > 1 and change.state is not State.TRIAL:
            self._violated(shell, case, "came back from a relapse without a trial")
        dead_for_s = self._dead_for_s(case)
        if dead_for_s > self._policy.deadline_s * self._policy.stretch + SLACK_S:
            self._violated(shell, case, f"came back although it has been dead for {dead_for_s:.2f} s")
        if case.well:
            waited_s = self._now - max(case.free_at, case.link.since)
            self.longest_out_s = max(self.longest_out_s, waited_s)
            self.tightest = max(self.tightest, waited_s / case.limit_s)
        if change.state is State.TRIAL:
            over_at = max(self._now + self._policy.trial_s, shell.late_until) + SLACK_S
            self._fleet.at(over_at, self._check_trial, shell, case, self._now)
        case.lifts.append(self._now)
        case.well_since = case.struck_at = self._now

    def _dead_for_s(self, case: Case) -> float:
        """Since when no answer can have been good; 0 where one may be."""
        process = case.port.process
        if not case.current or case.link.truth is not Truth.DEAD:
            return 0.0
        if process is not None and process.life is case.life and process.mute and process.depth < Depth.DATA:
            return 0.0  # nothing that can be asked of it shows that its data port is dead
        return self._now - case.link.since

    def _forgotten(self, shell: Shell, case: Case, change: Change) -> None:
        full = self._is_full(shell)
        if not full and self._now - case.wanted_at < self._policy.idle_timeout_s:
            self._violated(shell, case, "was forgotten while requests want it")
        if not full and change.was is State.DROPPED:
            self._violated(shell, case, "was forgotten although it was dropped")
        case.at_least = case.at_most = 0

    def _is_full(self, shell: Shell) -> bool:
        return len(shell.table) >= self._policy.max_sessions - 1

    # What is to come

    def _expect_back(self, shell: Shell, case: Case) -> None:
        """It is out and perhaps it is well: then the policy's bound for a link that nobody wants runs from now on."""
        if case.well and self._policy.enabled:
            held_until = case.out_since + hold_s(self._policy, case.at_most, jitter=self._policy.jitter)
            case.free_at = max(self._now, held_until, shell.late_until)
            last_answer_s = case.free_at - case.out_since + self._policy.deadline_s * self._policy.stretch
            self._expect_by(shell, case, unwanted_wait_s(self._policy, last_answer_s))

    def _expect_back_soon(self, shell: Shell, case: Case) -> None:
        """The first request that wants it since it is well: now the bound for a link that is wanted runs."""
        if case.well and self._policy.enabled and case.asked_for < case.link.since:
            case.asked_for = self._now
            case.free_at = max(self._now, case.free_at)
            self._expect_by(shell, case, max(self._policy.interval_s, self._policy.wanted_interval_s))

    def _expect_by(self, shell: Shell, case: Case, wait_s: float) -> None:
        stretched = (
            self._views[shell.index].doubt_until >= case.free_at - self._policy.deadline_s * self._policy.stretch
        )
        deadline_s = self._policy.deadline_s * (self._policy.stretch if stretched else 1)
        case.limit_s = bound_s(self._policy, wait_s, deadline_s, len(shell.out))
        self._fleet.at(
            case.free_at + case.limit_s, self._check_back, shell, case, case.link.since, case.out_since, case.free_at
        )

    def _check_back(self, shell: Shell, case: Case, well_since: float, out_since: float, free_at: float) -> None:
        same = case.well and case.link.since == well_since and case.out_since == out_since
        if same and case.state is State.BLOCKED and self._views[shell.index].cases[case.port.session] is case:
            self._violated(
                shell, case, f"is well and still out, {self._now - free_at:.2f} s after it was free to be in"
            )

    def _check_trial(self, shell: Shell, case: Case, since: float) -> None:
        same = case.well_since == since and self._views[shell.index].cases[case.port.session] is case
        on_time = self._now > shell.late_until and not shell.lagging_s and len(shell.out) < self._policy.max_concurrent
        if same and case.state is State.TRIAL and on_time:
            self._violated(shell, case, "is still on trial, though no transfer has failed for long enough")

    def _count_lifts(self, shell: Shell, case: Case, since: float) -> None:
        self.seen["flaps"] += 1
        if self._is_full(shell):
            return  # what made room has taken its ejections along
        lifts, allowed = sum(at >= since for at in case.lifts), lifts_within(self._policy, self._now - since)
        if lifts > allowed:
            self._violated(shell, case, f"came and went, and was let back {lifts} times; {allowed} would be the most")

    # Judgements

    def _judge_trust(self, shell: Shell, case: Case, cause: Cause) -> None:
        """A transfer has failed, and the session is in. Fine if strikes are left, or if it came back meanwhile."""
        if self._policy.strikes == 1 and case.well_since < self._now - PATIENCE_S:
            self._violated(shell, case, f"stays in after a transfer that failed ({cause})")

    def _tried(self, shell: Shell, case: Case, entry: Entry) -> None:
        trial = entry.trial if entry.turn is Turn.GO else shell.last_trial.get(entry.session)
        running = 0 if trial is None else shell.on_trial[trial]
        if entry.turn is Turn.WAIT and not running:
            self._violated(shell, case, "lets a transfer wait for a turn that nobody has")
        if entry.turn is Turn.GO and (trial is None or running >= self._policy.trial_transfers):
            self._violated(shell, case, f"is on trial and carries {running + 1} transfers at once")

    def _judge_size(self, shell: Shell, view: View) -> None:
        n = len(shell.table)
        if n > self._policy.max_sessions:
            raise self._violation(f"prefill {shell.index} holds {n} sessions")
        for name, held in vars(shell.table).items():
            if isinstance(held, Sized) and len(held) > 2 * len(view.cases) + 64:
                raise self._violation(
                    f"prefill {shell.index}: {name} has grown to {len(held)} entries, for {n} sessions"
                )

    def _judge_panics(self, shell: Shell, view: View, standings: Iterable[Standing]) -> None:
        members, blocked = Counter[str](), Counter[str]()
        for standing in standings:
            members[standing.group] += standing.state is not State.DROPPED
            blocked[standing.group] += standing.state is State.BLOCKED
        too_many = {group for group, n in members.items() if self._is_panic(n, blocked[group])}
        if not too_many == view.panics == set(shell.table.panicking()):
            raise self._violation(
                f"prefill {shell.index} has told panics {view.panics}, serves {shell.table.panicking()} and should "
                f"{too_many or 'none'}: of {dict(members)} are blocked {dict(blocked)}"
            )

    def _is_panic(self, members: int, blocked: int) -> bool:
        return members >= self._policy.panic_from and blocked > self._policy.max_ejected * members

    def _judge_doubt(self, shell: Shell, view: View) -> None:
        quiet_s = self._now - max(view.stirred_at, view.late_at)
        if view.doubting and quiet_s > self._policy.doubt_window_s + PATIENCE_S:
            raise self._violation(f"prefill {shell.index} doubts itself, {quiet_s:.1f} s after anything has happened")

    # Words

    def _violated(self, shell: Shell, case: Case, what: str) -> None:
        raise self._violation(f"prefill {shell.index}, session {case.port.session}: {what}")

    def _violation(self, what: str) -> Violation:
        return Violation(f"seed {self._fleet.plan.seed}, at {self._now:.3f} s: {what}")
