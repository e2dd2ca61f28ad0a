"""
Where a head of a layer of a page lies, in bytes, and which heads of two ranks are the same.

A rank's KV memory is a list of *entries* (SGLANG_WIRE 7: MHA has K of every layer, then V of every layer; MLA has one
entry a layer). Page `p` of entry `e` starts at `pointers[e] + p * item_lens[e]` and is `item_lens[e]` bytes long:
`page_size` tokens one after another, in each token the heads that this rank holds, one after another.
Aux rows (first token, log-probs, ...) and state have the same shape: one entry a buffer, one item a slot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from enum import StrEnum

from pdctl.core.device import HOST, DeviceSpec
from pdctl.errors import BadField, ConfigError, LayoutMismatch


@dataclass(frozen=True, slots=True)
class Region:
    """`nbytes` bytes from address `pointer` on; `owner` is what keeps them there, such as a tensor."""

    pointer: int
    nbytes: int
    owner: object = field(default=None, compare=False, repr=False)

    @property
    def end(self) -> int:
        return self.pointer + self.nbytes

    def __contains__(self, other: object) -> bool:
        return isinstance(other, Region) and self.pointer <= other.pointer and other.end <= self.end


@dataclass(frozen=True, slots=True)
class Pool:
    """`n_items` equal items in each of E entries; `pointers` and `item_lens` have length E.

    `n_items` is None for a peer's pool, whose size the wire does not carry: there the regions that the peer's engine
    announces are the bound. `on`: whose memory it is; `owner`: what keeps it there, such as a list of tensors.
    """

    pointers: tuple[int, ...]
    item_lens: tuple[int, ...]
    n_items: int | None = None
    on: DeviceSpec = HOST
    owner: object = field(default=None, compare=False, repr=False)

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
            Region(pointer, nbytes * self.n_items, self.owner)
            for pointer, nbytes in zip(self.pointers, self.item_lens, strict=True)
        )


class Kind(StrEnum):
    """What the entries of a KV pool are."""

    MHA = "mha"  # K of every layer, then V of every layer; heads are split over the TP ranks. GQA and MQA too
    MLA = "mla"  # one entry a layer, the same on every TP rank


@dataclass(frozen=True, slots=True)
class Heads:
    """Which of a model's `total` KV heads the rank `tp_rank` of `tp_size` holds.

    With more ranks than heads, neighbouring ranks hold the same one. Raises LayoutMismatch where neither number divides
    the other: no engine splits heads so.
    """

    total: int
    tp_size: int
    tp_rank: int

    def __post_init__(self) -> None:
        if self.total < 1 or not 0 <= self.tp_rank < self.tp_size:
            raise LayoutMismatch(
                f"{self.total} KV heads on TP rank {self.tp_rank} of {self.tp_size}: ranks count from 0 to size - 1"
            )
        if self.total % self.tp_size and self.tp_size % self.total:
            raise LayoutMismatch(
                f"{self.total} KV heads do not divide over {self.tp_size} TP ranks: "
                "choose a TP size that divides them, or a multiple of them"
            )

    @property
    def replicas(self) -> int:
        """How many neighbouring ranks hold the same heads."""
        return max(1, self.tp_size // self.total)

    @property
    def held(self) -> range:
        """Numbers of the heads here, in the order in which they lie in a token."""
        n = max(1, self.total // self.tp_size)
        first = self.tp_rank // self.replicas * n
        return range(first, first + n)

    def to_send(self, to: Heads) -> range:
        """The heads that this rank writes into the receiver `to`; empty where a neighbour that holds the same does.

        A receiver of a smaller TP hears `tp_size / to.tp_size` neighbours; of those with the same heads the first one
        writes. Raises LayoutMismatch, with both values, for models and sizes that do not fit each other.
        """
        if self.total != to.total:
            raise LayoutMismatch(
                f"the sender has {self.total} KV heads in all and the receiver {to.total}: start both with one model"
            )
        if self.tp_size % to.tp_size and to.tp_size % self.tp_size:
            raise LayoutMismatch(
                f"attn_tp_size is {self.tp_size} at the sender and {to.tp_size} at the receiver: "
                "choose two of which one divides the other"
            )
        neighbours = max(1, self.tp_size // to.tp_size)
        if self.tp_rank % neighbours % self.replicas:
            return range(0)
        first, end = max(self.held.start, to.held.start), min(self.held.stop, to.held.stop)
        return range(first, max(first, end))


@dataclass(frozen=True, slots=True)
class Share:
    """What one of `size` ranks holds of things that are dealt out in turn: thing i, if i % size is its `rank`."""

    size: int = 1
    rank: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise LayoutMismatch(f"rank {self.rank} of {self.size} that share: ranks count from 0 to size - 1")

    @property
    def is_all(self) -> bool:
        return self.size == 1


@dataclass(frozen=True, slots=True)
class KvLayout:
    """What the entries of a rank's KV pool stand for.

    page_size    tokens a page
    heads        which heads this rank holds; None where heads are not split (MLA), or not known: then only ranks of the
                 same TP size pair
    first_layer  of the layers of this pipeline stage, for pairs that announce no layer ids
    layer_ids    the model's layer of each entry, if the engine announces them; an id may repeat (K and V)
    pages        prefill: which of the request's page numbers are here, number i at page i // size (stock's
                 `--enable-kv-cache-sharding`)
    tokens       which of a request's tokens are here, in order, `page_size` to the page (decode context parallel); MLA
    """

    kind: Kind = Kind.MHA
    page_size: int = 1
    heads: Heads | None = None
    first_layer: int = 0
    layer_ids: tuple[int, ...] = ()
    pages: Share = Share()
    tokens: Share = Share()

    def __post_init__(self) -> None:
        if self.page_size < 1 or self.first_layer < 0:
            raise LayoutMismatch(
                f"page_size {self.page_size} from layer {self.first_layer} on: "
                "give at least 1 token, and a layer from 0"
            )
        if not self.tokens.is_all and self.kind is not Kind.MLA:
            raise LayoutMismatch(
                f"tokens are shared by {self.tokens.size} ranks and the pool is {self.kind}: only MLA pools can be"
            )


@dataclass(frozen=True, slots=True)
class Slices:
    """How an item of a state's entry is split over TP ranks: `rows` one after another, in each those units that `heads`
    says. One row of its channels (Mamba); a row for each token of a page (sliding windows). `Heads(1, ...)`: the same
    on every rank. `parts`: where a row is several after another, each split by itself, the units of each over all ranks
    (the convolution state of GDN: q, k, v)."""

    heads: Heads
    rows: int = 1
    parts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise LayoutMismatch(f"{self.rows} rows in an item of state: there is at least 1")
        if self.parts and (sum(self.parts) != self.heads.total or any(n % self.heads.tp_size for n in self.parts)):
            raise LayoutMismatch(
                f"parts of {self.parts} units are not the {self.heads.total} of a row, or do not divide over "
                f"{self.heads.tp_size} TP ranks: give all of them, over all ranks"
            )

    def heads_of_parts(self) -> list[Heads]:
        """Of each part, the units that this rank holds."""
        return [Heads(n, self.heads.tp_size, self.heads.tp_rank) for n in self.parts]

    @property
    def dim(self) -> int:
        """As stock announces it: units in a row here, 0 where all ranks have the same."""
        return 0 if self.heads.total == 1 else len(self.heads.held)


@dataclass(frozen=True, slots=True)
class RankPools:
    """All that a rank has to send, or to be written into: KV with the meaning of its entries, aux buffers, and groups
    of state beside KV (Mamba, sliding windows, an indexer: one group a kind, of which a request has its own rows).

    `state_layer_ids`: of each group, the model's layer of each entry; empty where the engine announces none.
    `state_slices`: of each group, how each entry is split over TP ranks; without, only items of one length pair.
    """

    kv: Pool
    aux: Pool
    layout: KvLayout = KvLayout()
    states: tuple[Pool, ...] = ()
    state_layer_ids: tuple[tuple[int, ...], ...] = ()
    state_slices: tuple[tuple[Slices, ...], ...] = ()

    def __post_init__(self) -> None:
        for lists, what in ((self.state_layer_ids, "layer ids"), (self.state_slices, "slices")):
            if lists and len(lists) != len(self.states):
                raise LayoutMismatch(
                    f"{len(self.states)} groups of state and {len(lists)} lists of {what}: "
                    "give each group one, or none at all"
                )
        for state, slices in zip(self.states, self.state_slices, strict=False):
            if slices and len(slices) != len(state):
                raise LayoutMismatch(
                    f"a group of {len(state)} entries of state has {len(slices)} slices: give each one"
                )

    @property
    def state_dims(self) -> tuple[tuple[int, ...], ...]:
        """As a registration has it."""
        return tuple(tuple(each.dim for each in slices) for slices in self.state_slices)

    def placed(self, where: Callable[[Region], DeviceSpec]) -> RankPools:
        """The same, each pool with the device that it is on; `where` knows. Raises BadField for one on several."""
        return replace(
            self,
            kv=_placed(self.kv, where, "kv"),
            aux=_placed(self.aux, where, "aux"),
            states=tuple(_placed(state, where, f"states.{n}") for n, state in enumerate(self.states)),
        )

    def check_summed_here(self) -> None:
        """Raises ConfigError where a checksum would have this processor follow a device's pointer."""
        named = (("kv", self.kv), ("aux", self.aux), *((f"states.{n}", pool) for n, pool in enumerate(self.states)))
        for what, pool in named:
            if not pool.on.is_host:
                raise ConfigError(
                    f"room.checksum is on, and the {what} pool is on {pool.on}: sums are made by the host's processor, "
                    "which cannot read it: switch room.checksum off at both sides"
                )

    def check_aux_written_here(self) -> None:
        """Raises BadField where an aux row that comes by the control link could not be written."""
        if not self.aux.on.is_host:
            raise BadField(
                "aux",
                f"is on {self.aux.on}: a prefill may send aux rows by the control link, and then the host's processor "
                "writes them: keep the aux buffers in host memory",
            )


def _placed(pool: Pool, where: Callable[[Region], DeviceSpec], what: str) -> Pool:
    found = {where(region) for region in pool.regions()}
    if len(found) > 1:
        named = " and ".join(sorted(map(str, found)))
        raise BadField(what, f"has entries on {named}: keep all entries of a pool on one device")
    return replace(pool, on=found.pop()) if found else pool
