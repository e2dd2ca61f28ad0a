"""
Which bytes of a room are summed, in which order, and how the sums travel: what the two sides must agree on to compare.

Values only: the bytes themselves are read by engine/checksums.py. A sum is the CRC-32 of one item (a page, an aux row,
a row of state) over every entry that one prefill rank writes of it, entry after entry: two ranks that write different
layers or heads of the same page sum different bytes of it, and each is checked for its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from pdctl.core.dealing import by_token
from pdctl.core.entries import Pairs, lengths
from pdctl.core.layout import Heads, Pool, RankPools
from pdctl.core.plan import Ints, head_nbytes

Crcs = npt.NDArray[np.uint32]

KV, AUX, STATE = 0, 1, 2
"""Which pool of a rank: STATE + g is its g-th group of state."""

_WORD = np.dtype("<u4")
_HEAD = 5  # words before the lists: pool, per, items, parts, entries


@dataclass(frozen=True, slots=True, eq=False)
class Spans:
    """The same bytes of each item: of entry `entries[j]`, cut into `parts` equal parts (tokens), of every part the
    `widths[j]` bytes from `offsets[j]` on. All three have shape (k,)."""

    entries: Ints
    offsets: Ints
    widths: Ints
    parts: int = 1

    @property
    def nbytes(self) -> int:
        """Of one item."""
        return int(self.widths.sum()) * self.parts

    def problem(self, pool: Pool) -> str | None:
        """Why these are no bytes of items of `pool`; None where they are."""
        if not len(self.entries) or int(self.entries.max()) >= len(pool):
            return f"they speak of entries {self.entries.tolist()[:8]}, the pool has {len(pool)}"
        lens = lengths(pool)[self.entries]
        if self.parts < 1 or (lens % self.parts).any() or (self.offsets + self.widths > lens // self.parts).any():
            return f"they speak of bytes outside an item of {lens.tolist()[:8]} bytes in {self.parts} parts"
        return None


@dataclass(frozen=True, slots=True, eq=False)
class Sums:
    """`crcs[i]` is the sum of item `numbers[i]` of those that decode has named of `pool`, over `spans` at the decode,
    as it was sent from the prefill's item `sources[i]`. `per`: so many items are one of those that were named: 1, or
    the tokens of a page, where they are dealt out over ranks."""

    pool: int
    spans: Spans
    numbers: Ints = field(repr=False)
    sources: Ints = field(repr=False)
    crcs: Crcs = field(repr=False)
    per: int = 1

    @property
    def end(self) -> int:
        """Above every number, in what was named."""
        return -(-(int(self.numbers.max(initial=-1)) + 1) // self.per)

    @property
    def noun(self) -> str:
        return {KV: "page", AUX: "aux row"}.get(self.pool, f"row of state {self.pool - STATE}")

    def pool_of(self, pools: RankPools) -> Pool | None:
        """Raises LayoutMismatch where its items have no so many parts."""
        known = (pools.kv, pools.aux, *pools.states)
        if self.pool >= len(known):
            return None
        return known[self.pool] if self.per == 1 else by_token(known[self.pool], self.per, self.noun)

    def items(self, named: Ints) -> Ints:
        """Which items of that pool they are."""
        return named[self.numbers // self.per] * self.per + self.numbers % self.per

    def differ(self, found: Crcs, items: Ints) -> str | None:
        """What to say where the bytes at `items`, summed as `found`, are not what was sent; None where they are."""
        wrong = np.flatnonzero(self.crcs != found)
        if not len(wrong):
            return None
        here, there = (list(dict.fromkeys((each[wrong] // self.per).tolist())) for each in (items, self.sources))
        return f"{self.noun}{'' if len(here) == 1 else 's'} {_some(here)} ({_some(there)} at the prefill)"


@dataclass(frozen=True, slots=True, eq=False)
class Summand:
    """What one write brings to one decode rank, to be summed at our side: `items` of our `source`, over `ours`, into
    those of the `numbers` that decode has named. `per` as in Sums."""

    pool: int
    numbers: Ints
    source: Pool
    items: Ints
    ours: Spans
    theirs: Spans
    per: int = 1

    def to(self, crcs: Crcs) -> Sums:
        return Sums(self.pool, self.theirs, self.numbers, self.items, crcs, self.per)


def item_spans(source: Pool, pairs: Pairs) -> tuple[Spans, Spans]:
    """Whole items, as `page_plan` copies them: at our side, and at the receiver's."""
    widths = lengths(source)[pairs[:, 0]]
    return Spans(pairs[:, 0], np.zeros_like(widths), widths), Spans(pairs[:, 1], np.zeros_like(widths), widths)


def head_spans(
    source: Pool, destination: Pool, pairs: Pairs, *, page_size: int, ours: Heads, theirs: Heads
) -> tuple[Spans, Spans] | None:
    """Of each token the heads that `head_plan` copies; None where it copies none."""
    sent = ours.to_send(theirs)
    if ours.held == theirs.held == sent:
        return item_spans(source, pairs)
    if not len(sent):
        return None
    head = head_nbytes(source, destination, pairs, page_size, ours, theirs, "KV")
    mine, far = (
        Spans(pairs[:, side], (sent.start - heads.held.start) * head, len(sent) * head, page_size)
        for side, heads in ((0, ours), (1, theirs))
    )
    return mine, far


def spoken(sums: Sequence[Sums], named: int) -> npt.NDArray[np.bool_]:
    """Which of the `named` KV pages a sum speaks of."""
    found = np.zeros(named, bool)
    for each in sums:
        if each.pool == KV:
            pages = each.numbers // each.per
            found[pages[pages < named]] = True
    return found


def pack(sums: Sequence[Sums]) -> bytes:
    """Little-endian words: of each of `sums` pool, per, n, parts, k; entries, offsets and widths (k); numbers, sources
    and crcs (n)."""
    words: list[npt.ArrayLike] = []
    for each in sums:
        spans = each.spans
        words.append([each.pool, each.per, len(each.crcs), spans.parts, len(spans.entries)])
        words += [spans.entries, spans.offsets, spans.widths, each.numbers, each.sources, each.crcs]
    return b"".join(np.asarray(part).astype(_WORD).tobytes() for part in words)


def unpack(raw: bytes) -> Iterator[Sums]:
    """Raises ValueError, in words, for bytes that `pack` has not made."""
    if len(raw) % _WORD.itemsize:
        raise ValueError(f"{len(raw)} bytes are no whole number of words")
    words, at = np.frombuffer(raw, _WORD).astype(np.int64), 0
    while at < len(words):
        pool, per, n, parts, k = (int(word) for word in words[at : at + _HEAD]) if at + _HEAD <= len(words) else [0] * 5
        at += _HEAD
        if not k or not parts or not per or at + 3 * k + 3 * n > len(words):
            raise ValueError(f"the sums break off at word {at} of {len(words)}")
        lists = words[at : at + 3 * k].reshape(3, k)
        at += 3 * k
        numbers, sources, crcs = words[at : at + 3 * n].reshape(3, n)
        at += 3 * n
        yield Sums(pool, Spans(lists[0], lists[1], lists[2], parts), numbers, sources, crcs.astype(np.uint32), per)


def _some(items: Sequence[int]) -> str:
    return ", ".join(map(str, items[:16])) + (f" and {len(items) - 16} more" if len(items) > 16 else "")
