"""
A conversation trace between two prefill and two decode processes: without faults, then with one every few seconds.

A request is given to one prefill and one decode as a router gives it, at its time in the trace (REPLAY_SPEED times as
fast), with the blocks that the trace says; a block is a page of 128 KiB, 256 bytes a token. Decodes keep blocks, so
that prefixes are not sent again. What may pass is tried again in a room of another number, by POLICY; each request ends
in SUCCESS with every byte as it should be, or is given up by POLICY by name, or counts as lost, and then the bench
fails. REPLAY_TRACE names another trace, REPLAY_SECONDS each pass's length, REPLAY_SEED the faults' order.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import re
import statistics
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pdctl import errors
from pdctl.demo.processes import Child, Event, Family, Goodbye, family
from pdctl.errors import NotNow, RoomFailed, Unreachable
from pdctl.retry import RetryPolicy, retrying
from tests.bench.replay_rank import Given, arguments
from tests.bench.rivals import Row
from tests.bench.trace import EXCERPT, WHOLE, Asked, read

POLICY = RetryPolicy(first_wait_s=0.05, max_wait_s=1.0, max_attempts=40, give_up_after_s=45.0)
"""What the client of a failed room does; ten times what the slowest restart here takes."""

PLACES = ("p0", "p1", "d0", "d1")
SETTINGS = {
    "engine.progress_timeout_s": "2",
    "retry.first_wait_s": "0.1",
    "retry.max_wait_s": "0.5",
    "log.level": "info",
}
DEADLINE_S, FAULT_EVERY_S, STOP_S, CUT_S, AT_MOST = 60.0, 5.0, 1.0, 0.5, 48


class Lost(Exception):
    """A request that ended otherwise than it may."""


@dataclass(frozen=True, slots=True)
class Done:
    """One request. `took_s`: of the room that succeeded, from its opening at decode; `whole_s`: from the request's time
    to its end, waits and repetitions included. `given_up`: why, where it was."""

    rooms: int
    whole_s: float
    took_s: float = 0.0
    nbytes: int = 0
    had: int = 0
    given_up: str = ""
    lost: str = ""


@dataclass(slots=True)
class Place:
    """A rank's place. `child` changes when it is killed; `open`: requests may be given to it; `broken`: a fault is."""

    name: str
    start: Callable[[], Coroutine[Any, Any, Child]]
    child: Child
    open: asyncio.Event = field(default_factory=asyncio.Event)
    broken: bool = False

    async def restart(self, members: Family) -> None:
        self.open.clear()
        await members.end(self.child, Child.kill)
        self.child = await self.start()
        await self.ready()

    async def ready(self) -> None:
        await self.child.event("opened", deadline_s=DEADLINE_S)
        await self.child.ask("ready", deadline_s=DEADLINE_S)
        self.open.set()


@dataclass(slots=True)
class Fleet:
    """A registry, and who is in each place."""

    members: Family
    registries: dict[str, str]
    places: dict[str, Place] = field(default_factory=dict)
    rooms: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    turns: Iterator[int] = field(default_factory=itertools.count)
    failures: Counter[str] = field(default_factory=Counter)
    ending: asyncio.Event = field(default_factory=asyncio.Event)

    async def serve(self, asked: Asked) -> Done:
        """One request, by POLICY, to its end."""
        began, rooms = time.monotonic(), 0

        async def attempt() -> Event:
            nonlocal rooms
            rooms += 1
            return await self._room(asked)

        try:
            told = await retrying(
                POLICY,
                attempt,
                is_permanent=lambda error: not isinstance(error, NotNow),
                on_failure=lambda failure: self.failures.update([_kind(failure.cause)]),
            )
        except NotNow as error:
            return Done(rooms, time.monotonic() - began, given_up=str(error))
        except Lost as error:
            return Done(rooms, time.monotonic() - began, lost=str(error))
        return Done(rooms, time.monotonic() - began, told["took_s"], told["nbytes"], told["had"])

    async def _room(self, asked: Asked) -> Event:
        """One room, at whoever is there; the side that is left is told when the other fails."""
        prefill, decode = await self._turn("p"), await self._turn("d")
        room, blocks = next(self.rooms), list(asked.blocks)
        asks = {
            asyncio.create_task(self._ask(decode, room, blocks, self.registries[prefill.name])): decode.child,
            asyncio.create_task(self._ask(prefill, room, blocks)): prefill.child,
        }
        done, pending = await asyncio.wait(asks, return_when=asyncio.FIRST_EXCEPTION)
        for task in pending:
            with suppress(Unreachable):
                await asks[task].ask("abort", room=room, deadline_s=DEADLINE_S)
        await asyncio.wait(asks)
        ended = [*done, *pending]  # what came first is the cause
        first = next(filter(None, [task.exception() for task in ended]), None)
        if first is not None:
            raise first
        return next(iter(asks)).result()

    async def _ask(self, place: Place, room: int, blocks: list[int], registry: str = "") -> Event:
        child = place.child
        told = await child.ask("room", room=room, hashes=blocks, registry=registry, deadline_s=DEADLINE_S)
        if "error" in told:
            kind = getattr(errors, told["kind"], Lost)
            if issubclass(kind, NotNow):
                raise RoomFailed(room, f"{place.name}: {told['error']}")
            raise Lost(f"room {room} at {place.name}: {told['kind']}: {told['error']}")
        if told.get("wrong"):
            raise Lost(f"room {room} at {place.name}: other bytes in {told['wrong'][:8]} of {len(blocks)} pages")
        return told

    async def _turn(self, kind: str) -> Place:
        """Whoever is open, one after another; if nobody is, the first that is."""
        there = [place for name, place in self.places.items() if name.startswith(kind)]
        ready = [place for place in there if place.open.is_set()]
        if not ready:
            waits = [asyncio.create_task(place.open.wait()) for place in there]
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for wait in waits:
                wait.cancel()
            ready = [place for place in there if place.open.is_set()]
        return ready[next(self.turns) % len(ready)]

    async def left(self, within_s: float = 20.0) -> list[str]:
        """What remains of rooms anywhere when all are over."""
        answers = {
            name: await place.child.ask("idle", within_s=within_s, deadline_s=DEADLINE_S)
            for name, place in self.places.items()
        }
        return [f"{name}: {', '.join(told['left'])}" for name, told in answers.items() if told["left"]]

    # --- faults

    async def kill(self, place: Place) -> None:
        await place.restart(self.members)

    async def stop(self, place: Place) -> None:
        place.child.pause()
        await asyncio.sleep(STOP_S)
        place.child.resume()

    async def cut(self, place: Place) -> None:
        spared = [int(url.rpartition(":")[2]) for url in self.registries.values()]
        await place.child.ask("cut", seconds=CUT_S, spared_ports=spared, deadline_s=DEADLINE_S)

    async def sound(self, kind: str, chance: random.Random) -> Place:
        """A rank that serves and that no other fault is at."""
        there = [place for name, place in self.places.items() if name.startswith(kind)]
        while not (sound := [place for place in there if place.open.is_set() and not place.broken]):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        return chance.choice(sound)

    async def break_one(self, what: str, place: Place) -> None:
        place.broken = True
        await {"kill": self.kill, "stop": self.stop, "cut": self.cut}[what](place)
        place.broken = False


FAULTS = (("kill", "d"), ("stop", "p"), ("cut", "d"), ("kill", "p"), ("stop", "d"))
"""Each kind of fault, and of which rank, in turn without end; which of them, chance says."""


@dataclass(frozen=True, slots=True)
class Pass:
    """What one pass over the trace came to. `seconds`: from the first request to the last one's end."""

    done: Sequence[Done]
    seconds: float
    faults: Counter[str]
    failures: Counter[str]
    left: Sequence[str]

    @property
    def well(self) -> list[Done]:
        return [each for each in self.done if not each.given_up and not each.lost]

    @property
    def lost(self) -> list[str]:
        return [each.lost for each in self.done if each.lost]

    @property
    def given_up(self) -> list[str]:
        return [each.given_up for each in self.done if each.given_up]

    @property
    def ok(self) -> bool:
        return bool(self.well) and not self.lost and not self.left

    def in_words(self) -> str:
        well, rooms = self.well, [each.took_s for each in self.well]
        whole = [each.whole_s for each in well]
        nbytes = sum(each.nbytes for each in well)
        again, had = sum(each.rooms > 1 for each in self.done), sum(each.had for each in well)
        lines = [
            f"{len(self.done)} requests: {len(well)} SUCCESS, {len(self.given_up)} given up by POLICY, "
            f"{len(self.lost)} lost; {again} needed more than one room",
            f"{len(well) / self.seconds:.1f} rooms/s, {nbytes / self.seconds / 1e6:.0f} MB/s of pages that "
            f"arrived, {had} blocks of prefixes not sent again",
            f"room opened to SUCCESS: p50 {_p(rooms, 50)}, p99 {_p(rooms, 99)}; request to its end, all its rooms: "
            f"p50 {_p(whole, 50)}, p99 {_p(whole, 99)}, max {max(whole):.2f} s",
            f"faults: {_counted(self.faults)}; failed rooms, by first cause: {_counted(self.failures)}",
            f"left behind: {'; '.join(self.left) or 'nothing'}",
            *(f"LOST: {each}" for each in self.lost[:10]),
            *(f"given up: {each}" for each in self.given_up[:10]),
        ]
        return "\n  ".join(lines)


def bench() -> list[Row]:
    seconds, speed = float(os.environ.get("REPLAY_SECONDS", "45")), float(os.environ.get("REPLAY_SPEED", "5"))
    path = Path(os.environ.get("REPLAY_TRACE", WHOLE if WHOLE.exists() else EXCERPT))
    trace = read(path, seconds * speed)
    print(f"{path.name}: {len(trace)} requests in {seconds:g} s, {speed:g} times as fast as they came")
    seed = int(os.environ.get("REPLAY_SEED", "1"))
    for name, every_s in (("no faults", None), (f"a fault every {FAULT_EVERY_S:g} s", FAULT_EVERY_S)):
        found = asyncio.run(replay(trace, speed, every_s, seed))
        print(f"{name}: {found.in_words()}")
        if not found.ok:
            raise AssertionError("the replay has lost a request, or something was left behind: see above")
    return []


async def replay(
    trace: Sequence[Asked], speed: float, fault_every_s: float | None, seed: int, n_faults: int | None = None
) -> Pass:
    """The whole trace through processes of its own: once, or, where that is said, until there were `n_faults`."""
    async with opened() as fleet:
        for asked in trace[:8]:  # connections are opened, and that is not what is measured
            await fleet.serve(asked)
        fleet.failures.clear()
        broken = Counter[str]()
        began = time.monotonic()
        async with asyncio.TaskGroup() as group:
            if fault_every_s is not None:
                group.create_task(_break(fleet, fault_every_s, n_faults, seed, broken))
            done = await _all(fleet, trace, speed, began)
            while sum(broken.values()) < (n_faults or 0):
                done += await _all(fleet, trace, speed, time.monotonic())
            seconds = time.monotonic() - began
            fleet.ending.set()
        return Pass(done, seconds, broken, fleet.failures, await fleet.left())


async def _all(fleet: Fleet, trace: Sequence[Asked], speed: float, began: float) -> list[Done]:
    places = asyncio.Semaphore(AT_MOST)

    async def one(asked: Asked) -> Done:
        await asyncio.sleep(max(0.0, began + asked.at_s / speed - time.monotonic()))
        async with places:
            return await fleet.serve(asked)

    return list(await asyncio.gather(*map(one, trace)))


async def _break(fleet: Fleet, every_s: float, most: int | None, seed: int, broken: Counter[str]) -> None:
    """A fault every so often, whether or not the one before is healed; all are when this ends."""
    chance = random.Random(seed)
    async with asyncio.TaskGroup() as healing:
        for what, kind in itertools.islice(itertools.cycle(FAULTS), most):
            await asyncio.sleep(every_s)
            place = await fleet.sound(kind, chance)
            if fleet.ending.is_set():
                return
            broken[f"{what} {kind}"] += 1
            healing.create_task(fleet.break_one(what, place), name=f"{what} {place.name}")
            await asyncio.sleep(0)  # it is broken from now on


@asynccontextmanager
async def opened() -> AsyncIterator[Fleet]:
    async with family({name: value for name, value in os.environ.items() if not name.startswith("MC_")}) as members:
        listen = [part for name in PLACES[:2] for part in ("--listen", f"{name}=127.0.0.1:0")]
        where = ("--port", "0", "--journal", "memory:", *listen)
        registry = await members.start("registry", "pdctl", "serve", *where, goodbye=Goodbye.SIGTERM)
        fleet = Fleet(members, {"": await _url(registry, "at")})
        for name in PLACES[:2]:
            fleet.registries[name] = await _url(registry, f"{name} at")

        def start(name: str) -> Callable[[], Coroutine[Any, Any, Child]]:
            settings = {**SETTINGS, "node.registry": fleet.registries[""], "node.instance": name}
            given = arguments(Given("prefill" if name.startswith("p") else "decode", settings))
            return lambda: members.start(name, "tests.bench.replay_rank", given)

        for name in PLACES:
            fleet.places[name] = Place(name, start(name), await start(name)())
        await asyncio.gather(*(place.ready() for place in fleet.places.values()))
        yield fleet


async def _url(registry: Child, after: str) -> str:
    said = await registry.first("its URL", lambda event: f"serving {after} http" in event.get("text", ""))
    return str(said["text"].rpartition(" ")[2])


def _kind(cause: str) -> str:
    """A cause without its numbers and names."""
    cause = re.sub(r"^room \d+ failed: ", "", cause)
    return re.sub(r"\d[\d.:]*", "N", cause)[:90]


def _counted(found: Counter[str]) -> str:
    return ", ".join(f"{n} x {what}" for what, n in found.most_common()) or "none"


def _p(values: Sequence[float], p: int) -> str:
    return f"{statistics.quantiles(values, n=100, method='inclusive')[p - 1] * 1e3:.0f} ms"
