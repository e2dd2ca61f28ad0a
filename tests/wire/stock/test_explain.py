"""`pdctl explain` where the registry is stock's own server, which knows little and forgets nobody."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pdctl.client import RegistryClient
from pdctl.core.address import Endpoint
from pdctl.core.route import Announcement, Seat, Shape
from tests.engine.processes import Child
from tests.explain.planted import culprits
from tests.ports import free_port
from tests.wire.stock.conftest import environment

SHAPE = Shape(2, 1, 1, 1, 64, "bfloat16")


@pytest.fixture
def server(stock_folder: Path) -> Iterator[str]:
    with Child("tests.wire.stock.registry", environ=environment(stock_folder)) as child:
        yield child.hello["url"]


async def test_who_is_missing_and_who_is_dead_is_told_of_a_stock_server_too(server: str) -> None:
    assert await culprits(server) == ["never_registered"]
    async with RegistryClient(server) as client:
        await client.register(Announcement(Seat(0, 0, 0, 0), SHAPE, Endpoint("127.0.0.1", free_port())))
        assert await culprits(server, "any-name") == ["rank_missing"]
        await client.register(Announcement(Seat(0, 0, 1, 0), SHAPE, Endpoint("127.0.0.1", free_port())))
    assert await culprits(server) == ["stale_registration"] * 2
