"""
What a process of ours costs before it does anything: CPU seconds, its own and those of the kernel, beside a bare Python.

Commands until they have ended, services until they have said that they listen, ranks until they are registered. CPU
and not wall seconds, which a busy machine changes more; medians of seven, after a first one that nobody counts.
"""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import psutil

from pdctl.config import Settings
from pdctl.sections import NodeSettings, ServeSettings
from tests.bench.rivals import Row
from tests.node_rig import FIRST, SHAPE, Memory
from tests.service import service

ROUNDS = 7
PRINTING = ("--version", "--help", "completion bash")
ASKING = ("status", "events", "sessions", "explain")
SERVE = ("serve", "--port", "0", "--journal", "memory:")
AGENT = ("agent", "--socket")


def bench() -> list[Row]:
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        url = stack.enter_context(service(Path(folder, "log"), "--journal", "memory:")).url
        bare = of(partial(ended, "-c", "pass"))
        return [Row(what, "pdctl", "python -c pass", of(once), bare) for what, once in kinds(url, folder)]


def kinds(url: str, folder: str) -> Iterator[tuple[str, Callable[[], float]]]:
    for words in PRINTING:
        yield f"pdctl {words}", partial(ended, "-m", "pdctl", *words.split())
    for words in ASKING:
        yield f"pdctl {words}", partial(ended, "-m", "pdctl", words, "--at", url)
    yield "pdctl serve, until it listens", partial(until, "serving at", "-m", "pdctl", *SERVE)
    yield "pdctl agent, until it listens", partial(until, "serving at", "-m", "pdctl", *AGENT, f"{folder}/s")
    for role in ("prefill", "decode"):
        yield f"{role} rank, until it is registered", partial(until, "ready", "-m", "tests.bench.starts", role, url)


def of(once: Callable[[], float]) -> tuple[float, ...]:
    once()  # compiles, and fills the page cache
    return tuple(once() for _ in range(ROUNDS))


def ended(*words: str) -> float:
    """CPU seconds of `python WORDS`, and of all that it waited for."""
    before = _of_children()
    subprocess.run([sys.executable, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    return _of_children() - before


def until(said: str, *words: str) -> float:
    """CPU seconds of `python WORDS` and of its children until one of them says it; then they are killed."""
    with subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, text=True, start_new_session=True) as child:
        assert child.stdout
        try:
            for line in child.stdout:
                if said in line:
                    family = [psutil.Process(child.pid), *psutil.Process(child.pid).children(recursive=True)]
                    return float(sum(sum(each.cpu_times()[:2]) for each in family))
        finally:
            os.killpg(child.pid, signal.SIGKILL)
    raise RuntimeError(f"{' '.join(words)} never said {said!r}")


def _of_children() -> float:
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


async def rank(role: str, registry: str) -> None:
    """A rank with as little memory as one can have; it says when it is ready, and stays."""
    from pdctl.node import decode_node, prefill_node  # who measures has none, and no engine

    memory, how = Memory(), Settings(node=NodeSettings(registry=registry, ttl_s=2.0), serve=ServeSettings(port=0))
    opening = (
        prefill_node(how, **memory.pools, seat=FIRST, shape=SHAPE)
        if role == "prefill"
        else decode_node(how, **memory.pools, shape=SHAPE, registry=registry)
    )
    async with opening as node:
        while not node.registered:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        print("ready", flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(rank(*sys.argv[1:]))
