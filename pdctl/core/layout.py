"""
Where a page lies, in bytes.

A rank's KV memory is a list of *entries* (SGLANG_WIRE: MHA has K of every layer, then V of every layer; MLA has one
entry a layer). Page `p` of entry `e` starts at `pointers[e] + p * item_lens[e]` and is `item_lens[e]` bytes long.
Aux rows (first token, log-probs, ...) have the same shape: one entry a buffer, one item a slot.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pdctl.errors import LayoutMismatch


@dataclass(frozen=True, slots=True)
class Region:
    """`nbytes` bytes from address `pointer` on."""

    pointer: int
    nbytes: int

    @property
    def end(self) -> int:
        return self.pointer + self.nbytes

    def __contains__(self, other: object) -> bool:
        return isinstance(other, Region) and self.pointer <= other.pointer and other.end <= self.end


@dataclass(frozen=True, slots=True)
class Pool:
    """`n_items` equal items in each of E entries; `pointers` and `item_lens` have length E.

    `n_items` is None for a peer's pool, whose size the wire does not carry: there the regions that the peer's engine
    announces are the bound.
    """

    pointers: tuple[int, ...]
    item_lens: tuple[int, ...]
    n_items: int | None = None

    def __post_init__(self) -> None:
        if len(self.pointers) != len(self.item_lens):
            raise LayoutMismatch(
                f"pool has {len(self.pointers)} pointers but {len(self.item_lens)} item lengths: "
                "give each entry one of both"
            )
        if any(n <= 0 for n in self.item_lens):
            raise LayoutMismatch(f"item lengths {self.item_lens} include one below 1: every entry needs bytes")

    def __len__(self) -> int:
        return len(self.pointers)

    def regions(self) -> Iterator[Region]:
        """One region an entry; needs `n_items`."""
        if self.n_items is None:
            raise LayoutMismatch("the pool's number of items is not known: it belongs to a peer")
        return (
            Region(pointer, nbytes * self.n_items)
            for pointer, nbytes in zip(self.pointers, self.item_lens, strict=True)
        )


def check_pair(source: Pool, destination: Pool, what: str) -> None:
    """Raise LayoutMismatch, with both values, if items of `source` cannot be copied one to one into `destination`."""
    if len(source) != len(destination):
        raise LayoutMismatch(
            f"{what}: the sender has {len(source)} entries and the receiver {len(destination)}: "
            "start both with the same model and the same pipeline split"
        )
    for entry, (ours, theirs) in enumerate(zip(source.item_lens, destination.item_lens, strict=True)):
        if ours != theirs:
            raise LayoutMismatch(
                f"{what} entry {entry}: the sender has {ours} bytes an item and the receiver {theirs}: "
                "start both with the same page size, dtype and head split"
            )
