"""One question to a registry, as a value: what is asked, how, and what its answer means."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Exchange(Generic[T]):
    """`what` in words; `read` makes a 200's body into what was wanted; `not_yet` is a 4xx that may pass."""

    what: str
    method: str
    path: str
    read: Callable[[bytes], T]
    params: Mapping[str, str] | None = None
    body: object = None
    not_yet: int | None = None
