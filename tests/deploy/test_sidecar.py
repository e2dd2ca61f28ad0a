"""A prefill's pod in the order of the kubelet: the sidecar by the manifest's words, then stock SGLang by its own."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.deploy.manifests import named
from tests.deploy.test_running import ask, drained, running
from tests.wire.stock.conftest import Stock, stock, stock_folder

__all__ = ["stock", "stock_folder"]  # fixtures

pytestmark = pytest.mark.stock


async def test_a_stock_prefill_is_served_by_its_sidecar_from_its_start_to_its_drain(
    stock: Stock, tmp_path: Path
) -> None:
    sidecar, engine = named("sglang", "sglang-prefill/pdctl"), named("sglang", "sglang-prefill/sglang")
    host = engine.flag("host")
    with running(sidecar, tmp_path, host=sidecar.flag("host")) as pdctl:
        address = f"127.0.0.1:{pdctl.port}"
        assert ask(f"http://{address}/readyz")[0] == 200, "the startup probe: only now is the engine started"
        assert "address already in use" in (await stock("serve", host=host, port=pdctl.port))["said"]
        await stock("rank", name="p", role="prefill", registry=f"{host}:{pdctl.port}")
        await stock("rank", name="d", role="decode", registry=address)
        known = await stock("topology", name="d", address=address)
        assert known is not None
        assert known["attn_tp_size"] == int(engine.flag("tp-size"))
        ended = await asyncio.to_thread(drained, f"http://{address}")
        assert ended.stdout.startswith("drained after ")
        await stock("rank", name="other", role="decode", registry=address)
        assert await stock("topology", name="other", address=address) is None
