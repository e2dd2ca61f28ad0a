"""
Which entries of two ranks' pools are the same, and whether their items are: as arrays, for those that copy.

Apart from the layout, which says the same in words, so that whoever only compares or shows one has no arrays.
"""

from __future__ import annotations

from collections import defaultdict, deque

import numpy as np
import numpy.typing as npt

from pdctl.core.layout import Kind, KvLayout, Pool
from pdctl.errors import LayoutMismatch

Pairs = npt.NDArray[np.int64]
"""Shape (k, 2): entry of the sender, entry of the receiver."""


def layer_of(layout: KvLayout, n_entries: int) -> npt.NDArray[np.int64]:
    """The model's layer of each entry, shape (n_entries,)."""
    if layout.layer_ids:
        return np.asarray(layout.layer_ids, dtype=np.int64)
    layers = n_entries // 2 if layout.kind is Kind.MHA else n_entries
    return layout.first_layer + np.arange(n_entries, dtype=np.int64) % max(1, layers)


def check_pair(source: Pool, destination: Pool, what: str) -> None:
    """Raise LayoutMismatch, with both values, if items of `source` cannot be copied one to one into `destination`."""
    if len(source) != len(destination):
        raise LayoutMismatch(
            f"{what}: the sender has {len(source)} entries and the receiver {len(destination)}: "
            "start both with the same model and the same pipeline split"
        )
    check_items(source, destination, same_entries(len(source)), what)


def check_items(source: Pool, destination: Pool, pairs: Pairs, what: str) -> None:
    """Raise LayoutMismatch, with entry and both values, unless the items of all `pairs` have the same length."""
    ours, theirs = lengths(source)[pairs[:, 0]], lengths(destination)[pairs[:, 1]]
    if (ours == theirs).all():
        return
    at = int(np.argmax(ours != theirs))
    raise LayoutMismatch(
        f"{what} entry {pairs[at, 0]}: the sender has {ours[at]} bytes an item and the receiver {theirs[at]}: "
        "start both with the same page size, dtype and head split"
    )


def lengths(pool: Pool) -> npt.NDArray[np.int64]:
    """Bytes an item, shape (E,)."""
    return np.asarray(pool.item_lens, dtype=np.int64)


def same_entries(n: int) -> Pairs:
    """Entry i to entry i."""
    return np.repeat(np.arange(n, dtype=np.int64), 2).reshape(-1, 2)


def pair_entries(ours: KvLayout, n_ours: int, their_ids: tuple[int, ...], n_theirs: int, what: str) -> Pairs:
    """Which entry of the receiver each of the sender's goes to. Raises LayoutMismatch where that cannot be known.

    By layer ids where both sides give them. Else by position: the receiver has the layers of all pipeline stages, or
    the same as the sender.
    """
    if ours.layer_ids and their_ids:
        return pair_by_id(ours.layer_ids, n_ours, their_ids, n_theirs, what)
    if n_ours == n_theirs:
        return same_entries(n_ours)
    if ours.layer_ids or their_ids:
        who = "receiver" if ours.layer_ids else "sender"
        raise LayoutMismatch(
            f"{what}: {n_ours} entries at the sender, {n_theirs} at the receiver, and the {who} gives no layer ids: "
            "start both with the same version, or with the same pipeline split"
        )
    parts = 2 if ours.kind is Kind.MHA else 1
    if n_ours % parts or n_theirs % parts or n_theirs < n_ours:
        raise _no_stage(ours, n_ours, n_theirs, what)
    layers, all_layers = n_ours // parts, n_theirs // parts
    if parts == 2 and all_layers % layers:  # a draft model's layers come after all of the model's own (stock's order)
        all_layers -= all_layers % layers
    if ours.first_layer + layers > all_layers:
        raise _no_stage(ours, n_ours, n_theirs, what)
    at = np.arange(layers, dtype=np.int64)
    return np.concatenate(
        [np.stack([part * layers + at, part * all_layers + ours.first_layer + at], axis=1) for part in range(parts)]
    )


def pair_by_id(our_ids: tuple[int, ...], n_ours: int, their_ids: tuple[int, ...], n_theirs: int, what: str) -> Pairs:
    """Each entry of the sender to the receiver's of the same layer; the k-th of an id to the k-th. Raises
    LayoutMismatch for a layer that the receiver has not, and for ids that are not as many as entries."""
    for ids, n, who in ((our_ids, n_ours, "sender"), (their_ids, n_theirs, "receiver")):
        if len(ids) != n:
            raise LayoutMismatch(f"{what}: the {who} has {n} entries and {len(ids)} layer ids: give each entry one")
    places: defaultdict[int, deque[int]] = defaultdict(deque)
    for place, layer in enumerate(their_ids):
        places[layer].append(place)
    pairs = []
    for entry, layer in enumerate(our_ids):
        if not places[layer]:
            raise LayoutMismatch(
                f"{what}: the receiver has no entry for layer {layer}: start both with the same model, and decode "
                "with the prefill's pipeline split or without one"
            )
        pairs.append((entry, places[layer].popleft()))
    return np.asarray(pairs, dtype=np.int64).reshape(-1, 2)


def _no_stage(ours: KvLayout, n_ours: int, n_theirs: int, what: str) -> LayoutMismatch:
    return LayoutMismatch(
        f"{what}: {n_ours} entries of {ours.kind} from layer {ours.first_layer} on do not fit into the receiver's "
        f"{n_theirs}: start decode with the prefill's pipeline split or without one"
    )
