"""
Record the wire of stock SGLang 0.5.23: every HTTP answer of its registry, every ZMQ message of its ranks.

    PYTHONPATH=<folder with the stock wheel> python -m tests.wire.capture tests/wire

Nothing here knows the format: the stock server answers real requests, the stock classes send into a real PULL socket,
and what arrived is written down beside the values that went in. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import zmq

from tests.wire.http_pairs import PAIRS, Pair, ask
from tests.wire.stock import surroundings

surroundings.install()

from sglang.srt.disaggregation.base.conn import KVPoll, StateType  # noqa: E402
from sglang.srt.disaggregation.common.conn import (  # noqa: E402
    AbortNotification,
    AckTarget,
    CommonKVBootstrapServer,
    PrefillServerInfo,
)
from sglang.srt.disaggregation.mooncake.conn import MooncakeKVManager, MooncakeKVReceiver, TransferInfo  # noqa: E402

from tests.wire.stock import ranks  # noqa: E402

DECODE_IP, DECODE_PORT, SESSION = "10.0.0.2", 41000, "10.0.0.2:15001"
ROOM = 2**53 + 11

JSON = dict[str, Any]


# ---- HTTP -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def stock_registry() -> Iterator[str]:
    server = CommonKVBootstrapServer("127.0.0.1", 0)
    deadline = time.monotonic() + 10
    while not (runner := getattr(server, "_runner", None)) or not runner.addresses:
        assert time.monotonic() < deadline, "the stock registry did not start"
        time.sleep(0.01)
    host, port = runner.addresses[0]
    yield f"{host}:{port}"
    server.close()


def capture_pair(pair: Pair) -> JSON:
    with stock_registry() as address:
        for earlier in pair.before:
            ask(address, earlier)
        response = ask(address, pair.request)
    return {**pair.to_json(), "response": response}


# ---- ZMQ ------------------------------------------------------------------------------------------------------------


class Wiretap:
    """A PULL socket where a peer rank's would be."""

    def __init__(self) -> None:
        self.socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PULL)
        self.socket.setsockopt(zmq.RCVTIMEO, 5000)
        self.port: int = self.socket.bind_to_random_port("tcp://127.0.0.1")

    def take(self) -> list[str]:
        return [frame.hex() for frame in self.socket.recv_multipart()]


def decode(args: Any, *, mla: bool = False, **parallel: int) -> Any:
    surroundings.tell("parallel", **{**surroundings.PARALLEL, **parallel})
    manager = ranks.manager("decode", args, ranks.Motionless(SESSION), mla=mla)
    manager.local_ip, manager.rank_port = DECODE_IP, DECODE_PORT
    return manager


def prefill(registry: str, **parallel: int) -> Any:
    surroundings.tell("parallel", **{**surroundings.PARALLEL, **parallel})
    surroundings.tell("disagg", disaggregation_bootstrap_port=int(registry.rpartition(":")[2]))
    return ranks.manager("prefill", ranks.kv_args(), ranks.Motionless("10.0.0.1:15002"))


def receiver(manager: Any, tap: Wiretap, room: int, *, dummy: bool = False) -> Any:
    one = MooncakeKVReceiver(manager, "10.0.0.1:8998", room)
    one.bootstrap_infos = [{"rank_ip": "127.0.0.1", "rank_port": tap.port, "is_dummy": dummy}]
    one.required_dst_info_num = 1
    return one


MHA = {
    "kv_data_ptrs": [0x7F00_0000_0000 + n * 0x10_0000 for n in range(4)],
    "kv_data_lens": [0x10_0000] * 4,
    "kv_item_lens": [4096] * 4,
    "aux_data_ptrs": [0x7F10_0000_0000, 0x7F10_0001_0000],
    "aux_data_lens": [0x1000, 0x400],
    "aux_item_lens": [64, 16],
}
MLA = {**MHA, "kv_data_ptrs": MHA["kv_data_ptrs"][:2], "kv_data_lens": [0x10_0000] * 2, "kv_item_lens": [18432] * 2}
NO_KV: JSON = {"kv_data_ptrs": [], "kv_data_lens": [], "kv_item_lens": []}
STATE = {
    "state_types": [StateType.SWA, StateType.MAMBA],
    "state_data_ptrs": [[0x7F20_0000_0000, 0x7F20_0010_0000], [0x7F30_0000_0000]],
    "state_data_lens": [[0x1000, 0x1000], [0x800]],
    "state_item_lens": [[512, 512], [256]],
    "state_dim_per_tensor": [[], [4]],
    "state_layer_ids": [[1, 3], [0]],
}


def registration_values(manager: Any) -> JSON:
    args = manager.kv_args
    return {
        "ip": DECODE_IP,
        "port": DECODE_PORT,
        "session": SESSION,
        "kv_pointers": args.kv_data_ptrs,
        "aux_pointers": args.aux_data_ptrs,
        "state_pointers": args.state_data_ptrs,
        "tp_rank": args.engine_rank,
        "attn_tp_size": manager.attn_tp_size,
        "kv_item_nbytes": args.kv_item_lens[0] if args.kv_item_lens else 0,
        "state_item_nbytes": args.state_item_lens,
        "state_dims": args.state_dim_per_tensor,
        "kv_layer_ids": args.kv_layer_ids,
        "state_layer_ids": args.state_layer_ids,
        "dcp_size": manager.dcp_size,
        "dcp_rank": manager.dcp_rank,
        "kv_items_nbytes": args.kv_item_lens,
    }


REGISTRATIONS: dict[str, tuple[str, JSON, JSON]] = {
    "register_mha": ("two layers: K0 K1 V0 V1, positional pairing", MHA, {}),
    "register_mha_layer_ids": ("the same, with a layer id for each entry", {**MHA, "kv_layer_ids": [0, 1, 0, 1]}, {}),
    "register_mla": ("two layers, one entry each", MLA, {}),
    "register_mla_layer_ids": ("the same, with layer ids", {**MLA, "kv_layer_ids": [0, 1]}, {}),
    "register_tp": (
        "rank 3 of 4 tensor-parallel decode ranks",
        {**MHA, "engine_rank": 3},
        {"attn_tp_size": 4, "attn_tp_rank": 3},
    ),
    "register_state": ("a hybrid model: two state components", {**MHA, **STATE}, {}),
    "register_no_kv": ("a pool without full-token KV: no KV entries", {**MHA, **NO_KV}, {}),
}


def decode_v6() -> Any:
    manager = decode(ranks.kv_args(**MHA))
    manager.local_ip, manager.engine = "fd00::2", ranks.Motionless("[fd00::2]:15001")
    return manager


def capture_ipv6(tap: Wiretap) -> Iterator[tuple[str, JSON]]:
    manager = decode_v6()
    where = {"ip": "fd00::2", "session": "[fd00::2]:15001"}
    one = receiver(manager, tap, ROOM)
    assert one._register_kv_args()
    note = "the address is bare, the session bracketed"
    yield "register_ipv6", {"note": note, "values": registration_values(manager) | where, "frames": tap.take()}
    one.init_time = time.time()
    one.abort()
    values = {"room": ROOM, "ip": "fd00::2", "port": DECODE_PORT, "generation": 1}
    yield "abort_ipv6", {"note": "the address is bare", "values": values, "frames": tap.take()}


def capture_registrations(tap: Wiretap) -> Iterator[tuple[str, JSON]]:
    rooms = itertools.count(1)
    for name, (note, changes, parallel) in REGISTRATIONS.items():
        manager = decode(ranks.kv_args(**changes), mla="mla" in name, **parallel)
        assert receiver(manager, tap, next(rooms))._register_kv_args()
        yield name, {"note": note, "values": registration_values(manager), "frames": tap.take()}


METADATA: dict[str, tuple[str, JSON, bool]] = {
    "metadata": ("pages and an aux row", {"kv_indices": [7, 8, 9, 2], "aux_index": 3}, False),
    "metadata_prefix": (
        "the decode already holds the first 32 tokens",
        {"kv_indices": [11], "aux_index": 0, "decode_prefix_len": 32},
        False,
    ),
    "metadata_no_pages": ("everything is in the decode's prefix cache", {"kv_indices": [], "aux_index": 1}, False),
    "metadata_state": (
        "a hybrid model's state indices; one component has none",
        {"kv_indices": [1, 2], "aux_index": 2, "state_indices": [[4, 5], [6]]},
        False,
    ),
    "metadata_device_pages": (
        "host KV with a second page space on the device",
        {"kv_indices": [1, 2], "aux_index": 2, "device_kv_indices": [8, 9]},
        False,
    ),
    "metadata_dummy": (
        "a rank that need not send (MLA): frames 4 and 5 empty",
        {"kv_indices": [7], "aux_index": 3},
        True,
    ),
}


def capture_metadata(tap: Wiretap) -> Iterator[tuple[str, JSON]]:
    manager = decode(ranks.kv_args(**MHA))
    for name, (note, given, dummy) in METADATA.items():
        arrays = {k: np.array(v, np.int32) if k.endswith("kv_indices") else v for k, v in given.items()}
        receiver(manager, tap, ROOM, dummy=dummy).send_metadata(**arrays)
        values = {"room": ROOM, "ip": DECODE_IP, "port": DECODE_PORT, "session": SESSION, "dummy": dummy}
        values |= {
            "pages": None if dummy else given["kv_indices"],
            "aux_row": None if dummy else given["aux_index"],
            "state_indices": given.get("state_indices", []),
            "required_dst_info_num": 1,
            "decode_prefix_len": given.get("decode_prefix_len", 0),
            "device_pages": given.get("device_kv_indices", []),
        }
        yield name, {"note": note, "values": values, "frames": tap.take()}


def capture_aborts(tap: Wiretap) -> Iterator[tuple[str, JSON]]:
    manager = decode(ranks.kv_args(**MHA))
    before = receiver(manager, tap, ROOM)
    before.abort()
    where = {"room": ROOM, "ip": DECODE_IP, "port": DECODE_PORT}
    note = "before the metadata went out: nothing is written, no acknowledgement is awaited"
    yield "abort", {"note": note, "values": {**where, "generation": None}, "frames": tap.take()}
    after = receiver(manager, tap, ROOM)
    after.init_time = time.time()
    after.abort()
    note = "after the metadata: the pages are held until this generation is acknowledged"
    yield "abort_generation", {"note": note, "values": {**where, "generation": 1}, "frames": tap.take()}
    bare = [frame.hex() for frame in AbortNotification(room=ROOM).to_zmq()]
    values = {"room": ROOM, "ip": None, "port": None, "generation": None}
    yield "abort_bare", {"note": "without a return address", "values": values, "frames": bare}


def capture_bootstrap(tap: Wiretap) -> Iterator[tuple[str, JSON]]:
    """prefill_complete: the decode's address goes out before it has pages."""
    manager = decode(ranks.kv_args(**MHA))
    surroundings.tell("disagg", disaggregation_decode_allocation_policy="prefill_complete")
    manager.connection_pool["10.0.0.1:8998_0_0_0"] = [
        {"rank_ip": "127.0.0.1", "rank_port": tap.port, "is_dummy": False}
    ]
    manager.prefill_info_table["10.0.0.1:8998"] = topology(decode_allocation_policy="prefill_complete")
    MooncakeKVReceiver(manager, "10.0.0.1:8998", ROOM).init(prefill_dp_rank=0)
    surroundings.tell("disagg", disaggregation_decode_allocation_policy="early")
    values = {"room": ROOM, "ip": DECODE_IP, "port": DECODE_PORT}
    yield "bootstrap", {"note": "policy prefill_complete only", "values": values, "frames": tap.take()}


def topology(**changes: Any) -> Any:
    info = PrefillServerInfo(1, 1, 1, 1, 16, "bfloat16", True, **changes)
    info.target_tp_rank, info.target_tp_ranks, info.target_cp_ranks, info.target_pp_ranks = 0, [0], [0], [0]
    info.required_dst_info_num = info.required_prefill_response_num = 1
    return info


STATUSES: dict[str, tuple[str, int, str | None]] = {
    "status_success": ("all pages and the aux row are there", KVPoll.Success, None),
    "status_failed": ("stock Mooncake sends no reason", KVPoll.Failed, "the reason stays at home"),
    "status_ready": ("policy prefill_complete: the last chunk is computed", KVPoll.WaitingForInput, None),
}


def capture_statuses(tap: Wiretap, registry: str) -> Iterator[tuple[str, JSON]]:
    manager = prefill(registry, attn_tp_size=4, attn_tp_rank=3)
    to = [("127.0.0.1", tap.port)]
    for name, (note, status, reason) in STATUSES.items():
        manager.send_kv_status_message(targets=to, bootstrap_room=ROOM, status=status, failure_reason=reason)
        values: JSON = {"room": ROOM, "status": status, "rank_id": 3, "reason": None}
        yield name, {"note": note, "values": values, "frames": tap.take()}
    manager.kv_status_msg_carries_reason = True
    reason = "the decode's memory is gone: ü"
    manager.send_kv_status_message(targets=to, bootstrap_room=ROOM, status=KVPoll.Failed, failure_reason=reason)
    frames = tap.take()
    assert manager.parse_kv_status_message([bytes.fromhex(frame) for frame in frames])[3] == reason
    note = "with stock's reason frame switched on (its own Mooncake ranks leave it off; its decode reads it)"
    values = {"room": ROOM, "status": KVPoll.Failed, "rank_id": 3, "reason": reason}
    yield "status_failed_reason", {"note": note, "values": values, "frames": frames}


def capture_acks_and_data(tap: Wiretap, registry: str) -> Iterator[tuple[str, JSON]]:
    manager = prefill(registry, attn_tp_size=4, attn_tp_rank=2)
    manager._send_abort_ack(ROOM, AckTarget("127.0.0.1", tap.port, 9))
    values: JSON = {"room": ROOM, "rank_id": 2, "generation": 9}
    yield "abort_ack", {"note": "nothing of the room is in flight any more", "values": values, "frames": tap.take()}
    manager._handle_legacy_abort_notification(AbortNotification(ROOM, "127.0.0.1", tap.port), False)
    note = "deferred release switched off: no rank, no generation"
    values = {"room": ROOM, "rank_id": None, "generation": None}
    yield "abort_ack_legacy", {"note": note, "values": values, "frames": tap.take()}
    data = bytes(range(16))
    manager.send_aux_data_to_endpoint("127.0.0.1", tap.port, ROOM, 1, 3, data)
    values = {"room": ROOM, "buffer": 1, "row": 3, "data": data.hex()}
    yield "aux_data", {"note": "aux over ZMQ instead of Mooncake", "values": values, "frames": tap.take()}
    manager.send_chunk_ready(
        room=ROOM, chunk_idx=0, page_start=0, num_pages=4, writer_id=SESSION, targets=[("127.0.0.1", tap.port)]
    )
    values = {"tag": "CHUNK_READY"}
    yield "unknown_chunk_ready", {"note": "staging, not spoken by pdctl", "values": values, "frames": tap.take()}


def check_stock_reads(name: str, frames: list[str]) -> None:
    """A captured message that its own stock reader would not take is no evidence."""
    if name.startswith("metadata"):
        assert TransferInfo.from_zmq([bytes.fromhex(frame) for frame in frames]).room == ROOM


def capture_zmq() -> Iterator[tuple[str, JSON]]:
    tap = Wiretap()
    yield from capture_registrations(tap)
    yield from capture_ipv6(tap)
    yield from capture_metadata(tap)
    yield from capture_aborts(tap)
    yield from capture_bootstrap(tap)
    with stock_registry() as address:
        yield from capture_statuses(tap, address)
        yield from capture_acks_and_data(tap, address)


def write(folder: Path, name: str, content: JSON) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    os.environ["SGLANG_HOST_IP"] = "127.0.0.1"
    assert MooncakeKVManager.kv_status_msg_tag is None
    for pair in PAIRS:
        write(folder / "http", pair.name, capture_pair(pair))
    for name, message in capture_zmq():
        check_stock_reads(name, message["frames"])
        write(folder / "zmq", name, message)
    os._exit(0)  # stock worker threads block for ever in a socket; nothing is left to lose


if __name__ == "__main__":
    main()
