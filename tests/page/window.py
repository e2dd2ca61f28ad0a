"""
A window of Debian's Chromium, for tests that look at the page as people do.

The browser and playwright's loop live in a thread of their own: one for all tests of a worker, whatever loops those
have. A look has a deadline and says, when it is over, what stands on the page instead.
"""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

from playwright.async_api import Browser, Error, Page, async_playwright

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-extensions", "--mute-audio")
DEADLINE_S = 60.0

T = TypeVar("T")
Scheme = Literal["dark", "light"]


def program() -> str | None:
    """Where the system has a Chromium; None where it has none."""
    return next((path for path in map(shutil.which, PROGRAMS) if path is not None), None)


class Window:
    """One page in a context of its own: no cookie and no storage of another window is in it."""

    def __init__(self, page: Page, loop: asyncio.AbstractEventLoop) -> None:
        self.page = page
        self._loop = loop
        self.complaints: list[str] = []
        page.on("pageerror", lambda error: self.complaints.append(error.stack or str(error)))
        page.on("console", lambda said: self.complaints.append(said.text) if said.type == "error" else None)

    async def do(self, make: Callable[[Page], Awaitable[T]]) -> T:
        """What playwright's page can do: `await window.do(lambda page: page.click("#forget"))`."""

        async def done() -> T:
            return await make(self.page)

        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(done(), self._loop))

    async def open(self, url: str) -> None:
        await self.do(lambda page: page.goto(url))

    async def ask(self, expression: str, argument: Any = None) -> Any:
        """What a script of ours finds there."""
        return await self.do(lambda page: page.evaluate(expression, argument))

    async def text(self, selector: str = "body") -> str:
        """What stands there for people: hidden parts have none."""
        return await self.do(lambda page: page.inner_text(selector))

    async def sees(self, words: str, selector: str = "body", *, within_s: float = DEADLINE_S) -> None:
        """Wait until `words` stand there."""
        await self._until(words, selector, True, within_s)

    async def misses(self, words: str, selector: str = "body", *, within_s: float = DEADLINE_S) -> None:
        """Wait until they do not."""
        await self._until(words, selector, False, within_s)

    async def comes(self, expression: str, *, within_s: float = DEADLINE_S) -> None:
        """Wait until `expression` is so."""
        await self.do(lambda page: page.wait_for_function(f"() => {expression}", timeout=within_s * 1000, polling=50))

    async def screenshot(self, path: Path, *, full: bool = False) -> None:
        await self.do(lambda page: page.screenshot(path=path, full_page=full))

    async def _until(self, words: str, selector: str, there: bool, within_s: float) -> None:
        look = """([selector, words, there]) => {
            const found = [...document.querySelectorAll(selector)]
                .some((each) => each.checkVisibility() && each.innerText.includes(words));
            return found === there;
        }"""
        try:
            await self.do(
                lambda page: page.wait_for_function(
                    look, arg=[selector, words, there], timeout=within_s * 1000, polling=50
                )
            )
        except Error as error:
            stands = await self.text(selector)
            wish = "does not say" if there else "still says"
            raise AssertionError(f"{selector} {wish} {words!r} after {within_s:g} s, but: {stands}") from error


class Chromium:
    """One browser; `window` opens a page in it."""

    def __init__(self, browser: Browser, loop: asyncio.AbstractEventLoop) -> None:
        self._browser, self._loop = browser, loop

    @asynccontextmanager
    async def window(
        self, *, width: int = 1280, height: int = 900, scheme: Scheme = "light", scale: float = 1
    ) -> AsyncIterator[Window]:
        async def opened() -> Window:
            context = await self._browser.new_context(
                viewport={"width": width, "height": height}, color_scheme=scheme, device_scale_factor=scale
            )
            return Window(await context.new_page(), self._loop)

        window = await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(opened(), self._loop))
        try:
            yield window
        finally:
            await window.do(lambda page: page.context.close())


@contextmanager
def chromium(path: str) -> Iterator[Chromium]:
    """The browser at `path`, in a thread of its own until the block is left."""
    loop = asyncio.new_event_loop()
    ready, ended = threading.Event(), asyncio.Event()
    found: list[Chromium | BaseException] = []

    async def live() -> None:
        try:
            async with async_playwright() as playwright:
                browser = await playwright.chromium.launch(executable_path=path, args=list(FLAGS))
                found.append(Chromium(browser, loop))
                ready.set()
                await ended.wait()
                await browser.close()
        except BaseException as error:
            found.append(error)
        finally:
            ready.set()

    thread = threading.Thread(target=lambda: loop.run_until_complete(live()), name="chromium")
    thread.start()
    ready.wait(60)
    try:
        first = found[0]
        if isinstance(first, BaseException):
            raise first
        yield first
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join(30)
        loop.close()
