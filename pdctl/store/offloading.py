"""
This rank's directory on the SSD: made, tried, locked, and not entered before the master has forgotten its last life.

A client that comes back while the master still knows the one before it loses everything in the directory: 10 s after
that one's death the master drops its keys, those that the new client has just announced as well, and with buckets every
later write is refused for ever. A fresh name does not help, and closing before does not either (docs/store.md).
The master's own list of segments says when it has forgotten; where it cannot be read, we wait for its client_ttl.

The wheel gives a directory back only with its process, so the lock is kept that long too.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import structlog

from pdctl.core.kvstore import SetUp, StoreRank
from pdctl.core.offload import OffloadPatience, directory_of, offload
from pdctl.errors import ConfigError, StoreCause, StoreFailed
from pdctl.persistence.lock import FileLock, take
from pdctl.retry import RetryPolicy, retrying
from pdctl.store.torn import clear_torn

log = structlog.get_logger(__name__)

Names = Callable[[], Awaitable[frozenset[str] | None]]
"""Under which names the master knows segments now; None where it does not tell."""


@dataclass(frozen=True, slots=True)
class _Place:
    """A directory, what is known of its last life, and the lock on both."""

    directory: Path
    life: Path
    lock: FileLock

    @property
    def last_life(self) -> str | None:
        """Under which name a store lived here last."""
        try:
            return str(json.loads(self.life.read_text())["name"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    @property
    def is_empty(self) -> bool:
        return not any(entry.is_file() for entry in self.directory.rglob("*"))


@dataclass(slots=True)
class Claim:
    """`plan`: the set-up as it has to be."""

    plan: SetUp
    _place: _Place | None = None

    def keep(self, name: str) -> None:
        """A store of this process lives here under `name`, and will until the process ends."""
        if self._place is not None:
            self._place.life.write_text(json.dumps({"name": name}))
            self._place = None

    def release(self) -> None:
        if self._place is not None:
            self._place.lock.release()
            self._place = None


@asynccontextmanager
async def offloading(
    plan: SetUp,
    rank: StoreRank,
    environ: MutableMapping[str, str],
    names: Names,
    patience: OffloadPatience | None = None,
) -> AsyncIterator[Claim]:
    """The plan with this rank's own directory, which nobody else has; the plan as it is where nothing is offloaded.

    `environ` is made whole: the wheel reads the rest there. Raises ConfigError naming what to mend, StoreFailed
    where the master does not forget the last life in time.
    """
    root = plan.options.get("ssd_offload_path")
    if not plan.options.get("enable_ssd_offload") or root is None:
        yield Claim(plan)
        return
    chosen = offload(environ, plan.segment_nbytes)
    for warning in chosen.warnings:
        log.warning("offload setting", rank=str(rank), says=warning)
    place = _claimed(Path(root) / directory_of(rank), plan.segment_nbytes)
    options = {**plan.options, "ssd_offload_path": str(place.directory)}
    claim = Claim(replace(plan, options=options), place)
    try:
        await _forgotten(place, rank, names, patience or OffloadPatience())
        await _without_torn(place.directory)
        environ.update(chosen.variables)
        yield claim
    finally:
        claim.release()


def _claimed(directory: Path, needed: int) -> _Place:
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = take(directory.with_name(directory.name + ".lock"))
    except OSError as error:
        raise _unusable(directory, error) from error
    if isinstance(lock, str):
        raise ConfigError(
            f"store ssd_offload_path {directory} is held by {lock}: two ranks in one directory truncate each other's "
            "files; give each rank (dp, tp, pp, cp) of this host its own, or stop that process"
        )
    try:
        _try(directory, needed)
    except BaseException:
        lock.release()
        raise
    return _Place(directory, directory.with_name(directory.name + ".life"), lock)


def _try(directory: Path, needed: int) -> None:
    """The wheel would only say "Invalid FileStorage configuration"."""
    if directory.resolve() != directory:
        raise ConfigError(f"store ssd_offload_path {directory} is {directory.resolve()} in truth: give that, no link")
    try:
        with tempfile.NamedTemporaryFile(dir=directory, prefix=".pdctl-"):
            pass
        free = shutil.disk_usage(directory).free
    except OSError as error:
        raise _unusable(directory, error) from error
    if free < needed:
        raise ConfigError(
            f"store ssd_offload_path {directory} has {free} bytes free, less than this rank's segment of {needed}: "
            "free some, give another path, or switch enable_ssd_offload off"
        )


def _unusable(directory: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"store ssd_offload_path {directory} cannot be used ({error.strerror}): give a directory that this process "
        "can write to"
    )


async def _without_torn(directory: Path) -> None:
    try:
        await asyncio.to_thread(clear_torn, directory)
    except OSError as error:
        raise _unusable(directory, error) from error


async def _forgotten(place: _Place, rank: StoreRank, names: Names, patience: OffloadPatience) -> None:
    """Returns when no earlier life of this directory is known to the master any more."""
    if place.is_empty:
        return
    last, known = place.last_life, await names()
    if last is None or known is None:
        log.info("store waits until the master forgets the last life", rank=str(rank), wait_s=patience.client_ttl_s)
        await asyncio.sleep(patience.client_ttl_s)
        return
    if last in known:
        log.info("store waits until the master forgets the last life", rank=str(rank), name=last)

    async def gone() -> None:
        if last in (await names() or ()):
            detail = (
                f"the master still knows {last}, the last to use {place.directory}: end that process; it is forgotten "
                "one client_ttl after its end"
            )
            raise StoreFailed(StoreCause.TIMED_OUT, "offload", detail)

    policy = RetryPolicy(first_wait_s=0.25, multiplier=1.0, max_wait_s=0.25, give_up_after_s=patience.forget_s)
    await retrying(policy, gone)
