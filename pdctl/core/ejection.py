"""
By what rules a session is put out and let back: the policy, and the arithmetic that needs no session.

    Health   failures and ejections that are remembered, and how health wears them off
    Groups   how many of a group are out, and when that is too many to be true (panic)
    Doubt    when what we see may be our own fault

No sockets, no clock, no chance of its own: `now` and chances are arguments. Sessions are names here, nothing else.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pdctl.core.calendar import Calendar
from pdctl.core.seconds import check_seconds
from pdctl.errors import ConfigError


@dataclass(frozen=True, slots=True)
class ProbePolicy:
    """When a blocked session is asked, what lets it back, and when nobody is put out. In the order of the story.

    enabled: off means that only a registration, or a hand, lifts: as with an engine that nobody can ask.
    strikes: failures that put a session out; each `decay_s` of health takes one off.
    interval_s: wait before the first question; half of it between two good answers, so that a healthy peer is back
        within two intervals. 100 ms, because an answer costs 0.3 ms and a peer that hiccupped should be back well
        within a second (stock SGLang: 30 s).
    multiplier: each question that was not answered well makes the next wait so many times longer; but no wait is longer
        than interval_s and, at 1.5, half the time that the peer has been away: who was away for 2 s is asked again
        within 1.1 s, however often requests have had it asked.
    max_interval_s: where that ends. 30 s: a peer down for hours costs two questions a minute. Below interval_s it means
        interval_s: who sets stock's own 60 s for the first must not be refused for our default of the second.
    wanted_interval_s: a session that requests want is asked at least so often, however long it has been away.
    jitter: each wait is shortened by a random share of at most this, so that sessions which failed together do not ask
        together for ever. Shortened, never lengthened: max_interval_s stays a bound. Holds are lengthened, never
        shortened, up to max_hold_s: how often a flapping peer is let back must not depend on luck.
    deadline_s: what one question may take. A time-out means unknown, not dead: the peer's listener serves one
        connection at a time, and one idle connection of a stranger delays it 5 s (MOONCAKE_FACTS 5.2). 1 s is 3,000
        times the usual answer; waiting longer would only hold a place that another question can use.
    good_answers: in a row, to be let back.
    hold_s: who is put out again while an earlier ejection is remembered stays out for at least so long; twice as long
        each further time, up to `max_hold_s`. With the defaults nobody is let back more than 6 times in 5 minutes,
        whatever the traffic and the chances: seven times need holds of 8+16+32+64+128+256 s, and each that is to be
        spared costs a `decay_s` of health. The first time there is no hold: a hiccup costs what it lasts.
    decay_s: each such time of health takes one ejection, and one strike, off the record.
    trial_transfers: who comes back after a relapse, or on its identity alone, may carry so many transfers at once until
        one succeeds.
    trial_s: or until so long has gone by without a failure. Above the engine's inactivity limit of 5 s: a first
        transfer that hangs has failed by then.
    max_ejected: when a larger share of a group than this is blocked, all of it is served (panic): the fault is then
        more likely the network or this host, and refusing everybody helps nobody. Dropped ones are never served.
    panic_from: a group with fewer sessions never panics: of two peers both can be down.
    lag_s: our own loop this late means that the time-outs of the next `deadline_s` are perhaps our own.
    doubt_from, doubt_window_s: so do most of at least so many sessions that time out within so long of each other,
        though they were well before.
    stretch: deadlines are so many times longer while in doubt, and time-outs put nobody out.
    idle_timeout_s: a session that no request has wanted for so long is forgotten: a restarted peer comes back under a
        new session, and nobody ever registers the old one again. 10 minutes is above every request's time-out.
    max_concurrent: questions in flight. 64 hung peers hold every place for one deadline at first; at max_interval_s it
        takes 64 * 30 of them to do so.
    max_sessions: what the table holds at most, about 1 KB each; see SessionTable for what happens there.
    """

    enabled: bool = True
    strikes: int = 1
    interval_s: float = 0.1
    multiplier: float = 1.5
    max_interval_s: float = 30.0
    wanted_interval_s: float = 1.0
    jitter: float = 0.1
    deadline_s: float = 1.0
    good_answers: int = 2
    hold_s: float = 8.0
    max_hold_s: float = 300.0
    decay_s: float = 100.0
    trial_transfers: int = 1
    trial_s: float = 10.0
    max_ejected: float = 0.5
    panic_from: int = 3
    lag_s: float = 0.25
    doubt_from: int = 5
    doubt_window_s: float = 10.0
    stretch: float = 4.0
    idle_timeout_s: float = 600.0
    max_concurrent: int = 64
    max_sessions: int = 65_536

    def __post_init__(self) -> None:
        check_seconds(self, "probe", or_zero={"hold_s"})
        for name in (
            "strikes", "good_answers", "trial_transfers", "panic_from", "doubt_from", "max_concurrent", "max_sessions"
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ConfigError(f"probe {name} is {getattr(self, name)}: give at least 1")
        for name in ("multiplier", "stretch"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 1):
                raise ConfigError(f"probe {name} is {getattr(self, name)}: give a factor of at least 1")
        if not 0 <= self.jitter < 1:
            raise ConfigError(f"probe jitter is {self.jitter}: give a share from 0 up to, not including, 1")
        if not 0 <= self.max_ejected <= 1:
            raise ConfigError(f"probe max_ejected is {self.max_ejected}: give a share from 0 to 1")

    def wait_s(self, tries: int, away_s: float, chance: float) -> float:
        """Before the next question, after `tries` in a row that were not answered well in the `away_s` by now."""
        # 1.5 ** 1750 overflows, and a peer that is wanted gets there within the hour.
        longer_s = self.interval_s * self.multiplier ** min(tries, 256)
        share_s = self.interval_s + (self.multiplier - 1) * max(0.0, away_s)
        return min(longer_s, share_s, max(self.interval_s, self.max_interval_s)) * (1 - self.jitter * chance)

    def confirm_s(self, chance: float) -> float:
        """Before the next question, after a good answer."""
        return self.interval_s / 2 * (1 - self.jitter * chance)

    def hold(self, relapses: int, chance: float) -> float:
        """For how long a session stays out at least, that was put out `relapses` times before within memory."""
        if relapses == 0:
            return 0.0
        longer_s = self.hold_s * 2.0 ** min(relapses - 1, 64) * (1 + self.jitter * chance)
        return min(longer_s, self.max_hold_s)

    @property
    def most_relapses(self) -> int:
        """What memory need not go beyond: here the hold is the longest."""
        if self.hold_s == 0 or self.hold_s >= self.max_hold_s:
            return 1
        return 1 + math.ceil(math.log2(self.max_hold_s / self.hold_s))


@dataclass(slots=True)
class Health:
    """What is remembered against one session. `since`: from when on it has been well."""

    since: float
    strikes: int = 0
    ejections: int = 0

    def wear_off(self, now: float, decay_s: float) -> None:
        """Health has lasted until `now`."""
        times = int((now - self.since) / decay_s)
        if times > 0:
            self.since += times * decay_s
            self.strikes = max(0, self.strikes - times)
            self.ejections = max(0, self.ejections - times)

    def strike(self, now: float) -> None:
        self.strikes += 1
        self.since = now

    def ejected(self, most: int) -> None:
        self.ejections = min(self.ejections + 1, most)

    def returned(self, now: float) -> None:
        self.strikes, self.since = 0, now


@dataclass(slots=True)
class _Group:
    members: int = 0
    blocked: int = 0
    panicking: bool = False


class Groups:
    """How many of each group may be served, and how many of them are blocked. Dropped sessions belong to none."""

    def __init__(self, policy: ProbePolicy) -> None:
        self._policy = policy
        self._groups: dict[str, _Group] = {}
        self._counted: set[str] = set()

    def __len__(self) -> int:
        return len(self._groups)

    def panicking(self) -> tuple[str, ...]:
        return tuple(name for name, group in self._groups.items() if group.panicking)

    def in_panic(self, name: str) -> bool:
        group = self._groups.get(name)
        return group is not None and group.panicking

    def count(self, name: str, members: int, blocked: int) -> None:
        """So many more of them, fewer when below 0."""
        group = self._groups.setdefault(name, _Group())
        group.members += members
        group.blocked += blocked
        self._counted.add(name)

    def weigh(self) -> list[tuple[str, bool, str]]:
        """Look again at those that were counted since: where panic has begun (True) or ended, and what to say of it."""
        news = []
        for name in self._counted:
            group = self._groups[name]
            before, group.panicking = group.panicking, self._too_many(group)
            if group.panicking != before:
                news.append((name, group.panicking, f"{group.blocked} of {group.members} are blocked"))
            if not group.members:
                del self._groups[name]
        self._counted.clear()
        return news

    def _too_many(self, group: _Group) -> bool:
        return group.members >= self._policy.panic_from and group.blocked > self._policy.max_ejected * group.members


class Doubt:
    """Whether what we see may be our own fault: our loop is late, or too many fall silent at once.

    Evidence is one word for each session asked: it answered (well or not: a refusal is heard, too), or it timed out
    though it was well before. An answer counts for a window from its time; a time-out from the time when the session
    was still well, so that peers that have been away for long are not evidence at all.
    """

    def __init__(self, policy: ProbePolicy) -> None:
        self._policy = policy
        self._silent: dict[str, bool] = {}
        self._until: Calendar[str] = Calendar()
        self._n_silent = 0
        self._late_until = -math.inf
        self._late_s = 0.0
        self.doubting = False

    def __len__(self) -> int:
        return len(self._silent)

    @property
    def next_at(self) -> float | None:
        """When doubt may end by itself; None while there is none."""
        if not self.doubting:
            return None
        return max(self._late_until, self._until.next_at if len(self._until) else -math.inf)

    def late(self, lag_s: float, now: float) -> None:
        """Our own loop came so late."""
        if lag_s > self._policy.lag_s:
            # who was being asked meanwhile has answered, or run out of time, within one deadline
            self._late_until, self._late_s = now + self._policy.deadline_s, lag_s

    def heard(self, session: str, now: float) -> None:
        self._note(session, False, now + self._policy.doubt_window_s)

    def silent(self, session: str, well_at: float) -> None:
        self._note(session, True, well_at + self._policy.doubt_window_s)

    def weigh(self, now: float) -> str | None:
        """Look again. Gives what to say when doubt has begun or ended by it."""
        for session in self._until.due(now):
            self._n_silent -= self._silent.pop(session)
        before, self.doubting = self.doubting, now < self._late_until or self._most_silent
        if self.doubting == before:
            return None
        if not self.doubting:
            return "answers come again"
        if now < self._late_until:
            return f"our own loop was {self._late_s:.2f} s late"
        return f"{self._n_silent} of {len(self._silent)} sessions asked have timed out together"

    @property
    def _most_silent(self) -> bool:
        return len(self._silent) >= self._policy.doubt_from and 2 * self._n_silent > len(self._silent)

    def _note(self, session: str, silent: bool, until: float) -> None:
        self._n_silent += silent - self._silent.get(session, False)
        self._silent[session] = silent
        self._until.put(session, until)
