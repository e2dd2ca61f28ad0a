"""Connections that idle are kept alive: those to peers, and no others."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator
from contextlib import AsyncExitStack, ExitStack, closing
from pathlib import Path

from pdctl.engine.idle import Idle
from tests.engine.conftest import mooncake_stage
from tests.engine.processes import Peers

MIB = 1 << 20


def is_kept_alive(it: socket.socket) -> bool:
    return bool(it.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE))


def leading_to(port: int) -> Iterator[socket.socket]:
    """Duplicates of this process's connections there."""
    for fd in os.listdir("/proc/self/fd"):
        path = Path("/proc/self/fd", fd)
        if path.is_socket():
            with closing(socket.socket(fileno=os.dup(int(fd)))) as it:
                try:
                    leads = it.family == socket.AF_INET and it.getpeername()[1] == port
                except OSError:
                    continue
                if leads:
                    yield it


def test_those_to_peers_are_kept_alive_and_no_others() -> None:
    with ExitStack() as stack:
        peer, other = (stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(2))
        to_peer, to_other = (stack.enter_context(socket.create_connection(at.getsockname())) for at in (peer, other))
        unconnected = stack.enter_context(socket.socket())
        tether = stack.enter_context(socket.create_connection(peer.getsockname()))
        tether.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        tether.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 1)
        idle, ports, n_open = Idle(), {peer.getsockname()[1]}, len(os.listdir("/proc/self/fd"))
        assert idle.keep_alive(ports) == 1
        assert [is_kept_alive(it) for it in (to_peer, to_other, unconnected)] == [True, False, False]
        assert to_peer.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 60
        assert tether.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 1, "it has its own"
        unconnected.connect(peer.getsockname())
        assert idle.keep_alive(ports) == 1, "which it was not when it was looked at before"
        assert is_kept_alive(unconnected)
        assert idle.keep_alive(ports) == 0
        assert len(os.listdir("/proc/self/fd")) == n_open


async def test_the_ways_of_a_real_engine_are_kept_alive(strangers: Peers) -> None:
    async with AsyncExitStack() as stack:
        stage = await mooncake_stage(stack, strangers)
        far = await stage.far()
        await stage.engine.write(far.session, stage.plan(far, 4 * MIB), deadline_s=30)
        card = stage.engine.card(far.session)
        assert card is not None
        n_ways = len(list(leading_to(card.data_port)))
        async with asyncio.timeout(60):
            while not all(is_kept_alive(it) for it in leading_to(card.data_port)):  # noqa: ASYNC110
                await asyncio.sleep(0.1)
        ours = [it.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) for it in leading_to(card.data_port)].count(60)
        assert ours >= 2, "the engine keeps none alive: where it does now, idle.py is not needed any more"
        assert len(list(leading_to(card.data_port))) == n_ways
        await stage.engine.write(far.session, stage.plan(far, 4 * MIB), deadline_s=30)
