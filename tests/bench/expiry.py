"""
What decodes notice while a million rooms end: p99 of `GET /route` at a real `pdctl serve`, beside p99 before.

The rooms come out of a journal, so that all of them are due in the same moment: the worst there is. `wrk` asks for a
second again and again, from the start until nobody is left; a window counts as quiet while all rooms are held, and as
expiring when rooms have ended all through it. The target is a ratio of 0.5 or more of p99; the server's own time for an
answer, which has the sweep in it, says the same where others are busy on the machine.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import tempfile
import urllib.request
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from pdctl.persistence.sqlite import open_sqlite
from tests.bench.registry import (
    QUESTIONS,
    Server,
    Shot,
    cpu_each,
    journal_flags,
    p99s,
    seat_all,
    serving,
    shoot,
)
from tests.bench.rivals import Row
from tests.bench.rooms import N_ROOMS, room
from tests.ports import free_port

TTL_S = 20.0  # of which a start takes 3 to 10
WINDOW_S = 1.0
ROUNDS = 7
AT_ONCE = 10_000
ASKED = next(question for question in QUESTIONS if question.what == "GET /route, one rank")
HELD = re.compile(rb"^pdctl_registry_rooms (\S+)$", re.MULTILINE)


@dataclass(slots=True)
class Windows:
    quiet: list[Shot] = field(default_factory=list)
    expiring: list[Shot] = field(default_factory=list)

    @property
    def n_rounds(self) -> int:
        return min(len(self.quiet), len(self.expiring))

    def rows(self) -> list[Row]:
        ending, quiet = self.expiring[: self.n_rounds], self.quiet[: self.n_rounds]
        what = {"p99": p99s, "the server's own time": cpu_each}
        return [
            Row(f"{ASKED.what}: {name}", "a million rooms end", "nothing ends", values(ending), values(quiet))
            for name, values in what.items()
        ]


def bench() -> list[Row]:
    windows, ends = Windows(), list[float]()
    with tempfile.TemporaryDirectory(prefix="pdctl-bench-") as folder:
        asyncio.run(fill(Path(folder) / "rooms"))
        while windows.n_rounds < ROUNDS:
            with started(Path(folder)) as server:
                ends.append(watched(server, windows))
    print(f"a million rooms were gone after {min(ends):.1f} to {max(ends):.1f} s of windows")
    return windows.rows()


async def fill(path: Path) -> None:
    async with open_sqlite(path) as journal:
        for first in range(0, N_ROOMS, AT_ONCE):
            await journal.append([], [(room(place), place % 8) for place in range(first, first + AT_ONCE)])


def started(folder: Path) -> AbstractContextManager[Server]:
    shutil.copyfile(folder / "rooms", folder / "journal.sqlite")
    port = free_port()
    words = ("-m", "pdctl", "serve", "--port", str(port), "--log-level", "warning", *journal_flags(folder))
    return serving("ours", port, words, {**os.environ, "PDCTL_SERVE__ROOM_TTL_S": str(TTL_S)})


def watched(server: Server, windows: Windows) -> float:
    """Ask until no room is left; for how long rooms ended."""
    seat_all(server)
    before, lasted_s = held(server), 0.0
    while before:
        shot = shoot(server, ASKED, WINDOW_S)
        after = held(server)
        if after == N_ROOMS:
            windows.quiet.append(shot)
        elif before < N_ROOMS:
            lasted_s += WINDOW_S
            if after:
                windows.expiring.append(shot)
        before = after
    return lasted_s


def held(server: Server) -> int:
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=10) as answer:
        found = HELD.search(answer.read())
    assert found is not None
    return int(float(found[1]))


if __name__ == "__main__":
    for row in bench():
        print(f"{row.what}: {row.ours_s} while they end, {row.rival_s} before; {row.ratio:.2f} x")
