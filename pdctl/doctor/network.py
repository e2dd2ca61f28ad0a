"""Ports that would be bound, the address that is announced, the registry, the engine against itself, the store."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace

from pdctl import config, listeners, server
from pdctl.config import Settings
from pdctl.core.address import Endpoint, is_loopback, is_wildcard
from pdctl.device.open import open_device
from pdctl.doctor.base import Result, Said, fail, ok, warn
from pdctl.doctor.rehearsal import rehearsed
from pdctl.engine import wheel
from pdctl.errors import AddressTaken, ConfigError, EngineUnavailable, StoreNotReady, StoreUnusable
from pdctl.explaining import nobody_there
from pdctl.identity import Service, Who, identify
from pdctl.kvstore import check_store
from pdctl.retry import RetryPolicy, root_cause
from pdctl.store.patience import StorePatience

_RPC_PORTS = ("MC_MIN_RPC_PORT", 15000), ("MC_MAX_RPC_PORT", 17000)
_FEW = 2
"""An engine takes two of its range."""
_KNOCK_S = 2.0
_STORE = StorePatience(until_ready=RetryPolicy(first_wait_s=0.5, max_wait_s=1.0, max_attempts=2), rehearsal_s=15.0)


async def ports(settings: Settings) -> Said:
    """Each address that `pdctl serve`, or a rank, would bind: free, or who has it."""
    said = [await _one_port(what, host, port) for what, host, port in _wanted(settings)]
    said.append(_engine_range())
    worst = max(said, key=lambda each: list(Result).index(each.result))
    fixes = dict.fromkeys(each.fix for each in said if each.fix)
    return Said(worst.result, "; ".join(each.evidence for each in said), "; ".join(fixes))


def _wanted(settings: Settings) -> Iterator[tuple[str, str, int]]:
    serve, node = settings.serve, settings.node
    if serve.port:
        yield "registry", serve.host, serve.port
    for each in serve.listeners():
        yield f"registry for {each.name}", each.host, each.port
    if node.http_port:
        yield "rank's own port", node.host, node.http_port


async def _one_port(what: str, host: str, port: int) -> Said:
    try:
        with closing(server.bind(host, port)):
            return ok(f"{what} {host}:{port} is free")
    except AddressTaken as error:
        return await _taken(what, host, port, str(error))
    except ConfigError as error:
        why, _, fix = str(error).rpartition(": ")
        return fail(f"{what}: {why}", fix)


async def _taken(what: str, host: str, port: int, sentence: str) -> Said:
    why = sentence.rpartition(": ")[0]
    at = Endpoint("127.0.0.1" if is_wildcard(host) else host, port)
    told = await identify(f"http://{at}", deadline_s=1.0)
    if told.who in (Who.REGISTRY, Who.LOCKED):
        return ok(f"{what} {why}, which is {told.who} that serves")
    if told.who is Who.STOCK:
        fix = "start pdctl before the engine, so that the engine finds the port taken, or give one of them another port"
        return fail(f"{what} {why}, and that is {told.who}", fix)
    return fail(f"{what} {why}", f"stop it, or choose another port than {port}, the same at every engine and router")


def _engine_range() -> Said:
    environ = config.environment()
    first, last = (int(said) if (said := environ.get(name, "")).isdigit() else usual for name, usual in _RPC_PORTS)
    taken = sum(first <= port <= last for port in listeners.ports())
    free = last - first + 1 - taken
    told = f"engine {first}-{last}: {max(0, free)} of {max(0, last - first + 1)} ports are free"
    return ok(told) if free >= _FEW else fail(told, "widen MC_MIN_RPC_PORT to MC_MAX_RPC_PORT, or stop who has them")


async def address(settings: Settings) -> Said:
    """`node.host`, which ranks announce: must be this host's, and lead every peer to it."""
    host = settings.node.host
    ours = ", ".join(_addresses()) or "none but loopback"
    fix = f"set PDCTL_NODE__HOST or SGLANG_HOST_IP to the address by which peers reach this host (it has: {ours})"
    if is_wildcard(host):
        return fail(f"node.host is {host}: every interface for who listens, and nobody for who connects", fix)
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, 0, type=socket.SOCK_STREAM)
    except OSError as error:
        return fail(f"node.host is {host}, a name that leads nowhere ({root_cause(error)})", fix)
    at = sorted({str(sockaddr[0]) for _, _, _, _, sockaddr in found})
    for each in at:
        if (wrong := await _leads_back(each)) is not None:
            return fail(f"node.host is {host}: {wrong}", fix)
    if all(map(is_loopback, at)):
        return warn(f"node.host is {host}: peers on other hosts reach themselves there, not this one", fix)
    named = "" if at == [host] else f" ({', '.join(at)})"
    return ok(f"node.host is {host}{named}: this host's, and a connection to it comes back")


async def _leads_back(host: str) -> str | None:
    """Listen there and connect to it."""
    try:
        sock = server.bind(host, 0)
    except (ConfigError, AddressTaken):
        return f"{host} is no address of this host: of another one, of a NAT or a Service in front of it, or outdated"
    with closing(sock):
        try:
            async with asyncio.timeout(_KNOCK_S):
                _, writer = await asyncio.open_connection(host, server.bound(sock).port)
        except (OSError, TimeoutError) as error:
            return f"it is this host's, and a connection to it does not come back ({root_cause(error) or 'no answer'})"
        writer.transport.abort()
    return None


def _addresses() -> list[str]:
    """This host's own, by which packets would leave it; nothing is sent."""
    found = dict[str, None]()
    for family, far in ((socket.AF_INET, "198.51.100.1"), (socket.AF_INET6, "2001:db8::1")):
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as sock:
                sock.connect((far, 9))
                found[sock.getsockname()[0]] = None
        except OSError:
            continue
    return [each for each in found if not is_loopback(each) and not is_wildcard(each)]


async def registry(settings: Settings) -> Said:
    """Each URL of `node.registry`: is a registry there?"""
    said = [await _one_registry(url, settings) for url in settings.node.registry.split(",")]
    worst = max(said, key=lambda each: list(Result).index(each.result))
    return Said(worst.result, "; ".join(each.evidence for each in said), worst.fix)


async def _one_registry(url: str, settings: Settings) -> Said:
    async with Service(url, settings.client) as service:
        told = await service.identify()
        if told.who is Who.REGISTRY:
            ready = await service.get("/readyz")
            if ready.status == 200:
                return ok(f"{url} is {told.who}, and ready")
            return fail(f"{url} is {told.who}, and not ready: {ready.words}", "mend what it names, on its host")
    if told.who is Who.STOCK:
        return warn(f"{url} is {told.who}: no leases, no draining", "let pdctl serve take its port (docs/wires.md)")
    finding = await nobody_there(url, told)
    return fail(f"{finding.what.value}: {finding.why} ({'; '.join(finding.evidence)})", finding.do)


async def engine(settings: Settings) -> Said:
    """An engine on loopback writes to itself, in a child."""
    if not wheel.installed():
        return warn("no Mooncake wheel is installed: not tried", "pip install 'pdctl[cpu]' (or [cuda], [cuda13])")
    told = await rehearsed("engine", settings)
    if told.works:
        return ok(told.words)
    what, _, fix = told.words.rpartition(": ")
    return fail(f"the engine cannot write to itself: {what or told.words}", fix)


async def store(settings: Settings) -> Said:
    """The shared store's master, where one is configured: as `pdctl store check`, with less patience."""
    given = settings.store
    environ = config.environment()
    named = any(environ.get(name) for name in ("MOONCAKE_MASTER", "MOONCAKE_CLIENT"))
    if not (named or given.extra or given.file or environ.get("SGLANG_HICACHE_MOONCAKE_CONFIG_PATH")):
        return ok("no shared store is configured")
    try:
        found = config.store_config(given.extra, file=given.file, local_hostname=given.local_hostname or None)
        # what is looked at is the master: nothing of this host's SSD is touched
        config_ = replace(found.config, enable_ssd_offload=False, ssd_offload_path=None)
        async with open_device(given.device, environ=environ) as device:
            plan, ability = await check_store(config_, given.rank(), device, patience=_STORE)
    except (StoreNotReady, StoreUnusable) as error:
        fix = "start mooncake_master there, or mend its address (pdctl store config says where it comes from)"
        return fail(f"the store's master does not serve: {error}", fix)
    except (ConfigError, EngineUnavailable) as error:
        what, _, fix = str(error).rpartition(": ")
        return fail(what, fix)
    return ok(f"{plan.master} answers, and a set-up works (wheel {ability.version})")
