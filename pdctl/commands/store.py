"""The work of `pdctl store config|check|warmup`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace

import structlog

from pdctl import config as configured
from pdctl.config import Settings
from pdctl.core.kvstore import Resolved
from pdctl.core.warmup import Report
from pdctl.device.open import open_device
from pdctl.errors import StoreNotReady, StoreUnusable
from pdctl.kvstore import check_store, open_store
from pdctl.tracing import open_tracing

log = structlog.get_logger(__name__)

_TRIAL_NBYTES = 64 << 20  # `store warmup` is gone in a second, and what others put there meanwhile with it


def _resolved(settings: Settings) -> Resolved:
    given = settings.store
    found = configured.store_config(given.extra, file=given.file, local_hostname=given.local_hostname or None)
    for warning in found.warnings:
        log.warning("store config", warning=warning)
    return found


@contextmanager
def _telling(*, as_json: bool) -> Iterator[None]:
    """A store that cannot be had is a document too, with the step that failed and its code."""
    try:
        yield
    except (StoreNotReady, StoreUnusable) as error:
        if as_json and isinstance(error.report, Report):
            print(json.dumps(asdict(error.report) | {"ready": False}))
        raise


async def config(settings: Settings, args: argparse.Namespace) -> int:
    found = _resolved(settings)
    values = asdict(found.config)
    if args.json:
        print(json.dumps({key: {"value": value, "source": found.sources[key]} for key, value in values.items()}))
        return 0
    for key, value in values.items():
        print(f"{key:<24} {value!s:<24} {found.sources[key]}")
    rank = settings.store.rank()
    print(f"{'of which this rank':<24} {found.config.segment_of(rank)} bytes for {rank}")
    return 0


async def check(settings: Settings, args: argparse.Namespace) -> int:
    found, store = _resolved(settings), settings.store
    async with open_device(store.device, environ=configured.environment()) as device:
        with _telling(as_json=args.json):
            plan, ability = await check_store(found.config, store.rank(), device, patience=store.patience())
    told = {"ready": True, "master": plan.master, "wheel": ability.version, "setup_takes": sorted(ability.setup)}
    print(json.dumps(told) if args.json else f"{plan.master} answers, and a set-up works (wheel {ability.version})")
    return 0


async def warmup(settings: Settings, args: argparse.Namespace) -> int:
    found, store = _resolved(settings), settings.store
    rank = store.rank()
    most = _TRIAL_NBYTES * rank.tp_size * rank.pp_size
    trial = replace(
        found.config,
        global_segment_size=min(found.config.global_segment_size, most),
        enable_ssd_offload=False,
        ssd_offload_path=None,
    )
    async with (
        open_device(store.device, environ=configured.environment()) as device,
        open_tracing(settings.trace, role="store") as spans,
    ):
        with _telling(as_json=args.json):
            async with open_store(trial, rank, device, patience=store.patience(), spans=spans) as opened:
                report = opened.report
    print(json.dumps(asdict(report) | {"ready": report.ready}) if args.json else report)
    return 0
