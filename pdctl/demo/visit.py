"""
For those who watch the page: where it is, pauses in which something can be seen, and a fleet that stays.

The story is the same with it and without; here it only waits. Requests go on meanwhile, so that something moves.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pdctl.demo.prompts import Prompt
from pdctl.demo.screen import Screen
from pdctl.demo.stage import REQUEST_DEADLINE_S, Stage, fetch, until
from pdctl.demo.stage import value_of as metric
from pdctl.errors import PdctlError, Unreachable

LOOK_S = 6.0
"""As long as a person takes to find what has changed."""
STOPPED_S = 8.0
BETWEEN_REQUESTS_S = 1.0
WATCHERS = "pdctl_watch_streams_open"


@dataclass(slots=True)
class Visit:
    """One show for one page. `prompts`: what is asked while people look."""

    screen: Screen
    prompts: tuple[Prompt, ...]
    opened_within_s: float = 120.0

    async def open(self, stage: Stage) -> None:
        """Say where the page is, and wait until somebody has it open; not for ever."""
        self.screen.call(f"open {stage.registry_url}/ in a browser: the show goes on when the page is open")

        async def is_open() -> bool:
            text = await fetch(f"{stage.registry_url}/metrics")
            return metric(text.splitlines(), WATCHERS) > 0

        with contextlib.suppress(Unreachable):  # nobody has come: the show goes on for those who read here
            await until(is_open, "the page", deadline_s=self.opened_within_s)

    async def look(self, what: str, stage: Stage | None = None, seconds: float = LOOK_S) -> None:
        """`what` can be seen now. With a `stage`, requests go on."""
        self.screen.call(f"on the page: {what}")
        ended = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            if stage is not None:
                group.create_task(self._requests(stage, ended), name="requests")
            await asyncio.sleep(seconds)
            ended.set()  # and the one under way is waited for: the story goes on with an idle fleet

    async def stay(self, stage: Stage) -> None:
        """Until Ctrl-C, or SIGTERM, which are its end and nobody's failure. Enter stops decode once more."""
        again = asyncio.Event()
        with _entered(again.set) as can_enter:
            self.screen.call(
                f"the fleet stays, the page too: {stage.registry_url}/ - Ctrl-C ends them"
                + (f", Enter stops the decode rank for {STOPPED_S:g} s once more" if can_enter else "")
            )
            with _until_told():
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._requests(stage, asyncio.Event()), name="requests")
                    while await again.wait():
                        again.clear()
                        await self._stop_decode(stage)

    async def _stop_decode(self, stage: Stage) -> None:
        stage.decode.pause()
        try:
            self.screen.note("decode stands still (SIGSTOP)")
            await asyncio.sleep(STOPPED_S)
        finally:
            stage.decode.resume()
        self.screen.note("decode goes on (SIGCONT)")

    async def _requests(self, stage: Stage, ended: asyncio.Event) -> None:
        """One after the other. What fails is on the page, and is what it is there for."""
        for prompt in itertools.cycle(self.prompts):
            if ended.is_set():
                return
            room = stage.next_room()
            with contextlib.suppress(PdctlError):
                for asked in (stage.ask_decode(room, prompt), stage.ask_prefill(room, prompt)):
                    await asked.within(REQUEST_DEADLINE_S)
            await asyncio.sleep(BETWEEN_REQUESTS_S)


@contextlib.contextmanager
def _until_told() -> Iterator[None]:
    """To be told to stop ends the block, and nothing else."""
    try:
        yield
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None:
            task.uncancel()


@contextlib.contextmanager
def _entered(hear: Callable[[], object]) -> Iterator[bool]:
    """`hear` is called for each line that a person enters; whether there is one to do so."""
    loop = asyncio.get_running_loop()
    if not sys.stdin or not sys.stdin.isatty():
        yield False
        return

    def read() -> None:
        if sys.stdin.readline():
            hear()
        else:
            loop.remove_reader(sys.stdin.fileno())

    loop.add_reader(sys.stdin.fileno(), read)
    try:
        yield True
    finally:
        loop.remove_reader(sys.stdin.fileno())
