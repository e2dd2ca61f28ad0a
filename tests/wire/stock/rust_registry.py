"""
Stock SGLang's second registry, the one of its Rust server (SGLANG_RUST_SERVER=1), in a process of its own.

The extension is loaded from the wheel as it is; what a scheduler would tell it stands in here, for no request for an
engine is ever put. Started as `registry.py`, with the stock wheel on PYTHONPATH.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import os
import socket
import sys
import time
import types
from pathlib import Path
from typing import Any

EXTENSION = "sglang.srt.rust_extensions._server"
CONTEXT = 4096


def load() -> types.ModuleType:
    """The extension alone: its package's own __init__ would import an inference engine."""
    spec = importlib.util.find_spec("sglang")
    assert spec is not None
    assert spec.submodule_search_locations
    (path,) = Path(spec.submodule_search_locations[0], "srt", "rust_extensions").glob("_server.*.so")
    loader = importlib.machinery.ExtensionFileLoader(EXTENSION, str(path))
    found = importlib.util.spec_from_file_location(EXTENSION, path, loader=loader)
    assert found is not None
    module = importlib.util.module_from_spec(found)
    loader.exec_module(module)
    return module


def said(ext: Any, port: int) -> dict[str, Any]:
    """Every field is wanted, and none has a default."""
    return {
        **dict.fromkeys(
            (
                *("revision", "weight_version", "hicache_storage_backend"),
                *("hicache_storage_backend_extra_config", "grpc_port", "chat_template", "tool_call_parser"),
                *("reasoning_parser", "default_priority_value", "preferred_sampling_params", "load_snapshot_path"),
                *("metrics", "log_level_http"),
            )
        ),
        **dict.fromkeys(
            (
                *("stream_response_default_include_usage", "enable_request_header_overrides", "enable_strict_thinking"),
                *("incremental_streaming_output", "allow_auto_truncate", "enable_return_hidden_states"),
            ),
            False,
        ),
        "model_path": "none",
        "served_model_name": "none",
        "tokenizer_path": "",
        "load_format": "auto",
        "hicache_storage_prefetch_policy": "best_effort",
        "hicache_write_policy": "write_through",
        "host": "127.0.0.1",
        "port": port,
        "log_level": "error",
        "default_chat_template_kwargs": "{}",
        "tokenizer_worker_num": 1,
        "detokenizer_worker_num": 1,
        "skip_tokenizer_init": True,
        "skip_server_warmup": True,
        "health_generate_headers": {},
        "disaggregation_mode": ext.DisaggregationMode.Prefill,
        "model_config": ext.ModelConfig(
            context_len=CONTEXT,
            vocab_size=100,
            is_multimodal=False,
            model_type=None,
            default_sampling_params=ext.DefaultSamplingParams(),
        ),
        "default_max_new_tokens": 128,
        "lora_ids": {},
        "limit_mm_data_per_request": [],
        "num_reserved_tokens": 0,
        "tokenizer_model_max_length": CONTEXT,
        "version": "0.5.23",
        "max_total_num_tokens": CONTEXT,
        "deployment_info": "{}",
        "launch_server_info": "{}",
        "load_snapshot_dp_size": 0,
        "load_snapshot_dp_rank": 0,
        "accelerator": "",
        "num_accelerators": 0,
    }


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def await_listening(port: int) -> None:
    deadline = time.monotonic() + 30
    while True:
        with socket.socket() as sock:
            if sock.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert time.monotonic() < deadline, "the Rust registry did not start"
        time.sleep(0.02)


def main() -> None:
    hello = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # where its log goes
    ext, port = load(), free_port()
    server = ext.Server(ext.ServerArgs(**said(ext, port)), cores=None, port_offset=0)
    await_listening(port)
    print(json.dumps({"url": f"http://127.0.0.1:{port}"}), file=hello, flush=True)
    sys.stdin.read()
    del server
    os._exit(0)  # its threads do not end by themselves


if __name__ == "__main__":
    main()
