"""What a device is called, and which physical one that is."""

from __future__ import annotations

import pytest

from pdctl.core.device import HOST, DeviceKind, DeviceSpec, physical_npu
from pdctl.errors import BadField, ConfigError

UUID = "GPU-00112233-4455-6677-8899-aabbccddeeff"


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("cpu", HOST),
        ("cuda:0", DeviceSpec(DeviceKind.CUDA, 0)),
        ("cuda:15", DeviceSpec(DeviceKind.CUDA, 15)),
        ("npu:3", DeviceSpec(DeviceKind.NPU, 3)),
        (f"cuda:{UUID}", DeviceSpec(DeviceKind.CUDA, 0, UUID)),
        (f"cuda:{UUID.replace('GPU', 'MIG')}", DeviceSpec(DeviceKind.CUDA, 0, UUID.replace("GPU", "MIG"))),
    ],
)
def test_a_name_means_one_device_and_is_written_back(text: str, meant: DeviceSpec) -> None:
    assert DeviceSpec.parse(text) == meant
    assert str(meant) == text


@pytest.mark.parametrize(
    "text", ["", "cuda", "cuda:", "cuda:-1", "cuda:x", "cpu:0", "gpu:0", f"npu:{UUID}", "cuda:00001"]
)
def test_what_names_no_device_is_refused_with_what_would(text: str) -> None:
    with pytest.raises(BadField, match=r"give cpu, cuda:N, cuda:GPU-<uuid> or npu:N"):
        DeviceSpec.parse(text)


@pytest.mark.parametrize(
    ("index", "visible", "physical"), [(3, None, 3), (0, "4,5,6", 4), (2, " 4, 5 ,6", 6), (0, "7", 7), (1, "0,1,", 1)]
)
def test_a_process_number_is_the_hosts_by_what_is_visible(index: int, visible: str | None, physical: int) -> None:
    assert physical_npu(index, visible) == physical


@pytest.mark.parametrize(("told", "physical"), [("7", 7), ("-1", 5), ("", 5), (None, 5)])
def test_a_physical_number_that_is_told_outright_stands(told: str | None, physical: int) -> None:
    assert physical_npu(1, "4,5", told) == physical


def test_a_physical_number_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="ASCEND_NPU_PHY_ID=seven is no number"):
        physical_npu(0, None, "seven")


@pytest.mark.parametrize(
    ("index", "visible", "says"),
    [
        (3, "4,5,6", r"npu:3 is not among the 3 that ASCEND_RT_VISIBLE_DEVICES=4,5,6 shows: choose npu:0 to npu:2"),
        (0, "", "show this process at least one"),
        (0, "4-6", "give physical ids with commas between"),
    ],
)
def test_a_card_that_the_process_does_not_see_is_refused(index: int, visible: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        physical_npu(index, visible)
