"""
What stock SGLang's prefill/decode classes find around them when they run alone: stand-ins for torch and the scheduler.

The disaggregation modules, the network helpers, the environment table and the Mooncake wrapper are the stock ones,
imported unchanged from the wheel. Only what they would ask a running model for (torch, parallel groups, server flags)
stands in here, and every stand-in that would have to compute something raises instead. Standard library only: this runs
in a child process beside the stock wheel, never in the tests' own.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import logging
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

VERSION = "0.5.23"

# The packages of the wheel whose own __init__ would import a whole inference engine: entered without running it.
OPENED = (
    "sglang",
    "sglang.srt",
    "sglang.srt.utils",
    "sglang.srt.distributed",
    "sglang.srt.observability",
    "sglang.srt.managers",
)

# Modules that stand in, with the names that the code under test takes from them at import.
STOOD_IN: dict[str, tuple[str, ...]] = {
    "torch": ("Tensor",),
    "torch.distributed": (),
    # kernels for a GPU, in modules of which the head and DCP paths take plain arithmetic
    "triton": (),
    "triton.language": ("constexpr",),
    "sglang.kernels": (),
    "sglang.kernels.ops": (),
    "sglang.kernels.ops.kvcache": (),
    "sglang.kernels.ops.kvcache.pd_dcp_gather": ("copy_mla_rows_into_pack",),
    "sglang.kernels.ops.memory": (),
    "sglang.kernels.ops.memory.ptr_table": ("make_ptr_table",),
    "sglang.srt.configs.model_config": ("get_dsa_mtp_topk_width", "is_deepseek_dsa"),
    "sglang.srt.distributed.parallel_state": ("GroupCoordinator",),
    "sglang.srt.mem_cache.page_interleave": ("get_kv_shard_group",),
    "sglang.srt.observability.mooncake_trace": ("MooncakeRequestStage",),
    "sglang.srt.observability.trace": ("TraceReqContext", "trace_set_thread_info"),
    "sglang.srt.runtime_context": ("max_prefill_buffer_tokens",),
    "sglang.srt.server_args": ("ServerArgs",),
    "sglang.srt.utils.common": ("ceil_align",),
    "sglang.srt.utils": ("create_device_event", "create_device_stream", "device_stream_context"),
}

PARALLEL: dict[str, Any] = {
    "attn_tp_size": 1,
    "attn_tp_rank": 0,
    "attn_cp_size": 1,
    "attn_cp_rank": 0,
    "attn_dp_size": 1,
    "attn_dp_rank": 0,
    "attn_dcp_size": 1,
    "attn_dcp_rank": 0,
    "dp_size": 1,
    "num_dp_ranks": 1,
    "pp_size": 1,
    "pp_group": None,
    "kv_shard_group": None,
    "world_group": None,
    "nnodes": 1,
    "node_rank": 0,
    "dist_init_addr": None,
    "load_balance_method": "follow_bootstrap_room",
    "enable_kv_cache_sharding": False,
    "enable_dsa_cache_layer_split": False,
    "enable_cp_tp_group_sharing": False,
}

# What the running server would say about itself: the getters of stock's runtime_context read these.
told: dict[str, types.SimpleNamespace] = {
    "parallel": types.SimpleNamespace(**PARALLEL),
    "serving": types.SimpleNamespace(host="127.0.0.1", port=30000),
    "disagg": types.SimpleNamespace(
        disaggregation_mode="prefill",
        disaggregation_transfer_backend="mooncake",
        enable_pd_role_switch=False,
        disaggregation_bootstrap_port=8998,
        disaggregation_decode_allocation_policy="early",
        disaggregation_ib_device=None,
    ),
    "observability": types.SimpleNamespace(enable_trace=False),
    "memory": types.SimpleNamespace(enable_unified_memory=False),
    "schedule": types.SimpleNamespace(chunked_prefill_size=8192, max_prefill_tokens=16384),
    "device": types.SimpleNamespace(device="cpu"),
    "exec": types.SimpleNamespace(),
    "resources": types.SimpleNamespace(),
    "spec": types.SimpleNamespace(speculative_algorithm=None),
}

_engine: list[Any] = []


class _NullTrace:
    """Stock's own null object: any attribute is itself, any call gives itself; tracing is off."""

    tracing_enable = False

    def __getattr__(self, name: str) -> _NullTrace:
        return self

    def __call__(self, *args: object, **kwargs: object) -> _NullTrace:
        return self


def _absent(module: str, name: str) -> type:
    def refuse(self: object, *args: object, **kwargs: object) -> None:
        raise RuntimeError(f"{module}.{name} only stands in here and was used: this path needs a real engine")

    return type(name, (), {"__init__": refuse, "__module__": module})


def _say(name: str) -> Callable[[], types.SimpleNamespace]:
    return lambda: told[name]


def _use_engine() -> Any:
    if not _engine:
        raise RuntimeError("no engine was given: call use_engine() before a stock manager is built")
    return _engine[-1]


def _run_with_deadline(fn: Callable[[], Any], *, timeout_s: float, what: str) -> Any:
    return fn()


def _as_it_is(stage: object) -> Callable[[Any], Any]:
    return lambda function: function


def _answers() -> dict[str, dict[str, Any]]:
    """The stand-ins that must work, not merely exist."""
    getters: dict[str, Any] = {f"get_{name}": _say(name) for name in told}
    getters["linear_attn_tp_size"] = lambda: told["parallel"].attn_tp_size
    getters["max_prefill_buffer_tokens"] = lambda: 0
    trace = {"mooncake_trace_func": _as_it_is, "mooncake_trace_slice": lambda *a, **k: None}
    return {
        "sglang.srt.runtime_context": getters,
        "sglang.srt.distributed.parallel_state": {"get_mooncake_transfer_engine": _use_engine},
        "sglang.srt.observability.trace": {"TraceNullContext": _NullTrace},
        "sglang.srt.observability.mooncake_trace": trace,
        "sglang.srt.mem_cache.page_interleave": {"get_kv_shard_group": lambda mla: told["parallel"].kv_shard_group},
        "sglang.srt.utils": {"is_npu": lambda: False},
        "sglang.srt.utils.common": {
            "run_with_deadline": _run_with_deadline,
            "ceil_align": lambda number, unit: -(-number // unit) * unit,
        },
        "torch": {"device": lambda name: types.SimpleNamespace(type=name.partition(":")[0])},
        "triton": {"jit": lambda kernel: kernel},
    }


def _enter(name: str, where: Path | None) -> types.ModuleType:
    """A module that is in place without its own code having run; with `where`, its submodules are the stock ones."""
    module = sys.modules.get(name)
    if module is None:
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=where is not None)
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent in sys.modules:
            setattr(sys.modules[parent], child, module)
    if where is not None:
        module.__path__ = [str(where)]
    return module


def install() -> None:
    """Make `sglang.srt.disaggregation` importable from the wheel on sys.path, with these surroundings."""
    spec = importlib.util.find_spec("sglang")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError("sglang is not importable: put the folder that holds the stock wheel on PYTHONPATH")
    root = Path(spec.submodule_search_locations[0])
    for name in OPENED:
        _enter(name, root.joinpath(*name.split(".")[1:]))
    answers = _answers()
    for name, absent in STOOD_IN.items():
        module = _enter(name, None)
        for each in absent:
            setattr(module, each, _absent(name, each))
        for each, answer in answers.get(name, {}).items():
            setattr(module, each, answer)
    stage = sys.modules["sglang.srt.observability.mooncake_trace"].MooncakeRequestStage
    for each in ("MOONCAKE_SEND", "MOONCAKE_WORKER_SEND", "MOONCAKE_WORKER_SEND_SESSION"):
        setattr(stage, each, None)
    # sglang adds this method to every logger when its server starts.
    logging.Logger.warning_once = logging.Logger.warning  # type: ignore[attr-defined]


def use_engine(engine: object) -> None:
    """The engine that the next stock manager takes."""
    _engine.append(engine)


def tell(room: str, **values: object) -> None:
    """Change what the running server says about itself: tell("parallel", attn_tp_size=2)."""
    for name, value in values.items():
        setattr(told[room], name, value)
