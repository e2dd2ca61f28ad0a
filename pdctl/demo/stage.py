"""
Who plays in the demo and how a request is sent through them: four processes, one registry port, running room numbers.

It does what a router does, and nothing a router would not: gives a request's room to both ranks and waits for both. It
judges nothing; that is story.py.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import socket
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field

import aiohttp

from pdctl.core.layout import Pool
from pdctl.core.plan import item_plan
from pdctl.demo.aux_rows import AuxRows
from pdctl.demo.processes import Child, Event, Family, Goodbye, Question
from pdctl.demo.prompts import Prompt
from pdctl.demo.report import Moved
from pdctl.demo.screen import Bar, Screen
from pdctl.demo.toy import ToyConfig
from pdctl.demo.workers import CHUNK_PAGES
from pdctl.errors import Unreachable
from pdctl.several import of_each

HOST = "127.0.0.1"
REQUEST_DEADLINE_S = 60.0
SETTINGS: Mapping[str, str] = {
    "retry.first_wait_s": "0.25",
    "retry.max_wait_s": "0.5",
    "engine.progress_timeout_s": "1",
    "engine.window": "4",
    "room.bootstrap_s": "20",
    "room.waiting_s": "30",
    "room.transfer_s": "20",
    "room.drain_margin_s": "0.5",
    "probe.interval_s": "0.1",
    "probe.max_interval_s": "0.5",
    "log.format": "json",
}
"""Impatient, so that the show is short: production waits longer."""


@dataclass(frozen=True, slots=True)
class Finished:
    """A request as all three saw it: prefill's answer, decode's answer, and the tokens of the run in one process."""

    prompt: Prompt
    prefilled: Event
    decoded: Event
    expected: list[int]

    @property
    def tokens(self) -> list[int]:
        return list(self.decoded.get("tokens", []))

    @property
    def error(self) -> str | None:
        return self.decoded.get("error") or self.prefilled.get("error")

    @property
    def same_bytes(self) -> bool:
        """The pages hold the same at both ends."""
        return "digest" in self.prefilled and self.prefilled["digest"] == self.decoded.get("digest")

    def moved(self, toy: ToyConfig) -> Moved:
        if self.error is not None:
            return Moved()
        source, destination = self.prefilled["pages"], self.decoded["pages"]
        return Moved(
            requests=1,
            tokens=len(self.prompt.tokens),
            pages=len(source),
            blocks=_n_blocks(toy, source, destination),
            nbytes=len(source) * toy.page_nbytes,
            aux_nbytes=AuxRows.nbytes_for(1),
            seconds=self.prefilled["moving_s"],
        )


@dataclass(frozen=True, slots=True)
class Running:
    """A request under way."""

    room: int
    prompt: Prompt
    decode: Question
    prefill: Question
    alone: Question

    async def finished(self) -> Finished:
        prefilled, decoded, alone = await asyncio.gather(
            *(question.within(REQUEST_DEADLINE_S) for question in (self.prefill, self.decode, self.alone))
        )
        return Finished(self.prompt, prefilled, decoded, alone["tokens"])


@dataclass(slots=True)
class Stage:
    """The cast. Children are there from the act that starts them."""

    family: Family
    screen: Screen
    toy: ToyConfig
    held: socket.socket
    prefill: Child
    decode: Child
    alone: Child
    opened_at: float = field(default_factory=time.monotonic)
    port: int = 0
    rooms: Iterator[int] = field(default_factory=lambda: itertools.count(random.SystemRandom().randrange(1, 2**60)))
    bars: dict[int, Bar] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.port = self.held.getsockname()[1]

    @property
    def registry_url(self) -> str:
        return registry_url(self.port)

    def next_room(self) -> int:
        return next(self.rooms)

    def run(self, prompt: Prompt) -> Running:
        """Give a request to both ranks, and to the one that runs it alone."""
        room = self.next_room()
        self.bars[room] = self.screen.bar(prompt.name, self.toy.pages_for(len(prompt.tokens)))
        return Running(room, prompt, self.ask_decode(room, prompt), self.ask_prefill(room, prompt), self._alone(prompt))

    def ask_decode(self, room: int, prompt: Prompt) -> Question:
        return self.decode.asked("generate", room=room, n_prompt=len(prompt.tokens), n_new=prompt.n_new)

    def ask_prefill(self, room: int, prompt: Prompt) -> Question:
        return self.prefill.asked("generate", room=room, tokens=prompt.tokens)

    def _alone(self, prompt: Prompt) -> Question:
        return self.alone.asked("generate", tokens=prompt.tokens, n_new=prompt.n_new)

    async def run_all(self, prompts: Iterable[Prompt], at_once: int = 4) -> list[Finished]:
        """All of them, `at_once` at a time, in their order; their bars move meanwhile."""
        async with self.screen.bars():
            return await of_each(lambda prompt: self.run(prompt).finished(), prompts, at_once=at_once)

    def hear(self, event: Event) -> None:
        """Move the bar of the room that prefill speaks of."""
        bar = self.bars.get(event.get("room", 0))
        if bar is not None and event["event"] == "sent":
            bar.at(event["pages"])

    async def registered(self) -> bool:
        return bool((await self.prefill.ask("status"))["registered"])

    async def metrics(self, *prefixes: str) -> list[str]:
        """Lines of the prefill rank's /metrics that begin so."""
        text = await fetch((await self.prefill.event("ready"))["metrics"])
        return [line for line in text.splitlines() if line.startswith(prefixes)]


async def start_rank(family: Family, name: str, role: str, port: int) -> Child:
    settings = {**SETTINGS, "node.registry": registry_url(port)}
    flags = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    return await family.start(name, "pdctl.demo.rank", role, *flags)


async def start_registry(stage: Stage) -> Child:
    """`pdctl serve`, the command itself, at the port that was kept for it; returns when it says that it serves."""
    stage.held.close()
    where = ("--host", HOST, "--port", str(stage.port), "--journal", "memory:", "--log-format", "json")
    child = await stage.family.start("registry", "pdctl", "serve", *where, goodbye=Goodbye.SIGTERM)
    await child.first("where it serves", lambda event: "http://" in event.get("text", ""))
    return child


def registry_url(port: int) -> str:
    return f"http://{HOST}:{port}"


async def open_stage(family: Family, screen: Screen, toy: ToyConfig) -> Stage:
    """Everybody but the registry. Its port is bound and not listened at: connecting there is refused."""
    held = socket.socket()
    held.bind((HOST, 0))
    port = held.getsockname()[1]
    prefill, decode, alone = [await start_rank(family, role, role, port) for role in ("prefill", "decode", "alone")]
    stage = Stage(family, screen, toy, held, prefill, decode, alone)
    prefill.hear = stage.hear
    return stage


async def fetch(url: str) -> str:
    """The body of a GET that must succeed."""
    timeout = aiohttp.ClientTimeout(total=5.0)
    async with aiohttp.ClientSession(timeout=timeout, raise_for_status=True) as session:
        try:
            async with session.get(url) as response:
                return await response.text()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise Unreachable(f"{url} does not answer as it should: {error}: read the logs") from error


def value_of(lines: Iterable[str], name: str) -> float:
    """The sum over all series of one metric."""
    series = (line.rpartition(" ") for line in lines)
    return sum(float(value) for left, _, value in series if left.partition("{")[0] == name)


async def until(is_so: Callable[[], Awaitable[bool]], what: str, *, deadline_s: float) -> float:
    """Ask until it is so; returns the seconds that it took. Raises Unreachable when it was not so in time."""
    started = time.monotonic()
    try:
        async with asyncio.timeout(deadline_s):
            while not await is_so():  # noqa: ASYNC110  # another process's state: only asking tells
                await asyncio.sleep(0.02)
    except TimeoutError as exc:
        raise Unreachable(f"{what} has not come about within {deadline_s:g} s: read the logs") from exc
    return time.monotonic() - started


def is_closed(port: int) -> bool:
    with closing(socket.socket()) as asker:
        asker.settimeout(1.0)
        return asker.connect_ex((HOST, port)) != 0


def _n_blocks(toy: ToyConfig, source: list[int], destination: list[int]) -> int:
    """Copies that the engine was given: neighbours at both ends are one, chunk by chunk."""
    pool = Pool((0,) * toy.entries, (toy.item_nbytes,) * toy.entries)
    starts = range(0, len(source), CHUNK_PAGES)
    chunks = ((source[s : s + CHUNK_PAGES], destination[s : s + CHUNK_PAGES]) for s in starts)
    return sum(len(item_plan(pool, pool, here, there, "demo")) for here, there in chunks)
