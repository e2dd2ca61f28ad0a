"""
The device port: what must have happened, and on which thread, before memory of a device is touched.

An engine and a store are opened with a Device and cannot be opened without one, so that nobody can make an engine first
and set the device afterwards: on Ascend that fails with `aclrtGetDevice failed, ret: 107002`, on CUDA it lands on
device 0 without a word. A Device exists only inside `open_device` (open.py); what is made with it is closed first.

    open_device(spec): the runtime is initialised, the device set on the caller's thread
    bind():            the same for one more thread; each thread of ours calls it before it makes an engine for the
                       device, registers or allocates its memory

Threads that an engine starts by itself are beyond our reach; docs/hardware.md says what they do.
"""

from __future__ import annotations

from typing import Protocol

from pdctl.core.device import DeviceSpec
from pdctl.core.handover import Handed, Mapped, Memory
from pdctl.core.layout import Region


class Device(Protocol):
    """A device that is open."""

    @property
    def spec(self) -> DeviceSpec: ...

    @property
    def uuid(self) -> str:
        """The same in every process of the host; empty where a device has none."""

    def bind(self) -> None:
        """Make it the calling thread's own. Cheap, and as often as one likes. Raises DeviceUnavailable."""

    def where(self, region: Region) -> DeviceSpec:
        """Whose memory that is: this device's, another's, or the host's. Raises BadField for what is neither, and for
        a region that reaches out of its allocation."""

    def engine_name(self, host: str, port: int | None = None) -> str:
        """What an engine or a store on this device must be told as its own name. `port`: where it shall be one of ours;
        an engine of ours takes any free one."""

    def check_protocol(self, protocol: str) -> None:
        """Raises ConfigError for an engine's protocol that cannot move this device's memory."""

    def share(self, region: Region) -> Handed:
        """Name this process's memory for another process of the host. Raises BadField for what cannot be shared."""

    def open_shared(self, memory: Memory, field: str) -> Mapped:
        """Another process's memory, at an address here until the device is closed; an allocation is opened once,
        however many of its parts are asked for. Raises BadField below `field`."""
