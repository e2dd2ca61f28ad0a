"""A device that records what was done to it, and on which thread."""

from __future__ import annotations

import threading

from pdctl.device.cpu import Cpu


class Recording(Cpu):
    """Host memory, as a device that says what happened to it, in order, with the thread's name."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str]] = []

    def note(self, what: str) -> None:
        self.seen.append((what, threading.current_thread().name))

    def bind(self) -> None:
        self.note("bound")
