"""What operators see: instances, who sits where, and who is missing."""

from __future__ import annotations

from typing import Any

import aiohttp

from pdctl.core.address import Endpoint
from pdctl.core.route import Announcement, Seat, Shape
from pdctl.dialects.native import MISSING_SHOWN
from pdctl.registrar import Registrar
from tests.conftest import Clock


def claim(tp: int, size: int = 2) -> Announcement:
    shape = Shape(attn_tp_size=size, attn_cp_size=1, dp_size=1, pp_size=1, page_size=16, kv_cache_dtype=None)
    return Announcement(Seat(0, 0, tp, 0), shape, Endpoint("fd00::7", 40000 + tp))


async def get(url: str) -> tuple[int, Any]:
    async with aiohttp.ClientSession() as session, session.get(url) as answer:
        return answer.status, await answer.json()


async def test_an_empty_registry_lists_nothing_and_knows_nobody(registry_url: str) -> None:
    assert await get(f"{registry_url}/v1/instances") == (200, {"instances": []})
    status, body = await get(f"{registry_url}/v1/instances/default")
    assert status == 404
    assert body == {"error": {"message": "no rank of 'default' has registered yet"}}


async def test_the_missing_seat_and_the_age_of_the_others_are_shown(
    registry_url: str, registrar: Registrar, clock: Clock
) -> None:
    await registrar.register("default", claim(1))
    clock.forward(2.5)
    summary = {"name": "default", "ready": False, "seats": 2, "alive": 1, "missing": 1, "epoch": 1}
    assert await get(f"{registry_url}/v1/instances") == (200, {"instances": [summary]})
    held = {"seat": "dp0/cp0/tp1/pp0", "dp": 0, "cp": 0, "tp": 1, "pp": 0}
    absent = {"seat": "dp0/cp0/tp0/pp0", "dp": 0, "cp": 0, "tp": 0, "pp": 0}
    life = {"address": "[fd00::7]:40001", "epoch": 1, "age_s": 2.5}
    expected = summary | {"alive_seats": [held | life], "missing_seats": [absent]}
    assert await get(f"{registry_url}/v1/instances/default") == (200, expected)


async def test_a_complete_instance_misses_nobody(registry_url: str, registrar: Registrar) -> None:
    for tp in (1, 0):
        await registrar.register("default", claim(tp))
    _, body = await get(f"{registry_url}/v1/instances/default")
    assert (body["ready"], body["missing_seats"]) == (True, [])
    assert [seat["tp"] for seat in body["alive_seats"]] == [0, 1]


async def test_of_very_many_missing_seats_the_first_are_listed(registry_url: str, registrar: Registrar) -> None:
    await registrar.register("default", claim(0, size=60_000))
    _, body = await get(f"{registry_url}/v1/instances/default")
    assert body["missing"] == 59_999
    assert len(body["missing_seats"]) == MISSING_SHOWN


async def test_an_unknown_path_of_ours_is_told_in_json(registry_url: str) -> None:
    assert await get(f"{registry_url}/v1/nothing") == (404, {"error": {"message": "Not Found"}})
