"""
The control plane for prefill/decode disaggregated LLM serving.

The public names; each is fetched from its room when it is first asked for, so that importing pdctl runs nothing and an
engine that only wants the client does not load the server.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pdctl.agent_client import AgentClient
    from pdctl.arrays import pool_of, region_of
    from pdctl.client import Exhaustion, RegistryClient
    from pdctl.config import Settings, load, store_config
    from pdctl.core.address import Endpoint
    from pdctl.core.ejection import ProbePolicy
    from pdctl.core.kvstore import KVStoreConfig, StoreRank
    from pdctl.core.layout import Heads, Kind, KvLayout, Pool, RankPools, Region
    from pdctl.core.news import Changed, Listed, Picture
    from pdctl.core.plan import CopyPlan
    from pdctl.core.route import Announcement, Seat, Shape
    from pdctl.core.trace import TraceContext
    from pdctl.core.transfer import RoomTimeouts
    from pdctl.credentials import Credentials
    from pdctl.device.base import Device
    from pdctl.device.open import open_device
    from pdctl.engine.base import Engine
    from pdctl.engine.mooncake import open_mooncake
    from pdctl.engine.settings import MooncakeSettings
    from pdctl.errors import (
        Cause,
        NotReady,
        PdctlError,
        RoomFailed,
        SessionBlocked,
        StoreNotReady,
        StoreUnusable,
        TransferFailed,
    )
    from pdctl.kvstore import open_store
    from pdctl.memory import Arena
    from pdctl.node import DecodeNode, PrefillNode, decode_node, prefill_node
    from pdctl.prober import Prober
    from pdctl.receiver import Receiver
    from pdctl.retry import RetryPolicy
    from pdctl.sender import Sender
    from pdctl.serving import Sidecar, sidecar
    from pdctl.store.patience import StorePatience
    from pdctl.store.watch import StoreWatch

__all__ = [
    "AgentClient",
    "Announcement",
    "Arena",
    "Cause",
    "Changed",
    "CopyPlan",
    "Credentials",
    "DecodeNode",
    "Device",
    "Endpoint",
    "Engine",
    "Exhaustion",
    "Heads",
    "KVStoreConfig",
    "Kind",
    "KvLayout",
    "Listed",
    "MooncakeSettings",
    "NotReady",
    "PdctlError",
    "Picture",
    "Pool",
    "PrefillNode",
    "ProbePolicy",
    "Prober",
    "RankPools",
    "Receiver",
    "Region",
    "RegistryClient",
    "RetryPolicy",
    "RoomFailed",
    "RoomTimeouts",
    "Seat",
    "Sender",
    "SessionBlocked",
    "Settings",
    "Shape",
    "Sidecar",
    "StoreNotReady",
    "StorePatience",
    "StoreRank",
    "StoreUnusable",
    "StoreWatch",
    "TraceContext",
    "TransferFailed",
    "decode_node",
    "load",
    "open_device",
    "open_mooncake",
    "open_store",
    "pool_of",
    "prefill_node",
    "region_of",
    "sidecar",
    "store_config",
]

_ROOMS = {
    "agent_client": ("AgentClient",),
    "arrays": ("pool_of", "region_of"),
    "client": ("Exhaustion", "RegistryClient"),
    "config": ("Settings", "load", "store_config"),
    "core.address": ("Endpoint",),
    "core.ejection": ("ProbePolicy",),
    "core.kvstore": ("KVStoreConfig", "StoreRank"),
    "core.layout": ("Heads", "Kind", "KvLayout", "Pool", "RankPools", "Region"),
    "core.news": ("Changed", "Listed", "Picture"),
    "core.plan": ("CopyPlan",),
    "core.route": ("Announcement", "Seat", "Shape"),
    "core.trace": ("TraceContext",),
    "core.transfer": ("RoomTimeouts",),
    "credentials": ("Credentials",),
    "device.base": ("Device",),
    "device.open": ("open_device",),
    "engine.base": ("Engine",),
    "engine.mooncake": ("open_mooncake",),
    "engine.settings": ("MooncakeSettings",),
    "errors": (
        "Cause",
        "NotReady",
        "PdctlError",
        "RoomFailed",
        "SessionBlocked",
        "StoreNotReady",
        "StoreUnusable",
        "TransferFailed",
    ),
    "kvstore": ("open_store",),
    "memory": ("Arena",),
    "node": ("DecodeNode", "PrefillNode", "decode_node", "prefill_node"),
    "prober": ("Prober",),
    "receiver": ("Receiver",),
    "retry": ("RetryPolicy",),
    "sender": ("Sender",),
    "serving": ("Sidecar", "sidecar"),
    "store.patience": ("StorePatience",),
    "store.watch": ("StoreWatch",),
}


def __getattr__(name: str) -> object:
    for room, names in _ROOMS.items():
        if name in names:
            value: object = getattr(import_module(f"pdctl.{room}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"pdctl has no {name}: the public names are in pdctl.__all__")
