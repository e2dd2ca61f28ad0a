"""
Whether the store's master is there and works, asked by us before the wheel asks: TCP first, then its HTTP health.

The wheel's own set-up holds the interpreter while it waits for an answer (4.4 s when refused, 1.1 s when the master
hangs, at our settings). Nothing here waits longer than its deadline, and nothing is sent to the RPC port.
"""

from __future__ import annotations

import asyncio
import json
import os
from typing import Any

import aiohttp
import structlog

from pdctl.core.address import Endpoint
from pdctl.core.kvstore import KVStoreConfig
from pdctl.core.warmup import Step
from pdctl.errors import StoreCause, StoreFailed

log = structlog.get_logger(__name__)


async def ask(config: KVStoreConfig, *, deadline_s: float) -> None:
    """Returns when it may be set up against. `deadline_s` holds for each of the two. Raises StoreFailed (MASTER).

    An address that only the wheel can read (`etcd://...`) is not asked.
    """
    master = config.master
    if master is None:
        return
    await _knock(master, deadline_s)
    if config.master_metrics_port:
        await _ask_health(Endpoint(master.host, config.master_metrics_port), config, deadline_s)


async def _knock(master: Endpoint, deadline_s: float) -> None:
    try:
        async with asyncio.timeout(deadline_s):
            _, writer = await asyncio.open_connection(master.host, master.port)
    except TimeoutError as cause:
        raise _timed_out(f"{master} takes no connection within {deadline_s:.3g} s") from cause
    except OSError as cause:
        raise _unreachable(f"{master}: {_words(cause)}") from cause
    writer.close()


async def _ask_health(at: Endpoint, config: KVStoreConfig, deadline_s: float) -> None:
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=deadline_s)) as http,
            http.get(f"http://{at}/health") as answer,
        ):
            body = await answer.text()
    except TimeoutError as cause:
        also = "or a firewall drops it (master_metrics_port 0 leaves it unasked)"
        raise _timed_out(f"its HTTP at {at} does not answer within {deadline_s:.3g} s: it hangs, {also}") from cause
    except (aiohttp.ClientError, OSError) as cause:
        if config.check_server:
            raise _unreachable(f"its HTTP at {at}: {_words(cause)}; check_server wants it") from cause
        log.debug("the store's master answers no HTTP", at=str(at), cause=_words(cause))
        return
    if answer.status == 200 and _says_not_ready(body):
        raise _unreachable(f"{config.master_server_address} is not serving yet: {body[:200]}")


def _says_not_ready(body: str) -> bool:
    """Older masters have no such page, or another: only a plain no is a no."""
    try:
        told: Any = json.loads(body)
    except ValueError:
        return False
    return isinstance(told, dict) and told.get("service_ready") is False


def _timed_out(detail: str) -> StoreFailed:
    return StoreFailed(StoreCause.TIMED_OUT, Step.MASTER, detail)


def _unreachable(detail: str) -> StoreFailed:
    return StoreFailed(StoreCause.MASTER_UNREACHABLE, Step.MASTER, detail)


def _words(cause: BaseException) -> str:
    inner = getattr(cause, "os_error", None) or cause
    number = getattr(inner, "errno", None)
    return os.strerror(number).lower() if isinstance(number, int) and number > 0 else str(inner)


async def segments(config: KVStoreConfig, *, deadline_s: float) -> frozenset[str] | None:
    """Under which names the master knows segments, as its HTTP tells; None where it does not tell."""
    master = config.master
    if master is None or not config.master_metrics_port:
        return None
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=deadline_s)) as http,
            http.get(f"http://{Endpoint(master.host, config.master_metrics_port)}/get_all_segments") as answer,
        ):
            told = await answer.text()
    except (TimeoutError, aiohttp.ClientError, OSError) as cause:
        log.debug("the store's master tells no segments", cause=_words(cause) if isinstance(cause, OSError) else "")
        return None
    return frozenset(told.split()) if answer.status == 200 else None
