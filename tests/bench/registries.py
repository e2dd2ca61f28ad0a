"""
The registries that the bench asks, each a process of its own: `python -m tests.bench.registries stock|rust|bare PORT`.

    stock  CommonKVBootstrapServer of the SGLang wheel, unchanged, on the loop that a running SGLang gives it (uvloop)
    rust   the registry inside the wheel's Rust server, started without a model
    bare   what uvicorn, uvloop and httptools do for an app that says two constant bytes: the ceiling of any ASGI app

They serve until they are killed. Ours is not here: the bench starts `pdctl serve` as an operator does.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import sys
import time
from collections.abc import Callable
from typing import Any

FOREVER_S = 3600.0


def stock(port: int) -> None:
    import uvloop

    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    stock_class()("127.0.0.1", port)
    time.sleep(FOREVER_S)


def stock_class() -> Any:
    from tests.wire.stock import surroundings

    surroundings.install()
    conn: Any = importlib.import_module("sglang.srt.disaggregation.common.conn")
    return conn.CommonKVBootstrapServer


def rust(port: int) -> None:
    """Every field of ServerArgs has to be given; what the registry does not read is null."""
    from tests.wire.stock import surroundings

    surroundings.install()
    extension: Any = importlib.import_module("sglang.srt.rust_extensions._server")
    model = extension.ModelConfig(
        context_len=1024,
        vocab_size=1000,
        is_multimodal=False,
        default_sampling_params=extension.DefaultSamplingParams(),
        model_type=None,
    )
    texts = [
        "model_path",
        "served_model_name",
        "tokenizer_path",
        "load_format",
        "weight_version",
        "version",
        "accelerator",
    ]
    texts += ["hicache_storage_prefetch_policy", "hicache_write_policy"]
    absent = [
        "revision",
        "hicache_storage_backend",
        "hicache_storage_backend_extra_config",
        "grpc_port",
        "log_level_http",
    ]
    absent += ["chat_template", "tool_call_parser", "reasoning_parser", "default_priority_value", "load_snapshot_path"]
    absent += ["preferred_sampling_params", "default_max_new_tokens", "metrics"]
    objects = ["default_chat_template_kwargs", "deployment_info", "launch_server_info"]
    off = ["stream_response_default_include_usage", "enable_request_header_overrides", "enable_strict_thinking"]
    off += ["incremental_streaming_output", "allow_auto_truncate", "enable_return_hidden_states"]
    none = ["num_reserved_tokens", "load_snapshot_dp_size", "load_snapshot_dp_rank", "num_accelerators"]
    some = {"tokenizer_worker_num": 1, "detokenizer_worker_num": 1, "tokenizer_model_max_length": 1024}
    server = extension.Server(
        extension.ServerArgs(
            **dict.fromkeys(texts, "none"),
            **dict.fromkeys(absent),
            **dict.fromkeys(objects, "{}"),
            **dict.fromkeys(off, False),
            **dict.fromkeys(none, 0),
            **some,
            host="127.0.0.1",
            port=port,
            log_level="error",
            skip_tokenizer_init=True,
            skip_server_warmup=True,
            health_generate_headers={},
            disaggregation_mode=extension.DisaggregationMode.Prefill,
            model_config=model,
            lora_ids={},
            limit_mm_data_per_request=[],
            max_total_num_tokens=1000,
        )
    )
    time.sleep(FOREVER_S)
    del server


def bare(port: int) -> None:
    import uvicorn

    headers = [(b"content-length", b"2"), (b"content-type", b"text/plain; charset=utf-8")]
    start = {"type": "http.response.start", "status": 200, "headers": headers}
    body = {"type": "http.response.body", "body": b"OK"}

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        await send(start)
        await send(body)

    uvicorn.run(
        answer,
        port=port,
        loop="uvloop",
        http="httptools",
        lifespan="off",
        ws="none",
        access_log=False,
        log_level="warning",
        server_header=False,
    )


class Said:
    """As much of a request as stock's handlers read."""

    def __init__(self, body: dict[str, int]) -> None:
        self._body = body

    async def json(self) -> dict[str, int]:
        return self._body


KINDS: dict[str, Callable[[int], None]] = {"stock": stock, "rust": rust, "bare": bare}

if __name__ == "__main__":
    print(json.dumps({"serving": sys.argv[1]}), flush=True)
    KINDS[sys.argv[1]](int(sys.argv[2]))
