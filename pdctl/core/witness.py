"""
Who speaks for those who never speak: when a rank without a lease is asked for a sign of life, and when it is dead.

No sockets, no clock, no logging: `now` comes in (seconds, monotonic, any zero), questions and verdicts go out.

    UNKNOWN --well--> ALIVE --dead_after failures in a row, and no doubt--> DEAD --alive_after signs in a row--> ALIVE

A failure is of one of two sorts. REFUSED and UNWELL are answers: the host, or the engine itself, has said it. SILENT is
none, and may be our own deafness. So nobody is declared dead for silence

- before every other host has been asked since it fell silent: who is asked first would be judged before the rest is;
- while more than half of the hosts are silent, three or more being watched: then it is the network, or this host. With
  one or two there is nobody to compare with, and the threshold alone decides;
- for a question during which our own loop came late: the answer may have been here, and we were not.

A silence that is not believed costs nothing but time: it is asked about again. What cannot be known: a stopped process
still accepts connections (the kernel does), so only the HTTP question notices it; and an HTTP question that has never
been answered well is an engine that is starting, not one that is dead.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from urllib.parse import urlsplit

from pdctl.core.calendar import Calendar
from pdctl.core.lives import Life
from pdctl.core.route import Seat
from pdctl.core.seconds import check_seconds
from pdctl.errors import ConfigError

HOSTS_TO_COMPARE = 3
DOUBTED_SHARE = 0.5


class Means(StrEnum):
    """How a rank is asked."""

    HTTP = "http"
    TCP = "tcp"


class Sign(StrEnum):
    """What came of a question."""

    WELL = "well"
    REFUSED = "refused"  # nothing listens there
    UNWELL = "unwell"  # the engine answers that it does not serve
    SILENT = "silent"  # no answer, or the way there is cut
    VOID = "void"  # we failed to ask, or to listen


@dataclass(frozen=True, slots=True)
class WitnessPolicy:
    """Which signs of life are asked for, and what their absence means. Off unless one of the first two is set.

    tcp: connect to the control port that the rank has announced. It listens before it announces itself, so that a
        refused connection means a process that is gone.
    http_url: the engine's own health URL, with {host} (the rank's), {http_port} (as the rank has announced it) and
        {instance} where they belong: `http://{host}:{http_port}/health`. Asked once for all ranks that share it; any
        status below 500 is a sign of life. A rank that announces no port is not asked where the URL wants one.
    interval_s: between two questions to who is well. 5 s, as often as a stock decode asks for its prefill.
    retry_s: after a failure, so that three of them take 2 s and not 10.
    deadline_s: what one question may take.
    dead_after: failures in a row. 3: one lost packet and one collection of garbage are no death.
    alive_after: signs in a row before a dead rank is alive again. 2: a rank that flaps is not offered to decodes.
    jitter: each wait is shortened by a random share of at most this; the first is drawn from the whole interval.
    max_concurrent: questions in flight. 256 hung hosts at 2 s are 128 questions a second, and as many file descriptors.
    max_lag_s: an answer that comes this long after its deadline shows that our loop was late, not the peer.
    """

    tcp: bool = False
    http_url: str = ""
    interval_s: float = 5.0
    retry_s: float = 1.0
    deadline_s: float = 2.0
    dead_after: int = 3
    alive_after: int = 2
    jitter: float = 0.1
    max_concurrent: int = 256
    max_lag_s: float = 0.5

    def __post_init__(self) -> None:
        check_seconds(self, "witness")
        if self.dead_after < 2:
            raise ConfigError(f"witness dead_after is {self.dead_after}: give at least 2, one lost packet is no death")
        if self.alive_after < 1 or self.max_concurrent < 1:
            raise ConfigError("witness alive_after and max_concurrent: give at least 1")
        if not 0 <= self.jitter < 1:
            raise ConfigError(f"witness jitter is {self.jitter}: give a share from 0 up to, not including, 1")
        if self.http_url:
            check_template(self.http_url, "witness http_url")

    @property
    def enabled(self) -> bool:
        return self.tcp or bool(self.http_url)

    def targets(self, life: Life) -> Iterator[Target]:
        """Where a life's signs are looked for."""
        host, port = life.address.host, life.address.port
        if self.tcp:
            yield Target(Means.TCP, str(life.address), host, port)
        http_port = life.announcement.prefill_http_port
        if self.http_url and (http_port is not None or "{http_port}" not in self.http_url):
            yield Target(Means.HTTP, filled(self.http_url, host, http_port, life.claim.instance), host)


@dataclass(frozen=True, slots=True)
class Target:
    """What is asked: an address to connect to, or a URL. `host` is whose silence it would be."""

    means: Means
    where: str
    host: str
    port: int = 0


@dataclass(frozen=True, slots=True)
class Question:
    """One question that is being asked; its answer is void when the target has been given up or begun anew."""

    target: Target
    number: int
    asked_at: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the witness says of one life from now on."""

    instance: str
    seat: Seat
    epoch: int
    alive: bool
    why: str


Key = tuple[str, Seat, int]


@dataclass(slots=True)
class _Watched:
    """One target: what its answers have been since the latest life came to it."""

    target: Target
    lives: set[Key] = field(default_factory=set)
    asking: int | None = None
    well: int = 0
    failed: int = 0
    failing_since: float = math.inf
    was_well: bool = False
    is_dead: bool = False
    why: str = ""

    def begin_anew(self) -> None:
        self.asking, self.well, self.failed, self.failing_since = None, 0, 0, math.inf
        self.was_well, self.why = False, ""


@dataclass(slots=True)
class _Host:
    n_targets: int = 0
    n_living: int = 0


@dataclass(slots=True)
class _Subject:
    """One life: where it is looked for, and what was last said of it (None: nothing yet)."""

    life: Life
    targets: tuple[Target, ...]
    told: bool | None = None


class WitnessTable:
    """Everybody who is watched. `random` gives the next chance, from 0 up to 1."""

    def __init__(self, policy: WitnessPolicy, random: Callable[[], float]) -> None:
        self.policy = policy
        self._random = random
        self._numbers = 0
        self._subjects: dict[Key, _Subject] = {}
        self._targets: dict[Target, _Watched] = {}
        self._given_up: set[Key] = set()
        self._agenda: Calendar[Target] = Calendar()
        self._hosts: dict[str, _Host] = {}
        # Of the hosts where not everything is dead: when each was last heard of, or found silent; longest ago first
        self._heard_at: OrderedDict[str, float] = OrderedDict()
        self._silent: set[str] = set()

    def __len__(self) -> int:
        return len(self._subjects)

    @property
    def doubts(self) -> bool:
        """Whether so many hosts are silent that silence is not believed. Those long dead are not among them."""
        n_hosts = len(self._heard_at)
        return n_hosts >= HOSTS_TO_COMPARE and len(self._silent) > DOUBTED_SHARE * n_hosts

    @property
    def next_due(self) -> float | None:
        """When the next question is due; None when nobody is to be asked."""
        return self._agenda.next_at if len(self._agenda) else None

    def follow(self, lives: Iterable[Life], now: float) -> None:
        """Watch these and nobody else."""
        present = {(life.claim.instance, life.seat, life.epoch): life for life in lives}
        for key in self._subjects.keys() - present.keys():
            self._leave(key)
        self._given_up &= present.keys()
        for key, life in present.items():
            subject = self._subjects.get(key)
            if subject is None and key not in self._given_up:
                self._join(key, life, now)
            elif subject is not None and subject.life is not life:
                self._amend(key, subject, life, now)

    def ask_due(self, now: float, limit: int) -> list[Question]:
        """Up to `limit` questions that are due. Each is to be answered."""
        questions: list[Question] = []
        for target in self._agenda.due(now, limit):
            watched = self._targets[target]
            self._numbers += 1
            watched.asking = self._numbers
            questions.append(Question(watched.target, self._numbers, now))
        return questions

    def answered(self, question: Question, sign: Sign, detail: str, now: float) -> list[Verdict]:
        """What came of a question, and what that changes."""
        watched = self._targets.get(question.target)
        if watched is None or watched.asking != question.number:
            return []
        watched.asking = None
        if sign is Sign.SILENT and now - question.asked_at > self.policy.deadline_s + self.policy.max_lag_s:
            sign = Sign.VOID
        self._hear(watched.target.host, sign, now)
        if sign is Sign.WELL:
            self._well(watched)
        elif sign is not Sign.VOID:
            self._failed(watched, sign, detail, now)
        self._schedule(watched, now, self._wait_s(watched))
        return [verdict for key in sorted(watched.lives) for verdict in self._verdicts(self._subjects[key])]

    def _hear(self, host: str, sign: Sign, now: float) -> None:
        if sign is Sign.VOID or not self._hosts[host].n_living:
            return
        self._heard_at[host] = now
        self._heard_at.move_to_end(host)
        (self._silent.add if sign is Sign.SILENT else self._silent.discard)(host)

    def _well(self, watched: _Watched) -> None:
        watched.was_well = True
        watched.failed, watched.failing_since = 0, math.inf
        watched.well += 1
        if watched.is_dead and watched.well >= self.policy.alive_after:
            self._set_dead(watched, False)

    def _failed(self, watched: _Watched, sign: Sign, detail: str, now: float) -> None:
        watched.well = 0
        watched.failed += 1
        watched.failing_since = min(watched.failing_since, now)
        if watched.failed >= self.policy.dead_after and not watched.is_dead and self._is_believed(watched, sign):
            said = f"{_ASKED[watched.target.means]} {watched.target.where}: {detail}, {watched.failed} times in a row"
            watched.why = f"shows no sign of life ({said})"
            self._set_dead(watched, True)

    def _is_believed(self, watched: _Watched, sign: Sign) -> bool:
        if watched.target.means is Means.HTTP and not watched.was_well:
            return False
        if sign is not Sign.SILENT:
            return True
        longest_ago = next(iter(self._heard_at.values()))
        return longest_ago >= watched.failing_since and not self.doubts

    def _wait_s(self, watched: _Watched) -> float:
        is_settled = watched.is_dead or not watched.failed
        return self.policy.interval_s if is_settled else min(self.policy.retry_s, self.policy.interval_s)

    def _verdicts(self, subject: _Subject) -> Iterator[Verdict]:
        """What is said of a life, where that is another thing than before."""
        watched = [self._targets[target] for target in subject.targets]
        dead = next((one for one in watched if one.is_dead), None)
        if dead is None and not any(one.was_well for one in watched):
            return
        alive = dead is None
        if subject.told is alive:
            return
        subject.told = alive
        claim, why = subject.life.claim, dead.why if dead else "answers"
        yield Verdict(claim.instance, claim.seat, subject.life.epoch, alive, why)

    def _join(self, key: Key, life: Life, now: float) -> None:
        subject = _Subject(life, tuple(self.policy.targets(life)))
        for target in subject.targets:
            self._give_up_dead(target)
            watched = self._targets.get(target) or self._add(target)
            watched.lives.add(key)
            self._heard_at.setdefault(target.host, now)
            if watched.is_dead:
                self._set_dead(watched, False)
            watched.begin_anew()
            self._schedule(watched, now, self.policy.interval_s * self._random())
        self._subjects[key] = subject

    def _give_up_dead(self, target: Target) -> None:
        """Who answers at `target` from now on is another process: its signs must not bring back the dead."""
        watched = self._targets.get(target)
        for key in [key for key in watched.lives if self._subjects[key].told is False] if watched else []:
            self._leave(key)
            self._given_up.add(key)

    def _amend(self, key: Key, subject: _Subject, life: Life, now: float) -> None:
        """The same life says something else of itself, as an HTTP port that it did not say before."""
        if subject.targets == tuple(self.policy.targets(life)):
            subject.life = life
            return
        self._leave(key)
        self._join(key, life, now)
        self._subjects[key].told = subject.told

    def _leave(self, key: Key) -> None:
        for target in self._subjects.pop(key).targets:
            watched = self._targets[target]
            watched.lives.discard(key)
            if not watched.lives:
                self._remove(watched)

    def _add(self, target: Target) -> _Watched:
        watched = self._targets[target] = _Watched(target)
        host = self._hosts.setdefault(target.host, _Host())
        host.n_targets += 1
        host.n_living += 1
        return watched

    def _remove(self, watched: _Watched) -> None:
        host = self._hosts[watched.target.host]
        host.n_targets -= 1
        host.n_living -= not watched.is_dead
        self._compare_no_more(watched.target.host)
        if not host.n_targets:
            del self._hosts[watched.target.host]
        del self._targets[watched.target]
        self._agenda.strike(watched.target)

    def _set_dead(self, watched: _Watched, is_dead: bool) -> None:
        watched.is_dead = is_dead
        self._hosts[watched.target.host].n_living += -1 if is_dead else 1
        self._compare_no_more(watched.target.host)

    def _compare_no_more(self, host: str) -> None:
        if not self._hosts[host].n_living:
            self._heard_at.pop(host, None)
            self._silent.discard(host)

    def _schedule(self, watched: _Watched, now: float, wait_s: float) -> None:
        self._agenda.put(watched.target, now + wait_s * (1 - self.policy.jitter * self._random()))


_ASKED = {Means.TCP: "connecting to", Means.HTTP: "asking"}


def filled(template: str, host: str, http_port: int | None, instance: str) -> str:
    """The URL of one rank."""
    return template.format(host=f"[{host}]" if ":" in host else host, http_port=http_port, instance=instance)


def check_template(template: str, name: str) -> None:
    """Raise ConfigError, which calls it `name`, for a template that makes no URL."""
    try:
        url = urlsplit(filled(template, "10.0.0.1", 30000, "default"))
        valid = url.scheme in ("http", "https") and bool(url.hostname)
        _ = url.port
    except (ValueError, KeyError, IndexError, AttributeError):
        valid = False
    if not valid:
        raise ConfigError(
            f"{name} is {template!r}: write a URL in which {{host}}, {{http_port}} and {{instance}} stand "
            "for a rank's, as http://{host}:{http_port}/health"
        )
