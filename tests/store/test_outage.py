"""A real master taken away under load; `python -m tests.store.outage` does it for a minute each."""

from __future__ import annotations

import pytest

from tests.store.outage import outage


@pytest.mark.parametrize("way", ["killed", "stopped"])
async def test_a_master_that_goes_away_under_load_is_misses_and_comes_back(way: str) -> None:
    seen = await outage(way, 2.0)
    assert seen.wrong == 0
    assert seen.hits > 100
    assert seen.hits_away == 0
    assert seen.told == ["store left alone: reads are misses, writes are dropped", "store is back"]
    assert seen.slowest_s < 30  # a put and a get that were under way: 1 s each if it hangs, 4.6 s if it was killed
    assert seen.lag_s < 3.0
    assert seen.back_s is not None
    assert seen.back_s < 60
    assert seen.counted["pdctl_store_left_total"] == 1
    assert seen.counted["pdctl_store_keys_total/read/left_out"] > 100
    assert seen.counted["pdctl_store_keys_total/write/left_out"] > 100
