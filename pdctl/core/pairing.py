"""
Which ranks of a prefill instance a decode rank hears, who of them writes, and how many answers make a room whole.

Both sides compute it from the two shapes alone, as stock does (SGLANG_WIRE 7, `_resolve_rank_mapping`): nothing of it
travels. What stock finds out in mid-transfer, or never, is refused here, before a byte moves.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pdctl.core.address import Endpoint
from pdctl.core.layout import Kind, KvLayout, Share
from pdctl.core.route import Seat, Shape
from pdctl.errors import LayoutMismatch

_SAME = ("page_size", "kv_cache_dtype", "kv_layout", "dsv41_spec_layout")


@dataclass(frozen=True, slots=True)
class Pairing:
    """What one decode rank needs of one prefill instance; the seats are those of DP rank 0.

    senders    the prefill ranks that write into this decode rank
    dummies    those that write nothing and must hear of the room all the same, or it never ends there
    required   of how many decode ranks each of them must hear, this one included
    responses  how many of the senders must report success: all of them
    """

    senders: tuple[Seat, ...]
    dummies: tuple[Seat, ...]
    required: int

    @property
    def responses(self) -> int:
        return len(self.senders)

    def at(self, dp: int) -> Pairing:
        """The same in another DP group."""
        senders, dummies = (tuple(Seat(dp, s.cp, s.tp, s.pp) for s in seats) for seats in (self.senders, self.dummies))
        return Pairing(senders, dummies, self.required)


@dataclass(frozen=True, slots=True)
class Paired:
    """A Pairing of which the control links are known: whom one room's decode rank tells, and whom it hears.

    ranks: the ids by which the senders report, in their order; None where they are not known, and then every report
    counts.
    """

    senders: tuple[Endpoint, ...]
    dummies: tuple[Endpoint, ...] = ()
    required: int = 1
    responses: int = 1
    ranks: tuple[int, ...] | None = None


def pair(prefill: Shape, decode: Shape, tp_rank: int, pp_rank: int, kind: Kind, dcp_size: int = 1) -> Pairing:
    """Raises LayoutMismatch, with both values, for instances that cannot be paired."""
    check_shapes(prefill, decode, kind, dcp_size)
    stages = range(prefill.pp_size) if decode.pp_size == 1 else (pp_rank,)
    # of CP ranks, the first has and sends all, unless each has some of the pages or some of the layers
    shared = prefill.enable_kv_cache_sharding or prefill.enable_dsa_cache_layer_split
    cps = range(prefill.attn_cp_size if shared else 1)
    if _is_sharded_over_tp(prefill, kind):
        tps, silent, required = range(prefill.attn_tp_size), range(0), decode.attn_tp_size
    else:
        tps, silent = _tp_ranks(prefill.attn_tp_size, decode.attn_tp_size, tp_rank, kind)
        required = max(1, decode.attn_tp_size // prefill.attn_tp_size)
    return Pairing(
        senders=tuple(Seat(0, cp, tp, pp) for cp in cps for pp in stages for tp in tps),
        dummies=tuple(Seat(0, cp, tp, pp) for cp in cps for pp in stages for tp in silent),
        required=required,
    )


def pages_of(seat: Seat, prefill: Shape, kind: Kind) -> Share:
    """Which page numbers a prefill rank in `seat` holds (`KvLayout.pages`): with KV sharding, CP ranks share them, or
    without CP the TP ranks of MLA, whose KV would be the same; else all."""
    if _is_sharded_over_tp(prefill, kind):
        return Share(prefill.attn_tp_size, seat.tp)
    return Share(prefill.attn_cp_size, seat.cp) if prefill.enable_kv_cache_sharding else Share()


def _is_sharded_over_tp(prefill: Shape, kind: Kind) -> bool:
    return prefill.enable_kv_cache_sharding and prefill.attn_cp_size == 1 and kind is Kind.MLA


def check_shapes(prefill: Shape, decode: Shape, kind: Kind, dcp_size: int = 1) -> None:
    """Raises LayoutMismatch for the first field that keeps the two apart."""
    for name, theirs, ours, fix in _obstacles(prefill, decode, kind, dcp_size):
        raise LayoutMismatch(f"{name} is {theirs!r} at the prefill and {ours!r} at this decode: {fix}")


def check_rank(layout: KvLayout, seat: Seat, shape: Shape, *, prefill: bool) -> None:
    """Raises LayoutMismatch where a rank's layout is not what its seat in its own instance says: peers plan by the
    shape, so bytes would go astray and nobody would hear of it. `page_size` only where pages are cut into tokens."""
    heads = layout.heads
    said: list[tuple[str, object, object]] = []
    if heads is not None:
        said.append(("heads", (heads.tp_rank, heads.tp_size), (seat.tp, shape.attn_tp_size)))
    if heads is not None or not layout.tokens.is_all:
        said.append(("page_size", layout.page_size, shape.page_size))
    said.append(("pages", layout.pages, pages_of(seat, shape, layout.kind) if prefill else Share()))
    for name, ours, wanted in said:
        if ours != wanted:
            raise LayoutMismatch(
                f"the layout's {name} are {ours} and the rank's seat {seat} and shape say {wanted}: give both the same"
            )


def rank_id(seat: Seat, shape: Shape) -> int:
    """By which decode ranks tell the answers of an instance's ranks apart: SGLANG_WIRE 2."""
    return (seat.tp * shape.pp_size + seat.pp) * shape.attn_cp_size + seat.cp


def dp_rank_of(shape: Shape, room: int) -> int | None:
    """Which DP group prefills `room`; None where only the registry knows (SGLANG_WIRE 1.4)."""
    if shape.dp_size == 1:
        return 0
    return room % shape.dp_size if shape.follow_bootstrap_room else None


def _obstacles(prefill: Shape, decode: Shape, kind: Kind, dcp_size: int) -> Iterator[tuple[str, object, object, str]]:
    for name in _SAME:
        theirs, ours = getattr(prefill, name), getattr(decode, name)
        if theirs != ours:
            yield name, theirs, ours, f"start both with the same {name}"
    larger, smaller = sorted((prefill.attn_tp_size, decode.attn_tp_size), reverse=True)
    if larger % smaller:
        yield "attn_tp_size", prefill.attn_tp_size, decode.attn_tp_size, "choose two of which one divides the other"
    if decode.attn_cp_size != 1:
        yield "attn_cp_size", prefill.attn_cp_size, decode.attn_cp_size, "start decode with 1: only prefill has CP"
    if decode.pp_size not in (1, prefill.pp_size):
        yield "pp_size", prefill.pp_size, decode.pp_size, "start decode with the prefill's, or with 1"
    if _is_sharded_over_tp(prefill, kind) and prefill.attn_tp_size != decode.attn_tp_size:
        fix = "KV that is sharded over the TP ranks of MLA needs the same at both sides"
        yield "attn_tp_size", prefill.attn_tp_size, decode.attn_tp_size, fix
    if dcp_size > 1 and prefill.attn_cp_size > 1:
        yield "attn_cp_size", prefill.attn_cp_size, 1, f"start prefill with 1: decode has a DCP size of {dcp_size}"
    if dcp_size > 1 and prefill.enable_kv_cache_sharding:
        yield "enable_kv_cache_sharding", True, False, f"start prefill without it: decode has a DCP size of {dcp_size}"


def _tp_ranks(prefill: int, decode: int, rank: int, kind: Kind) -> tuple[range, range]:
    """(those that write, those that only must hear)."""
    if decode >= prefill:
        mine = rank // (decode // prefill)
        return range(mine, mine + 1), range(0)
    ratio = prefill // decode
    first, end = rank * ratio, (rank + 1) * ratio
    if kind is Kind.MLA:  # every rank has all of it
        return range(first, first + 1), range(first + 1, end)
    return range(first, end), range(0)
