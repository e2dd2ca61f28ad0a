"""
All ranks of one stock SGLang instance, on the memory of tests/e2e/model.py, doing a request's share of the scheduler.

Runs beside the stock wheel only, after surroundings.install(). What a scheduler decides (which pages, which chunk is
the last, when to look again) is decided here, in the order of stock's prefill.py and decode.py; all else is stock's.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
from sglang.srt.disaggregation.base.conn import StateType
from sglang.srt.disaggregation.common.conn import KVTransferError
from sglang.srt.disaggregation.mooncake.conn import MooncakeKVReceiver, MooncakeKVSender

from pdctl.core.layout import Kind, Pool
from pdctl.core.pairing import pages_of
from pdctl.core.route import Seat
from tests.e2e.model import Model, Rank, Split
from tests.wire.stock import ranks, surroundings

FAILED, WAITING, SUCCESS = 0, 2, 4
POLL_S = 0.002
WITHIN_S = 60.0


class Group:
    """A parallel group whose ranks are all in this process: what its first rank says, the others hear."""

    def __init__(self) -> None:
        self.said: object = None

    def broadcast_object(self, said: object, src: int) -> object:
        self.said = self.said if said is None else said
        return self.said


@dataclass
class Seated:
    rank: Rank
    manager: Any


class Instance:
    def __init__(self, role: str, registry: str, model: Model, split: Split, state_type: str = "swa") -> None:
        self.role, self.address, self.model, self.split, self.state_type = role, registry, model, split, state_type
        self.seated: list[Seated] = []
        self.rooms: dict[int, list[Any]] = {}
        groups: dict[tuple[int, int, int], Group] = {}
        host, _, port = registry.rpartition(":")
        surroundings.tell("serving", host=host.strip("[]"))
        surroundings.tell("disagg", disaggregation_bootstrap_port=int(port))
        for seat in sorted(split.shape(model).seats()):
            rank = Rank(model, split, seat)
            group = groups.setdefault((seat.dp, seat.cp, seat.tp), Group())
            surroundings.tell("parallel", **{**surroundings.PARALLEL, **self._parallel(seat, group)})
            args = self._args(rank)
            self.seated.append(Seated(rank, ranks.manager(role, args, ranks.real_engine(), mla=model.kind == "mla")))

    def _parallel(self, seat: Seat, group: Group) -> dict[str, Any]:
        split, pages = self.split, pages_of(seat, self.split.shape(self.model), Kind(self.model.kind))
        return {
            "attn_tp_size": split.tp, "attn_tp_rank": seat.tp,
            "attn_cp_size": split.cp, "attn_cp_rank": seat.cp,
            "attn_dp_size": split.dp, "attn_dp_rank": seat.dp, "num_dp_ranks": split.dp,
            "attn_dcp_size": split.dcp, "attn_dcp_rank": seat.tp % split.dcp,
            "pp_size": split.pp, "pp_group": group,
            "enable_kv_cache_sharding": split.sharded, "enable_dsa_cache_layer_split": split.layered,
            "kv_shard_group": SimpleNamespace(rank_in_group=pages.rank, world_size=pages.size),
            "load_balance_method": "follow_bootstrap_room" if split.follow else "round_robin",
        }  # fmt: skip

    def _args(self, rank: Rank) -> Any:
        pools, seat = rank.pools, rank.seat
        return ranks.kv_args(
            # decode ranks of a second DP group count on, as --enable-dp-attention has it
            engine_rank=seat.tp + (seat.dp if self.role == "prefill" else 1) * self.split.tp,
            **_named("kv", pools.kv),
            kv_layer_ids=list(pools.layout.layer_ids),
            kv_cache_dtype_str="uint8",
            **_named("aux", pools.aux),
            state_types=[StateType(self.state_type)] * len(pools.states),
            **{f"state_{name}": [_each(state)[name] for state in pools.states] for name in _each(pools.kv)},
            state_layer_ids=[list(ids) for ids in pools.state_layer_ids],
            state_dim_per_tensor=[list(dims) if self.state_type == "mamba" else [] for dims in pools.state_dims],
            state_conv_shard_groups=[[list(self.model.state_parts) or None] * len(dims) for dims in pools.state_dims],
            state_slice_outer_counts=[[self.model.state_rows] * len(dims) for dims in pools.state_dims],
            swa_kv_cache_layout="nhd",
            page_size=self.model.page_size,
            kv_head_num=len(rank.heads),
            total_kv_head_num=self.model.heads,
            pp_rank=seat.pp,
            prefill_start_layer=rank.entries[0][1],
        )

    def fill(self, seed: int) -> None:
        for each in self.seated:
            each.rank.fill(seed)

    # --- prefill

    def send(self, room: int, dp: int, chunks: list[list[int]], row: int) -> dict[str, Any]:
        """Chunk after chunk from every rank of a DP group; what the room came to."""
        self.expect(room, dp)
        for sender, rank in zip(self.rooms[room], self._group(dp), strict=True):
            self._send(sender, rank.rank, chunks, row)
        return self.outcome(room)

    def expect(self, room: int, dp: int = 0) -> None:
        """Open it; decode has named its pages when this returns, or has given up."""
        self.rooms[room] = [MooncakeKVSender(each.manager, self.address, room) for each in self._group(dp)]
        for sender in self.rooms[room]:
            settle(sender, (WAITING, FAILED))

    def _group(self, dp: int) -> list[Seated]:
        return [each for each in self.seated if each.rank.seat.dp == dp]

    def _send(self, sender: Any, rank: Rank, chunks: list[list[int]], row: int) -> None:
        skipped = sender.pop_decode_prefix_len() // self.model.page_size
        left = sum(map(len, chunks)) - skipped
        sender.init(left, row)
        for chunk in chunks:
            pages, skipped = chunk[skipped:], max(0, skipped - len(chunk))
            left -= len(pages)
            if pages or chunk is chunks[-1]:
                state = [[row]] if rank.state and not left else None
                sender.send(np.array(pages, np.int32), state, num_kv_tokens=len(pages) * self.model.page_size)

    # --- decode

    def receive(self, room: int, pages: list[int], sent: list[int], row: int, prefix: int, seed: int) -> dict[str, Any]:
        """As tests/e2e/instance.py: `pages` into which `sent` go, of which the first `prefix` are here."""
        for each in self.seated:
            each.rank.begin(sent, pages, prefix, seed)
        self.find(room)
        self.name(room, pages, row, prefix)
        return self.outcome(room) | {
            "wrong": [wrong for each in self.seated for wrong in each.rank.wrong(sent, pages, 1, row, seed)]
        }

    def name(self, room: int, pages: list[int], row: int, prefix: int = 0) -> None:
        """Tell the prefill of the pages."""
        for each, receiver in zip(self.seated, self.rooms[room], strict=True):
            state = [[row]] if each.rank.state else None
            named = np.array(pages[each.rank.n_named(prefix) :], np.int32)
            receiver.send_metadata(named, row, state, decode_prefix_len=prefix * self.model.page_size)

    def find(self, room: int) -> None:
        """Open it, find the prefill ranks and tell them of the memory."""
        for each in self.seated:
            wait_for(partial(each.manager.try_ensure_parallel_info, self.address), "the instance is not complete")
        receivers = [MooncakeKVReceiver(each.manager, self.address, room) for each in self.seated]
        dp = self._dp_rank(room)
        for receiver in receivers:
            receiver.init(prefill_dp_rank=dp)
        self.rooms[room] = receivers

    def _dp_rank(self, room: int) -> int:
        info = self.seated[0].manager.prefill_info_table[self.address]
        if info.dp_size == 1 or info.follow_bootstrap_room:
            dp_rank: int = room % info.dp_size
            return dp_rank
        found: dict[str, int] = {}

        def asked() -> bool:
            found.update(MooncakeKVReceiver.query_prefill_dp_ranks(self.address, [room]))
            return str(room) in found

        wait_for(asked, f"no DP rank announced room {room}")
        return found[str(room)]

    # --- both

    def outcome(self, room: int) -> dict[str, Any]:
        """How its ranks see the room at its end: `reasons` for those that failed."""
        ended = [settle(one, (SUCCESS, FAILED)) for one in self.rooms[room]]
        return {"reasons": [_reason(one) for one, status in zip(self.rooms[room], ended, strict=True) if not status]}

    def abort(self, room: int) -> None:
        for one in self.rooms[room]:
            one.abort()

    def released(self, room: int, acks: int) -> bool:
        """Whether so many prefill ranks confirmed the abort to each decode rank."""
        for each in self.seated:
            wait_for(partial(each.manager.is_abort_release_safe, room, acks), f"room {room}: no {acks} acks came")
        return True

    def speak(self, frames: list[str], to: str) -> None:
        """Say this to a rank of the other side, by stock's own socket."""
        host, _, port = to.rpartition(":")
        sock, lock = MooncakeKVReceiver._connect_to_bootstrap_server({"rank_ip": host, "rank_port": int(port)})
        with lock:
            sock.send_multipart([frame.encode() for frame in frames])

    def register_as(self, n_frames: int, more: Sequence[str] = ()) -> None:
        """Registrations from now on: the first frames alone, or more than there are."""
        for each in self.seated:
            build = type(each.manager).build_receiver_registration_message
            each.manager.build_receiver_registration_message = lambda manager=each.manager, build=build: [
                *build(manager)[:n_frames],
                *(frame.encode() for frame in more),
            ]

    def aux_by_link(self, on: bool) -> None:
        os.environ["SGLANG_MOONCAKE_SEND_AUX_TCP"] = str(on).lower()

    def close(self) -> None:
        with ThreadPoolExecutor() as pool:  # each waits for its threads, which look up twice a second
            list(pool.map(lambda manager: manager.teardown(), [each.manager for each in self.seated]))


def settle(one: Any, status: Sequence[int]) -> int:
    wait_for(lambda: one.poll() in status, f"room {one.bootstrap_room} stays at {one.poll()}, not {status}")
    status_now: int = one.poll()
    return status_now


def wait_for(said: Callable[[], Any], otherwise: str, within_s: float = WITHIN_S) -> None:
    deadline = time.monotonic() + within_s
    while not said():
        if time.monotonic() > deadline:
            raise TimeoutError(otherwise)
        time.sleep(POLL_S)


def _reason(one: Any) -> str:
    try:
        one.failure_exception()
    except KVTransferError as error:
        return str(error.failure_reason)
    return ""


def _each(pool: Pool) -> dict[str, list[int]]:
    return {
        "data_ptrs": list(pool.pointers),
        "data_lens": [nbytes * (pool.n_items or 0) for nbytes in pool.item_lens],
        "item_lens": list(pool.item_lens),
    }


def _named(what: str, pool: Pool) -> dict[str, list[int]]:
    return {f"{what}_{name}": values for name, values in _each(pool).items()}
