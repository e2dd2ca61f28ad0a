"""At a limit: the answer names it, and the rest keeps working."""

from __future__ import annotations

from typing import Any

import aiohttp
import pytest

from pdctl import config, serving
from pdctl.core.native import Registration
from pdctl.errors import ConfigError
from tests.test_client import ROW


async def put(http: aiohttp.ClientSession, url: str, instance: str, **more: Any) -> tuple[int, str]:
    row = Registration.of(ROW, ttl_s=60.0).to_body() | more
    async with http.put(f"{url}/v1/instances/{instance}/ranks/dp0-cp0-tp0-pp0", json=row) as answer:
        return answer.status, await answer.text()


async def test_a_full_registry_says_which_limit_and_serves_those_it_has() -> None:
    limits = {"limits.max_instances": 2, "limits.max_labels": 1, "limits.max_metadata_nbytes": 100}
    settings = config.load({"serve.port": 0, "serve.journal": "memory:", **limits})
    async with serving.sidecar(settings) as sidecar, aiohttp.ClientSession() as http:
        for instance in ("a", "b"):
            assert (await put(http, sidecar.url, instance))[0] == 200
        status, said = await put(http, sidecar.url, "c")
        assert (status, "max_instances" in said) == (429, True), said
        status, said = await put(http, sidecar.url, "a", labels={"x": "1", "y": "2"})
        assert (status, "max_labels" in said) == (413, True), said
        status, said = await put(http, sidecar.url, "a", metadata={"x": "y" * 100})
        assert (status, "max_metadata_nbytes" in said) == (413, True), said
        assert (await put(http, sidecar.url, "a", port=40999))[0] == 200
        async with http.get(f"{sidecar.url}/readyz") as answer:
            assert "instances" in await answer.text()


@pytest.mark.parametrize("name", ["max_instances", "max_ranks"])
def test_a_limit_that_lets_nobody_in_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        config.load({f"limits.{name}": 0})
