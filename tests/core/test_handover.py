"""What an engine may say of its pool: the way there and back, and a name for everything that cannot be meant."""

from __future__ import annotations

import base64
import copy
import json
from dataclasses import replace
from typing import Any

import pytest

from pdctl.core.handover import Handed, Memory, Offer, Role, Store
from pdctl.core.layout import Heads, Kind, KvLayout, Pool, RankPools, Region, Share, Slices
from pdctl.core.route import Seat, Shape
from pdctl.errors import BadField, LayoutMismatch

SHAPE = Shape(2, 1, 1, 1, 16, "bfloat16")
HOST = Handed(Memory(Store.FILE, "/kv/rank0", 8192), Region(0x10000, 8192))
GPU = "GPU-00112233-4455-6677-8899-aabbccddeeff"
HANDLE = base64.b64encode(bytes(range(64))).decode()
DEVICE = Handed(Memory(Store.CUDA_IPC, HANDLE, 1 << 20, 4096, GPU), Region(0x9000_0000, 1 << 20))
POOLS = RankPools(
    kv=Pool((0x9000_0000, 0x9000_1000), (256, 256), 16),
    aux=Pool((0x10000,), (48,), 8),
    layout=KvLayout(Kind.MHA, 16, Heads(4, 2, 1), layer_ids=(0, 0)),
    states=(Pool((0x10400,), (32,), 4),),
    state_layer_ids=((0,),),
    state_slices=((Slices(Heads(8, 2, 1), rows=2),),),
)
OFFER = Offer.of(Role.PREFILL, POOLS, [HOST, DEVICE], Seat(0, 0, 1, 0), SHAPE, "http://r:8998", "a")


def body(**changes: Any) -> dict[str, Any]:
    """A good one, with what stands at a dotted path replaced; `...` takes it away."""
    said: dict[str, Any] = copy.deepcopy(OFFER.to_body())
    for dotted, value in changes.items():
        *way, last = (int(part) if part.isdigit() else part for part in dotted.split("__"))
        inner: Any = said
        for part in way:
            inner = inner[part]
        if value is ...:
            del inner[last]
        else:
            inner[last] = value
    return said


def test_what_is_handed_over_is_what_is_read() -> None:
    assert Offer.from_body(json.loads(json.dumps(OFFER.to_body()))) == OFFER


def test_pools_move_with_the_memory_they_lie_in() -> None:
    there = [Region(0x70000, 8192), Region(0x5000_0000, 1 << 20)]
    moved = OFFER.pools(there)
    assert moved.kv == Pool((0x5000_0000, 0x5000_1000), (256, 256), 16)
    assert moved.aux == Pool((0x70000,), (48,), 8)
    assert moved.states == (Pool((0x70400,), (32,), 4),)
    assert (moved.layout, moved.state_layer_ids) == (POOLS.layout, POOLS.state_layer_ids)
    assert moved.state_slices == POOLS.state_slices


def test_what_is_shared_in_turn_is_handed_over_too() -> None:
    layout = KvLayout(Kind.MLA, 16, pages=Share(2, 1), tokens=Share(4, 3))
    offer = Offer.of(Role.DECODE, replace(POOLS, layout=layout), [HOST, DEVICE], Seat(0, 0, 1, 0), SHAPE)
    assert Offer.from_body(json.loads(json.dumps(offer.to_body()))).layout == layout


def test_what_is_left_out_is_what_most_engines_have() -> None:
    least = {
        "role": "decode",
        "memory": [{"kind": "shm", "name": "/kv", "nbytes": 4096}],
        "kv": {"n_items": 4, "entries": [{"offset": 0, "item_nbytes": 512}, {"offset": 2048, "item_nbytes": 256}]},
        "aux": {"n_items": 1, "entries": [{"offset": 4000, "item_nbytes": 96}]},
        "shape": OFFER.to_body()["shape"],
    }
    offer = Offer.from_body(least)
    assert (offer.layout, offer.seat, offer.states, offer.registry) == (KvLayout(), Seat(0, 0, 0, 0), (), None)


WRONG = [
    ("role", {"role": "router"}, "role: is the text 'router': send one of prefill, decode"),
    ("no memory", {"memory": []}, "memory: is 0 of them: send a list of 1 to 1024 objects"),
    ("kind of memory", {"memory__0__kind": "nfs"}, "memory.0.kind: is the text 'nfs'"),
    ("no path", {"memory__0__path": ...}, "memory.0.path: is missing"),
    ("a null byte", {"memory__0__path": "/a\0b"}, "memory.0.path: is the text"),
    ("a misspelt field", {"memory__0__ofset": 1}, "memory.0.ofset: is no field: there are kind, nbytes, offset, path"),
    ("another kind's field", {"memory__0__handle": "ab"}, "memory.0.handle: is no field"),
    ("no bytes", {"memory__0__nbytes": 0}, "memory.0.nbytes: is 0: give 1 to"),
    ("a boolean", {"memory__0__nbytes": True}, "memory.0.nbytes: is a boolean: send an integer"),
    ("a fraction", {"kv__n_items": 1.5}, "kv.n_items: is 1.5: send an integer"),
    ("a device's number", {"memory__1__device": 1}, "memory.1.device: is 1: send a text"),
    (
        "a device without a UUID",
        {"memory__1__device": "cuda:1"},
        "memory.1.device: is 'cuda:1': give the device's UUID",
    ),
    ("no device", {"memory__1__device": ...}, "memory.1.device: is missing"),
    ("no entries", {"kv__entries": []}, "kv.entries: is 0 of them"),
    ("an entry that is none", {"kv__entries__1": 7}, "kv.entries.1: is 7: send an object"),
    ("a memory that is not there", {"kv__entries__0__memory": 2}, "kv.entries.0.memory: is 2: give 0 to 1"),
    ("before its beginning", {"kv__entries__0__offset": -1}, "kv.entries.0.offset: is -1"),
    ("beyond its end", {"aux__entries__0__offset": 7809}, "aux.entries.0.offset: is 7809, and 8 items of 48 bytes"),
    ("more than there is", {"states__0__n_items": 2**31 - 1}, "states.0.entries.0.offset: is 1024, and 2147483647"),
    ("layer ids", {"layout__layer_ids": [1]}, "layout.layer_ids: has 1 for 2 entries of kv"),
    ("layer ids that are none", {"layout__layer_ids": ["a", 1]}, "layout.layer_ids: is no list of integers"),
    ("kind of layout", {"layout__kind": "mqa2"}, "layout.kind: is the text 'mqa2'"),
    ("shares", {"layout__pages": {"size": 2, "rank": 2}}, "layout.pages.rank: is 2: give 0 to 1"),
    ("slices", {"state_units": [[7]]}, "state_units: 7 KV heads do not divide over 2 TP ranks"),
    ("rows", {"state_rows": [[1, 1]]}, "state_rows: is not as long as state_units"),
    ("heads", {"layout__heads__tp_size": 3}, "layout.heads.total: 4 KV heads do not divide over 3 TP ranks"),
    ("a seat outside", {"seat__tp": 2}, "seat: dp0/cp0/tp2/pp0 is outside the shape"),
    ("shape", {"shape__attn_tp_size": ...}, "shape.attn_tp_size: is missing"),
    ("no shape", {"shape": ...}, "shape: is"),
    ("a misspelt field at the top", {"kvv": 1}, "kvv: is no field"),
]


@pytest.mark.parametrize(("changes", "said"), [case[1:] for case in WRONG], ids=[case[0] for case in WRONG])
def test_what_cannot_be_meant_is_named_by_its_path(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(BadField) as refused:
        Offer.from_body(body(**changes))
    assert str(refused.value).startswith(said)


def test_a_rank_has_one_device_and_says_which() -> None:
    assert OFFER.device == GPU
    other = {**OFFER.to_body()["memory"][1], "device": GPU.replace("ff", "fe")}
    with pytest.raises(BadField, match="memory: is on GPU-00112233-4455-6677-8899-aabbccddeefe and GPU-"):
        Offer.from_body(body(memory=[*OFFER.to_body()["memory"], other]))


@pytest.mark.parametrize("other", [None, 7, "x", [], [1]])
def test_another_thing_than_an_object_is_refused(other: object) -> None:
    with pytest.raises(BadField, match="body: is"):
        Offer.from_body(other)


def test_a_list_for_each_group_of_state_or_none() -> None:
    with pytest.raises(LayoutMismatch, match="1 groups of state and 2 lists"):
        Offer.from_body(body(state_layer_ids=[[0], [1]])).pools([HOST.region, DEVICE.region])


def test_a_pool_outside_of_what_is_handed_over_is_refused() -> None:
    with pytest.raises(BadField, match=r"kv entry 0: Region.* is not inside the memory"):
        Offer.of(Role.PREFILL, POOLS, [HOST], Seat(0, 0, 0, 0), SHAPE)
