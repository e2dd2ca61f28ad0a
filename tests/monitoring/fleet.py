"""A registry, a prefill and a decode as processes of their own, and a real Prometheus that scrapes them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.engine.processes import Child
from tests.monitoring.prometheus import Prometheus, prometheus
from tests.service import Service, service, until


@dataclass
class Fleet:
    """`stack` ends what it has started."""

    registry: Service
    prefill: Child
    decode: Child
    stack: ExitStack
    directory: Path
    _rooms: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    @property
    def metrics_urls(self) -> dict[str, str]:
        return {
            "serve": f"{self.registry.url}/metrics",
            "prefill": str(self.prefill.hello["metrics"]),
            "decode": str(self.decode.hello["metrics"]),
        }

    @property
    def journal(self) -> Path:
        return self.directory / "journal"

    def move(self) -> None:
        """One room, from end to end."""
        room = next(self._rooms)
        self.prefill.ask_now("begin", room=room)
        self.decode.ask_now("begin", room=room)
        assert (self.prefill.ask_now("end", room=room), self.decode.ask_now("end", room=room)) == ({"why": ""},) * 2

    def start_registry_again(self) -> None:
        """At the port and with the journal of the one that was killed."""
        port, journal = str(self.registry.port), f"sqlite:{self.journal}"
        again = service(self.directory / "again.log", "--port", port, "--journal", journal)
        self.registry = self.stack.enter_context(again)

    def hold(self) -> int:
        """A room whose page the decode has named, and whose prefill waits to be told to `go`."""
        room = next(self._rooms)
        self.prefill.ask_now("begin", room=room, held=True)
        self.decode.ask_now("begin", room=room)
        self.prefill.ask_now("is_named", room=room)
        return room


@contextmanager
def watched(directory: Path) -> Iterator[tuple[Fleet, Prometheus]]:
    """All that takes its time is started at once: Prometheus is told of the ranks when they have registered."""
    with ExitStack() as stack, ThreadPoolExecutor(2) as pool:  # a child lives no longer than the thread that began it
        registry = stack.enter_context(
            service(directory / "registry.log", "--journal", f"sqlite:{directory / 'journal'}")
        )
        starting = [pool.submit(Child, "tests.monitoring.node", role, registry.url) for role in ("prefill", "decode")]
        for each in starting:
            stack.callback(lambda each=each: each.result().kill())  # type: ignore[misc]
        jobs = {"pdctl-registry": [registry.url.split("/")[2]], "pdctl-ranks": f"{registry.url}/v1/targets"}
        seen = stack.enter_context(prometheus(directory, jobs))
        prefill, decode = (each.result() for each in starting)
        until(lambda: [value for _, value in seen.query("up")] == [1, 1, 1])
        yield Fleet(registry, prefill, decode, stack, directory), seen
