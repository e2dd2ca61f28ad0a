"""
What /docs says of SGLang's paths. The handlers read the raw request, so nothing here is derived: a test sends these
examples to a real server and compares.
"""

from __future__ import annotations

from typing import Any

from fastapi.responses import JSONResponse, PlainTextResponse

Docs = dict[str, Any]


def _text(description: str, example: str) -> Docs:
    return {
        "description": description,
        "content": {"text/plain": {"schema": {"type": "string"}, "example": example}},
    }


def _json(description: str, schema: Docs, example: Any) -> Docs:
    return {"description": description, "content": {"application/json": {"schema": schema, "example": example}}}


def _body(properties: Docs, required: list[str], example: Any) -> Docs:
    schema = {"type": "object", "properties": properties, "required": required}
    return {
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema, "example": example}}},
    }


def _query(name: str, meaning: str) -> Docs:
    return {
        "name": name,
        "in": "query",
        "required": True,
        "schema": {"type": "integer"},
        "description": f"{meaning}; -1 in all four asks for the topology",
    }


def _operation(summary: str, description: str, responses: dict[int, Docs], extra: Docs | None = None) -> Docs:
    return {
        "summary": summary,
        "description": description,
        "responses": responses,
        "openapi_extra": extra or {},
        "response_class": JSONResponse if "application/json" in responses[200]["content"] else PlainTextResponse,
    }


_INTEGER = {"type": "integer"}
_RANK = {"type": "integer", "minimum": 0}
_SIZE = {"type": "integer", "minimum": 1}
_PORT = {"anyOf": [{"type": "integer", "minimum": 1, "maximum": 65535}, {"type": "string"}]}
_TEXT_OR_NULL = {"type": ["string", "null"]}
_NUMBER = {"anyOf": [{"type": "integer"}, {"type": "string"}], "description": "an integer, or one as text"}
_ROOM = 6_917_529_027_641_081_856

_MALFORMED = _text(
    "A field is missing or cannot be used. Nothing was changed.", "rank_port: is 0: give the port that is listened at"
)
_TOO_LARGE = _text("The body is over the limit.", "body: is over 1048576 bytes, the limit of this path")
_NOT_READY = _text(
    "Some seats are missing. `Retry-After: 1`.", "Prefill server not fully registered yet (3 workers registered)."
)
_OK = _text("Taken.", "OK")

PUT_ROUTE = _operation(
    "A prefill rank announces itself",
    "The same seat from the same address again changes nothing; from another address it is a new life that replaces "
    "the old one. Unknown fields are ignored.",
    {
        200: _OK,
        400: _text(
            "Malformed, or contradicts the instance. Nothing was changed.",
            "page_size is 64 for this prefill but this rank offers 16: start every rank with the same page_size",
        ),
        413: _TOO_LARGE,
    },
    _body(
        {
            **{f"{name}_size": _SIZE for name in ("attn_tp", "attn_cp", "attn_dp", "pp", "system_dp")},
            **{f"{name}_rank": _RANK for name in ("attn_tp", "attn_cp", "attn_dp", "pp", "system_dp")},
            "rank_ip": {"type": "string", "description": "IPv4, IPv6 without brackets, or a name; no wildcard"},
            "rank_port": _PORT,
            "page_size": _NUMBER,
            "kv_cache_dtype": _TEXT_OR_NULL,
            "kv_layout": _TEXT_OR_NULL,
            "dsv41_spec_layout": {"type": ["object", "null"]},
            "load_balance_method": {"type": "string", "default": "follow_bootstrap_room"},
            "enable_dsa_cache_layer_split": {"type": "boolean", "default": False},
            "enable_kv_cache_sharding": {"type": "boolean", "default": False},
            "prefill_http_port": {"type": ["integer", "null"]},
            "decode_allocation_policy": {"type": "string", "default": "early"},
        },
        [
            *(
                f"{name}_{what}"
                for name in ("attn_tp", "attn_cp", "attn_dp", "pp", "system_dp")
                for what in ("size", "rank")
            ),
            "rank_ip",
            "rank_port",
            "page_size",
            "kv_cache_dtype",
        ],
        {
            "attn_tp_size": 1,
            "attn_tp_rank": 0,
            "attn_cp_size": 1,
            "attn_cp_rank": 0,
            "attn_dp_size": 1,
            "attn_dp_rank": 0,
            "pp_size": 1,
            "pp_rank": 0,
            "system_dp_size": 1,
            "system_dp_rank": 0,
            "rank_ip": "10.0.0.1",
            "rank_port": 40123,
            "page_size": 16,
            "kv_cache_dtype": "bfloat16",
            "load_balance_method": "follow_bootstrap_room",
            "prefill_http_port": 30000,
        },
    ),
)

GET_ROUTE = _operation(
    "Where a rank listens, or the topology",
    "All four -1: the topology. Otherwise the address of one rank. 503 for both until every seat is held.",
    {
        200: _json(
            "One rank, or the topology (all four -1).",
            {"type": "object"},
            {"rank_ip": "10.0.0.1", "rank_port": 40123},
        ),
        400: _text("A parameter is missing, empty or no integer.", "Missing inputs for bootstrap server."),
        404: _text(
            "The instance has no such rank.", "Bootstrap info not found for dp_rank=0 cp_rank=0 tp_rank=7 pp_rank=0"
        ),
        503: _NOT_READY,
    },
    {
        "parameters": [
            _query("prefill_dp_rank", "data-parallel rank"),
            _query("prefill_cp_rank", "context-parallel rank"),
            _query("target_tp_rank", "tensor-parallel rank"),
            _query("target_pp_rank", "pipeline rank"),
        ]
    },
)

REGISTER_DP_RANK = _operation(
    "A prefill rank says that it prefills a room",
    "The last announcement wins. A room is kept for a bounded time, longer while it is asked for.",
    {
        200: _OK,
        400: _MALFORMED,
        413: _TOO_LARGE,
        429: _text("As many rooms are held as may be. `Retry-After: 1`.", "1000000 rooms are held, the limit"),
    },
    _body(
        {"bootstrap_room": _NUMBER, "dp_rank": _NUMBER},
        ["bootstrap_room", "dp_rank"],
        {"bootstrap_room": _ROOM, "dp_rank": 1},
    ),
)

QUERY_DP_RANKS = _operation(
    "Which DP ranks prefill these rooms",
    "Unknown rooms are absent from the answer. Bodies up to 8 MiB.",
    {
        200: _json("DP rank by room.", {"type": "object", "additionalProperties": _INTEGER}, {str(_ROOM): 1}),
        400: _MALFORMED,
        413: _TOO_LARGE,
    },
    _body({"bootstrap_rooms": {"type": "array", "items": _NUMBER}}, ["bootstrap_rooms"], {"bootstrap_rooms": [_ROOM]}),
)

HEALTH = _operation(
    "The instance's sign of life, as decodes read it",
    "200 while the instance lives or is starting. /livez is the service's own.",
    {
        200: _OK,
        503: _text(
            "Known to be dead: its leases are over, or its witness says so.",
            "instance default is known to be dead: the rank in dp0/cp0/tp0/pp0 at 10.0.0.1:40123 shows no sign of life "
            "(connecting to 10.0.0.1:40123: connection refused, 3 times in a row), 4 s ago: start it again",
        ),
    },
)
