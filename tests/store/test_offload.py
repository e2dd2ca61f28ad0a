"""The real thing: four times its DRAM comes back from a store with SSD offload, also after its process was killed.

`python -m tests.store.offload` does it with more.
"""

from __future__ import annotations

from pathlib import Path

from tests.store.offload import EAGER, Size, killed_and_back, proof

SMALL = Size(segment=16 << 20, object=256 << 10, times=4)


def test_four_times_the_dram_comes_back_every_object_from_a_master_that_writes_at_once(tmp_path: Path) -> None:
    told = proof(SMALL, EAGER, tmp_path)
    assert (told["hits"], told["equal"]) == (SMALL.n, SMALL.n)
    assert told["on_disk"] >= SMALL.n * SMALL.object - SMALL.segment


def test_what_is_on_disk_survives_its_process_and_the_moment_when_the_master_forgets_it(tmp_path: Path) -> None:
    told = killed_and_back(SMALL, tmp_path, ttl_s=4)
    assert told["wrote_first"]["kept"] == SMALL.n
    assert told["waited_s"] > 2
    held_in_dram = SMALL.segment // SMALL.object
    n_torn = 2  # one for certain, and maybe one that was being written
    assert told["first"]["equal"] >= SMALL.n - held_in_dram - n_torn
    assert told["later"]["equal"] >= told["first"]["equal"]
    assert told["last"]["equal"] == SMALL.n
