"""
What a device is called: `cpu`, `cuda:0`, `cuda:GPU-<uuid>`, `npu:3`.

A number is this process's own: CUDA_VISIBLE_DEVICES and ASCEND_RT_VISIBLE_DEVICES say which physical devices a process
sees, and number them anew. A UUID means the same in every process of a host.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from pdctl.errors import BadField, ConfigError

_UUID = re.compile(r"(?:GPU|MIG)-[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_NUMBER = re.compile(r"\d{1,4}")
NPUS, NPU = "ASCEND_RT_VISIBLE_DEVICES", "ASCEND_NPU_PHY_ID"


def is_uuid(text: str) -> bool:
    """Whether it is what names a CUDA device, or a part of one (MIG), in every process."""
    return _UUID.fullmatch(text) is not None


def same_device(one: str, other: str) -> bool:
    """Whether two UUIDs mean one device: a part of one (MIG) is `MIG-` to nvidia-smi, and to the driver a UUID."""
    return one.partition("-")[2] == other.partition("-")[2]


class DeviceKind(StrEnum):
    CPU = "cpu"
    CUDA = "cuda"
    NPU = "npu"  # Huawei Ascend


@dataclass(frozen=True, slots=True)
class DeviceSpec:
    """Which device is meant: by this process's number, or by the UUID that a CUDA device has."""

    kind: DeviceKind
    index: int = 0
    uuid: str = ""

    @classmethod
    def parse(cls, text: str) -> DeviceSpec:
        """Raises BadField."""
        kind, _, which = text.partition(":")
        if text == DeviceKind.CPU:
            return HOST
        if kind == DeviceKind.CUDA and is_uuid(which):
            return cls(DeviceKind.CUDA, 0, which)
        if kind in (DeviceKind.CUDA, DeviceKind.NPU) and _NUMBER.fullmatch(which, 0):
            return cls(DeviceKind(kind), int(which))
        raise BadField("device", f"{text!r} is none: give cpu, cuda:N, cuda:GPU-<uuid> or npu:N")

    @property
    def is_host(self) -> bool:
        return self.kind is DeviceKind.CPU

    def __str__(self) -> str:
        return self.kind.value if self.is_host else f"{self.kind}:{self.uuid or self.index}"


HOST = DeviceSpec(DeviceKind.CPU)
"""Memory that a processor may read and write by its pointer."""


def physical_npu(index: int, visible: str | None, told: str | None = None) -> int:
    """The number that the host has for this process's NPU `index`.

    `visible`: as ASCEND_RT_VISIBLE_DEVICES says it; `told`: ASCEND_NPU_PHY_ID, by which operators of SGLang say it
    outright (-1: they do not). The engine must be told the host's number (its name for the card in `host:port:npu_N`),
    the runtime wants ours.
    """
    if told and told != "-1":
        if not _NUMBER.fullmatch(told):
            raise ConfigError(f"{NPU}={told} is no number: give the host's own of the card, or unset it")
        return int(told)
    if visible is None:
        return index
    seen = [part.strip() for part in visible.split(",") if part.strip()]
    if not all(_NUMBER.fullmatch(part) for part in seen):
        raise ConfigError(f"{NPUS}={visible} is no list of numbers: give physical ids with commas between, as 4,5,6")
    if index >= len(seen):
        raise ConfigError(f"npu:{index} is not among the {len(seen)} that {NPUS}={visible} shows: {_choose(seen)}")
    return int(seen[index])


def _choose(seen: Sequence[str]) -> str:
    return f"choose npu:0 to npu:{len(seen) - 1}" if seen else "show this process at least one"
