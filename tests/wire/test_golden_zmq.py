"""Every ZMQ message recorded from stock SGLang: ours reads the values that went in, and writes the same bytes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pdctl.core.address import Endpoint
from pdctl.core.transfer import Phase
from pdctl.core.wire import (
    Abort,
    AbortAck,
    AuxData,
    Bootstrap,
    Metadata,
    RegisterBuffers,
    Status,
    Unknown,
    parse_to_decode,
    parse_to_prefill,
)

JSON = dict[str, Any]
GOLDEN = {path.stem: json.loads(path.read_text()) for path in sorted(Path(__file__).with_name("zmq").glob("*.json"))}
TO_DECODE = ("status", "abort_ack", "aux_data", "unknown")


def frames_of(name: str) -> list[bytes]:
    return [bytes.fromhex(frame) for frame in GOLDEN[name]["frames"]]


def parsed(name: str) -> Any:
    parse = parse_to_decode if name.startswith(TO_DECODE) else parse_to_prefill
    return parse(frames_of(name))


def reply(values: JSON) -> Endpoint | None:
    return Endpoint(values["ip"], values["port"]) if values["ip"] is not None else None


def tuples(lists: list[list[int]]) -> tuple[tuple[int, ...], ...]:
    return tuple(map(tuple, lists))


def registration(values: JSON) -> RegisterBuffers:
    return RegisterBuffers(
        reply=Endpoint(values["ip"], values["port"]),
        session=values["session"],
        kv_pointers=tuple(values["kv_pointers"]),
        aux_pointers=tuple(values["aux_pointers"]),
        tp_rank=values["tp_rank"],
        tp_size=values["attn_tp_size"],
        kv_item_len=values["kv_item_nbytes"],
        kv_item_lens=tuple(values["kv_items_nbytes"]),
        state_pointers=tuples(values["state_pointers"]),
        state_item_lens=tuples(values["state_item_nbytes"]),
        state_dims=tuples(values["state_dims"]),
        kv_layer_ids=tuple(values["kv_layer_ids"]),
        state_layer_ids=tuples(values["state_layer_ids"]),
        dcp_size=values["dcp_size"],
        dcp_rank=values["dcp_rank"],
    )


def metadata(values: JSON) -> Metadata:
    device_pages = values["device_pages"]
    return Metadata(
        room=values["room"],
        reply=Endpoint(values["ip"], values["port"]),
        session=values["session"],
        pages=np.array(values["pages"] or [], np.int32),
        aux_row=values["aux_row"],
        required=values["required_dst_info_num"],
        prefix_len=values["decode_prefix_len"],
        state_rows=tuples(values["state_indices"]),
        device_pages=np.array(device_pages, np.int32) if device_pages else None,
    )


def ours(name: str) -> Any:
    """The message of ours that says what the recorded one says."""
    values: JSON = GOLDEN[name]["values"]
    match name.split("_"):
        case ["register", *_]:
            return registration(values)
        case ["metadata", *_]:
            return metadata(values)
        case ["abort", "ack", *_]:
            return AbortAck(values["room"], values["rank_id"], values["generation"])
        case ["abort", *_]:
            return Abort(values["room"], reply(values), values["generation"])
        case ["bootstrap"]:
            return Bootstrap(values["room"], Endpoint(values["ip"], values["port"]))
        case ["status", *_]:
            return Status(values["room"], Phase(values["status"]), values["rank_id"], values["reason"])
        case ["aux", "data"]:
            return AuxData(values["room"], values["buffer"], values["row"], bytes.fromhex(values["data"]))
    return Unknown(values["tag"])


def plain(message: object) -> JSON:
    """Its fields with arrays as lists: an array is not equal to another with ==."""
    assert dataclasses.is_dataclass(message)
    fields = {field.name: getattr(message, field.name) for field in dataclasses.fields(message)}
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in fields.items()}


def test_every_kind_of_message_was_recorded() -> None:
    kinds = {type(ours(name)) for name in GOLDEN}
    assert kinds == {RegisterBuffers, Metadata, Abort, Bootstrap, AbortAck, Status, AuxData, Unknown}


@pytest.mark.parametrize("name", GOLDEN)
def test_a_stock_message_is_read_as_what_went_in(name: str) -> None:
    message = parsed(name)
    assert type(message) is type(ours(name))
    assert plain(message) == plain(ours(name))


@pytest.mark.parametrize("name", [name for name in GOLDEN if not name.startswith("unknown")])
def test_ours_is_the_stock_message_byte_for_byte(name: str) -> None:
    assert ours(name).to_frames() == frames_of(name)


@pytest.mark.parametrize("name", [name for name in GOLDEN if name.startswith("metadata")])
def test_a_dummy_is_told_from_a_request_without_pages(name: str) -> None:
    assert parsed(name).is_dummy == GOLDEN[name]["values"]["dummy"]


@pytest.mark.parametrize("shorter", range(10, 20))
def test_a_registration_of_an_older_rank_ends_early(shorter: int) -> None:
    message = parse_to_prefill(frames_of("register_mha")[:shorter])
    assert isinstance(message, RegisterBuffers)
    assert message.kv_pool() == parsed("register_mha").kv_pool()
