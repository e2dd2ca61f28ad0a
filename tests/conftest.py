"""What every room of the house needs in its tests: a clock that is turned by hand."""

from __future__ import annotations

import pytest


class Clock:
    """Seconds, monotonic, any zero. `clock()` reads it, `clock.forward(s)` turns it."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def forward(self, seconds: float) -> float:
        assert seconds >= 0
        self.now += seconds
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()
