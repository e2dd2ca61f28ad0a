"""What every journal promises, held against each of them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from pdctl.core.address import Endpoint
from pdctl.core.registry import Change, Registry
from pdctl.core.route import Announcement, Seat, Shape
from pdctl.persistence.base import Journal
from pdctl.persistence.memory import MemoryJournal

TP2 = Shape(attn_tp_size=2, attn_cp_size=1, dp_size=1, pp_size=1, page_size=16, kv_cache_dtype=None)
TP1 = replace(TP2, attn_tp_size=1, dsv41_spec_layout={"num_draft_tokens": 5})


@pytest.fixture(params=["memory"])
async def journal(request: pytest.FixtureRequest) -> AsyncIterator[Journal]:
    opened = {"memory": MemoryJournal}[request.param]()
    yield opened
    await opened.aclose()


def claim(tp: int, shape: Shape = TP2, port: int = 0) -> Announcement:
    return Announcement(Seat(0, 0, tp, 0), shape, Endpoint("10.0.0.1", port or 40000 + tp))


async def told(journal: Journal, *claims: Announcement, instance: str = "default") -> Registry:
    """A registry that took these claims, every change of it appended."""
    registry = Registry()
    for each in claims:
        await journal.append(registry.register(instance, each, now=5.0))
    return registry


async def rebuilt(journal: Journal) -> Registry:
    registry = Registry()
    for change in await journal.load():
        registry.restore(change, now=9.0)
    return registry


def picture(registry: Registry) -> object:
    """All but the times, which mean nothing to another process."""
    return [
        (view.name, view.shape, view.ready, {s: (life.announcement, life.epoch) for s, life in view.alive.items()})
        for view in registry
    ]


async def test_a_fresh_journal_gives_nothing_back(journal: Journal) -> None:
    assert await journal.load() == []


@pytest.mark.parametrize(
    "claims",
    [
        [claim(0)],
        [claim(0), claim(1)],
        [claim(0), claim(1), claim(0, port=50000)],
        [claim(0, TP1), claim(0, TP2, port=50000), claim(1)],
        [claim(0), claim(0), claim(0)],
    ],
    ids=["one", "complete", "replaced", "reshaped", "repeated"],
)
async def test_what_was_appended_gives_the_registry_back(journal: Journal, claims: list[Announcement]) -> None:
    registry = await told(journal, *claims)
    assert picture(await rebuilt(journal)) == picture(registry)


async def test_instances_are_kept_apart(journal: Journal) -> None:
    await told(journal, claim(0), instance="a")
    await told(journal, claim(0, TP1), claim(0, TP2, port=50000), instance="b")
    assert [view.name for view in await rebuilt(journal)] == ["a", "b"]


async def test_an_epoch_goes_on_after_a_restart(journal: Journal) -> None:
    await told(journal, claim(0), claim(0, port=50000))
    registry = await rebuilt(journal)
    change: Change = registry.register("default", claim(0, port=50001), now=10.0)[0]
    assert change.life.epoch == 3


async def test_it_keeps_one_change_a_seat(journal: Journal) -> None:
    """A rank that comes and goes for a year must not fill it."""
    await told(journal, *(claim(0, port=port) for port in range(40000, 40100)))
    assert len(await journal.load()) == 1


async def test_appending_nothing_is_nothing(journal: Journal) -> None:
    await journal.append([])
    assert await journal.load() == []


async def test_closing_again_does_nothing(journal: Journal) -> None:
    await journal.aclose()
    await journal.aclose()
