"""Clocks, shared memory, limits of this process, and the place of the journal."""

from __future__ import annotations

import asyncio
import os
import resource
import sqlite3
import tempfile
import time
from contextlib import closing
from pathlib import Path

from pdctl import config
from pdctl.config import Settings
from pdctl.core.address import Endpoint
from pdctl.doctor.base import Said, fail, ok, warn
from pdctl.errors import ConfigError
from pdctl.identity import Service, Who
from pdctl.persistence.etcd_place import ETCD, EtcdPlace
from pdctl.persistence.place import MEMORY, path_in
from pdctl.retry import root_cause
from pdctl.sections import ServeSettings

SKEW_S, FAR_S = 2.0, 300.0
CONTAINERS_SHM = 64 << 20
"""What a container gets that nobody has said more for; a KV pool is larger than that."""
MANY_FILES = 8192
FREE_FOR_ROWS = 64 << 20
_CLOCK_SOURCE = Path("/sys/devices/system/clocksource/clocksource0/current_clocksource")
_SLOW_SOURCES = ("hpet", "acpi_pm", "jiffies")
_DRIFT_S = 0.05


async def clocks(settings: Settings) -> Said:
    """This host's against the registry's, which dates its answers; and whether time runs evenly here."""
    source = _clock_source()
    if (uneven := await _drift_s()) > _DRIFT_S:
        fix = "look at this host's virtualisation: leases and deadlines are kept by that clock"
        return fail(f"0.1 s by one clock was {uneven:.3f} s more or less by another (source {source})", fix)
    if source in _SLOW_SOURCES:
        return warn(f"the clock source is {source}", "use tsc or the hypervisor's: each look at this one takes 1 us")
    skew_s = await _skew_s(settings)
    if skew_s is None:
        return ok(f"time runs evenly (source {source}); no registry to compare the time of day with")
    told = f"{abs(skew_s):.0f} s {'ahead of' if skew_s > 0 else 'behind'} the registry"
    fix = "let both keep NTP's time (chronyc tracking): certificates and the times in logs depend on it"
    if abs(skew_s) > FAR_S:
        return fail(f"this host is {told}", fix)
    if abs(skew_s) > SKEW_S:
        return warn(f"this host is {told}", fix)
    return ok(f"the time of day is the registry's within {SKEW_S:g} s; time runs evenly (source {source})")


def _clock_source() -> str:
    return _CLOCK_SOURCE.read_text().strip() if _CLOCK_SOURCE.exists() else "unknown"


async def _drift_s() -> float:
    """How far apart the clocks of this host run within a tenth of a second."""
    begun = [time.monotonic(), time.perf_counter(), time.clock_gettime(time.CLOCK_BOOTTIME)]
    await asyncio.sleep(0.1)
    ended = [time.monotonic(), time.perf_counter(), time.clock_gettime(time.CLOCK_BOOTTIME)]
    took = [after - before for before, after in zip(begun, ended, strict=True)]
    return max(took) - min(took) if min(took) > 0 else 1.0


async def _skew_s(settings: Settings) -> float | None:
    """Positive where this host is ahead; the header has whole seconds, so half of one is added."""
    async with Service(settings.node.registry.split(",")[0], settings.client) as service:
        told = await service.identify()
        now = time.time()
    if told.who not in (Who.REGISTRY, Who.STOCK) or told.reply is None or told.reply.date is None:
        return None
    return now - told.reply.took_s / 2 - (told.reply.date.timestamp() + 0.5)


def shared_memory(_: Settings, at: Path = Path("/dev/shm")) -> Said:  # noqa: S108 - what is asked about
    if not at.is_dir():
        return fail(f"{at} is not there", "mount a tmpfs: pdctl agent hands pools over by it (docs/agent.md)")
    told = os.statvfs(at)
    total, free = told.f_blocks * told.f_frsize, told.f_bavail * told.f_frsize
    sizes = f"{at} has {_size(total)}, {_size(free)} of it free"
    fix = "give it more: docker --shm-size=16g; in Kubernetes an emptyDir of medium Memory at /dev/shm (docs/agent.md)"
    if not os.access(at, os.W_OK):
        return fail(f"{at} cannot be written by uid {os.getuid()}", "chmod 1777 it, or run as who may")
    if total and free < total // 100:
        return fail(f"{sizes}: it is full", "see who fills it (ls -l), files of ended processes stay there; or " + fix)
    if total <= CONTAINERS_SHM:
        return warn(f"{sizes}: no KV pool fits", fix)
    return ok(sizes)


def open_files(settings: Settings) -> Said:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    window = settings.engine.window
    told = f"RLIMIT_NOFILE is {_count(soft)} (at most {_count(hard)})"
    if soft == resource.RLIM_INFINITY or soft >= MANY_FILES:
        return ok(f"{told}: peers take up to {window} connections each")
    fix = f"raise it to {max(MANY_FILES, 65536)}: ulimit -n, LimitNOFILE= in the unit, --ulimit nofile of the container"
    peers = max(0, soft - 256) // window
    said = f"{told}: enough for {peers} peers at {window} connections each"
    return warn(said, fix) if peers else fail(said, fix)


def locked_memory(settings: Settings) -> Said:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    told = f"RLIMIT_MEMLOCK is {'unlimited' if soft == resource.RLIM_INFINITY else _size(soft)}"
    if soft == resource.RLIM_INFINITY or settings.engine.forces_tcp:
        return ok(f"{told}; protocol {settings.engine.protocol}")
    fix = "set it to unlimited: ulimit -l, LimitMEMLOCK=infinity, --ulimit memlock=-1, or IPC_LOCK in the pod"
    return fail(f"{told}, and {settings.engine.protocol} pins every page that it registers", fix)


def _count(limit: int) -> str:
    return "unlimited" if limit == resource.RLIM_INFINITY else str(limit)


def _size(nbytes: int) -> str:
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if nbytes >= unit:
            return f"{nbytes / unit:.1f} {name}"
    return f"{nbytes} B"


async def journal(settings: Settings) -> Said:
    """Whether `pdctl serve` with these settings could keep its rows."""
    url = settings.serve.journal
    if url.startswith(ETCD):
        return await _etcd(EtcdPlace.parse(url), settings.etcd.timeout_s)
    if url == MEMORY or (not url and not settings.serve.port):
        return warn("the journal is memory: what is registered is forgotten with the process", "give sqlite:PATH")
    try:
        path = path_in(url) if url else _usual(settings.serve)
    except ConfigError as error:
        what, _, fix = str(error).rpartition(": ")
        return fail(what, fix)
    assert path is not None  # noqa: S101 - memory has been told apart
    return _place(path)


def _usual(serve: ServeSettings) -> Path:
    return config.state_dir(config.environment()) / f"registry-{serve.port}.journal"


def _place(path: Path) -> Said:
    """A file beside it is made, written through and removed: what a full or read-only disk answers."""
    there = next(each for each in (path.parent, *path.parent.parents) if each.exists())
    move = "make it, or give another place with --journal sqlite:PATH (STATE_DIRECTORY, XDG_STATE_HOME)"
    try:
        with tempfile.NamedTemporaryFile(dir=there, prefix=".pdctl-doctor-") as file:
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return fail(f"{there} cannot be written ({error.strerror}), where the journal {path} shall be", move)
    free = os.statvfs(there).f_bavail * os.statvfs(there).f_frsize
    if free < FREE_FOR_ROWS:
        return warn(f"only {_size(free)} are free at {there}", "make room: a full journal refuses registrations")
    if path.exists() and (wrong := _wrong_with(path)) is not None:
        return fail(f"{path} {wrong}", "give another file, or the rights to the user of pdctl serve")
    new = "" if path.exists() else " (not made yet)"
    return ok(f"{path}{new} can be written, {_size(free)} free")


def _wrong_with(path: Path) -> str | None:
    if not os.access(path, os.R_OK | os.W_OK):
        return f"cannot be read and written by uid {os.getuid()}"
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=1.0)) as db:
            db.execute("SELECT name FROM sqlite_master LIMIT 1").fetchall()
    except sqlite3.OperationalError:
        return None  # held by a registry that serves: that is no fault
    except sqlite3.DatabaseError as error:
        return f"is no journal ({error})"
    return None


async def _etcd(place: EtcdPlace, deadline_s: float) -> Said:
    """Whether its members take connections; a majority of them makes it work."""
    told = await asyncio.gather(*(_takes_connections(each, deadline_s) for each in place.endpoints))
    wrong = [f"{at}: {why}" for at, why in zip(place.endpoints, told, strict=True) if why]
    if not wrong:
        return ok(f"{place} takes connections at {len(told)} of {len(told)} members")
    fix = "start etcd there, or mend the addresses in --journal etcd://HOST:PORT,..."
    said = f"of {len(told)} members of etcd {len(wrong)} take no connection: {'; '.join(wrong)}"
    return fail(said, fix) if 2 * len(wrong) >= len(told) else warn(said, fix)


async def _takes_connections(at: Endpoint, deadline_s: float) -> str:
    try:
        async with asyncio.timeout(deadline_s):
            _, writer = await asyncio.open_connection(at.host, at.port)
    except TimeoutError:
        return f"no connection within {deadline_s:g} s"
    except OSError as error:
        return root_cause(error)
    writer.close()
    return ""
