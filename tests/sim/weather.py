"""
What befalls a fleet: one method for each kind of misfortune, and a season of them drawn from the run's source.

Each begins, holds for a time and ends, through the fleet's event heap, and tells the fleet whose truth to look at
anew. Misfortunes overlap as they like: what holds a process or a path is counted, and a process that was killed takes
what held it along.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from tests.sim.network import Link, Network, Port, Prefill, Process, Rank


class Stage(Protocol):
    """What the weather needs of the fleet."""

    now: float
    network: Network

    def at(self, when: float, act: Callable[..., None], *args: Any) -> None: ...
    def look(self, links: Iterable[Link]) -> None: ...
    def announce(self, link: Link, port: Port, process: Process) -> None: ...
    def supersede(self, link: Link, port: Port) -> None: ...
    def lag(self, prefill: Prefill, lag_s: float) -> None: ...
    def flaps(self, links: Sequence[Link], until: float) -> None: ...


class Weather:
    """`season` plans a run: its misfortunes begin between `start` and `end`, `mean_gap_s` apart on average."""

    def __init__(self, stage: Stage, chance: random.Random) -> None:
        self._stage = stage
        self._network = stage.network
        self._chance = chance
        self._kinds: dict[Callable[[], None], float] = {
            self.partition: 3,
            self.hang: 4,
            self.restart_in_place: 3,
            self.restart_elsewhere: 2,
            self.usurp: 1,
            self.echo: 1,
            self.lose_data: 2,
            self.gray: 3,
            self.flap: 1,
            self.flap_process: 0.5,
            self.lag: 2,
            self.host_outage: 1,
            self.storm: 1,
        }

    def season(self, start: float, end: float, mean_gap_s: float) -> None:
        kinds, weights = list(self._kinds), list(self._kinds.values())
        when = start + self._chance.expovariate(1 / mean_gap_s)
        while when < end:
            self._stage.at(when, self._chance.choices(kinds, weights)[0])
            when += self._chance.expovariate(1 / mean_gap_s)

    # Paths

    def partition(self) -> None:
        """Some prefill ranks and some decode ranks do not reach each other."""
        network, chance = self._network, self._chance
        prefills = self._some(network.prefills, chance.choice((1, 1, 3, len(network.prefills))))
        ranks = {rank.index for rank in self._some(network.ranks, chance.choice((1, 1, 3, 8)))}
        self._cut([prefill.links[j] for prefill in prefills for j in sorted(ranks)], self._holding_s())

    def storm(self) -> None:
        """More than half of the fleet is out of one prefill's reach, or of everybody's: panic."""
        network, chance = self._network, self._chance
        ranks = self._some(network.ranks, round(chance.uniform(0.4, 1.0) * len(network.ranks)))
        prefills = chance.choice((network.prefills, self._some(network.prefills, 1), self._some(network.prefills, 1)))
        self._cut([prefill.links[rank.index] for prefill in prefills for rank in ranks], chance.uniform(3, 40))

    def flap(self) -> None:
        """One path, or a few, come and go: as long up as down, for minutes."""
        prefills, (rank,) = self._some(self._network.prefills, 3), self._some(self._network.ranks, 1)
        links, half_s = [prefill.links[rank.index] for prefill in prefills], self._chance.uniform(0.7, 2.0)
        until = self._stage.now + self._chance.uniform(60, 300)
        self._stage.flaps(links, until)
        self._flap_on(links, half_s, until)

    def _flap_on(self, links: list[Link], half_s: float, until: float) -> None:
        self._cut(links, half_s)
        if self._stage.now + 2 * half_s < until:
            self._stage.at(self._stage.now + 2 * half_s, self._flap_on, links, half_s, until)

    def _cut(self, links: list[Link], for_s: float) -> None:
        for link in links:
            link.cut += 1
        self._stage.look(links)
        self._stage.at(self._stage.now + for_s, self._mend, links)

    def _mend(self, links: list[Link]) -> None:
        for link in links:
            link.cut -= 1
        self._stage.look(links)

    # Processes that hang, or work by half

    def hang(self) -> None:
        rank = self._living()
        self._stop(rank, rank.port.process, self._chance.choice((self._chance.uniform(0.2, 5), self._holding_s())))

    def flap_process(self) -> None:
        rank, half_s = self._living(), self._chance.uniform(0.7, 2.0)
        until = self._stage.now + self._chance.uniform(60, 300)
        self._stage.flaps(rank.links, until)
        self._flap_process_on(rank, half_s, until)

    def _flap_process_on(self, rank: Rank, half_s: float, until: float) -> None:
        self._stop(rank, rank.port.process, half_s)
        if self._stage.now + 2 * half_s < until:
            self._stage.at(self._stage.now + 2 * half_s, self._flap_process_on, rank, half_s, until)

    def _stop(self, rank: Rank, process: Process | None, for_s: float) -> None:
        if process is not None:
            process.stopped += 1
            self._stage.look(rank.links)
            self._stage.at(self._stage.now + for_s, self._go_on, rank, process)

    def _go_on(self, rank: Rank, process: Process) -> None:
        process.stopped -= 1
        self._stage.look(rank.links)

    def lose_data(self) -> None:
        """The handshake answers as ever, and no byte arrives."""
        rank = self._living()
        process = rank.port.process
        assert process is not None
        process.mute += 1
        self._stage.look(rank.links)
        self._stage.at(self._stage.now + self._holding_s(), self._find_data, rank, process)

    def _find_data(self, rank: Rank, process: Process) -> None:
        process.mute -= 1
        self._stage.look(rank.links)

    def gray(self) -> None:
        """A share of the transfers fails, or of the questions is slow, or both; at a process or on paths."""
        chance = self._chance
        fail, slow = chance.choice(((0.05, 0.0), (0.3, 0.0), (0.6, 0.3), (0.0, 0.5), (0.02, 0.9)))
        rank = self._living()
        sick: list[Any] = [rank.port.process] if chance.random() < 0.5 else self._some(rank.links, 3)
        for thing in sick:
            thing.fail_share, thing.slow_share = fail, slow
        self._stage.look(rank.links)
        self._stage.at(self._stage.now + chance.uniform(10, 120), self._clear, rank, sick)

    def _clear(self, rank: Rank, sick: list[Any]) -> None:
        for thing in sick:
            thing.fail_share = thing.slow_share = 0.0
        self._stage.look(rank.links)

    # Our own loop

    def lag(self) -> None:
        (prefill,) = self._some(self._network.prefills, 1)
        self._stage.lag(prefill, self._chance.choice((0.4, 1.0, 3.0)))
        self._stage.look(prefill.links)
        self._stage.at(self._stage.now + self._chance.uniform(2, 30), self._on_time, prefill)

    def _on_time(self, prefill: Prefill) -> None:
        self._stage.lag(prefill, 0.0)
        self._stage.look(prefill.links)

    # Processes that end

    def restart_in_place(self) -> None:
        """Killed, and a new life listens on the same port before anybody was told."""
        rank = self._living()
        self._kill(rank)
        self._stage.at(self._stage.now + self._chance.expovariate(1.0), self._rise, rank, rank.port, 20.0)

    def restart_elsewhere(self) -> None:
        rank = self._living()
        self._kill(rank)
        self._stage.at(self._stage.now + self._holding_s(), self._rise, rank, None, 5.0)

    def usurp(self) -> None:
        """A process of somebody else takes the port; the rank comes back on another."""
        rank = self._living()
        self._kill(rank)
        self._stage.at(self._stage.now + self._chance.uniform(0, 3), self._take, rank)
        self._stage.at(self._stage.now + self._holding_s(), self._rise, rank, None, 5.0)

    def _take(self, rank: Rank) -> None:
        if rank.port.process is None:
            self._network.start(rank, rank.port)
            self._stage.look(rank.links)

    def echo(self) -> None:
        """Something that answers every handshake takes the port; the rank comes back on another."""
        rank = self._living()
        self._kill(rank)
        rank.port.echo = True
        self._stage.at(self._stage.now + self._holding_s(), self._rise, rank, None, 5.0)

    def host_outage(self) -> None:
        host = self._chance.choice(self._network.ranks).host
        for_s, killed = self._holding_s(), self._chance.random() < 0.4
        for rank in [rank for rank in self._network.ranks if rank.host == host]:
            if killed and rank.port.process is not None:
                self._kill(rank)
                self._stage.at(self._stage.now + for_s, self._rise, rank, rank.port, 10.0)
            else:
                rank.cut += 1
                self._stage.look(rank.links)
                self._stage.at(self._stage.now + for_s, self._plug_in, rank)

    def _plug_in(self, rank: Rank) -> None:
        rank.cut -= 1
        self._stage.look(rank.links)

    def _kill(self, rank: Rank) -> None:
        self._network.kill(rank)
        self._stage.look(rank.links)

    def _rise(self, rank: Rank, port: Port | None, told_within_s: float) -> None:
        """A new life, at `port` or a fresh one; each prefill rank learns of it in its own time."""
        old = rank.port
        if port is not None and (port is not old or port.process is not None):
            return  # somebody has taken it meanwhile, or the rank has moved on
        port = port or self._network.fresh_port(rank)
        process = self._network.start(rank, port)
        self._stage.look(rank.links)
        superseded = port is not old and self._chance.random() < 0.5
        for link in rank.links:
            told_at = self._stage.now + 0.05 + told_within_s * self._chance.random() ** 3
            self._stage.at(told_at, self._stage.announce, link, port, process)
            if superseded:
                self._stage.at(told_at, self._stage.supersede, link, old)

    # Drawing

    def _holding_s(self) -> float:
        """Mostly seconds, now and then minutes."""
        return min(0.2 + self._chance.lognormvariate(1.5, 1.3), 240.0)

    def _some(self, things: Sequence[Any], n: int) -> list[Any]:
        return self._chance.sample(things, min(n, len(things)))

    def _living(self) -> Rank:
        ranks = self._network.ranks
        living = [rank for rank in self._chance.sample(ranks, min(8, len(ranks))) if rank.port.process is not None]
        return living[0] if living else self._revived()

    def _revived(self) -> Rank:
        """Everybody who was asked is dead, in a small fleet: one comes back at once."""
        rank = self._chance.choice(self._network.ranks)
        if rank.port.process is None:
            self._rise(rank, None, 5.0)
        return rank
