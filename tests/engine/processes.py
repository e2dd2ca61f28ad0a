"""Child processes for the engine's tests: started, asked by JSON lines, stopped, killed, never left behind."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from pdctl import logs
from pdctl.logs import LogSettings

ROOT = Path(__file__).parents[2]
_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """SIGKILL for this process when its parent ends, even a stopped one."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


async def obey(who: object, hello: dict[str, Any]) -> None:
    """A `Child`'s own side: say hello, then do what each line names and answer it, until there are no more."""
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    print(json.dumps(hello), flush=True)
    while line := await reader.readline():
        asked = json.loads(line)
        try:
            done = await getattr(who, asked.pop("do"))(**asked)
        except Exception as error:  # told to the test, which fails by it
            done = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(done), flush=True)


def live(main: Coroutine[Any, Any, None]) -> NoReturn:
    """As a `Child`: no longer than its parent, and no longer than what it does: closed engines keep their threads."""
    die_with_parent()
    logs.configure(LogSettings())
    asyncio.run(main)
    sys.stdout.flush()
    os._exit(0)


class Child:
    """`python -m module arguments`, a process that speaks JSON lines; `hello` is its first. A context manager.

    `environ` comes on top of this process's own, from which the engine's variables are taken out.
    """

    def __init__(self, module: str, *arguments: str, environ: Mapping[str, str] | None = None) -> None:
        own = {name: value for name, value in os.environ.items() if not name.startswith("MC_")}
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=ROOT,
            env={**own, **(environ or {})},
        )
        self._read = b""
        assert self._process.stdout
        self._polling = select.poll()  # select.select() knows no file above 1,023, and engines hold many
        self._polling.register(self._process.stdout, select.POLLIN)
        try:
            self.hello = self.line(60.0)
        except BaseException:
            self.kill()
            raise

    @property
    def session(self) -> str:
        return str(self.hello["session"])

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    async def ask(self, do: str, **arguments: object) -> dict[str, Any]:
        return await asyncio.to_thread(self.ask_now, do, **arguments)

    def ask_now(self, do: str, **arguments: object) -> dict[str, Any]:
        assert self._process.stdin
        self._process.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
        self._process.stdin.flush()
        return self.line()

    def line(self, deadline_s: float = 60.0) -> dict[str, Any]:
        """Its next line. EOFError when it has ended, TimeoutError when it says nothing."""
        assert self._process.stdout
        until = time.monotonic() + deadline_s
        while b"\n" not in self._read:
            ready = self._polling.poll(max(0.0, until - time.monotonic()) * 1000)
            if not ready:
                raise TimeoutError(f"the child said nothing for {deadline_s} s")
            more = os.read(self._process.stdout.fileno(), 1 << 16)
            if not more:
                raise EOFError(f"the child has ended with {self.end()}")
            self._read += more
        line, _, self._read = self._read.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def end(self, deadline_s: float = 30.0) -> int:
        """Wait for it; its exit status, negative for a signal."""
        return self._process.wait(deadline_s)

    def stop(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)
        while _state(self.pid) != "T":  # takes microseconds
            os.sched_yield()

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream
            stream.close()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.kill()


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def peer(*, environ: Mapping[str, str] | None = None, **settings: object) -> Child:
    """A process with an open engine; `session` is its id."""
    return Child("tests.engine.peer", json.dumps(settings), environ=environ)


class Peers:
    """Peer processes that go from test to test: starting one takes longer than most tests."""

    def __init__(self) -> None:
        self._idle: list[Child] = []

    def take(self) -> Child:
        return self._idle.pop() if self._idle else peer()

    def give_back(self, child: Child) -> None:
        """Emptied, for the next test; or killed."""
        if child.is_alive:
            child.resume()
            try:
                child.ask_now("empty")
                self._idle.append(child)
            except (OSError, EOFError):  # a TimeoutError is an OSError
                child.kill()

    def close(self) -> None:
        for child in self._idle:
            child.kill()


class Address:
    """A session id that one process after another can hold.

    A killed engine's own ports are not free for a minute (TIME_WAIT); this forwards handshakes to whoever is `holder`.
    """

    def __init__(self) -> None:
        self.holder = ""
        self.session = ""

    @classmethod
    @asynccontextmanager
    async def listening(cls) -> AsyncIterator[Address]:
        it = cls()
        server = await asyncio.start_server(it._forward, "127.0.0.1", 0)
        it.session = "{}:{}".format(*server.sockets[0].getsockname())
        async with server:
            yield it

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, port = self.holder.rsplit(":", 1)
        with contextlib.suppress(OSError):
            there, back = await asyncio.open_connection(host, int(port))
            await asyncio.gather(_pump(reader, back), _pump(there, writer))
        writer.close()


async def _pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await source.read(1 << 16):
            sink.write(data)
    sink.close()
