"""
The store port: what a shared KV store must promise, whoever keeps it.

Return codes end below this line; above it there are results and `StoreFailed` with a `StoreCause`.
A store's promises, held by one contract suite over all adapters:

- Nothing is overwritten: `put` of a key that exists leaves the old value, and is no error (a key names its content).
- A batch tells of each key apart: one that fails does not hide the others.
- Zero copy means that the caller's memory is in the store's hands until the call returns. A call that is cancelled
  returns only when the store is done with that memory.
- After `close` every call raises StoreFailed (CLOSED); closing again does nothing. Before set-up there is no object.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pdctl.core.layout import Region
from pdctl.errors import StoreFailed

Ints = NDArray[np.int64]

Each = tuple[StoreFailed | None, ...]
"""What became of each key, in the order in which they were given: None where it is well."""


@dataclass(frozen=True, slots=True)
class StoreAbility:
    """What the installed store can do, found before it is set up: `setup` has the names that its set-up takes."""

    name: str
    version: str
    setup: frozenset[str]


class Store(Protocol):
    """Set up already. `name` is the address under which the master knows this client."""

    @property
    def name(self) -> str: ...

    @property
    def ability(self) -> StoreAbility: ...

    async def put(self, key: str, value: bytes) -> None:
        """Keep a small value, at most as large as the local buffer (16 MiB). Raises StoreFailed."""

    async def get(self, key: str) -> bytes:
        """A small value. Raises StoreFailed, MISSING where there is none."""

    async def exists(self, keys: Sequence[str]) -> list[bool]:
        """Which of the keys are there. Raises StoreFailed where that cannot be known."""

    async def remove(self, key: str, *, force: bool = False) -> None:
        """Raises StoreFailed: MISSING; LEASED for 10 s after the key was read or asked for, unless `force`."""

    async def register(self, region: Region) -> None:
        """Let pages be put from and got into `region`. Raises CallerError for one that is empty or overlaps."""

    async def unregister(self, region: Region) -> None:
        """Take back a `register`. Raises CallerError for what was not registered."""

    async def put_pages(self, keys: Sequence[str], pointers: Ints, nbytes: Ints) -> Each:
        """Keep for each key the bytes at its pieces, one after the other; the pieces lie in registered memory.

        `pointers` and `nbytes` have the shape (keys, pieces), int64. Raises StoreFailed only where none could be tried.
        """

    async def get_pages(self, keys: Sequence[str], pointers: Ints, nbytes: Ints) -> Each:
        """Bring back what `put_pages` kept, into the pieces; MISSING for a key that is not there.

        What a key's pieces hold after it failed is not known. Raises StoreFailed only where none could be tried.
        """

    async def health(self) -> None:
        """Raises StoreFailed while the store's master cannot be reached. Costs no question: what was seen last."""

    async def close(self) -> None:
        """Give back what the store holds here, or leave it to the process's end where that could freeze it."""
