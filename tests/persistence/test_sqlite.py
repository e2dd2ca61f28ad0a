# ruff: noqa: ASYNC220, ASYNC240 - files and processes are what is tested, and nobody else is in the loop
"""What only a journal on a disk can promise: through kills, corruption, full and read-only disks, a second process."""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from zlib import crc32

import pytest
import structlog

from pdctl.core.kinds import ChangeKind
from pdctl.errors import ConfigError, JournalUnavailable, JournalUnusable
from pdctl.metrics import Metrics
from pdctl.persistence.base import Kept
from pdctl.persistence.open import open_journal
from pdctl.persistence.place import path_in
from pdctl.persistence.sqlite import SqliteJournal
from tests.conftest import Clock
from tests.patience import until
from tests.persistence.rows import change, claim, life, records
from tests.persistence.tmpfs import Tmpfs, can_mount

needs_mount = pytest.mark.skipif(not can_mount(), reason="cannot mount a small tmpfs here")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal"


@pytest.fixture
def lines() -> Iterator[list]:
    with structlog.testing.capture_logs() as captured:
        yield captured


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Tmpfs]:
    """A file system of 1 MiB of its own."""
    with Tmpfs(tmp_path / "disk") as mounted:
        yield mounted


@asynccontextmanager
async def opened(path: Path, **more: object) -> AsyncIterator[SqliteJournal]:
    journal = SqliteJournal(path, retry_every_s=0.05, **more)  # type: ignore[arg-type]
    await journal.start()
    try:
        yield journal
    finally:
        await journal.aclose()


async def filled(path: Path, *epochs: int) -> None:
    async with opened(path) as journal:
        await journal.append([change(life(epoch), epoch) for epoch in epochs], [(epoch, 0) for epoch in epochs])


@pytest.mark.parametrize("n", [1, 2, 3, 37, 128, 129, 300])
async def test_a_group_of_any_length_is_kept_whole(path: Path, n: int) -> None:
    """However many rows one statement takes."""
    lives = [life(epoch, claim(epoch % 64)) for epoch in range(1, 2 * n + 1)]
    rooms = [(2**62 + place, place % 8) for place in range(n)]
    async with opened(path) as journal:
        await journal.append([change(each, each.epoch) for each in lives[:n]], rooms)
        await journal.append(
            [change(new, new.epoch, before=old) for old, new in zip(lives[:n], lives[n:], strict=True)]
        )
        await journal.note([("keys", str(place), b"v%d" % place) for place in range(n)])
    async with opened(path) as journal:
        kept = await journal.load()
    assert kept.records == tuple(each.record() for each in lives[n:])
    assert (kept.last_epoch, kept.revision, list(kept.rooms)) == (2 * n, 2 * n, rooms)
    assert list(kept.notes) == [("keys", str(place), b"v%d" % place) for place in range(n)]


async def test_a_journal_says_where_it_is_refused_to_be(tmp_path: Path) -> None:
    with pytest.raises(JournalUnusable, match=r"there is no directory .*missing: make it"):
        await SqliteJournal(tmp_path / "missing" / "journal").start()
    with pytest.raises(JournalUnusable, match="is a directory: give the path of a file"):
        await SqliteJournal(tmp_path).start()


@pytest.mark.parametrize("url", ["", "sqlite:", "sqlite: ", "postgres://x", "journal.db", "memory", "sqlite:a\0b"])
def test_a_url_that_names_no_journal_is_refused_with_those_that_do(url: str) -> None:
    with pytest.raises(ConfigError, match="give sqlite:PATH, etcd://HOST:PORT, or memory:"):
        path_in(url)


async def test_a_url_names_its_path() -> None:
    assert path_in("sqlite:/var/lib/x") == Path("/var/lib/x")
    assert path_in("sqlite:rel/x") == Path("rel/x")
    assert path_in("memory:") is None


async def test_of_a_room_the_last_rank_counts_and_rooms_wider_than_the_disks_integers_are_kept(path: Path) -> None:
    wide = 2**127
    async with opened(path) as journal:
        await asyncio.gather(*(journal.append([], [(room, rank)]) for room, rank in ((7, 0), (wide, 1), (7, 2))))
    async with opened(path) as journal:
        assert dict((await journal.load()).rooms) == {7: 2, wide: 1}


async def test_rooms_that_nobody_can_ask_for_any_more_are_cut_off_by_time_alone(path: Path, clock: Clock) -> None:
    async with opened(path, clock=clock, rooms_kept_s=100.0) as journal:
        for number in range(30):
            await journal.append([], [(number, 0)])
            clock.forward(10.0)
        kept = [room for room, _ in (await journal.load()).rooms]
        assert kept[-1] == 29
        assert 10 <= len(kept) <= 13  # 100 s of them, to the grain of a mark


async def test_rooms_have_their_whole_life_again_after_a_restart(path: Path, clock: Clock) -> None:
    await filled(path, 1, 2)
    async with opened(path, clock=clock, rooms_kept_s=100.0) as journal:
        clock.forward(99.0)
        await journal.append([], [(3, 0)])
        assert [room for room, _ in (await journal.load()).rooms] == [1, 2, 3]
        clock.forward(2.0)
        await journal.append([], [(4, 0)])
        assert [room for room, _ in (await journal.load()).rooms] == [3, 4]


async def test_whoever_waits_shares_one_transaction(path: Path) -> None:
    """Each for itself, 1,000 rows would be 1,000 waits for the disk."""
    async with opened(path) as journal:
        before = transactions(path)
        await asyncio.gather(*(journal.append([change(life(n), n)]) for n in range(1, 1001)))
        assert transactions(path) - before <= 3


def transactions(path: Path) -> int:
    """Commit frames in the WAL: those whose second word, the size of the database after the commit, is not 0."""
    wal = path.with_name(path.name + "-wal").read_bytes()
    page = int.from_bytes(wal[8:12], "big")
    return sum(wal[at + 4 : at + 8] != bytes(4) for at in range(32, len(wal), 24 + page))


async def test_a_row_that_cannot_be_written_fails_its_caller_alone(path: Path) -> None:
    odd = change(life(1, claim(metadata={"x": float("nan")})), 1)
    async with opened(path) as journal:
        good = asyncio.create_task(journal.append([change(life(2), 2)]))
        with pytest.raises(ValueError, match="not JSON compliant"):
            await journal.append([odd])
        await good
        assert [record.epoch for record in await records(journal)] == [2]


async def test_what_was_appended_before_closing_is_written(path: Path) -> None:
    journal = SqliteJournal(path)
    await journal.start()
    waiting = asyncio.create_task(journal.append([change(life(1), 1)]))
    await asyncio.sleep(0)
    await journal.aclose()
    await waiting
    with pytest.raises(JournalUnavailable, match="closing"):
        await journal.append([change(life(2), 2)])
    async with opened(path) as again:
        assert [record.epoch for record in await records(again)] == [1]


# --- who may have it


async def test_a_second_process_is_refused_and_told_who_holds_it(path: Path) -> None:
    async with opened(path):
        with pytest.raises(JournalUnusable, match=rf"held by process {os.getpid()} on .*: stop that process, or give"):
            await SqliteJournal(path).start()
    await filled(path, 1)  # the holder has let go


async def test_a_holder_that_was_killed_holds_nothing(path: Path) -> None:
    code = (
        "import asyncio,sys; from pathlib import Path; from pdctl.persistence.sqlite import SqliteJournal\n"
        "async def main():\n"
        "    await SqliteJournal(Path(sys.argv[1])).start(); print('held', flush=True); await asyncio.sleep(60)\n"
        "asyncio.run(main())"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"held\n"
        with pytest.raises(JournalUnusable, match=f"process {child.pid} on"):
            await SqliteJournal(path).start()
        child.kill()
        child.wait()
    await filled(path, 1)


async def test_a_program_that_does_not_ask_is_kept_out_too(path: Path) -> None:
    async with opened(path) as journal:
        await journal.append([change(life(1), 1)])
        other = sqlite3.connect(path, timeout=0)
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            other.execute("DELETE FROM lives")
        other.close()


async def test_another_programs_database_is_refused_and_not_touched(path: Path) -> None:
    other = sqlite3.connect(path)
    other.execute("CREATE TABLE theirs (x)")
    other.close()
    before = path.read_bytes()
    with pytest.raises(JournalUnusable, match="another program's database: give a path of its own"):
        await SqliteJournal(path).start()
    assert path.read_bytes() == before


# --- versions


def alter(path: Path, sql: str, *values: object) -> None:
    db = sqlite3.connect(path)
    with db:
        db.execute(sql, values)
    db.close()


async def test_a_journal_of_a_newer_schema_is_refused_and_not_touched(path: Path) -> None:
    await filled(path, 1)
    alter(path, "PRAGMA user_version = 7")
    with pytest.raises(JournalUnusable, match=r"another version of pdctl \(its schema is 7, this one knows 1\): start"):
        await SqliteJournal(path).start()
    alter(path, "PRAGMA user_version = 1")
    async with opened(path) as journal:
        assert [record.epoch for record in await records(journal)] == [1]


@pytest.mark.parametrize(
    ("alteration", "complaint"),
    [
        ({"color": "red"}, "does not know color in the row of epoch 1"),
        ({"ttl_s": None, "role": 5, "epoch": "x"}, "row of epoch 1"),
        ({"ttl_s": -1}, "in the row of epoch 1: ttl_s: is -1"),
    ],
    ids=["unknown field", "other types", "other limits"],
)
async def test_a_row_that_this_version_cannot_read_whole_is_named_and_kept(
    path: Path, alteration: dict[str, object], complaint: str
) -> None:
    await filled(path, 1)
    text = json.dumps(life(1).record().to_row() | alteration)
    alter(path, "UPDATE lives SET row = ?, checksum = ?", text, crc32(text.encode()))
    async with opened(path) as journal:
        with pytest.raises(JournalUnusable, match=complaint):
            await journal.load()
    assert text.encode() in path.read_bytes()


async def test_a_row_without_a_field_is_of_another_version(path: Path) -> None:
    await filled(path, 1)
    row = life(1).record().to_row()
    del row["labels"]
    alter(path, "UPDATE lives SET row = ?, checksum = ?", json.dumps(row), crc32(json.dumps(row).encode()))
    async with opened(path) as journal:
        with pytest.raises(JournalUnusable, match=r"another version of pdctl .*epoch 1: no 'labels'"):
            await journal.load()


# --- corruption: set aside, loudly, never deleted


def scribble(path: Path, at: int, nbytes: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(b"\xa5" * nbytes)


def spoil_what_nobody_reads(path: Path) -> None:
    """An index, which the next write would follow astray."""
    db = sqlite3.connect(path)
    ((page,),) = db.execute("SELECT rootpage FROM sqlite_master WHERE name = 'sqlite_autoindex_notes_1'").fetchall()
    db.close()
    scribble(path, (page - 1) * 4096, 100)


def flip_a_bit_in_a_row(path: Path) -> None:
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b'"rank_ip":"10.0.0.1"', b'"rank_ip":"10.0.0.3"', 1))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_bytes(b"not a database at all, and long enough to have a header" * 20),
        lambda path: scribble(path, 0, 64),
        lambda path: scribble(path, 4096, 2048),
        lambda path: os.truncate(path, path.stat().st_size // 2),
        spoil_what_nobody_reads,
        flip_a_bit_in_a_row,
    ],
    ids=["other text", "header", "pages", "cut short", "an index", "one bit"],
)
async def test_a_corrupt_journal_is_set_aside_loudly_and_the_next_one_works(
    path: Path, spoil: Callable[[Path], object], lines: list
) -> None:
    await filled(path, *range(1, 200))
    spoil(path)
    spoiled = path.read_bytes()
    async with opened(path) as journal:
        assert await journal.load() == Kept()
        await journal.append([change(life(1), 1)])
    (aside,) = path.parent.glob("journal.corrupt-*Z")
    assert aside.read_bytes() == spoiled
    (said,) = [line for line in lines if line["log_level"] == "error"]
    assert "SET ASIDE" in said["event"]
    assert said["aside"] == str(aside)
    async with opened(path) as journal:
        assert [record.epoch for record in await records(journal)] == [1]


async def test_two_that_are_set_aside_in_one_second_are_both_there(path: Path) -> None:
    for text in (b"first" * 100, b"second" * 100):
        path.write_bytes(text)
        async with opened(path) as journal:
            assert await journal.load() == Kept()
        path.unlink()
    assert len(list(path.parent.glob("journal.corrupt-*"))) == 2


async def test_a_tail_that_a_power_cut_left_half_written_is_no_corruption(path: Path, tmp_path: Path) -> None:
    async with opened(path) as journal:
        for epoch in (1, 2):
            await journal.append([change(life(epoch), epoch)])
        crashed = tmp_path / "crashed"
        crashed.write_bytes(path.read_bytes())
        wal = path.with_name("journal-wal").read_bytes()
    crashed.with_name("crashed-wal").write_bytes(wal[:-100])
    async with opened(crashed) as journal:
        assert [record.epoch for record in await records(journal)] == [1]
    assert not list(tmp_path.glob("*corrupt*"))


# --- disks


async def test_a_full_disk_refuses_with_the_cause_and_recovers_by_itself(path: Path, lines: list) -> None:
    """By SQLite's own limit, which fails where a full disk does; on a real one below."""
    async with opened(path) as journal:
        await journal.append([change(life(1), 1)])
        assert journal._db is not None
        await journal._db.execute("PRAGMA max_page_count = 6")
        wide = claim(metadata={"x": "y" * 20_000})
        outcomes = await asyncio.gather(
            *(journal.append([change(life(n, wide), n)]) for n in range(2, 5)), return_exceptions=True
        )
        assert [type(outcome) for outcome in outcomes] == [JournalUnavailable] * 3
        assert "no space is left" in str(outcomes[0])
        assert [record.epoch for record in await records(journal)] == [1]
        await journal._db.execute("PRAGMA max_page_count = 100000")
        await until(lambda: journal.trouble is None)
        await journal.append([change(life(2, wide), 2)])
        assert [record.epoch for record in await records(journal)] == [1, 2]
    assert [line["event"] for line in lines] == ["the journal takes no rows", "the journal takes rows again"]


async def test_what_was_written_of_a_refused_append_is_taken_back(path: Path) -> None:
    """The life would have fitted, the rooms do not."""
    async with opened(path) as journal:
        assert journal._db is not None
        await journal._db.execute("PRAGMA max_page_count = 20")
        with pytest.raises(JournalUnavailable):
            await journal.append([change(life(1), 1)], [(room, 0) for room in range(50_000)])
        await journal._db.execute("PRAGMA max_page_count = 100000")
        await until(lambda: journal.trouble is None)
        await journal.append([change(life(2), 2)])
        kept = await journal.load()
        assert [record.epoch for record in kept.records] == [2]
        assert not kept.rooms


@needs_mount
async def test_a_disk_that_fills_keeps_what_it_took_and_nothing_of_what_it_refused(disk: Tmpfs) -> None:
    path, taken, refused = disk.path / "journal", [], 0
    async with opened(path) as journal:
        for epoch in range(1, 400):
            wide = claim(metadata={"x": "y" * 5000})
            try:
                await journal.append([change(life(epoch, wide), epoch)], [(epoch, 0)])
                taken.append(epoch)
            except JournalUnavailable as error:
                assert "no space is left: free some" in str(error)  # noqa: PT017
                assert journal.trouble is not None
                refused += 1
        assert taken
        assert refused
        assert [record.epoch for record in await records(journal)] == taken
    async with opened(path) as journal:  # a restart on the full disk
        kept = await journal.load()
        assert [record.epoch for record in kept.records] == taken
        assert [room for room, _ in kept.rooms] == taken
        disk.resize("8m")
        await until(lambda: journal.trouble is None)
        await journal.append([change(life(1000), 1000)])
        assert [record.epoch for record in await records(journal)] == [*taken, 1000]


@needs_mount
@pytest.mark.parametrize("how", ["closed", "killed"])
async def test_a_read_only_disk_gives_what_it_holds_and_takes_no_more_until_it_may(disk: Tmpfs, how: str) -> None:
    path = disk.path / "journal"
    await filled(path, 1, 2)
    if how == "killed":  # rows that stand in the WAL alone
        async with opened(path) as journal:
            await journal.append([change(life(3), 3)])
            left = {part: part.read_bytes() for part in disk.path.iterdir() if part.name != "journal.lock"}
        for part, content in left.items():
            part.write_bytes(content)
    else:
        await filled(path, 3)
    disk.remount("ro")
    async with opened(path) as journal:
        assert [record.epoch for record in await records(journal)] == [1, 2, 3]
        with pytest.raises(JournalUnavailable, match="read-only"):
            await journal.append([change(life(4), 4)])
        assert "read-only" in str(journal.trouble)
        disk.remount("rw")
        await until(lambda: journal.trouble is None)
        await journal.append([change(life(5), 5)])
        assert [record.epoch for record in await records(journal)] == [1, 2, 3, 5]


async def test_a_file_that_was_deleted_under_it_takes_no_rows(path: Path, tmp_path: Path) -> None:
    """SQLite would go on writing to a file that has no name, and everything acknowledged would be gone with us."""
    async with opened(path) as journal:
        await journal.append([change(life(1), 1)])
        path.rename(tmp_path / "elsewhere")
        with pytest.raises(JournalUnavailable, match="no such file or directory"):
            await journal.append([change(life(2), 2)])
        path.write_bytes(b"")
        with pytest.raises(JournalUnavailable):
            await journal.append([change(life(2), 2)])
        (tmp_path / "elsewhere").rename(path)
        await until(lambda: journal.trouble is None)
        await journal.append([change(life(3), 3, ChangeKind.SEATED)])
    async with opened(path) as journal:
        assert [record.epoch for record in await records(journal)] == [1, 3]


async def test_a_disk_that_hangs_is_trouble_to_whoever_comes_later_and_late_to_whoever_waits(
    path: Path, clock: Clock
) -> None:
    """Whoever waits is not told no: the disk may have taken the row after all."""
    released = threading.Event()
    async with opened(path, clock=clock) as journal:
        assert journal._db is not None
        await journal._db.set_progress_handler(lambda: released.wait(10) and 0, 1)
        waiting = asyncio.create_task(journal.append([change(life(1), 1)]))
        await asyncio.sleep(0.05)
        assert journal.trouble is None
        clock.forward(7.0)
        assert "the disk has not answered for 7 s: check it" in str(journal.trouble)
        with pytest.raises(JournalUnavailable, match="not answered for 7 s"):
            await journal.append([change(life(2), 2)])
        released.set()
        await waiting
        assert journal.trouble is None
        assert [record.epoch for record in await records(journal)] == [1]


async def test_a_writer_that_died_is_told_to_all_who_wait_or_come(path: Path) -> None:
    async with opened(path) as journal:
        assert journal._writer is not None
        journal._writer.cancel()
        with pytest.raises(JournalUnavailable, match=r"its writer has ended .* defect"):
            await journal.append([change(life(1), 1)])
        with pytest.raises(JournalUnavailable, match=r"its writer has ended .* defect"):
            await journal.append([change(life(1), 1)])


async def test_its_transactions_its_failures_and_its_trouble_are_counted(path: Path) -> None:
    metrics = Metrics()
    async with opened(path, metrics=metrics.journal) as journal:
        await journal.append([change(life(1), 1)])
        assert b"pdctl_journal_commit_seconds_count 1.0" in metrics.exposition()[0]
        assert b"pdctl_journal_trouble 0.0" in metrics.exposition()[0]
        path.rename(path.with_name("elsewhere"))
        with pytest.raises(JournalUnavailable):
            await journal.append([change(life(2), 2)])
        assert b"pdctl_journal_failed_total 0.0" not in metrics.exposition()[0]
        assert b"pdctl_journal_trouble 1.0" in metrics.exposition()[0]


async def test_it_opens_by_its_url(tmp_path: Path) -> None:
    async with open_journal(f"sqlite:{tmp_path / 'a'}") as journal:
        await journal.append([change(life(1), 1)])
    assert (tmp_path / "a").is_file()


async def test_notes_are_there_after_a_restart_and_one_whose_bits_flipped_is_not_served(path: Path) -> None:
    async with opened(path) as journal:
        await journal.note([("keys", "a", b"1"), ("keys", "b", b"2"), ("keys", "a", None)])
    async with opened(path) as journal:
        assert (await journal.load()).notes == (("keys", "b", b"2"),)
    with sqlite3.connect(path) as db:
        db.execute("UPDATE notes SET value = x'33'")
    db.close()
    async with opened(path) as journal:
        assert await journal.load() == Kept()
    assert [each.name for each in path.parent.glob("journal.corrupt-*")]
