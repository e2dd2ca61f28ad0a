"""Pages of every host layout go into the real store and come back: zero copy, from one pool into another."""

from __future__ import annotations

from uuid import uuid4

import numpy as np
import pytest

from pdctl.memory import Arena
from pdctl.store.attachment import attached
from pdctl.store.base import Store
from tests.store.pools import CASES, Case, Model, names_of, nbytes_of, obvious, pool_in

MODEL = Model()


async def healthy() -> None:
    return


@pytest.mark.parametrize("case", CASES, ids=str)
async def test_pages_of_each_layout_come_back_byte_for_byte(store: Store, case: Case) -> None:
    with Arena(nbytes_of(MODEL)) as here, Arena(nbytes_of(MODEL)) as there:
        source, target = (arena.array(nbytes_of(MODEL), np.uint8) for arena in (here, there))
        source[:] = np.random.default_rng(1).integers(1, 256, source.size, np.uint8)
        sent, arrived = pool_in(here, case, MODEL), pool_in(there, case, MODEL)
        for pool in (sent, arrived):
            for region in pool.regions():
                await store.register(region)
        names = names_of(sent, ["aa", "bb", "cc"], uuid4().hex)
        async with attached(store, healthy) as attachment:
            assert all(await attachment.put_pages(names, *sent.runs([4, 0, 5])))
            assert all(await attachment.get_pages(names, *arrived.runs([1, 2, 5]), strict=True))
        for page, other in ((4, 1), (0, 2), (5, 5)):
            assert obvious(target, case, MODEL, other) == obvious(source, case, MODEL, page)
        assert not any(obvious(target, case, MODEL, 0)), "a page that nobody asked for was written to"
        for pool in (sent, arrived):
            for region in pool.regions():
                await store.unregister(region)
