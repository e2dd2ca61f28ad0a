"""
Where one decode rank wants one room, and the copies that bring it there.

Values in, plans out: what a rank has registered and named is paired with our pools once, and a rank that this prefill
cannot serve is refused with both values. Never asks whether the rank may be written to: the sender's gate knows that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from pdctl.core.layout import (
    Heads,
    Pairs,
    Pool,
    RankPools,
    check_items,
    check_pair,
    pair_by_id,
    pair_entries,
    same_entries,
)
from pdctl.core.plan import CopyPlan, Ints, head_plan, item_plan, page_plan
from pdctl.core.sums import AUX, KV, STATE, Spans, Summand, head_spans, item_spans
from pdctl.core.wire import Metadata, RegisterBuffers
from pdctl.errors import CallerError, LayoutMismatch

_REMEDY = "start both with the same page size, and count from the same prefix"


@dataclass(frozen=True, slots=True)
class Destination:
    """`kv`, `aux` and `states` are the decode rank's pools; `pairs` says which of its entries each of ours goes to."""

    ours: RankPools
    kv: Pool
    aux: Pool
    states: tuple[tuple[Pool, Pairs], ...]
    pairs: Pairs
    heads: Heads | None
    named: Metadata
    wants_sums: bool = False

    @classmethod
    def of(cls, said: RegisterBuffers, named: Metadata, ours: RankPools) -> Destination:
        """Raises a PdctlError, with its reason, when memory so registered and named cannot be paired with our pools."""
        _check_supported(said, named, ours)
        kv = said.kv_pool()
        pairs = pair_entries(ours.layout, len(ours.kv), said.kv_layer_ids, len(kv), "KV")
        heads = None
        if ours.layout.heads is not None:  # a rank of several DP groups may count itself through all of them
            heads = Heads(ours.layout.heads.total, said.tp_size, said.tp_rank % said.tp_size)
        it = cls(
            ours,
            kv,
            said.aux_pool(ours.aux.item_lens),
            _states(said, named, ours),
            pairs,
            heads,
            named,
            said.wants_sums,
        )
        it._copies(np.empty(0, np.int64), np.empty(0, np.int64), pairs)  # refuses what no chunk could be sent to
        return it

    @property
    def session(self) -> str:
        return self.named.session

    def chunk(self, source: Ints, start: int, layers: range | None = None) -> CopyPlan:
        """Our pages `source`, shape (n,), into the n of the named pages that begin with number `start`; of all layers,
        or of the model's `layers`."""
        named, end = self.named.pages, start + len(source)
        if end > len(named):
            raise LayoutMismatch(
                f"KV: decode session {self.session} named {len(named)} pages and page {end} is being sent: {_REMEDY}"
            )
        return self._copies(source, named[start:end], self._pairs_of(layers))

    def chunk_summands(self, source: Ints, start: int, layers: range | None = None) -> list[Summand]:
        """What `chunk` copies, page by page; to be summed only after it has raised nothing."""
        pairs, layout = self._pairs_of(layers), self.ours.layout
        if layout.heads is None or self.heads is None:
            spans: tuple[Spans, Spans] | None = item_spans(self.ours.kv, pairs)
        else:
            spans = head_spans(
                self.ours.kv, self.kv, pairs, page_size=layout.page_size, ours=layout.heads, theirs=self.heads
            )
        return (
            []
            if spans is None or not len(source) or not len(pairs)
            else [Summand(KV, start, self.ours.kv, source, *spans)]
        )

    def last_summands(self, aux_row: int | None, state_rows: Sequence[npt.ArrayLike] = ()) -> list[Summand]:
        """What `last` copies, row by row; to be summed only after it has raised nothing."""
        found = []
        for group, rows in enumerate(self.named.state_rows):
            if rows:
                ours = self.ours.states[group]
                spans = item_spans(ours, self.states[group][1])
                found.append(Summand(STATE + group, 0, ours, np.asarray(state_rows[group], np.int64).ravel(), *spans))
        if aux_row is not None and self.named.aux_row is not None and len(self.ours.aux):
            spans = item_spans(self.ours.aux, same_entries(len(self.ours.aux)))
            found.append(Summand(AUX, 0, self.ours.aux, np.array([aux_row], np.int64), *spans))
        return found

    def _pairs_of(self, layers: range | None) -> Pairs:
        if layers is None:
            return self.pairs
        of = self.ours.layout.layer_of(len(self.ours.kv))[self.pairs[:, 0]]
        return self.pairs[(layers.start <= of) & (of < layers.stop)]

    def last(self, n_sent: int, aux_row: int | None, state_rows: Sequence[npt.ArrayLike] = ()) -> CopyPlan:
        """Our aux row and rows of state, when `n_sent` pages have been all that were named; nothing of what either side
        has no row of."""
        if n_sent != len(self.named.pages):
            raise LayoutMismatch(
                f"KV: decode session {self.session} named {len(self.named.pages)} pages and {n_sent} were sent: "
                f"{_REMEDY}"
            )
        plans = [self._state(group, rows, state_rows) for group, rows in enumerate(self.named.state_rows) if rows]
        if aux_row is not None and self.named.aux_row is not None:
            plans.append(item_plan(self.ours.aux, self.aux, [aux_row], [self.named.aux_row], "aux"))
        return CopyPlan.join(*plans)

    def _copies(self, source: npt.ArrayLike, named: npt.ArrayLike, pairs: Pairs) -> CopyPlan:
        layout = self.ours.layout
        if layout.heads is None or self.heads is None:
            return page_plan(self.ours.kv, self.kv, pairs, source, named, "KV")
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

    def _state(self, group: int, rows: Sequence[int], state_rows: Sequence[npt.ArrayLike]) -> CopyPlan:
        if group >= len(state_rows):
            raise LayoutMismatch(
                f"state {group}: decode session {self.session} named {len(rows)} rows and none are sent: "
                "give finish() the rows of each group"
            )
        pool, pairs = self.states[group]
        return page_plan(self.ours.states[group], pool, pairs, state_rows[group], rows, f"state {group}")


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


def _states(said: RegisterBuffers, named: Metadata, ours: RankPools) -> tuple[tuple[Pool, Pairs], ...]:
    """The decode rank's pools of state, one for each group of ours, paired. Raises LayoutMismatch."""
    if not any(named.state_rows):
        return ()
    if not len(ours.states) == len(said.state_pointers) == len(said.state_item_lens):
        raise LayoutMismatch(
            f"state: the sender has {len(ours.states)} groups and the receiver {len(said.state_pointers)}, with "
            f"{len(said.state_item_lens)} lists of item lengths: start both with the same model"
        )
    paired = []
    for group, source in enumerate(ours.states):
        what = f"state {group}"
        pool = Pool(said.state_pointers[group], said.state_item_lens[group])
        ids = (ours.state_layer_ids[group : group + 1] or ((),))[0]
        theirs = (said.state_layer_ids[group : group + 1] or ((),))[0]
        if ids and theirs:
            pairs = pair_by_id(ids, len(source), theirs, len(pool), what)
            check_items(source, pool, pairs, what)
        else:
            check_pair(source, pool, what)
            pairs = pair_entries(replace(ours.layout, layer_ids=()), len(source), (), len(pool), what)
        paired.append((pool, pairs))
    return tuple(paired)


def _check_supported(said: RegisterBuffers, named: Metadata, ours: RankPools) -> None:
    wanted = {
        f"a DCP size of {said.dcp_size}": said.dcp_size != 1,
        "state beside KV": any(named.state_rows) and not ours.states,
        "device pages beside host pages": named.device_pages is not None,
    }
    for what, is_wanted in wanted.items():
        if is_wanted:
            raise LayoutMismatch(
                f"decode session {named.session} wants {what}, which this prefill does not move: start decode without"
            )
