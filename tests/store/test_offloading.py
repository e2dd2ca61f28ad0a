"""A rank's directory on the SSD: its own, usable, and not entered while the master still knows its last life."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from pdctl.core.kvstore import SetUp, StoreRank
from pdctl.core.offload import OffloadPatience
from pdctl.errors import ConfigError, StoreFailed
from pdctl.store.offloading import Claim, offloading

SEGMENT = 1 << 20
RANK = StoreRank(dp=1, tp=2, pp=0, cp=3, tp_size=4)
OTHER = StoreRank(dp=1, tp=3, pp=0, cp=3, tp_size=4)
SOON = OffloadPatience(client_ttl_s=0.3, forget_s=0.6)
LONG = OffloadPatience(client_ttl_s=60.0, forget_s=60.0)


def plan(root: Path, **changes: object) -> SetUp:
    options = {"enable_ssd_offload": True, "ssd_offload_path": str(root)}
    return SetUp("h", "P2PHANDSHAKE", SEGMENT, 0, "tcp", "", "m:1", options | changes)


class Master:
    """Knows these names, or tells nothing."""

    def __init__(self, *names: str) -> None:
        self.names: frozenset[str] | None = frozenset(names)
        self.asked = 0

    async def __call__(self) -> frozenset[str] | None:
        self.asked += 1
        return self.names


def enter(
    root: Path,
    rank: StoreRank = RANK,
    master: Master | None = None,
    environ: dict[str, str] | None = None,
    patience: OffloadPatience = SOON,
) -> AbstractAsyncContextManager[Claim]:
    return offloading(plan(root), rank, {} if environ is None else environ, master or Master(), patience)


@asynccontextmanager
async def lived(root: Path, name: str) -> AsyncIterator[Path]:
    """The directory of a rank whose process has ended: its files, its name, no lock."""
    directory = root / "rank_1_2_0_3"
    directory.mkdir(parents=True)
    (directory / "7.bucket").write_bytes(b"kept")
    (root / "rank_1_2_0_3.life").write_text(f'{{"name": "{name}"}}')
    yield directory


async def test_a_rank_has_a_directory_of_its_own_and_the_wheel_its_settings(tmp_path: Path) -> None:
    environ = {"MOONCAKE_OFFLOAD_HEARTBEAT_INTERVAL_SECONDS": "2"}
    async with enter(tmp_path / "ssd", environ=environ) as claim, enter(tmp_path / "ssd", OTHER) as other:
        assert claim.plan.options["ssd_offload_path"] == str(tmp_path / "ssd" / "rank_1_2_0_3")
        assert other.plan.options["ssd_offload_path"] == str(tmp_path / "ssd" / "rank_1_3_0_3")
        assert (tmp_path / "ssd" / "rank_1_2_0_3").stat().st_mode & 0o777 == 0o700
    assert environ["MOONCAKE_OFFLOAD_HEARTBEAT_INTERVAL_SECONDS"] == "2"
    assert environ["MOONCAKE_OFFLOAD_STORAGE_BACKEND_DESCRIPTOR"] == "file_per_key_storage_backend"
    assert environ["MOONCAKE_OFFLOAD_LOCAL_BUFFER_SIZE_BYTES"] == str(64 << 20)


async def test_without_offload_nothing_is_touched(tmp_path: Path) -> None:
    environ: dict[str, str] = {}
    bare = plan(tmp_path / "ssd", enable_ssd_offload=False)
    async with offloading(bare, RANK, environ, Master()) as claim:
        assert claim.plan is bare
        claim.keep("name")
    assert environ == {}
    assert not (tmp_path / "ssd").exists()


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Another process that lives in the directory."""
    (tmp_path / "rank_1_2_0_3").mkdir()
    code = (
        "import sys, time, pathlib; from pdctl.persistence.lock import take; "
        "held = take(pathlib.Path(sys.argv[1])); print(flush=True); time.sleep(60)"
    )
    lock = tmp_path / "rank_1_2_0_3.lock"
    with subprocess.Popen([sys.executable, "-c", code, str(lock)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()


async def test_a_directory_that_another_process_lives_in_is_refused_until_that_one_is_dead(
    tmp_path: Path, holder: subprocess.Popen[bytes]
) -> None:
    with pytest.raises(ConfigError, match=rf"rank_1_2_0_3 is held by process {holder.pid} on .* give each rank"):
        async with enter(tmp_path):
            pass
    holder.kill()
    holder.wait()
    async with enter(tmp_path):
        pass


async def test_a_directory_is_kept_until_the_process_ends_once_a_store_lives_there(tmp_path: Path) -> None:
    async with enter(tmp_path) as claim:
        pass
    async with enter(tmp_path) as claim:  # nobody lived there
        claim.keep("127.0.0.1:13000")
    with pytest.raises(ConfigError, match=f"held by process {os.getpid()}"):
        async with enter(tmp_path):
            pass


async def test_a_path_where_no_directory_can_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "ssd").write_text("")
    for root, why in ((tmp_path / "ssd", "Not a directory"), (Path("/proc/ssd"), "No such file or directory")):
        with pytest.raises(ConfigError, match=rf"{root}/rank_1_2_0_3 cannot be used \({why}\)"):
            async with enter(root):
                pass


async def test_a_link_is_refused_because_the_wheel_takes_none(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "ssd").symlink_to(tmp_path / "real")
    with pytest.raises(ConfigError, match=rf"is {tmp_path}/real/rank_1_2_0_3 in truth"):
        async with enter(tmp_path / "ssd"):
            pass


async def test_a_disk_with_less_room_than_the_segment_is_refused(tmp_path: Path) -> None:
    huge = replace(plan(tmp_path), segment_nbytes=1 << 60)
    with pytest.raises(ConfigError, match="bytes free, less than this rank's segment of"):
        async with offloading(huge, RANK, {}, Master()):
            pass
    async with enter(tmp_path):  # and is not held
        pass


async def test_nobody_enters_while_the_master_knows_the_last_life(tmp_path: Path) -> None:
    master = Master("127.0.0.1:13000", "127.0.0.1:14000")
    async with lived(tmp_path, "127.0.0.1:13000"):
        with pytest.raises(StoreFailed, match=r"still knows 127\.0\.0\.1:13000, the last to use"):
            async with enter(tmp_path, master=master):
                pass
        assert master.asked > 1
        master.names = frozenset({"127.0.0.1:14000"})
        began = time.monotonic()
        async with enter(tmp_path, master=master, patience=LONG):
            assert time.monotonic() - began < LONG.client_ttl_s / 2


@pytest.mark.parametrize("why", ["the master tells nothing", "nobody wrote its name"])
async def test_where_it_cannot_be_known_a_client_ttl_is_waited(tmp_path: Path, why: str) -> None:
    master = Master()
    async with lived(tmp_path, "127.0.0.1:13000"):
        if why == "the master tells nothing":
            master.names = None
        else:
            (tmp_path / "rank_1_2_0_3.life").write_text("{")
        began = time.monotonic()
        async with enter(tmp_path, master=master):
            assert time.monotonic() - began >= SOON.client_ttl_s


async def test_an_empty_directory_is_entered_at_once(tmp_path: Path) -> None:
    (tmp_path / "rank_1_2_0_3").mkdir()
    master = Master()
    master.names = None
    began = time.monotonic()
    async with enter(tmp_path, master=master, patience=LONG):
        assert time.monotonic() - began < LONG.client_ttl_s / 2


async def test_half_written_objects_of_the_last_life_are_gone_when_a_rank_moves_in(tmp_path: Path) -> None:
    async with lived(tmp_path, "old") as directory:
        torn = directory / "file_per_key_dir" / "a" / "b" / "default_k"
        torn.parent.mkdir(parents=True)
        torn.write_bytes(b"\x0a\x09def")
        async with enter(tmp_path):
            assert not torn.exists()
            assert (directory / "7.bucket").exists()


async def test_a_directory_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(_: Path) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pdctl.store.offloading.clear_torn", refused)
    with pytest.raises(ConfigError, match=r"rank_1_2_0_3 cannot be used \(Permission denied\)"):
        await enter(tmp_path).__aenter__()
    monkeypatch.undo()
    async with enter(tmp_path):
        pass  # it was let go
