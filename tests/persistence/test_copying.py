"""A registry that moves to another store: nothing is lost on the way, and its ranks go on as they are."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pdctl.cli import run
from pdctl.core.kinds import ChangeKind
from pdctl.core.lives import Ending, Life
from pdctl.persistence.copying import copy
from pdctl.persistence.open import open_journal
from tests.faults.replicas import call, claim, renew, seen
from tests.persistence.etcd import Cluster, cluster
from tests.persistence.rows import change, life
from tests.persistence.rows import claim as claimed
from tests.service import service


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("etcd")) as made:
        yield made


@pytest.mark.parametrize("back", [False, True], ids=["to etcd", "to sqlite"])
async def test_everything_that_was_kept_is_kept_there_with_its_numbers(
    tmp_path: Path, etcd: Cluster, back: bool
) -> None:
    urls = [f"sqlite:{tmp_path / 'journal'}", etcd.url(f"copy{back:d}")]
    source, target = reversed(urls) if back else urls
    lost = life(3, claimed(2))
    async with open_journal(source) as full:
        names = [f"i{n}" for n in range(120)]
        for first in range(0, 120, 40):
            some = names[first : first + 40]
            await full.append(
                [change(life(10 + first + n, claimed(instance=name)), first + n) for n, name in enumerate(some)]
            )
        ending = Ending(ChangeKind.EXPIRED, 9, of_complete=True)
        await full.append([change(lost, 400)])
        await full.append([replace(change(lost, 401, ChangeKind.EXPIRED), why="was silent", ending=ending)])
        await full.append([change(life(999, claimed(5)), 402), change(life(999, claimed(5)), 500, ChangeKind.LEFT)])
        await full.append(
            [change(life(500, claimed(1)).draining(30.0, 0.0), 450, ChangeKind.DRAINING)], [(7, 1), (2**70, 0)]
        )
        await full.note([("keys", f"k{n}", bytes([n])) for n in range(130)])
    async with open_journal(source) as full, open_journal(target) as empty:
        copied = await copy(full, empty)
        assert (copied.lives, copied.rooms, copied.notes, copied.last_epoch) == (122, 2, 130, 999)
        kept = await full.load()
    async with open_journal(target) as again:
        assert await again.load() == kept


def test_a_target_that_has_something_is_refused_and_left_as_it_is(
    tmp_path: Path, etcd: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = f"sqlite:{tmp_path / 'journal'}", etcd.url("full")
    asyncio.run(keep(source, life(1)))
    asyncio.run(keep(target, life(8)))
    assert run(["journal", "copy", source, target]) == 2
    assert "1 lives, 0 rooms and 0 notes already" in capsys.readouterr().err
    assert asyncio.run(epochs(target)) == [8]


async def keep(url: str, what: Life) -> None:
    async with open_journal(url) as journal:
        await journal.append([change(what, 1)])


async def epochs(url: str) -> list[int]:
    async with open_journal(url) as journal:
        return [record.epoch for record in (await journal.load()).records]


@pytest.mark.parametrize("ends", [("memory:", "sqlite:x"), ("sqlite:/nowhere/at/all", "etcd://127.0.0.1:1")])
def test_what_cannot_be_copied_is_said(ends: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["journal", "copy", *ends]) == 2
    assert "give" in capsys.readouterr().err


def test_a_running_registry_moves_to_etcd_and_its_ranks_keep_their_seats(
    tmp_path: Path, etcd: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    file, url = f"sqlite:{tmp_path / 'journal'}", etcd.url("moved")
    with service(tmp_path / "old.log", "--journal", file) as old:
        port = old.port
        epoch = claim(old, "p", 0, size=1, ttl_s=60.0).body["epoch"]
        assert call("POST", f"{old.url}/register_dp_rank", {"bootstrap_room": 5, "dp_rank": 0}).status == 200
        assert run(["journal", "copy", file, url]) == 69  # in use
        assert f"{old.pid}" in capsys.readouterr().err
    assert run(["journal", "copy", file, url]) == 0
    replicas = [
        service(tmp_path / "new.log", "--journal", url, "--port", str(port)),
        service(tmp_path / "b.log", "--journal", url),
    ]
    with replicas[0] as new, replicas[1] as other:
        assert renew(new, "p", 0, epoch).status == 200
        assert set(seen(new, "p")) == set(seen(other, "p")) == {epoch}
        rooms = call("POST", f"{other.url}/query_dp_ranks", {"bootstrap_rooms": [5]})
        assert rooms.body == {"5": 0}
