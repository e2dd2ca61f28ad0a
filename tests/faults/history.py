"""
What registries over one etcd acknowledged, under faults, held against what may be: who was told what, and is it so.

    python -m tests.faults.history [ROUNDS] [SEED]      rounds of a fault each; 20 in the tests

Clients claim a few seats at any registry, from new addresses and known ones, give some back, and read; each call with
when it began, when it ended and what came of it. A call without an answer, or with a 503, may have happened or not.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.replicas import Fleet, call, claim, fleet
from tests.service import Service, service, until

SEATS = 3
CLIENTS = 4
LATE_S = 5.0
"""A fresh answer knows what was acknowledged so long before the question."""


@dataclass(frozen=True)
class Word:
    """One call. `epoch` None: not known to have happened. `gone`: it gave the seat back."""

    seat: int
    began: float
    ended: float
    port: int = 0
    epoch: int | None = None
    gone: bool = False


@dataclass(frozen=True)
class Look:
    """What one registry said of the seats to one client: epoch by seat."""

    who: tuple[int, int]  # client, registry
    began: float
    age_s: int
    epochs: dict[int, int]


@dataclass
class History:
    words: list[Word] = field(default_factory=list)
    looks: list[Look] = field(default_factory=list)

    def check(self) -> list[str]:
        """What must not be, in words."""
        return [*self._given_twice(), *self._gone_back(), *self._overlooked()]

    def _given_twice(self) -> list[str]:
        by_epoch: dict[int, Word] = {}
        wrong = []
        for word in self._acknowledged:
            assert word.epoch is not None
            first = by_epoch.setdefault(word.epoch, word)
            if (first.seat, first.port) != (word.seat, word.port):
                wrong.append(f"epoch {word.epoch} was given to {first} and to {word}")
        return wrong

    def _gone_back(self) -> list[str]:
        """Of two claims of a seat the one that began after the other had ended has the higher epoch, or the same."""
        wrong = []
        for seat in range(SEATS):
            mine = [word for word in self._granted if word.seat == seat]
            for one in mine:
                wrong += [
                    f"{later} is older than {one}, which had ended before"
                    for later in mine
                    if later.began > one.ended and (later.epoch or 0) < (one.epoch or 0)
                ]
        last: dict[tuple[int, ...], int] = {}
        for look in self.looks:
            for seat, epoch in look.epochs.items():
                if epoch < last.get((*look.who, seat), 0):
                    wrong.append(f"a registry has gone back at seat {seat} to {epoch}: {look}")
                last[*look.who, seat] = epoch
        return wrong

    def _overlooked(self) -> list[str]:
        """A fresh answer has what was acknowledged well before, or something later, or knows that it was given back."""
        wrong = []
        for look in self.looks:
            if look.age_s:
                continue
            for word in self._granted:
                left = any(each.gone and each.seat == word.seat and each.ended > word.began for each in self.words)
                known = look.epochs.get(word.seat, 0)
                if word.ended < look.began - LATE_S and known < (word.epoch or 0) and not (left and not known):
                    wrong.append(f"{look} does not know {word}")
        return wrong

    @property
    def _granted(self) -> list[Word]:
        """The first word of each life. A claim that is repeated is a renewal: it may be heard by a registry that learns
        only some ms later that the seat was taken meanwhile."""
        first: dict[int, Word] = {}
        for word in sorted(self._acknowledged, key=lambda each: each.ended):
            first.setdefault(word.epoch or 0, word)
        return list(first.values())

    @property
    def _acknowledged(self) -> list[Word]:
        return [word for word in self.words if word.epoch is not None and not word.gone]


class Client(threading.Thread):
    """Claims, gives back and looks, at registries drawn by chance."""

    def __init__(self, number: int, rig: Fleet, history: History, seed: int, over: threading.Event) -> None:
        super().__init__(daemon=True)
        self._number = number
        self._rig = rig
        self._history = history
        self._random = random.Random(seed)
        self._over = over
        self._port = 10_000 * (number + 1)

    def run(self) -> None:
        while not self._over.is_set():
            which = self._random.randrange(len(self._rig.replicas))
            try:
                self._act(which, self._rig.replicas[which])
            except OSError:
                self._over.wait(0.05)  # killed, or stopped; there are others

    def _act(self, which: int, at: Service) -> None:
        seat, dice = self._random.randrange(SEATS), self._random.random()
        if dice < 0.4:
            self._look(which, at)
        elif dice < 0.9:
            self._claim(at, seat)
        else:
            self._leave(at, seat)

    def _claim(self, at: Service, seat: int) -> None:
        self._port += self._random.randrange(2)
        began = time.monotonic()
        epoch = None
        try:
            ttl_s = self._random.choice([None, 60.0])
            answer = claim(at, "p", seat, port=self._port, size=SEATS, ttl_s=ttl_s, timeout_s=4.0)
            epoch = answer.body["epoch"] if answer.status == 200 else None
        finally:
            self._history.words.append(Word(seat, began, time.monotonic(), self._port, epoch))

    def _leave(self, at: Service, seat: int) -> None:
        began = time.monotonic()
        try:
            call("DELETE", f"{at.url}/v1/instances/p/ranks/tp{seat}", timeout_s=4.0)
        finally:
            self._history.words.append(Word(seat, began, time.monotonic(), gone=True))

    def _look(self, which: int, at: Service) -> None:
        began = time.monotonic()
        answer = call("GET", f"{at.url}/v1/instances/p", timeout_s=4.0)
        if answer.status == 200:
            epochs = {row["tp"]: row["epoch"] for row in answer.body["alive_seats"]}
            self._history.looks.append(Look((self._number, which), began, answer.age_s, epochs))


@dataclass
class Rig:
    """What faults are done to. A registry that was killed is started again at once."""

    fleet: Fleet
    where: Path
    stack: ExitStack
    random: random.Random

    def etcd_killed(self) -> None:
        node = self.random.choice(self.fleet.etcd.nodes)
        node.kill()
        self._for_a_while()
        node.start()

    def etcd_stopped(self) -> None:
        node = self.random.choice(self.fleet.etcd.nodes)
        node.stopped(signal.SIGSTOP)
        self._for_a_while()
        node.stopped(signal.SIGCONT)

    def majority_lost(self) -> None:
        nodes = self.random.sample(self.fleet.etcd.nodes, 2)
        for node in nodes:
            node.kill()
        self._for_a_while()
        for node in nodes:
            node.start()

    def registry_stopped(self) -> None:
        replica = self.random.choice(self.fleet.replicas)
        os.kill(replica.pid, signal.SIGSTOP)
        self._for_a_while()
        os.kill(replica.pid, signal.SIGCONT)

    def registry_killed(self) -> None:
        which = self.random.randrange(len(self.fleet.replicas))
        self.fleet.replicas[which].kill()
        log = self.where / f"again{self.random.getrandbits(32)}.log"
        self.fleet.replicas[which] = self.stack.enter_context(service(log, "--journal", self.fleet.etcd.url("fleet")))

    @property
    def faults(self) -> list[Callable[[], None]]:
        return [self.etcd_killed, self.etcd_stopped, self.majority_lost, self.registry_stopped, self.registry_killed]

    def _for_a_while(self) -> None:
        threading.Event().wait(self.random.uniform(0.3, 1.5))  # the fault's length, and nobody is waited for


def run(where: Path, rounds: int, seed: int, say: Callable[[str], None] = lambda line: None) -> History:
    """Rounds of faults; then all is well again and every registry says the same."""
    history, over = History(), threading.Event()
    with fleet(where, n_replicas=2, n_nodes=3) as made, ExitStack() as stack:
        rig = Rig(made, where, stack, random.Random(seed))
        clients = [Client(n, made, history, seed + n, over) for n in range(CLIENTS)]
        for client in clients:
            client.start()
        for n in range(rounds):
            fault = rig.faults[n % len(rig.faults)] if n < len(rig.faults) else rig.random.choice(rig.faults)
            say(f"round {n}: {fault.__name__}")
            fault()
        made.etcd.wait()
        over.set()
        for client in clients:
            client.join(30.0)
            assert not client.is_alive()
        history.words += [last_word(made, seat) for seat in range(SEATS)]
        made.agree("p", {word.epoch for word in history.words[-SEATS:] if word.epoch is not None})
    return history


def last_word(made: Fleet, seat: int) -> Word:
    """A claim that is acknowledged now that all is well."""
    port, taken = 60_000 + seat, list[Word]()

    def is_taken() -> bool:
        began = time.monotonic()
        answer = claim(made.replicas[seat % 2], "p", seat, port=port, size=SEATS, ttl_s=None)
        if answer.status == 200:
            taken.append(Word(seat, began, time.monotonic(), port, answer.body["epoch"]))
        return bool(taken)

    until(is_taken)
    return taken[0]


def main() -> int:
    rounds, seed = (int(text) for text in (*sys.argv[1:3], *("20", "1")[len(sys.argv) - 1 :]))
    with tempfile.TemporaryDirectory() as where:
        history = run(Path(where), rounds, seed, say=print)
    wrong = history.check()
    acknowledged = sum(word.epoch is not None for word in history.words)
    print(f"{len(history.words)} calls, {acknowledged} acknowledged, {len(history.looks)} looks: {len(wrong)} wrong")
    print("\n".join(wrong[:20]))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
