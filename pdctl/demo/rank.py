"""
One rank of the demo: `python -m pdctl.demo.rank prefill|decode|alone --set node.registry=URL ...`.

Opens its node, says where it can be reached, and answers JSON lines until stdin ends. Composition only: what a rank
does is in workers.py, how it is wired is in pdctl.node.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence

import numpy as np

from pdctl import config, logs, node
from pdctl.config import Settings
from pdctl.core.layout import RankPools
from pdctl.core.route import Seat, Shape
from pdctl.demo.talk import Answer, Request, converse, tell
from pdctl.demo.toy import ToyConfig
from pdctl.demo.workers import Alone, Decode, Device, Prefill
from pdctl.errors import BadField
from pdctl.memory import Arena

N_PAGES, N_ROWS = 448, 64

Op = Callable[[Request], Awaitable[Answer]]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="pdctl.demo.rank", description="One rank of the demo.")
    parser.add_argument("role", choices=sorted(_ROLES))
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.NAME=VALUE", help="a setting of pdctl")
    args = parser.parse_args(argv)
    settings = config.load(dict(given.split("=", 1) for given in args.set))
    logs.configure(settings.log)
    asyncio.run(_until_told_to_stop(_ROLES[args.role](settings)))


async def _until_told_to_stop(role: Awaitable[None]) -> None:
    """SIGTERM ends the rank in order, as the end of its stdin does."""
    task = asyncio.ensure_future(role)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    await asyncio.wait([task])
    if not task.cancelled():
        task.result()


async def _prefill(settings: Settings) -> None:
    toy = ToyConfig()
    nbytes = Device.nbytes_for(toy, N_PAGES, N_ROWS)
    with Arena(nbytes) as arena:
        device = Device.of(toy, N_PAGES, N_ROWS, arena.array(nbytes, np.uint8))
        pools, seat = RankPools(device.kv.pool(), device.aux.pool()), Seat(0, 0, 0, 0)
        async with node.prefill_node(settings, pools=pools, arena=arena.region, seat=seat, shape=_shape(toy)) as rank:

            async def status(request: Request) -> Answer:  # noqa: ARG001
                return {"registered": rank.registered}

            tell("ready", session=rank.engine.session, metrics=rank.metrics_url)
            await _serve({"generate": Prefill(device, rank.sender).generate, "status": status})


async def _decode(settings: Settings) -> None:
    toy = ToyConfig()
    nbytes = Device.nbytes_for(toy, N_PAGES, N_ROWS)
    with Arena(nbytes) as arena:
        device = Device.of(toy, N_PAGES, N_ROWS, arena.array(nbytes, np.uint8))
        pools = RankPools(device.kv.pool(), device.aux.pool())
        registry, shape = settings.node.registry, _shape(toy)
        async with node.decode_node(settings, pools=pools, arena=arena.region, shape=shape, registry=registry) as rank:
            worker = Decode(device, rank.receiver, lambda room: rank.pair(settings.node.registry, room))
            tell("ready", session=rank.engine.session, metrics=rank.metrics_url)
            await _serve({"generate": worker.generate, "untouched": worker.untouched})


async def _alone(settings: Settings) -> None:  # noqa: ARG001
    toy = ToyConfig()
    arena = np.zeros(Device.nbytes_for(toy, N_PAGES, N_ROWS), np.uint8)
    worker = Alone(Device.of(toy, N_PAGES, N_ROWS, arena))
    tell("ready")
    await _serve({"generate": worker.generate})


async def _serve(ops: dict[str, Op]) -> None:
    async def answer(request: Request) -> Answer:
        if request["op"] not in ops:
            raise BadField("op", f"{request['op']!r} is unknown: this rank knows {', '.join(sorted(ops))}")
        return await ops[request["op"]](request)

    await converse(answer, sys.stdin.buffer)


def _shape(toy: ToyConfig) -> Shape:
    """One rank is the whole instance."""
    return Shape(
        attn_tp_size=1, attn_cp_size=1, dp_size=1, pp_size=1, page_size=toy.page_size, kv_cache_dtype="float32"
    )


_ROLES: dict[str, Callable[[Settings], Awaitable[None]]] = {"prefill": _prefill, "decode": _decode, "alone": _alone}

if __name__ == "__main__":
    main()
