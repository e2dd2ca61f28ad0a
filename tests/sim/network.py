"""
The virtual network: which process listens where, who can reach it, and how a question or a transfer ends.

It holds the truth, which no table ever sees, and draws every chance from the run's own source. No clock: outcomes say
how long they take, and whoever asked puts that into the event heap.

A port outlives its processes: that is the whole difficulty. A link is one prefill rank's way to one decode rank: the
port that was announced to it, and the life that it means by that.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import NamedTuple

from pdctl.core.kinds import Depth
from pdctl.errors import Cause

LIVELY_S, MODEST_S = 0.5, 5.0
"""Between two requests for a link that is much wanted, and for one that is wanted now and then."""

RANKS_AN_INSTANCE = 16


@dataclass(frozen=True, slots=True)
class Life:
    """What a process shows of itself; stands for a card."""

    pid: int

    def same_life(self, later: Life) -> bool:
        return self.pid == later.pid


@dataclass(slots=True, eq=False)
class Process:
    """A decode rank's process. `stopped` and `mute` count the faults that hold it so.

    depth: how much a question can prove of it. mute: its handshake answers, its data port does not.
    fail_share, slow_share: of its transfers that fail, of its questions that take too long.
    """

    life: Life
    depth: Depth
    stopped: int = 0
    mute: int = 0
    fail_share: float = 0.0
    slow_share: float = 0.0


@dataclass(slots=True, eq=False)
class Port:
    """One session name. `echo`: something listens there that says the handshake's words to anybody."""

    session: str
    rank: Rank
    process: Process | None = None
    echo: bool = False


@dataclass(slots=True, eq=False)
class Rank:
    """A decode rank: the port where it listens now, on a host. `cut` counts what keeps everybody from it."""

    index: int
    host: int
    depth: Depth
    port: Port = field(init=False)
    cut: int = 0
    links: list[Link] = field(default_factory=list)
    group: str = ""  # the instance that it is a rank of

    def __post_init__(self) -> None:
        self.group = f"decode-{self.index // RANKS_AN_INSTANCE}"


@dataclass(slots=True, eq=False)
class Prefill:
    """A prefill rank as the network sees it. `lag_s`: how late its own loop may be now."""

    index: int
    cut: int = 0
    lag_s: float = 0.0
    links: list[Link] = field(default_factory=list)


class Truth(Enum):
    """What a link really is."""

    HEALTHY = auto()
    GRAY = auto()  # works now and then, or is seen through a lagging loop: nothing is promised of it
    DEAD = auto()  # no transfer can succeed, or none may


@dataclass(slots=True, eq=False)
class Link:
    """One prefill's way to one decode rank.

    port, life: what was announced last. tether: the process that the engine holds a connection to. doubt: the engine
    asks who is there before it submits anything. gap_s: mean time between requests, 0 if nobody wants this link.
    """

    prefill: Prefill
    rank: Rank
    port: Port
    life: Life
    gap_s: float
    tether: Process | None
    doubt: bool = False
    cut: int = 0
    fail_share: float = 0.0
    slow_share: float = 0.0
    truth: Truth = Truth.HEALTHY
    since: float = 0.0
    watched_until: float = -1.0
    asked_for: bool = False
    announced_at: float = 0.0


class Answer(NamedTuple):
    """How a question ends after `after_s`: by a cause, or well, so deep; the life that it shows; who answered."""

    after_s: float
    life: Life | None
    depth: Depth
    cause: Cause | None
    by: Process | None = None


class Network:
    """Who is where. `counts` is (prefill ranks, decode ranks); `ranks_a_host` decode ranks share one host's fate."""

    def __init__(self, counts: tuple[int, int], chance: random.Random, ranks_a_host: int = 8) -> None:
        self.chance = chance
        self._pids = 0
        self.ports: dict[str, Port] = {}
        self.prefills = [Prefill(i) for i in range(counts[0])]
        self.ranks = [Rank(j, j // ranks_a_host, self._depth()) for j in range(counts[1])]
        for rank in self.ranks:
            self.start(rank, self.fresh_port(rank))
        for prefill in self.prefills:
            for rank in self.ranks:
                self._connect(prefill, rank)

    def _depth(self) -> Depth:
        """Of ten ranks six are ours, three are stock, one is known by its handshake only."""
        return self.chance.choices((Depth.DATA, Depth.IDENTITY, Depth.HANDSHAKE), (60, 35, 5))[0]

    def _connect(self, prefill: Prefill, rank: Rank) -> None:
        process = rank.port.process
        assert process is not None
        gap_s = self.chance.choices((LIVELY_S, MODEST_S, 0.0), (30, 30, 40))[0]
        link = Link(prefill, rank, rank.port, process.life, gap_s, process)
        prefill.links.append(link)
        rank.links.append(link)

    # Processes and ports

    def fresh_port(self, rank: Rank) -> Port:
        port = Port(f"10.0.{rank.host}.{rank.index}:{15000 + len(self.ports)}", rank)
        self.ports[port.session] = port
        return port

    def start(self, rank: Rank, port: Port) -> Process:
        """A new process of this rank, listening at `port`."""
        self._pids += 1
        port.echo = False
        port.process = Process(Life(self._pids), rank.depth)
        rank.port = port
        return port.process

    def kill(self, rank: Rank) -> None:
        rank.port.process = None

    # The truth

    def reaches(self, prefill: Prefill, port: Port) -> bool:
        """Whether a packet gets there and a process that runs would take it."""
        process = port.process
        return not (prefill.cut or port.rank.cut or prefill.links[port.rank.index].cut) and (
            process is None or not process.stopped
        )

    def truth(self, link: Link) -> Truth:
        process = link.port.process
        if process is None or process.life is not link.life or process.mute:
            return Truth.DEAD
        if link.cut or link.prefill.cut or link.rank.cut or process.stopped:
            return Truth.DEAD
        if process.fail_share or process.slow_share or link.fail_share or link.slow_share or link.prefill.lag_s:
            return Truth.GRAY
        return Truth.HEALTHY

    # Exchanges

    def question(self, prefill: Prefill, session: str, deadline_s: float) -> Answer:
        """How a question put now ends, were the asker's loop on time."""
        port = self.ports[session]
        process, chance = port.process, self.chance.random
        if not self.reaches(prefill, port):
            return Answer(deadline_s, None, Depth.HANDSHAKE, Cause.TIMED_OUT)
        after_s = 0.0003 + 0.002 * chance()
        if process is None:
            if port.echo:
                return Answer(after_s, None, Depth.HANDSHAKE, None)
            return Answer(after_s, None, Depth.HANDSHAKE, Cause.REFUSED)
        slow_share = process.slow_share + prefill.links[port.rank.index].slow_share
        if slow_share and chance() < slow_share:
            after_s = 3 * deadline_s * chance()
            if after_s >= deadline_s:
                return Answer(deadline_s, None, Depth.HANDSHAKE, Cause.TIMED_OUT)
        if process.mute and process.depth is Depth.DATA:
            return Answer(min(deadline_s, after_s + 0.5 * deadline_s), None, Depth.IDENTITY, Cause.NO_DATA)
        shows = process.depth > Depth.HANDSHAKE or port.rank.index % 2
        return Answer(after_s, process.life if shows else None, process.depth, None, process)

    def fails(self, link: Link, process: Process) -> bool:
        """Whether one transfer between two that are well fails nevertheless."""
        share = process.fail_share + link.fail_share
        return bool(share) and self.chance.random() < share
