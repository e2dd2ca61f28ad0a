"""A mapping that is written over another: what is below is read and stays as it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Overlay(MutableMapping[K, V]):
    """`own`: what was written here. Nothing is ever deleted, here or below."""

    __slots__ = ("_below", "own")

    def __init__(self, below: Mapping[K, V]) -> None:
        self._below = below
        self.own: dict[K, V] = {}

    def get(self, key: K, default: Any = None) -> Any:
        found = self.own.get(key)
        return self._below.get(key, default) if found is None else found

    def __getitem__(self, key: K) -> V:
        found = self.own.get(key)
        return self._below[key] if found is None else found

    def __setitem__(self, key: K, value: V) -> None:
        self.own[key] = value

    def __delitem__(self, key: K) -> None:
        raise TypeError(f"{key} cannot be deleted: it may stand below, where nothing is changed")

    def __iter__(self) -> Iterator[K]:
        yield from self._below
        yield from (key for key in self.own if key not in self._below)

    def __len__(self) -> int:
        return len(self._below) + sum(key not in self._below for key in self.own)
