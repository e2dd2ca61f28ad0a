"""What every journal promises, held against each of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pdctl.core.kinds import ChangeKind
from pdctl.core.lives import Change, Life, Record
from pdctl.persistence.base import Journal, Kept, Notebook
from pdctl.persistence.memory import MemoryJournal
from pdctl.persistence.open import open_journal
from tests.persistence.etcd import Cluster, cluster
from tests.persistence.rows import change, claim, life, records

KINDS = ("memory", "sqlite", "etcd")


class Notes(Journal, Notebook, Protocol):
    """Both ports of one journal."""


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("etcd")) as made:
        yield made


def url(kind: str, tmp_path: Path, etcd: Cluster) -> str:
    """The same journal for the same `tmp_path`."""
    if kind == "etcd":
        return etcd.url(f"at{tmp_path}")
    return "memory:" if kind == "memory" else f"sqlite:{tmp_path / 'journal'}"


@pytest.fixture(params=KINDS)
async def journal(request: pytest.FixtureRequest, tmp_path: Path, etcd: Cluster) -> AsyncIterator[Journal]:
    async with open_journal(url(request.param, tmp_path, etcd)) as opened:
        yield opened


async def test_a_fresh_journal_gives_nothing_back(journal: Journal) -> None:
    assert await journal.load() == Kept()
    assert journal.trouble is None


async def test_what_was_appended_comes_back_whole(journal: Journal) -> None:
    whole = life(
        3,
        claim(
            instance="kimi",
            role="decode",
            labels={"zone": "b\u00fc\u00df"},
            metadata={"gpus": [1, 2.5, None], "deep": {"a": {"b": True}}},
            ttl_s=7.5,
            principal="ci",
            layout={"num_draft_tokens": 5, "kinds": ["x"]},
            page_size=None,
            http_port=30000,
        ),
    )
    await journal.append([change(whole, 9)])
    assert await journal.load() == Kept((whole.record(),), (), last_epoch=3, revision=9)


async def test_lives_come_back_by_rising_epoch(journal: Journal) -> None:
    for epoch in (2, 7, 5):
        await journal.append([change(life(epoch), epoch)])
    assert [record.epoch for record in (await journal.load()).records] == [2, 5, 7]


async def test_a_life_that_lost_its_seat_is_dropped(journal: Journal) -> None:
    old, new = life(1), life(2)
    await journal.append([change(old, 1)])
    await journal.append([change(new, 2, ChangeKind.REPLACED, before=old)])
    assert await records(journal) == [new.record()]


@pytest.mark.parametrize("kind", ["left", "expired", "drained", "superseded", "forgotten"])
async def test_the_end_of_a_life_is_kept_as_its_absence(journal: Journal, kind: str) -> None:
    await journal.append([change(life(1), 1), change(life(2, claim(tp=1)), 2)])
    await journal.append([change(life(1), 3, ChangeKind(kind))])
    assert [record.epoch for record in await records(journal)] == [2]


async def test_epoch_and_revision_outlive_the_last_life(journal: Journal) -> None:
    """Else a rank that comes after a restart would be an older life than one that left before it."""
    await journal.append([change(life(41), 1)])
    await journal.append([change(life(41), 77, ChangeKind.LEFT)])
    assert await journal.load() == Kept(last_epoch=41, revision=77)


async def test_of_two_words_on_one_life_the_later_counts(journal: Journal) -> None:
    await journal.append([change(life(1), 1), change(life(1).draining(30.0, now=5.0), 2, ChangeKind.DRAINING)])
    assert [record.grace_s for record in await records(journal)] == [30.0]


async def test_a_life_that_was_lost_comes_back_lost_with_the_cause(journal: Journal) -> None:
    await journal.append([change(life(1), 1), replace(change(life(1), 2, ChangeKind.LOST), why="refused")])
    assert [record.lost for record in await records(journal)] == ["refused"]


async def test_a_rank_that_comes_and_goes_for_a_year_does_not_fill_it(journal: Journal) -> None:
    before: Life | None = None
    for epoch in range(1, 101):
        await journal.append([change(life(epoch), epoch, ChangeKind.REPLACED, before=before)])
        before = life(epoch)
    assert [record.epoch for record in await records(journal)] == [100]


async def test_what_is_appended_at_once_is_kept_in_the_order_of_the_calls(journal: Journal) -> None:
    steps = [[change(life(n), n, ChangeKind.REPLACED, before=life(n - 1))] for n in range(1, 65)]
    await asyncio.gather(*(journal.append(step) for step in steps))
    assert await journal.load() == Kept((life(64).record(),), (), last_epoch=64, revision=64)


async def test_a_cancelled_wait_disturbs_nobody_else(journal: Journal) -> None:
    first = asyncio.create_task(journal.append([change(life(1), 1)]))
    second = asyncio.create_task(journal.append([change(life(2, claim(tp=1)), 2)]))
    await asyncio.sleep(0)
    first.cancel()
    await second
    assert 2 in [record.epoch for record in await records(journal)]


async def test_notes_come_back_in_the_order_of_the_last_word_on_each(journal: Notes) -> None:
    await journal.note([("keys", "a", b"1"), ("keys", "b", bytes(range(256))), ("fleet", "a", b"2")])
    await asyncio.gather(journal.note([("keys", "a", b"3")]), journal.note([("fleet", "a", None), ("keys", "c", b"")]))
    await journal.note([])
    kept = (("keys", "b", bytes(range(256))), ("keys", "a", b"3"), ("keys", "c", b""))
    assert await journal.load() == Kept(notes=kept)


async def test_notes_and_lives_share_a_journal_and_not_a_word(journal: Notes) -> None:
    await asyncio.gather(journal.append([change(life(1), 1)]), journal.note([("keys", "a", b"1")]))
    await journal.note([("keys", "a", None)])
    assert await journal.load() == Kept((life(1).record(),), (), 1, 1)


async def test_appending_nothing_is_nothing(journal: Journal) -> None:
    await journal.append([])
    assert await journal.load() == Kept()


async def test_closing_again_does_nothing(journal: Journal) -> None:
    await journal.aclose()
    await journal.aclose()


EPOCHS = st.integers(1, 6)
STEPS = st.lists(
    st.lists(
        st.tuples(EPOCHS, st.sampled_from(["seated", "amended", "left", "lost"]), st.none() | EPOCHS),
        max_size=4,
    ),
    max_size=12,
)


@pytest.mark.parametrize("kind", KINDS)
@given(steps=STEPS, at_once=st.booleans())
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_both_keep_what_the_port_says(
    tmp_path_factory: pytest.TempPathFactory,
    etcd: Cluster,
    kind: str,
    steps: list[list[tuple[int, str, int | None]]],
    at_once: bool,
) -> None:
    """Against the sentence in the port, taken word by word; opened anew for the reading where it can be."""
    asyncio.run(check_against_the_port(url(kind, tmp_path_factory.mktemp("journal"), etcd), steps, at_once))


async def check_against_the_port(where: str, steps: list[list[tuple[int, str, int | None]]], at_once: bool) -> None:
    revision, told = 0, []
    for step in steps:
        changes = []
        for epoch, word, before in step:
            revision += 1
            lost = None if before is None else life(before)
            changes.append(change(life(epoch, claim(port=40000 + revision)), revision, ChangeKind(word), before=lost))
        told.append(changes)
    async with AsyncExitStack() as stack:
        journal = await stack.enter_async_context(open_journal(where))
        if at_once:
            await asyncio.gather(*(journal.append(changes) for changes in told))
        else:
            for changes in told:
                await journal.append(changes)
        if not isinstance(journal, MemoryJournal):
            await stack.aclose()
            journal = await stack.enter_async_context(open_journal(where))
        assert await journal.load() == expected([each for changes in told for each in changes])


def expected(changes: list[Change]) -> Kept:
    kept: dict[int, Record] = {}
    last_epoch = revision = 0
    for each in changes:
        if each.before is not None:
            kept.pop(each.before.epoch, None)
        if each.is_dropped:
            kept.pop(each.life.epoch, None)
        else:
            kept[each.life.epoch] = each.record
        last_epoch, revision = max(last_epoch, each.life.epoch), max(revision, each.revision)
    return Kept(tuple(kept[epoch] for epoch in sorted(kept)), (), last_epoch, revision)
