"""Offload settings that lose nothing, whatever an operator has set before."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdctl.core.kvstore import StoreRank
from pdctl.core.offload import BUCKET, MIB, Offload, directory_of, offload
from pdctl.errors import ConfigError

P = "MOONCAKE_OFFLOAD_"
BUCKETS = {P + "STORAGE_BACKEND_DESCRIPTOR": BUCKET}


def test_left_alone_it_is_a_file_for_each_key_every_second_and_a_buffer_of_64_mib() -> None:
    assert offload({"PATH": "/bin"}, 4 << 30) == Offload(
        {
            P + "STORAGE_BACKEND_DESCRIPTOR": "file_per_key_storage_backend",
            P + "HEARTBEAT_INTERVAL_SECONDS": "1",
            P + "LOCAL_BUFFER_SIZE_BYTES": str(64 * MIB),
        },
        64 * MIB,
    )


@given(st.integers(8 * MIB, 1 << 40))
def test_buckets_are_full_long_before_the_segment(segment: int) -> None:
    chosen = offload(BUCKETS, segment)
    assert int(chosen.variables[P + "BUCKET_SIZE_LIMIT_BYTES"]) * 8 <= segment
    assert len(chosen.warnings) == 1
    assert "--offload_on_evict=true" in chosen.warnings[0]


@pytest.mark.parametrize(
    ("nbytes", "ends"),
    [("8MiB", 1), ("16MiB", 1), ("24MiB", 2), ("32MiB", 2), ("33MiB", None), ("256MiB", None)],
)
def test_a_bucket_limit_is_held_against_the_segment(nbytes: str, ends: int | None) -> None:
    given_ = {**BUCKETS, P + "BUCKET_SIZE_LIMIT_BYTES": nbytes}
    if ends is None:
        with pytest.raises(ConfigError, match=r"BUCKET_SIZE_LIMIT_BYTES is .* every write refused for ever; give at"):
            offload(given_, 64 * MIB)
    else:
        assert len(offload(given_, 64 * MIB).warnings) == ends


def test_what_an_operator_has_set_stays_and_what_is_odd_about_it_is_named() -> None:
    chosen = offload(
        {
            P + "STORAGE_BACKEND_DESCRIPTOR": "offset_allocator_storage_backend",
            P + "HEARTBEAT_INTERVAL_SECONDS": "10",
            P + "LOCAL_BUFFER_SIZE_BYTES": "1g",
        },
        64 * MIB,
    )
    assert chosen.variables[P + "HEARTBEAT_INTERVAL_SECONDS"] == "10"
    assert chosen.variables[P + "LOCAL_BUFFER_SIZE_BYTES"] == str(1 << 30)
    assert [warning.split(" ")[0] for warning in chosen.warnings] == [
        P + "STORAGE_BACKEND_DESCRIPTOR",
        P + "HEARTBEAT_INTERVAL_SECONDS",
        P + "LOCAL_BUFFER_SIZE_BYTES",
    ]


@pytest.mark.parametrize(("value", "why"), [("lots", "give bytes, or a size like"), ("4096", "at least 1 MiB")])
def test_a_size_that_is_none_names_its_variable(value: str, why: str) -> None:
    with pytest.raises(ConfigError, match=f"{P}LOCAL_BUFFER_SIZE_BYTES.*{why}"):
        offload({P + "LOCAL_BUFFER_SIZE_BYTES": value}, 64 * MIB)


def test_a_rank_that_gives_no_segment_has_nothing_to_offload() -> None:
    with pytest.raises(ConfigError, match="global_segment_size is 0"):
        offload({}, 0)


def test_a_directory_names_every_axis_of_a_rank() -> None:
    assert directory_of(StoreRank(dp=1, tp=2, pp=3, cp=4, tp_size=8, pp_size=4)) == "rank_1_2_3_4"
