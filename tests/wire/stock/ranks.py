"""
Stock SGLang ranks small enough to hold in a hand: the real managers, on KV entries that are numpy arrays.

Runs beside the stock wheel only, after surroundings.install(); it builds stock objects and never imitates one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from sglang.srt.disaggregation.base.conn import KVArgs
from sglang.srt.disaggregation.mooncake.conn import MooncakeKVManager
from sglang.srt.disaggregation.utils import DisaggregationMode
from sglang.srt.distributed.device_communicators.mooncake_transfer_engine import MooncakeTransferEngine

from tests.wire.stock import surroundings


class ServerArgs:
    """The two flags of the server that a manager reads."""

    enable_pd_role_switch = True  # its worker threads then poll, and so can be stopped
    enable_kv_cache_sharding = False


class Motionless:
    """An engine that registers nothing and moves nothing, with a session id that never changes: for captures."""

    def __init__(self, session: str) -> None:
        self.session = session

    def get_session_id(self) -> str:
        return self.session

    def batch_register(self, pointers: list[int], lengths: list[int]) -> int:
        return 0

    def batch_deregister(self, pointers: list[int]) -> int:
        return 0


@dataclass
class Pool:
    """Numpy memory for `entries` KV entries of `pages` pages and for aux rows, as a scheduler would own it."""

    entries: int
    pages: int
    page_nbytes: int
    aux_nbytes: tuple[int, ...] = (64, 16)
    rows: int = 4
    kv: list[np.ndarray] = field(init=False)
    aux: list[np.ndarray] = field(init=False)

    def __post_init__(self) -> None:
        self.kv = [np.zeros((self.pages, self.page_nbytes), np.uint8) for _ in range(self.entries)]
        self.aux = [np.zeros((self.rows, nbytes), np.uint8) for nbytes in self.aux_nbytes]

    def fill(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        for array in (*self.kv, *self.aux):
            array[:] = rng.integers(0, 256, array.shape, np.uint8)


def kv_args(**changes: Any) -> Any:
    """Stock KVArgs with every field of a plain model set; `changes` replace some."""
    args = KVArgs()
    plain: dict[str, Any] = {
        "engine_rank": 0,
        "kv_data_ptrs": [],
        "kv_data_lens": [],
        "kv_item_lens": [],
        "kv_layer_ids": [],
        "kv_cache_dtype_str": "bfloat16",
        "kv_layout": None,
        "aux_data_ptrs": [],
        "aux_data_lens": [],
        "aux_item_lens": [],
        "state_types": [],
        "state_data_ptrs": [],
        "state_data_lens": [],
        "state_item_lens": [],
        "state_layer_ids": [],
        "state_dim_per_tensor": [],
        "page_size": 16,
        "kv_head_num": 2,
        "total_kv_head_num": 2,
        "system_dp_rank": 0,
        "pp_rank": 0,
        "prefill_start_layer": 0,
        "prefill_end_layer": None,
        "mla_compression_ratios": None,
        "gpu_id": 0,
        "ib_device": "",
        "rust_http_port": None,
        "is_hybrid_mla_backend": False,
    }
    for name, value in (plain | changes).items():
        setattr(args, name, value)
    return args


def args_of(pool: Pool, **changes: Any) -> Any:
    return kv_args(
        kv_data_ptrs=[array.ctypes.data for array in pool.kv],
        kv_data_lens=[array.nbytes for array in pool.kv],
        kv_item_lens=[pool.page_nbytes] * pool.entries,
        aux_data_ptrs=[array.ctypes.data for array in pool.aux],
        aux_data_lens=[array.nbytes for array in pool.aux],
        aux_item_lens=list(pool.aux_nbytes),
        **changes,
    )


def real_engine(host: str = "127.0.0.1") -> Any:
    """The stock wrapper around the real Mooncake engine, on TCP."""
    return MooncakeTransferEngine(hostname=host)


def manager(role: str, args: Any, engine: object, *, mla: bool = False) -> Any:
    """A stock MooncakeKVManager; a prefill one announces itself to the registry before this returns."""
    surroundings.use_engine(engine)
    return MooncakeKVManager(args, DisaggregationMode(role), ServerArgs(), mla)
