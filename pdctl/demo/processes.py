"""
Child processes that cannot outlive the demo: started, asked, stopped, continued, killed.

A child is asked in JSON lines on its stdin and answers on its stdout; what it says on stderr is kept as its log. It
gets its own session, so that Ctrl-C reaches only the parent, which then ends its children in order; should the parent
die without doing so, the kernel kills them (leash.py). Every wait here has a deadline.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import sys
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from pdctl.errors import Unreachable

Event = dict[str, Any]

_LEASH = Path(__file__).with_name("leash.py")
_LINE_LIMIT = 1 << 20


class Goodbye(Enum):
    """How a child is told to end: by the end of its stdin, or by SIGTERM."""

    END_OF_INPUT = "end of input"
    SIGTERM = "SIGTERM"


@dataclass(frozen=True, slots=True)
class Ending:
    """How a child went: its status (negative: the signal), the seconds it took, and whether it had to be killed."""

    name: str
    status: int
    took_s: float
    forced: bool


class Child:
    """One process. `events` holds every line that it said unasked, oldest first; `hear` is told of each as it comes."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, goodbye: Goodbye) -> None:
        self.hear: Callable[[Event], None] = _ignore
        self.name, self.pid, self.events = name, process.pid, list[Event]()
        self._process, self._goodbye = process, goodbye
        self._news = asyncio.Condition()
        self._answers: dict[int, asyncio.Future[Event]] = {}
        self._numbers = itertools.count(1)
        self._log: deque[str] = deque(maxlen=400)
        self._readers = [
            asyncio.create_task(self._read_answers(_piped(process.stdout)), name=f"{name} stdout"),
            asyncio.create_task(self._read_log(_piped(process.stderr)), name=f"{name} stderr"),
        ]
        self._silent = False

    async def ask(self, op: str, *, deadline_s: float = 30.0, **fields: object) -> Event:
        """Send one request; returns its answer. Raises Unreachable when it ends, or does not answer in time."""
        return await self.asked(op, **fields).within(deadline_s)

    def asked(self, op: str, **fields: object) -> Question:
        """Send one request now; await its answer later."""
        number = next(self._numbers)
        future = self._answers[number] = asyncio.get_running_loop().create_future()
        if self._silent or self._process.stdin is None:
            _fail(future, self._gone())
        else:
            self._process.stdin.write(json.dumps({"id": number, "op": op, **fields}).encode() + b"\n")
        return Question(self, op, future)

    async def event(self, kind: str, *, deadline_s: float = 30.0, **equal: object) -> Event:
        """The first event of this kind with these values, said or yet to be said."""
        wanted = {"event": kind, **equal}
        return await self.first(kind, lambda event: wanted.items() <= event.items(), deadline_s=deadline_s)

    async def first(self, what: str, is_it: Callable[[Event], bool], *, deadline_s: float = 30.0) -> Event:
        """The first event that `is_it`, said or yet to be said; `what` names it in the error."""
        try:
            async with asyncio.timeout(deadline_s), self._news:
                while (found := next(filter(is_it, self.events), None)) is None:
                    if self._silent:
                        raise self._gone()
                    await self._news.wait()
                return found
        except TimeoutError as exc:
            raise Unreachable(f"{self.name} has not said {what} within {deadline_s:g} s: read its log") from exc

    def pause(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    async def kill(self) -> Ending:
        """SIGKILL, and wait until the kernel has taken it away."""
        return await self._end(grace_s=0.0)

    async def close(self, grace_s: float = 8.0) -> Ending:
        """Tell it to end; kill it when `grace_s` is over. Always returns with the process gone."""
        return await self._end(grace_s)

    @property
    def alive(self) -> bool:
        return self._process.returncode is None

    def listening_ports(self) -> list[int]:
        """TCP ports that it listens at, as the kernel has them."""
        sockets = {os.readlink(fd) for fd in Path(f"/proc/{self.pid}/fd").iterdir() if fd.is_symlink()}
        tables = [Path(f"/proc/{self.pid}/net/{name}") for name in ("tcp", "tcp6")]
        rows = [line.split() for table in tables if table.exists() for line in table.read_text().splitlines()[1:]]
        return sorted({int(row[1].rpartition(":")[2], 16) for row in rows if _is_listening(row, sockets)})

    def log_tail(self, n: int = 12) -> list[str]:
        return list(self._log)[-n:]

    def log_events(self) -> list[Event]:
        """The lines of the log that are JSON objects, as `log.format=json` writes them."""
        return [event for event in map(_as_event, self._log) if event is not None]

    async def _end(self, grace_s: float) -> Ending:
        started = asyncio.get_running_loop().time()
        with suppress(ProcessLookupError):
            self._say_goodbye(grace_s)
        forced = not await self._gone_within(grace_s)
        if forced:
            with suppress(ProcessLookupError):
                self._process.kill()
        status = await self._process.wait()
        await asyncio.wait(self._readers, timeout=1.0)
        for reader in self._readers:
            reader.cancel()
        return Ending(self.name, status, asyncio.get_running_loop().time() - started, forced)

    def _say_goodbye(self, grace_s: float) -> None:
        if grace_s <= 0:
            return
        if self._goodbye is Goodbye.SIGTERM:
            self._process.terminate()
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.send_signal(signal.SIGCONT)  # a stopped child cannot hear the rest

    async def _gone_within(self, grace_s: float) -> bool:
        if grace_s <= 0:
            return not self.alive
        try:
            async with asyncio.timeout(grace_s):
                await self._process.wait()
        except TimeoutError:
            return False
        return True

    def _gone(self) -> Unreachable:
        return Unreachable(f"{self.name} (pid {self.pid}) has ended: read its log")

    async def _read_answers(self, stdout: asyncio.StreamReader) -> None:
        try:
            async for line in stdout:
                text = line.decode(errors="replace").strip()
                await self._take(_as_event(text) or {"event": "said", "text": text})
        finally:
            await self._fall_silent()

    async def _take(self, event: Event) -> None:
        answered = self._answers.pop(event.get("answers", 0), None)
        if answered is not None and not answered.done():
            answered.set_result(event)
            return
        self.events.append(event)
        self.hear(event)
        async with self._news:
            self._news.notify_all()

    async def _fall_silent(self) -> None:
        self._silent = True
        for future in self._answers.values():
            _fail(future, self._gone())
        self._answers.clear()
        async with self._news:
            self._news.notify_all()

    async def _read_log(self, stderr: asyncio.StreamReader) -> None:
        async for line in stderr:
            self._log.append(line.decode(errors="replace").rstrip())


@dataclass(frozen=True, slots=True)
class Question:
    """A request under way."""

    child: Child
    op: str
    _future: asyncio.Future[Event]

    async def within(self, deadline_s: float) -> Event:
        try:
            async with asyncio.timeout(deadline_s):
                return await asyncio.shield(self._future)
        except TimeoutError as exc:
            said = f"{self.child.name} has not answered {self.op} within {deadline_s:g} s: read its log"
            raise Unreachable(said) from exc


class Family:
    """The children of one demo, in the order of their birth; ended in reverse by `family()`.

    `children` are those that were not ended yet, `everyone` has been born.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = dict(environment)
        self.children: list[Child] = []
        self.everyone: list[Child] = []
        self.endings: list[Ending] = []

    async def start(self, name: str, module: str, *args: str, goodbye: Goodbye = Goodbye.END_OF_INPUT) -> Child:
        """`python -m module args...` on a leash."""
        return await self.start_command(name, [sys.executable, "-m", module, *args], goodbye)

    async def start_command(self, name: str, command: Sequence[str], goodbye: Goodbye) -> Child:
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", str(_LEASH), str(os.getpid()), *command),
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            env=self._environment,
            start_new_session=True,
            limit=_LINE_LIMIT,
        )
        child = Child(name, process, goodbye)
        self.children.append(child)
        self.everyone.append(child)
        return child

    async def end(self, child: Child, ending: Callable[[Child], Any] = Child.close) -> Ending:
        """End one child before the others; keeps how it went."""
        told: Ending = await ending(child)
        self.endings.append(told)
        self.children.remove(child)
        return told

    async def close(self) -> None:
        """End the rest, the youngest first. Whatever happens meanwhile, nobody is left."""
        try:
            while self.children:
                await self.end(self.children[-1])
        finally:
            for child in self.children:
                with suppress(ProcessLookupError):
                    os.kill(child.pid, signal.SIGKILL)


@asynccontextmanager
async def family(environment: Mapping[str, str]) -> AsyncIterator[Family]:
    """Children that are gone when the block is left, however it is left."""
    members = Family(environment)
    try:
        yield members
    finally:
        await members.close()


def _piped(stream: asyncio.StreamReader | None) -> asyncio.StreamReader:
    if stream is None:
        raise ValueError("the child was started without pipes: start it through a Family")
    return stream


def _is_listening(row: list[str], sockets: set[str]) -> bool:
    """A row of /proc/net/tcp: state 0A is LISTEN, column 9 the socket's inode."""
    return row[3] == "0A" and f"socket:[{row[9]}]" in sockets


def _ignore(event: Event) -> None:
    """Nobody listens yet."""


def _fail(future: asyncio.Future[Event], reason: Unreachable) -> None:
    if not future.done():
        future.set_exception(reason)
        future.exception()  # seen: asyncio need not warn when nobody asks any more


def _as_event(line: str) -> Event | None:
    try:
        told = json.loads(line)
    except ValueError:
        return None
    return told if isinstance(told, dict) else None
