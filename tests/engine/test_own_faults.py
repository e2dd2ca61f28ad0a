"""Transfers that fail by this side's own fault, with real engines: they say so, and their peer is not blamed for it."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from pdctl.core.layout import Region
from pdctl.core.plan import CopyPlan
from pdctl.engine.blame import own_fault
from pdctl.errors import Cause
from tests.engine.processes import Peers
from tests.engine.test_contract import failure
from tests.engine.test_cures import staged

_libc = ctypes.CDLL(None, use_errno=True)


@contextmanager
def taken_away(region: Region) -> Iterator[None]:
    """As if it had been unmapped: whoever touches it gets EFAULT, or a signal."""

    def allow(what: int) -> None:
        got = _libc.mprotect(ctypes.c_void_p(region.pointer), ctypes.c_size_t(region.nbytes), what)
        assert got == 0, os.strerror(ctypes.get_errno())

    allow(0)
    try:
        yield
    finally:
        allow(mmap.PROT_READ | mmap.PROT_WRITE)


@contextmanager
def no_descriptor_left() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("when", ["at its first use", "in use"])
async def test_memory_of_ours_that_is_gone_is_our_own_fault(peers: Peers, when: str) -> None:
    async with staged(peers) as stage:
        far = await stage.far()
        map_ = mmap.mmap(-1, 1 << 16)
        region = Region(np.frombuffer(map_, np.uint8).ctypes.data, 1 << 16)
        await stage.engine.register(region)
        if when == "in use":
            await stage.engine.write(far.session, stage.plan(far), deadline_s=30)
        with taken_away(region):
            copies = CopyPlan(
                region.pointer + np.arange(0, 1 << 16, 4096),
                far.pointer + np.arange(0, 1 << 16, 4096),
                np.full(16, 4096, np.int64),
            )
            failed = await failure(stage.engine.write(far.session, copies, deadline_s=30))
        assert failed.cause is Cause.LOCAL
        assert failed.settled
        assert "memory of this side that it was to move is not there any more" in str(failed)
        stage.memory[:] = 9
        await stage.engine.write(far.session, stage.plan(far), deadline_s=30)
        assert await far.count(9) == 4 << 20
        await stage.engine.unregister(region)


async def test_memory_that_the_peer_took_back_speaks_of_the_request_and_not_of_the_peer(peers: Peers) -> None:
    async with staged(peers) as stage:
        far = await stage.far()
        await stage.engine.write(far.session, stage.plan(far), deadline_s=30)
        gone = far.pointer
        await far.unregister(gone)
        for _ in range(2):
            failed = await failure(stage.engine.write(far.session, stage.plan(far), deadline_s=30))
            assert (failed.cause, failed.settled) == (Cause.REJECTED_ADDRESS, True), failed


async def test_a_peer_that_is_killed_is_no_fault_of_ours(peers: Peers) -> None:
    async with staged(peers) as stage:
        far = await stage.far()
        await stage.engine.write(far.session, stage.plan(far), deadline_s=30)
        await far.kill()
        assert (await failure(stage.engine.write(far.session, stage.plan(far), deadline_s=30))).cause.speaks_of_peer


async def test_without_descriptors_nobody_else_is_blamed(peers: Peers) -> None:
    async with staged(peers) as stage:
        used, new = await stage.far(), await stage.far()
        await stage.engine.write(used.session, stage.plan(used, 4096), deadline_s=30)
        with no_descriptor_left():
            met = await failure(stage.engine.write(new.session, stage.plan(new), deadline_s=30))
            widened = await failure(stage.engine.write(used.session, stage.plan(used, block=4096), deadline_s=30))
        for failed in (met, widened):
            assert (failed.cause, failed.settled) == (Cause.LOCAL, True), failed
            assert "no file descriptor left" in str(failed)
        for far in (used, new):
            await stage.engine.write(far.session, stage.plan(far), deadline_s=30)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EPERM, errno.EACCES])
def test_what_only_this_host_can_be_short_of_or_forbid_is_called_ours(number: int) -> None:
    assert re.match("this (process|host)", own_fault(OSError(number, "x")) or "")


@pytest.mark.parametrize("number", [errno.ECONNREFUSED, errno.ECONNRESET, errno.ETIMEDOUT, errno.EHOSTUNREACH, None])
def test_what_may_speak_of_the_peer_is_not_called_ours(number: int | None) -> None:
    assert own_fault(OSError(number, "x") if number else OSError("x")) is None
    assert own_fault(EOFError()) is None
