"""
Pages and tokens that are dealt out over ranks in turn: which are ours, where they lie here, and where they go.

Two things that stock SGLang does so. KV sharding: a prefill rank holds every size-th page number. Decode context
parallel (DCP): a decode rank holds every size-th token of a request, packed. Numbers only: plan.py makes copies of
them.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from pdctl.core.layout import Pool, Share
from pdctl.core.plan import Ints
from pdctl.errors import LayoutMismatch


def held_pages(numbers: Ints, share: Share) -> tuple[Ints, Ints]:
    """Which pages of ours have those of the request's `numbers` that we hold, and at which positions these stand."""
    at = np.flatnonzero(numbers % share.size == share.rank)
    return numbers[at] // share.size, at


def dealt_tokens(source: Ints, start: int, named: npt.ArrayLike, share: Share, page_size: int) -> tuple[Ints, Ints]:
    """Tokens of our pages `source`, and of the receiver's pages `named`, that are its share: both shape (n,).

    `start`: how many pages of the request came before; its first token is one that the rank 0 of them gets.
    """
    pages = np.asarray(named, dtype=np.int64).ravel()
    first, n = start * page_size, len(source) * page_size
    ours = np.arange((share.rank - first) % share.size, n, share.size, dtype=np.int64)
    theirs = (first + ours) // share.size
    return (
        source[ours // page_size] * page_size + ours % page_size,
        pages[theirs // page_size] * page_size + theirs % page_size,
    )


def by_token(pool: Pool, page_size: int, what: str) -> Pool:
    """The same memory with a token as an item. Raises LayoutMismatch where a page is no whole number of them."""
    for entry, nbytes in enumerate(pool.item_lens):
        if nbytes % page_size:
            raise LayoutMismatch(
                f"{what} entry {entry}: {nbytes} bytes a page are no {page_size} tokens: check page_size"
            )
    n_items = None if pool.n_items is None else pool.n_items * page_size
    return replace(pool, item_lens=tuple(nbytes // page_size for nbytes in pool.item_lens), n_items=n_items)
