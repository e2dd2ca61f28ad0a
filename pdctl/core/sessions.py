"""
Which transfer sessions are trusted, and when to ask a blocked one again.

No sockets, no clock, no logging, no locks. Time arrives as `now` (seconds, monotonic, any zero), chance as a function;
what happened leaves as a list of `Change`.

             strikes failures                    good_answers in a row that prove the known life,
                                                 not before the hold is over
    TRUSTED ------------------> BLOCKED ----------------+-------------------------------> TRUSTED
       ^                         ^   |                  | after a relapse, or on identity alone
       |                 failure |   |                  v
       |                         +---|--------------- TRIAL ---a success, or trial_s without a failure---> TRUSTED
       |                             |                  |
       |      another life answers, or the registry says that its own is over (from TRUSTED too)
       |                             v                  v
       +--registered, or by hand-- DROPPED <------------+

    BLOCKED --registered, or by hand--> TRUSTED
    BLOCKED --nobody wants it for idle_timeout_s, or the table is full--> (forgotten: TRUSTED until it fails again)

A session that the table does not hold is trusted. What an answer proves is only as good as what it is held against
(MOONCAKE_FACTS H5, H6: any process on that port answers the handshake): the life that was announced, or shown while the
session was trusted. An answer that cannot be that life drops; without a known life, or with a handshake alone, no
answer lifts. A registration is the peer's word for a new life: it lifts, and nothing is held against it.

When too many of a group are blocked, all of it is served but the dropped (`ejection.Groups`); when the fault may be
our own, time-outs put nobody out (`ejection.Doubt`). News that is older than what it is about is no news: the end of a
transfer that began before its session came back, or before another life registered, and the answer to a question that
was put before the last failure.
"""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Generic

from pdctl.core.calendar import Calendar
from pdctl.core.ejection import Doubt, Groups, Health, ProbePolicy
from pdctl.core.kinds import Depth, State
from pdctl.core.record import NOTHING, Block, Record, Trial, ending, endings, older, weight
from pdctl.core.standing import Change, ChangeKind, Entry, Life, Question, ShownT, Standing, Turn, Unwell, Well, words
from pdctl.errors import Cause

AT_ONCE = 256  # forgetting 10,000 idle sessions in one go held the loop for 165 ms
_UNPROVEN = "somebody answers, but nothing shows that it is the same life"
_NOTHING_KNOWN = "somebody answers, but there is no life to compare it with"


class SessionTable(Generic[ShownT]):
    """The sessions that are known: how each stands, and the life that it stands for.

    At `max_sessions` the session that no request has wanted for longest makes room. If it was blocked it is trusted
    again, and a request for it, should one ever come, costs one more failed transfer; refusing to hold the new failure
    instead would cost one for every request of a session that is wanted now. Dropped sessions go last, and never by
    idleness: what they guard is another process's memory.

    `random` gives the next chance, from 0 up to 1: `random.random` of a real source, or of a seeded one.
    """

    def __init__(self, policy: ProbePolicy, random: Callable[[], float]) -> None:
        self.policy = policy
        self._random = random
        self._number = itertools.count(1)
        self._records: dict[str, Record[ShownT]] = {}
        # Both ordered by wanted_at, so that the idlest is found without a search; dropped ones apart, as they go last.
        self._idlest: OrderedDict[str, None] = OrderedDict()
        self._dropped: OrderedDict[str, None] = OrderedDict()
        self._questions: Calendar[str] = Calendar()
        self._trials: Calendar[str] = Calendar()
        self._groups = Groups(policy)
        self._doubt = Doubt(policy)

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[str]:
        return iter(self._records)

    def blocked(self) -> dict[str, Cause]:
        """Every session that is out, dropped ones included, with its cause."""
        return {session: record.block.cause for session, record in self._records.items() if record.block}

    # What is known of a session

    def announce(self, session: str, now: float, group: str = "") -> list[Change]:
        """The session is there, and of `group`: those of which a large share cannot well be down at once."""
        record, changes = self._wanted(session, now, group)
        self._recount(record.group, record.state, None)
        record.group = group
        self._recount(group, None, record.state)
        return changes + self._panic()

    def registered(self, session: str, now: float, life: Life[ShownT] | None = None) -> list[Change]:
        """The peer has announced the session anew, and of itself `life`: nothing is held against it."""
        changes = self._lift(session, "the peer has registered anew", now)
        record, made_room = self._wanted(session, now)
        record.life, record.well_at = life, now
        record.lifted = record.returned = next(self._number)
        return changes + made_room + self._panic()

    def lift(self, session: str, detail: str, now: float) -> list[Change]:
        """Somebody vouches for it by hand. Of one that was dropped the life is forgotten: another may be meant."""
        return self._lift(session, detail, now) + self._panic()

    def supersede(self, session: str, detail: str, now: float) -> list[Change]:
        """The registry says that the life which the session stands for is over."""
        record, changes = self._wanted(session, now)
        return changes + self._drop(record, detail, now) + self._panic()

    def remember(self, session: str, life: ShownT, now: float) -> list[Change]:
        """This is what the peer shows of itself. Learned after a failure it says nothing of the life that failed."""
        record, changes = self._wanted(session, now)
        if record.block is None:
            changes += self._learn(record, life, now)
        return changes + self._panic()

    def requested(self, session: str, now: float) -> None:
        """A request wants this session: it is not idle, and if it is blocked, it is asked soon."""
        if (record := self._records.get(session)) is None:
            return
        self._touch(record, now)
        due = self._questions.at(session)
        if due is not None and record.block and due > (soon := self._soon(record.block, now)):
            self._questions.put(session, soon)

    # Transfers

    def enter(self, session: str, now: float) -> Entry:
        """May a transfer begin? Tell `succeed` or `fail` how it ended, then `leave`, each with the entry."""
        number = next(self._number)
        if (reason := self.reason_blocked(session, now)) is not None:
            return Entry(session, Turn.NO, number, reason)
        record = self._records.get(session)
        if record is None or record.trial is None or self._groups.in_panic(record.group):
            return Entry(session, Turn.GO, number)
        if record.trial.running >= self.policy.trial_transfers:
            return Entry(session, Turn.WAIT, number)
        record.trial.running += 1
        return Entry(session, Turn.GO, number, trial=record.trial.number)

    def leave(self, entry: Entry) -> None:
        """A transfer that was let in is over, however it ended."""
        record = self._records.get(entry.session)
        if record is not None and record.trial is not None and record.trial.number == entry.trial:
            record.trial.running -= 1

    def succeed(self, session: str, now: float, entry: Entry | None = None) -> list[Change]:
        """A transfer's bytes have landed."""
        record = self._records.get(session)
        if record is None:
            return []
        if not older(entry, record.returned):
            record.well_at = now
        if record.trial is None or older(entry, record.trial.number):
            return []
        return self._end_trial(record, record.trial, "a transfer has succeeded", now)

    def fail(self, session: str, cause: Cause, detail: str, now: float, entry: Entry | None = None) -> list[Change]:
        """A transfer failed. Counts if the cause speaks of the peer; the first cause stays, later ones are symptoms."""
        if not cause.speaks_of_peer:
            return []
        changes = self._weigh(now)
        if (known := self._records.get(session)) is not None and older(entry, known.lifted):
            return changes
        record, made_room = self._wanted(session, now)
        if cause is Cause.PEER_CHANGED:
            changes += made_room + self._drop(record, detail, now)
        elif older(entry, record.returned) or (cause is Cause.TIMED_OUT and self.doubting):
            changes += made_room
        elif record.block is not None:
            self._failed_again(record, record.block, entry, now)
        else:
            changes += made_room + self._strike(record, cause, detail, now)
        return changes + self._panic()

    def reason_blocked(self, session: str, now: float) -> str | None:
        """Why no transfer may go there now, as a sentence for whoever wanted one; None when one may."""
        record = self._records.get(session)
        if record is None or self._served(record):
            return None
        return self._standing(record, now).sentence

    # Questions and answers

    @property
    def next_due(self) -> float | None:
        """When there is next something to do: a question to put, or time to `tick`. None while there is nothing."""
        due = min(self._questions.next_at, self._trials.next_at)
        if (doubt := self._doubt.next_at) is not None:
            due = min(due, doubt)
        return None if due == math.inf else due

    @property
    def deadline_s(self) -> float:
        """What one question may take now."""
        return self.policy.deadline_s * (self.policy.stretch if self.doubting else 1)

    def ask_due(self, now: float, limit: int) -> list[Question]:
        """At most `limit` questions that are due, the most overdue first. They are being asked from now on."""
        return [self._ask(self._records[session], now) for session in self._questions.due(now, limit)]

    def ask_now(self, session: str, now: float) -> Question:
        """Somebody wants to know now, however the session stands. A question that is being asked becomes void."""
        record = self._records.get(session)
        if record is None:
            return Question(session, next(self._number))
        self._questions.strike(session)
        return self._ask(record, now)

    def answered(self, question: Question, verdict: Well[ShownT] | Unwell, now: float) -> list[Change]:
        """How a question ended. Late news about a block that is over, or that was renewed meanwhile, is not news."""
        record = self._records.get(question.session)
        if record is None or record.asking != question:
            return []
        record.asking = None
        self._note(record, verdict, now)
        changes = self._weigh(now)
        if record.state is State.DROPPED:
            return changes
        if isinstance(verdict, Unwell):
            changes += self._answered_ill(record, verdict, now)
        else:
            changes += self._answered_well(record, verdict, now)
        return changes + self._panic()

    # Time, and ourselves

    def tick(self, now: float) -> list[Change]:
        """What time alone has brought about. To be called when `next_due` says so, and before `ask_due`."""
        changes = self._weigh(now)
        for session in self._trials.due(now):
            record = self._records[session]
            if record.trial:
                changes += self._end_trial(record, record.trial, "no transfer has failed since it came back", now)
        return changes + self.forget_idle(now)

    def forget_idle(self, now: float) -> list[Change]:
        """Let go of the sessions that no request has wanted for `idle_timeout_s`, of some at a time.

        There is no moment of its own for it: a blocked session is asked at least every `max_interval_s`, and whoever
        does so calls this first. With probing off nothing is forgotten: to forget is to trust again.
        """
        changes: list[Change] = []
        for _ in range(min(AT_ONCE, len(self._idlest)) if self.policy.enabled else 0):
            record = self._records[next(iter(self._idlest))]
            if now - record.wanted_at < self.policy.idle_timeout_s:
                break
            changes += self._forget(record, "no request has wanted it", now)
        return changes + self._panic()

    def lagged(self, lag_s: float, now: float) -> list[Change]:
        """Our own loop came so late."""
        self._doubt.late(lag_s, now)
        return self._weigh(now)

    @property
    def doubting(self) -> bool:
        """Whether the fault may be here."""
        return self._doubt.doubting

    def panicking(self) -> tuple[str, ...]:
        """The groups that are served whole, because too many of them are blocked."""
        return self._groups.panicking()

    def standing(self, session: str, now: float) -> Standing:
        record = self._records.get(session)
        return Standing(session) if record is None else self._standing(record, now)

    def standings(self, now: float) -> tuple[Standing, ...]:
        """All that the table holds, the longest unwanted first and the dropped last."""
        return tuple(self._standing(self._records[session], now) for session in [*self._idlest, *self._dropped])

    # How: out

    def _strike(self, record: Record[ShownT], cause: Cause, detail: str, now: float) -> list[Change]:
        record.health.wear_off(now, self.policy.decay_s)
        record.health.strike(now)
        if record.trial is None and record.health.strikes < self.policy.strikes:
            return []
        return self._block(record, cause, detail, now)

    def _block(self, record: Record[ShownT], cause: Cause, detail: str, now: float) -> list[Change]:
        relapses, was = record.health.ejections, record.state
        record.health.ejected(self.policy.most_relapses)
        hold_s = self.policy.hold(relapses, self._random())
        block = Block(cause, detail, now, next(self._number), now + hold_s, relapses > 0, asked_at=now)
        block.well_at = now if record.well_at is not None else None
        news = Change(ChangeKind.BLOCKED, record.session, cause, None, detail, was=was, state=State.BLOCKED)
        self._become(record, block)
        self._schedule(record, block, self._wait_s(block, now), now)
        return [news]

    def _failed_again(self, record: Record[ShownT], block: Block, entry: Entry | None, now: float) -> None:
        """While it is blocked: what began before is a symptom of the same; what began since (panic) is worse news."""
        if block.dropped or older(entry, block.number):
            return
        block.good = 0
        if record.asking:
            record.asking = None
            self._ask_again(record, block, now)

    def _drop(self, record: Record[ShownT], detail: str, now: float) -> list[Change]:
        was, before = record.state, record.block
        if was is State.DROPPED:
            return []
        cause = Cause.PEER_CHANGED
        since = before.since if before else now
        questions = before.questions if before else 0
        block = Block(cause, detail, since, next(self._number), questions=questions)
        news = Change(
            ChangeKind.DROPPED, record.session, cause, before.cause if before else None, detail,
            now - since, questions, was, State.DROPPED,
        )  # fmt: skip
        self._become(record, block)
        self._touch(record, now)
        return [news]

    # How: back

    def _answered_ill(self, record: Record[ShownT], verdict: Unwell, now: float) -> list[Change]:
        if verdict.cause is Cause.PEER_CHANGED:
            return self._drop(record, verdict.detail, now)
        if record.block is None:
            return []  # only transfers put out
        if verdict.cause.speaks_of_peer:
            record.block.good = 0
        self._not_proven(record, record.block, words(verdict.cause), verdict.cause, now)
        return []

    def _answered_well(self, record: Record[ShownT], verdict: Well[ShownT], now: float) -> list[Change]:
        known, shown, block = record.life, verdict.life, record.block
        if known is not None and shown is not None and not known.same_life(shown):
            return self._drop(record, "another process, or another life, answers there", now)
        if block is None:
            return [] if shown is None else self._learn(record, shown, now)
        if known is None or shown is None or verdict.depth is Depth.HANDSHAKE:
            block.good = 0
            self._not_proven(record, block, _NOTHING_KNOWN if known is None else _UNPROVEN, None, now)
            return []
        record.life, record.depth, block.well_at = shown, verdict.depth, now
        block.good, block.tries, block.last_answer = block.good + 1, 0, "well"
        if block.good >= self.policy.good_answers and now >= block.hold_until:
            return self._let_back(record, block, verdict.depth, now)
        self._schedule(record, block, self.policy.confirm_s(self._random()), now)
        return []

    def _not_proven(self, record: Record[ShownT], block: Block, answer: str, cause: Cause | None, now: float) -> None:
        block.last_answer = answer
        if not (cause is Cause.TIMED_OUT and self.doubting):
            block.tries += 1
        self._ask_again(record, block, now)

    def _let_back(self, record: Record[ShownT], block: Block, depth: Depth, now: float) -> list[Change]:
        """Bytes that were read back are a trial passed; a relapse, or identity alone, has one before it."""
        record.health.returned(now)
        record.returned = next(self._number)
        record.well_at = now
        on_trial = block.relapse or depth < Depth.DATA
        self._become(record, Trial(block, record.returned) if on_trial else None)
        if on_trial:
            self._trials.put(record.session, now + self.policy.trial_s)
        detail = f"answers have proved it well, by {depth.name.lower()}"
        return [ending(ChangeKind.RECOVERED, record, State.BLOCKED, block, detail, now)]

    def _end_trial(self, record: Record[ShownT], trial: Trial, detail: str, now: float) -> list[Change]:
        self._become(record, None)
        return [ending(ChangeKind.TRIAL_PASSED, record, State.TRIAL, trial.after, detail, now)]

    def _lift(self, session: str, detail: str, now: float) -> list[Change]:
        record = self._records.get(session)
        if record is None:
            return []
        was, held = record.state, record.held
        record.lifted = record.returned = next(self._number)
        record.health, record.depth = Health(now), None
        if was is State.DROPPED:
            record.life = None
        self._become(record, None)
        self._touch(record, now)
        return endings(ChangeKind.LIFTED, record, was, held, detail, now)

    # How: asking

    def _ask(self, record: Record[ShownT], now: float) -> Question:
        record.asking = Question(record.session, next(self._number))
        if record.block:
            record.block.questions += 1
            record.block.asked_at = now
        return record.asking

    def _schedule(self, record: Record[ShownT], block: Block, wait_s: float, now: float) -> None:
        """The next question, not before the hold is over, unless none may help."""
        if self.policy.enabled and not block.dropped:
            self._questions.put(record.session, max(now + wait_s, block.hold_until))

    def _ask_again(self, record: Record[ShownT], block: Block, now: float) -> None:
        """After a question in vain, or a void one: soon, if a request has wanted the session since it was put."""
        wait_s = self._wait_s(block, now)
        if record.wanted_at >= block.asked_at:
            wait_s = min(wait_s, max(self.policy.interval_s, self._soon(block, now) - now))
        self._schedule(record, block, wait_s, now)

    def _wait_s(self, block: Block, now: float) -> float:
        return self.policy.wait_s(block.tries, now - max(block.since, block.hold_until), self._random())

    def _soon(self, block: Block, now: float) -> float:
        """When a session that requests want is asked at the latest."""
        return max(now, block.asked_at + max(self.policy.wanted_interval_s, self.policy.interval_s), block.hold_until)

    def _note(self, record: Record[ShownT], verdict: Well[ShownT] | Unwell, now: float) -> None:
        """What the answer says about ourselves: a time-out counts if the peer was well not long ago."""
        if isinstance(verdict, Well) or verdict.cause not in (Cause.TIMED_OUT, Cause.LOCAL):
            self._doubt.heard(record.session, now)
        elif verdict.cause is Cause.TIMED_OUT:
            well_at = record.block.well_at if record.block else record.well_at
            if well_at is not None:
                self._doubt.silent(record.session, well_at)

    def _weigh(self, now: float) -> list[Change]:
        if (said := self._doubt.weigh(now)) is None:
            return []
        return [Change(ChangeKind.DOUBT_BEGAN if self.doubting else ChangeKind.DOUBT_ENDED, "", None, None, said)]

    def _learn(self, record: Record[ShownT], life: ShownT, now: float) -> list[Change]:
        if record.life is not None and not record.life.same_life(life):
            return self._drop(record, "another process, or another life, answers there", now)
        record.life, record.well_at = life, now
        return []

    # How: the table

    def _served(self, record: Record[ShownT]) -> bool:
        state = record.state
        return state in (State.TRUSTED, State.TRIAL) or (state is State.BLOCKED and self._groups.in_panic(record.group))

    def _standing(self, record: Record[ShownT], now: float) -> Standing:
        held, due = record.held, self._questions.at(record.session)
        if held is None or isinstance(held, Trial):
            record.health.wear_off(now, self.policy.decay_s)
        block = held.after if isinstance(held, Trial) else held or NOTHING
        return Standing(
            session=record.session,
            state=record.state,
            group=record.group,
            cause=None if held is None else block.cause,
            detail=block.detail,
            since_s=0.0 if held is None else now - block.since,
            strikes=record.health.strikes,
            ejections=record.health.ejections,
            questions=block.questions,
            next_question_s=None if due is None else max(0.0, due - now),
            asking=record.asking is not None,
            held_s=max(0.0, block.hold_until - now),
            good=block.good,
            last_answer=block.last_answer,
            depth=record.depth,
            served=self._served(record),
        )

    def _become(self, record: Record[ShownT], held: Block | Trial | None) -> None:
        """The one place where a state changes. What was asked or planned before is void."""
        was, session = record.state, record.session
        record.held, record.asking = held, None
        self._questions.strike(session)
        self._trials.strike(session)
        if (was is State.DROPPED) != (record.state is State.DROPPED):
            self._order(was).pop(session)
            self._order(record.state)[session] = None
        self._recount(record.group, was, record.state)

    def _order(self, state: State) -> OrderedDict[str, None]:
        return self._dropped if state is State.DROPPED else self._idlest

    def _recount(self, group: str, was: State | None, state: State | None) -> None:
        (members, blocked), (m, b) = weight(state), weight(was)
        if (members, blocked) != (m, b):
            self._groups.count(group, members - m, blocked - b)

    def _panic(self) -> list[Change]:
        """Where panic has begun or ended by what was just done: looked at once, when all of it is done."""
        kinds = (ChangeKind.PANIC_ENDED, ChangeKind.PANIC_BEGAN)
        return [Change(kinds[began], "", None, None, said, group=name) for name, began, said in self._groups.weigh()]

    def _wanted(self, session: str, now: float, group: str = "") -> tuple[Record[ShownT], list[Change]]:
        """The session's record, made if there is none, as the one wanted last; and what making it has changed."""
        record = self._records.get(session)
        if record is not None:
            self._touch(record, now)
            return record, []
        changes = self._make_room(now)
        record = self._records[session] = Record(session, group, now, Health(now))
        self._idlest[session] = None
        self._recount(group, None, record.state)
        return record, changes

    def _touch(self, record: Record[ShownT], now: float) -> None:
        """Wanted now, and last in its order: whoever changes to the other order has to come last there."""
        record.wanted_at = now
        self._order(record.state).move_to_end(record.session)

    def _make_room(self, now: float) -> list[Change]:
        if len(self._records) < self.policy.max_sessions:
            return []
        session = next(iter(self._idlest or self._dropped))
        return self._forget(self._records[session], "the table is full", now)

    def _forget(self, record: Record[ShownT], detail: str, now: float) -> list[Change]:
        was, held = record.state, record.held
        self._become(record, None)
        self._recount(record.group, record.state, None)
        del self._records[record.session], self._idlest[record.session]
        return endings(ChangeKind.FORGOTTEN, record, was, held, detail, now)
