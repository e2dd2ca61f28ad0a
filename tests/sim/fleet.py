"""
A fleet in virtual time: for each prefill rank a session table, the shell around it, and the requests that it serves.

One heap of events, no thread, no clock but the heap's. The shells do what pdctl's own do (ask what is due, under a
bound and a deadline; let a transfer pass where the table lets it; tell the table how it ended), and no more. Links that
are well and trusted carry little traffic, since it changes nothing there: the hour is spent where something happens.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from pdctl.core.ejection import ProbePolicy
from pdctl.core.kinds import Depth, State
from pdctl.core.sessions import SessionTable
from pdctl.core.standing import Change, ChangeKind, Entry, Question, Turn, Unwell, Well
from pdctl.errors import Cause
from tests.sim.network import Answer, Life, Link, Network, Port, Prefill, Process, Truth
from tests.sim.oracle import Oracle
from tests.sim.weather import Weather

Table = SessionTable[Life]
WATCHED_S = 5.0
"""For so long after a link has become well and is trusted its requests are played; they change nothing any more."""
SILENT = Unwell(Cause.TIMED_OUT, "no answer in time")
MakeTable = Callable[[ProbePolicy, Callable[[], float]], Table]


@dataclass(frozen=True, slots=True)
class Plan:
    """One run. calm_s: at the end of it no new misfortune begins, so that everything has to come back."""

    seed: int
    counts: tuple[int, int] = (30, 30)
    span_s: float = 3600.0
    calm_s: float = 600.0
    mean_gap_s: float = 120.0
    policy: ProbePolicy = field(default_factory=ProbePolicy)


class Fleet:
    """One run of a plan. `run` plays it; `oracle` raises where a table is wrong. A seed gives the same run always."""

    def __init__(self, plan: Plan, make_table: MakeTable = SessionTable) -> None:
        self.plan = plan
        self.now = 0.0
        self.events = 0
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self.chance = random.Random(plan.seed)
        self.network = Network(plan.counts, self.chance)
        self.oracle = Oracle(self, plan.policy)
        self.shells = [Shell(self, prefill, make_table) for prefill in self.network.prefills]
        self._weather = Weather(self, self.chance)

    def run(self, told: Callable[[float], None] = lambda _: None, every_s: float = 600.0) -> None:
        """To the end of the plan; `told` hears the time now and then."""
        plan = self.plan
        self._weather.season(0.0, plan.span_s - plan.calm_s, plan.mean_gap_s)
        for shell in self.shells:
            self.at(self.chance.uniform(0, 30), shell.background)
        mark = every_s
        while self._heap:
            when, _, act, arguments = heapq.heappop(self._heap)
            if when > plan.span_s:
                break
            if when >= mark:
                told(when)
                self.oracle.look_over(self.shells)
                mark += every_s
            self.now = when
            self.events += 1
            act(*arguments)
        self.now = plan.span_s
        self.oracle.at_the_end(self.shells)

    # The stage of the weather

    def at(self, when: float, act: Callable[..., None], *arguments: Any) -> None:
        self._count += 1
        heapq.heappush(self._heap, (when, self._count, act, arguments))

    _count = 0

    def look(self, links: Iterable[Link]) -> None:
        """The truth of these links may have changed."""
        for link in links:
            truth = self.network.truth(link)
            if truth is not link.truth:
                link.truth, link.since = truth, self.now
                self.shells[link.prefill.index].truth_changed(link)

    def announce(self, link: Link, port: Port, process: Process) -> None:
        """The registry tells a prefill rank of a new life. Older news than it has is no news."""
        if process.life.pid > link.life.pid:
            link.port, link.life = port, process.life
            self.shells[link.prefill.index].announced(link, process)
            self.look((link,))

    def supersede(self, link: Link, port: Port) -> None:
        """The registry tells it that a life is over, if it had ever told it of that one."""
        if link.port is not port and port.session in self.shells[link.prefill.index].sessions:
            self.shells[link.prefill.index].superseded(port.session)

    def lag(self, prefill: Prefill, lag_s: float) -> None:
        self.shells[prefill.index].lagging(lag_s)

    def flaps(self, links: Sequence[Link], until: float) -> None:
        for link in links:
            self.oracle.flaps(self.shells[link.prefill.index], link, until)


class Shell:
    """What stands around one table in a prefill rank: questions, transfers, and who waits for a turn.

    out: since when each session is out, by the table's own changes. on_trial: transfers under way that hold a place of
    a trial, and last_trial: a session's last one. late_until: until when something may still be under way that our
    loop's lag has held up.
    """

    def __init__(self, fleet: Fleet, prefill: Prefill, make_table: MakeTable) -> None:
        self._fleet, self._network, self._oracle = fleet, fleet.network, fleet.oracle
        self._chance = fleet.chance
        self._prefill = prefill
        self.policy = fleet.plan.policy
        self.table = make_table(self.policy, random.Random(fleet.chance.random()).random)
        self.sessions: dict[str, Link] = {}
        self.out: dict[str, float] = {}
        self.on_trial: Counter[int] = Counter()
        self.last_trial: dict[str, int] = {}
        self.late_until = 0.0
        self._asking = 0
        self._answered_by: Process | None = None
        self._pins: dict[str, Life] = {}
        self._waiting: Counter[str] = Counter()
        self._wake_at = math.inf
        for link in prefill.links:
            self._register(link, link.life)

    @property
    def index(self) -> int:
        return self._prefill.index

    @property
    def lagging_s(self) -> float:
        return self._prefill.lag_s

    # What the registry says

    def announced(self, link: Link, process: Process) -> None:
        self._register(link, process.life)
        link.tether, link.doubt = process, False
        self._turn(link.port.session)
        self._plan()

    def _register(self, link: Link, life: Life) -> None:
        session, now = link.port.session, self._fleet.now
        self.sessions[session], self._pins[session] = link, life
        self._oracle.announced(self, link)
        self._tell(self.table.announce(session, now, link.rank.group))
        self._tell(self.table.registered(session, now, life))

    def _announce(self, link: Link) -> None:
        """Say again whose rank it is: the table may have forgotten that it knew it."""
        now = self._fleet.now
        if now > link.announced_at + 60.0 or self.policy.max_sessions < len(self._prefill.links):
            link.announced_at = now
            self._tell(self.table.announce(link.port.session, now, link.rank.group))

    def superseded(self, session: str) -> None:
        self._tell(self.table.supersede(session, "the registry knows a later life", self._fleet.now))
        self._oracle.superseded(self, session)
        self._plan()

    def _register_later(self, link: Link) -> None:
        """Whom no question can prove registers again, or stays out: nothing else lifts it."""
        if link.rank.depth is Depth.HANDSHAKE and link.truth is Truth.HEALTHY and link.port.session in self.out:
            self._fleet.at(self._fleet.now + self._chance.uniform(0, 20), self._register_again, link, link.life)

    def _register_again(self, link: Link, life: Life) -> None:
        process = link.port.process
        if link.life is life and process is not None and process.life is life:
            self.announced(link, process)

    # Requests

    def background(self) -> None:
        """Now and then a request for anybody, and an operator who cannot wait."""
        link = self._chance.choice(self._prefill.links)
        if link.gap_s:
            self._admit(link)
        if self._chance.random() < 0.1:
            self._ask_by_hand(self._chance.choice(list(self.out) or [link.port.session]))
        self._fleet.at(self._fleet.now + self._chance.expovariate(1 / 30.0), self.background)

    def truth_changed(self, link: Link) -> None:
        self._oracle.truth_changed(self, link)
        link.watched_until = self._fleet.now + WATCHED_S
        self._register_later(link)
        if link.truth is not Truth.HEALTHY and not link.gap_s and self._chance.random() < 0.3:
            self._fleet.at(self._fleet.now + self._chance.random(), self._admit, link)
        self._watch(link)

    def _watch(self, link: Link) -> None:
        """The next request for a link where something happens. Whom it has failed for long is chosen less."""
        if link.gap_s and not link.asked_for:
            link.asked_for = True
            busy = link.truth is not Truth.HEALTHY or link.port.session in self.out
            gap_s = max(link.gap_s, 0.02 * (self._fleet.now - link.since)) if busy else 4 * link.gap_s
            self._fleet.at(self._fleet.now + self._chance.expovariate(1 / gap_s), self._request, link)

    def _request(self, link: Link) -> None:
        link.asked_for = False
        self._admit(link)
        if link.truth is not Truth.HEALTHY or link.port.session in self.out or self._fleet.now < link.watched_until:
            self._watch(link)

    def _admit(self, link: Link) -> None:
        session, now = link.port.session, self._fleet.now
        self._announce(link)
        self.table.requested(session, now)
        entry = self.table.enter(session, now)
        self._oracle.entered(self, link, entry)
        if entry.turn is Turn.GO:
            self._begin(link, entry)
        elif entry.turn is Turn.WAIT:
            self._waiting[session] += 1
        self._plan()

    # Transfers

    def _begin(self, link: Link, entry: Entry) -> None:
        """As the engine does it: after a failure it asks who is there, before that it looks at its tether; then bytes.

        A tether whose process has ended is over for good, so that nothing is submitted to whoever came after it.
        """
        now, process = self._fleet.now, link.port.process
        reached = self._network.reaches(self._prefill, link.port)
        if entry.trial is not None:
            self.on_trial[entry.trial] += 1
            self.last_trial[entry.session] = entry.trial
        if (refusal := self._refusal(link, reached)) is not None:
            after_s = self.policy.deadline_s if refusal is Cause.TIMED_OUT else 0.001
            self._fleet.at(now + after_s, self._end, link, link.port, entry, now, refusal)
            return
        assert process is not None
        link.tether, link.doubt = process, False
        self._oracle.submitted(self, link, process)
        patience_s = 0.5 + 4.5 * self._chance.random()
        after_s = min(self._chance.expovariate(30.0), 0.5) if reached else patience_s
        self._fleet.at(now + after_s, self._moved, link, link.port, entry, now, process)

    def _refusal(self, link: Link, reached: bool) -> Cause | None:
        """Why the engine submits nothing."""
        process = link.port.process
        if not link.doubt:
            return None if process is not None and link.tether is process else Cause.PEER_GONE
        if not reached:
            return Cause.TIMED_OUT
        if process is None:
            return Cause.REFUSED
        return None if process.life is link.life else Cause.PEER_CHANGED

    def _moved(self, link: Link, port: Port, entry: Entry, began: float, process: Process) -> None:
        self._end(link, port, entry, began, self._outcome(link, port, process))

    def _outcome(self, link: Link, port: Port, process: Process) -> Cause | None:
        if port.process is not process:
            return Cause.PEER_GONE
        if not self._network.reaches(self._prefill, port):
            return Cause.TIMED_OUT
        if process.mute or self._network.fails(link, process):
            return self._chance.choice((Cause.PEER_GONE, Cause.TIMED_OUT))
        if self._prefill.lag_s and self._chance.random() < 0.3:
            return Cause.TIMED_OUT
        return None

    def _end(self, link: Link, port: Port, entry: Entry, began: float, cause: Cause | None) -> None:
        session, now = entry.session, self._fleet.now
        if cause is None:
            changes = self.table.succeed(session, now, entry)
        else:
            link.doubt = link.doubt or link.port is port
            self._announce(self.sessions[session])
            changes = self.table.remember(session, self._pins[session], now)  # as pdctl's own shell does it
            changes += self.table.fail(session, cause, "a transfer failed", now, entry)
        if entry.trial is not None:
            self.on_trial[entry.trial] -= 1
        self.table.leave(entry)
        self._tell(changes)
        self._oracle.ended(self, entry, began, cause)
        self._turn(session)
        self._plan()

    def _turn(self, session: str) -> None:
        """Whoever waited for a turn tries again."""
        link = self.sessions[session]
        for _ in range(self._waiting.pop(session, 0)):
            if link.port.session == session:
                self._admit(link)

    # Our own loop

    def lagging(self, lag_s: float) -> None:
        """It comes late from now on, by so much at most; 0: it is on time again."""
        self.late_until = self._fleet.now + max(self._prefill.lag_s, lag_s)
        self._prefill.lag_s = lag_s
        if lag_s:
            self._tick()

    def _tick(self) -> None:
        lag_s = self._prefill.lag_s
        if lag_s:
            self._tell(self.table.lagged(lag_s, self._fleet.now))
            self._oracle.lagged(self, lag_s)
            self._fleet.at(self._fleet.now + lag_s, self._tick)
            self._plan()

    def _late_s(self) -> float:
        return self._prefill.lag_s * self._chance.random() if self._prefill.lag_s else 0.0

    # Questions

    def _plan(self) -> None:
        """Wake when there is something to do and a place for it."""
        due = self.table.next_due if self._asking < self.policy.max_concurrent else None
        if due is not None and due < self._wake_at:
            self._wake_at = max(due, self._fleet.now)
            self._fleet.at(self._wake_at, self._wake, self._wake_at)

    def _wake(self, meant: float, *, late: bool = False) -> None:
        if meant != self._wake_at:
            return
        if self._prefill.lag_s and not late:
            self._fleet.at(self._fleet.now + self._late_s(), partial(self._wake, meant, late=True))
            return
        self._wake_at, now = math.inf, self._fleet.now
        self._tell(self.table.tick(now))
        for question in self.table.ask_due(now, self.policy.max_concurrent - self._asking):
            self._ask(question)
        self._plan()

    def _ask_by_hand(self, session: str) -> None:
        self._ask(self.table.ask_now(session, self._fleet.now))
        self._plan()

    def _ask(self, question: Question) -> None:
        self._asking += 1
        self._oracle.asked(self, question)
        deadline_s = self.table.deadline_s
        answer = self._network.question(self._prefill, question.session, deadline_s)
        after_s = answer.after_s + self._late_s()
        verdict = _verdict(answer) if after_s <= deadline_s else SILENT
        self._fleet.at(self._fleet.now + after_s, self._answered, question, answer, verdict)

    def _answered(self, question: Question, answer: Answer, verdict: Well[Life] | Unwell) -> None:
        self._asking -= 1
        changes = self.table.answered(question, verdict, self._fleet.now)
        self._oracle.answered(self, question, answer, verdict, changes)
        self._answered_by = answer.by
        self._tell(changes)
        self._answered_by = None
        self._plan()

    # Changes

    def _tell(self, changes: list[Change]) -> None:
        for change in changes:
            self._oracle.changed(self, change)
            if change.session:
                self._note(change)
        if changes:
            self._oracle.told(self)

    def _note(self, change: Change) -> None:
        session, link = change.session, self.sessions[change.session]
        if change.state in (State.BLOCKED, State.DROPPED):
            self.out.setdefault(session, self._fleet.now)
            self._register_later(link)
        else:
            self.out.pop(session, None)
        if change.kind in (ChangeKind.RECOVERED, ChangeKind.LIFTED) and link.port.session == session:
            # The engine believes the table: whoever has answered gets the bytes. A wrong lift shows by that.
            link.tether, link.doubt = self._answered_by or link.port.process, False
        self._fleet.at(self._fleet.now, self._turn, session)


def _verdict(answer: Answer) -> Well[Life] | Unwell:
    if answer.cause is not None:
        return SILENT if answer.cause is Cause.TIMED_OUT else Unwell(answer.cause, "no good answer")
    return Well(answer.life, answer.depth)
