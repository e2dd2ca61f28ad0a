"""
Where one decode rank wants one room, and the copies that bring it there.

Values in, plans out: what a rank has registered and named is paired with our pools once, and a rank that this prefill
cannot serve is refused with both values. Never asks whether the rank may be written to: the sender's gate knows that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from pdctl.core.dealing import by_token, dealt_tokens, held_pages
from pdctl.core.entries import Pairs, check_items, layer_of, pair_by_id, pair_entries, same_entries
from pdctl.core.layout import Heads, Kind, Pool, RankPools, Share, Slices
from pdctl.core.parts import part_spans, span_plan
from pdctl.core.plan import CopyPlan, Ints, Paired, head_plan, page_plan
from pdctl.core.sums import AUX, KV, STATE, Spans, Summand, head_spans, item_spans
from pdctl.core.wire import Metadata, RegisterBuffers
from pdctl.errors import CallerError, LayoutMismatch

Alike = tuple[Pairs, Slices, Slices] | tuple[Pairs, None, None]

_REMEDY = "start both with the same page size, and count from the same prefix"


@dataclass(frozen=True, slots=True)
class Partner:
    """What one decode rank has registered, paired with our pools: the same for all of its rooms.

    `kv` and `aux` are its pools; `pairs` says which of its entries each of ours goes to. `tokens`: the share of every
    request's tokens that it takes of pages that we have whole. `items`: the pages of all entries, or their tokens where
    these are dealt out; None where only some heads of each are copied. `rows`: those of aux.
    """

    said: RegisterBuffers
    ours: RankPools
    kv: Pool
    aux: Pool
    pairs: Pairs
    heads: Heads | None
    tokens: Share
    items: Paired | None
    rows: Paired

    @classmethod
    def of(cls, said: RegisterBuffers, ours: RankPools) -> Partner:
        """Raises LayoutMismatch, with both values, when memory so registered cannot be paired with our pools."""
        kv, layout = said.kv_pool(), ours.layout
        pairs = pair_entries(layout, len(ours.kv), said.kv_layer_ids, len(kv), "KV")
        heads = None
        if layout.heads is not None:  # a rank of several DP groups may count itself through all of them
            heads = Heads(layout.heads.total, said.tp_size, said.tp_rank % said.tp_size)
        tokens, aux = _share(said, ours), said.aux_pool(ours.aux.item_lens)
        rows = Paired.of(ours.aux, aux, same_entries(len(ours.aux)), "aux")
        it = cls(said, ours, kv, aux, pairs, heads, tokens, None, rows)
        if tokens.is_all and not _alike_heads(layout.heads, heads):
            it.copies(pairs, (), ())  # refuses what no page could be sent to
            return it
        return replace(it, items=it.paired(pairs))

    def paired(self, pairs: Pairs) -> Paired:
        """Pages, or tokens where these are dealt out, of so many entries."""
        if self.items is not None and pairs is self.pairs:
            return self.items
        if self.tokens.is_all:
            return Paired.of(self.ours.kv, self.kv, pairs, "KV")
        ours, theirs = (by_token(pool, self.ours.layout.page_size, "KV") for pool in (self.ours.kv, self.kv))
        return Paired.of(ours, theirs, pairs, "KV")

    def copies(self, pairs: Pairs, source: npt.ArrayLike, named: npt.ArrayLike) -> CopyPlan:
        """Pages `source` of ours into its pages `named`, each with all of its tokens."""
        layout = self.ours.layout
        if self.items is not None or layout.heads is None or self.heads is None:
            return self.paired(pairs).plan(source, named)
        return head_plan(
            self.ours.kv,
            self.kv,
            pairs,
            source,
            named,
            page_size=layout.page_size,
            ours=layout.heads,
            theirs=self.heads,
            what="KV",
        )

    def destination(self, named: Metadata) -> Destination:
        """Raises LayoutMismatch, with its reason, when what it named cannot be paired with our pools."""
        _check_supported(named, self.ours)
        _check_prefix(named, self.tokens, self.ours)
        return Destination(self, _states(self.said, named, self.ours), named)


@dataclass(frozen=True, slots=True)
class Destination:
    """Where `partner` wants one room. `states`: its pools of state, where it named rows of them."""

    partner: Partner
    states: tuple[State, ...]
    named: Metadata

    @classmethod
    def of(cls, said: RegisterBuffers, named: Metadata, ours: RankPools) -> Destination:
        """Raises a PdctlError, with its reason, when memory so registered and named cannot be paired with our pools."""
        return Partner.of(said, ours).destination(named)

    @property
    def session(self) -> str:
        return self.named.session

    @property
    def ours(self) -> RankPools:
        return self.partner.ours

    @property
    def wants_sums(self) -> bool:
        return self.partner.said.wants_sums

    def chunk(self, source: Ints, start: int, layers: range | None = None) -> CopyPlan:
        """Our pages `source`, shape (n,), into the n of the named pages that begin with number `start`; of all layers,
        or of the model's `layers`."""
        named, end, pairs, layout = self.named.pages, start + len(source), self._pairs_of(layers), self.ours.layout
        if self._filled(end) > len(named):
            raise LayoutMismatch(
                f"KV: decode session {self.session} named {len(named)} pages and page {end} is being sent: {_REMEDY}"
            )
        if not self.partner.tokens.is_all:
            here, there = dealt_tokens(source, start, named, self.partner.tokens, layout.page_size)
            return self.partner.paired(pairs).plan(here, there)
        if layout.pages.is_all:
            return self.partner.copies(pairs, source, named[start:end])
        held, at = held_pages(source, layout.pages)
        return self.partner.copies(pairs, held, named[start + at])

    def _filled(self, n: int) -> int:
        """How many pages of the decode rank's `n` of ours fill."""
        return -(-n // self.partner.tokens.size)

    def chunk_summands(self, source: Ints, start: int, layers: range | None = None) -> list[Summand]:
        """What `chunk` copies, page by page, or token by token; to be summed only after it has raised nothing."""
        pairs, layout, kv = self._pairs_of(layers), self.ours.layout, self.ours.kv
        if not len(source) or not len(pairs):
            return []
        partner = self.partner
        if not partner.tokens.is_all:
            per = layout.page_size
            kv, every = by_token(kv, per, "KV"), np.arange(len(self.named.pages))
            here, numbers = dealt_tokens(source, start, every, partner.tokens, per)
            return [Summand(KV, numbers, kv, here, *item_spans(kv, pairs), per)] if len(here) else []
        held, at = (source, np.arange(len(source))) if layout.pages.is_all else held_pages(source, layout.pages)
        if layout.heads is None or partner.heads is None:
            spans: tuple[Spans, Spans] | None = item_spans(kv, pairs)
        else:
            spans = head_spans(
                kv, partner.kv, pairs, page_size=layout.page_size, ours=layout.heads, theirs=partner.heads
            )
        return [] if spans is None or not len(held) else [Summand(KV, start + at, kv, held, *spans)]

    def last_summands(self, aux_row: int | None, state_rows: Sequence[npt.ArrayLike] = ()) -> list[Summand]:
        """What `last` copies, row by row; to be summed only after it has raised nothing."""
        found = []
        for group, rows in enumerate(self.named.state_rows):
            if rows:
                ours, items = self.ours.states[group], np.asarray(state_rows[group], np.int64).ravel()
                numbers = np.arange(len(items))
                found += [
                    Summand(STATE + group, numbers, ours, items, *spans) for spans in self.states[group].spans(ours)
                ]
        if aux_row is not None and self.named.aux_row is not None and len(self.ours.aux):
            spans = item_spans(self.ours.aux, same_entries(len(self.ours.aux)))
            row = np.array([aux_row], np.int64)
            found.append(Summand(AUX, np.zeros_like(row), self.ours.aux, row, *spans))
        return found

    def _pairs_of(self, layers: range | None) -> Pairs:
        pairs = self.partner.pairs
        if layers is None:
            return pairs
        of = layer_of(self.ours.layout, len(self.ours.kv))[pairs[:, 0]]
        return pairs[(layers.start <= of) & (of < layers.stop)]

    def last(self, n_sent: int, aux_row: int | None, state_rows: Sequence[npt.ArrayLike] = ()) -> CopyPlan:
        """Our aux row and rows of state, when `n_sent` pages have been all that were named; nothing of what either side
        has no row of."""
        if self._filled(n_sent) != len(self.named.pages):
            raise LayoutMismatch(
                f"KV: decode session {self.session} named {len(self.named.pages)} pages and {n_sent} were sent: "
                f"{_REMEDY}"
            )
        plans = [self._state(group, rows, state_rows) for group, rows in enumerate(self.named.state_rows) if rows]
        if aux_row is not None and self.named.aux_row is not None:
            plans.append(self.partner.rows.plan([aux_row], [self.named.aux_row]))
        return CopyPlan.join(*plans)

    def _state(self, group: int, rows: Sequence[int], state_rows: Sequence[npt.ArrayLike]) -> CopyPlan:
        if group >= len(state_rows):
            raise LayoutMismatch(
                f"state {group}: decode session {self.session} named {len(rows)} rows and none are sent: "
                "give finish() the rows of each group"
            )
        return self.states[group].plan(self.ours.states[group], state_rows[group], rows, f"state {group}")


@dataclass(frozen=True, slots=True)
class State:
    """A decode rank's pool of one group of state. `parts`: pairs of entries that are split over TP in one way, with
    ours and theirs; None where items are copied whole."""

    pool: Pool
    parts: tuple[Alike, ...]

    def plan(self, source: Pool, src: npt.ArrayLike, dst: npt.ArrayLike, what: str) -> CopyPlan:
        return CopyPlan.join(
            *(
                page_plan(source, self.pool, pairs, src, dst, what)
                if mine is None or far is None
                else span_plan(source, self.pool, part_spans(source, self.pool, pairs, mine, far, what), src, dst, what)
                if mine.parts
                else head_plan(
                    source,
                    self.pool,
                    pairs,
                    src,
                    dst,
                    page_size=mine.rows,
                    ours=mine.heads,
                    theirs=far.heads,
                    what=what,
                )
                for pairs, mine, far in self.parts
            )
        )

    def spans(self, source: Pool) -> list[tuple[Spans, Spans]]:
        """What `plan` copies of each item."""
        found = [
            item_spans(source, pairs)
            if mine is None or far is None
            else part_spans(source, self.pool, pairs, mine, far, "state")
            if mine.parts
            else head_spans(source, self.pool, pairs, page_size=mine.rows, ours=mine.heads, theirs=far.heads)
            for pairs, mine, far in self.parts
        ]
        return [each for each in found if each is not None]


@dataclass(frozen=True, slots=True)
class Last:
    """What a room ends with: our pages `source` from number `start` on, where there are any left, and the rows."""

    source: Ints | None
    start: int
    n_sent: int
    aux_row: int | None
    state_rows: Sequence[npt.ArrayLike]

    def plan(self, to: Destination) -> CopyPlan:
        pages = [] if self.source is None else [to.chunk(self.source, self.start)]
        return CopyPlan.join(*pages, to.last(self.n_sent, self.aux_row, self.state_rows))

    def summands(self, to: Destination) -> list[Summand]:
        """As `Destination.last_summands`."""
        pages = [] if self.source is None else to.chunk_summands(self.source, self.start)
        return [*pages, *to.last_summands(self.aux_row, self.state_rows)]


@dataclass(frozen=True, slots=True)
class LayerGroups:
    """A chunk that is sent in groups of layers: its pages, and the layers that are still to be sent."""

    pages: tuple[int, ...]
    layers: frozenset[int]
    left: frozenset[int]

    @classmethod
    def of(cls, layers: frozenset[int], pages: Ints) -> LayerGroups:
        return cls(tuple(pages.tolist()), layers, layers)

    @property
    def is_new(self) -> bool:
        """Whether nothing of it has been sent."""
        return self.left == self.layers

    def sent(self, pages: Ints, layers: range | None) -> LayerGroups | None:
        """What is left when `layers` have been sent too, all where None; None when nothing is. Raises CallerError for
        other pages than those that were begun, and for layers that were sent before or are not of this stage."""
        if tuple(pages.tolist()) != self.pages:
            raise self.unfinished()
        now = self.layers if layers is None else frozenset(layers)
        if not now <= self.left:
            raise CallerError(
                f"layers {_some(now - self.left)} of this chunk were sent before, or are not of this stage, which has "
                f"{_some(self.layers)}: send each layer once"
            )
        left = self.left - now
        return replace(self, left=left) if left else None

    def unfinished(self) -> CallerError:
        return CallerError(
            f"layers {_some(self.left)} of the chunk before are not sent: send them with the same "
            f"{len(self.pages)} pages first"
        )


def _some(layers: frozenset[int]) -> str:
    """As 0-3, 8."""
    parts: list[list[int]] = []
    for layer in sorted(layers):
        if parts and parts[-1][-1] == layer - 1:
            parts[-1][1:] = [layer]
        else:
            parts.append([layer])
    return ", ".join("-".join(map(str, part)) for part in parts[:8])


def _states(said: RegisterBuffers, named: Metadata, ours: RankPools) -> tuple[State, ...]:
    """The decode rank's pools of state, one for each group of ours, paired. Raises LayoutMismatch."""
    if not any(named.state_rows):
        return ()
    if not len(ours.states) == len(said.state_pointers) == len(said.state_item_lens):
        raise LayoutMismatch(
            f"state: the sender has {len(ours.states)} groups and the receiver {len(said.state_pointers)}, with "
            f"{len(said.state_item_lens)} lists of item lengths: start both with the same model"
        )
    found = []
    for group, source in enumerate(ours.states):
        what, slices = f"state {group}", (ours.state_slices[group : group + 1] or ((),))[0]
        pool = Pool(said.state_pointers[group], said.state_item_lens[group])
        pairs = _state_pairs(said, ours, group, pool)
        state = State(pool, tuple(_alike(pairs, slices, said)) if slices else ((pairs, None, None),))
        if not slices:
            check_items(source, pool, pairs, what)
        state.plan(source, (), (), what)  # refuses what no row could be sent to
        found.append(state)
    return tuple(found)


def _state_pairs(said: RegisterBuffers, ours: RankPools, group: int, pool: Pool) -> Pairs:
    source, what = ours.states[group], f"state {group}"
    ids, theirs = ((lists[group : group + 1] or ((),))[0] for lists in (ours.state_layer_ids, said.state_layer_ids))
    if ids and theirs:
        return pair_by_id(ids, len(source), theirs, len(pool), what)
    if len(source) != len(pool):
        raise LayoutMismatch(
            f"{what}: the sender has {len(source)} entries and the receiver {len(pool)}, and not both give layer ids: "
            "start both with the same model and the same pipeline split"
        )
    return same_entries(len(source))


def _alike(pairs: Pairs, slices: Sequence[Slices], said: RegisterBuffers) -> Iterator[Alike]:
    """Pairs whose entries of ours are split in one way, and how the decode rank's are."""
    for mine in dict.fromkeys(slices):
        heads = Heads(mine.heads.total, said.tp_size, said.tp_rank % said.tp_size)
        some = pairs[[slices[entry] == mine for entry in pairs[:, 0]]]
        yield (some, None, None) if heads == mine.heads else (some, mine, replace(mine, heads=heads))


def _alike_heads(ours: Heads | None, theirs: Heads | None) -> bool:
    """Whether all heads here are all heads there."""
    return ours is None or theirs is None or ours.held == theirs.held == ours.to_send(theirs)


def _share(said: RegisterBuffers, ours: RankPools) -> Share:
    """Of tokens that we have whole and the decode rank has not. Raises LayoutMismatch."""
    theirs, layout = Share(said.dcp_size, said.dcp_rank), ours.layout
    if theirs == layout.tokens:
        return Share()
    if not layout.tokens.is_all or layout.kind is not Kind.MLA or not layout.pages.is_all:
        raise LayoutMismatch(
            f"decode session {said.session} is DCP rank {theirs.rank} of {theirs.size} and this prefill rank, of "
            f"{layout.kind}, {layout.tokens.rank} of {layout.tokens.size}, its pages shared by {layout.pages.size}: "
            "only a prefill of MLA without DCP and KV sharding serves another DCP size"
        )
    return theirs


def _check_prefix(named: Metadata, tokens: Share, ours: RankPools) -> None:
    page_size = ours.layout.page_size
    if not tokens.is_all and named.prefix_len % (page_size * tokens.size):
        raise LayoutMismatch(
            f"decode session {named.session} has a prefix of {named.prefix_len} tokens already: with a DCP size of "
            f"{tokens.size} and pages of {page_size} it must be a multiple of {page_size * tokens.size}"
        )


def _check_supported(named: Metadata, ours: RankPools) -> None:
    wanted = {
        "state beside KV": any(named.state_rows) and not ours.states,
        "device pages beside host pages": named.device_pages is not None,
    }
    for what, is_wanted in wanted.items():
        if is_wanted:
            raise LayoutMismatch(
                f"decode session {named.session} wants {what}, which this prefill does not move: start decode without"
            )
