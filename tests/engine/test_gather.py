"""Copies that are one at the peer go as one block, and every byte comes to where the plan says."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdctl.core.layout import Region
from pdctl.core.plan import CopyPlan
from pdctl.engine.gather import LONGEST_PIECE, STAGE_NBYTES, Gathering, Stages
from pdctl.errors import Cause
from tests.engine.conftest import Stage as Pair
from tests.engine.conftest import mooncake_stage
from tests.engine.processes import Peers
from tests.engine.test_contract import failure
from tests.engine.test_hazards import Spy

NBYTES = 1 << 16
KIB = 1 << 10
HERE = np.random.default_rng(1).integers(0, 256, NBYTES, np.uint8)


def plan_of(copies: list[tuple[int, int, int]]) -> CopyPlan:
    """From offsets here, addresses there."""
    return CopyPlan.of(*((HERE.ctypes.data + src, dst, nbytes) for src, dst, nbytes in copies))


@st.composite
def plans(draw: st.DrawFn) -> CopyPlan:
    """Copies in any order here; there some go on, some leave a gap."""
    at, copies = 0, []
    for _ in range(draw(st.integers(1, 60))):
        nbytes = draw(st.sampled_from([1, 3, 64, 64, 64, KIB, KIB, 5000, LONGEST_PIECE, LONGEST_PIECE + 1]))
        at += draw(st.sampled_from([0, 0, 0, 0, 7]))
        copies.append((draw(st.integers(0, NBYTES - nbytes)), at, nbytes))
        at += nbytes
    return plan_of(copies)


@given(plans())
def test_the_same_bytes_come_to_the_same_places(plan: CopyPlan) -> None:
    there = np.zeros(int((plan.dst + plan.nbytes).max()), np.uint8)
    wanted, stage, gathering = there.copy(), Stages().take(), Gathering.of(plan)
    for src, dst, nbytes in zip(plan.src - HERE.ctypes.data, plan.dst, plan.nbytes, strict=True):
        wanted[dst : dst + nbytes] = HERE[src : src + nbytes]
    found = list(gathering.blocks())
    assert len(found) == len(gathering) <= len(plan)
    for local, to, nbytes in found:
        at = local if isinstance(local, int) else local.into(stage)
        ctypes.memmove(there.ctypes.data + to, at, nbytes)
    assert (there == wanted).all()


def test_slices_of_one_token_each_become_one_block_of_64_kib() -> None:
    slices = plan_of([(256 * (k % 250), KIB // 8 * k, KIB // 8) for k in range(1024)])
    assert [nbytes for _, _, nbytes in Gathering.of(slices).blocks()] == [STAGE_NBYTES, STAGE_NBYTES]


def test_what_is_strewn_at_the_peer_or_long_stays_as_it_is() -> None:
    for copies in (
        [(512 * k, 1024 * k, 512) for k in range(8)],
        [(0, k * (LONGEST_PIECE + 1), LONGEST_PIECE + 1) for k in range(3)],
    ):
        assert list(Gathering.of(plan_of(copies)).blocks()) == [(HERE.ctypes.data + a, b, n) for a, b, n in copies]


def test_stages_are_used_again_and_their_files_are_closed_with_them() -> None:
    before, stages = descriptors(), Stages()
    taken = [stages.take() for _ in range(70)]
    assert len({stage.put([]) for stage in taken}) == 70, "no two are the same memory"
    held = descriptors()
    for stage in taken:
        stages.give_back(stage)
    taken = [stages.take() for _ in range(70)]
    assert before < descriptors() == held
    del stages, taken, stage
    assert descriptors() == before


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


# --- by the engine


@pytest.fixture
async def pair(peers: Peers) -> AsyncIterator[tuple[Pair, Spy]]:
    spy = Spy(window=16)
    async with AsyncExitStack() as stack:
        yield await mooncake_stage(stack, peers, factory=spy.make, window=16), spy


def slices(pair: Pair, pointer: int, n: int) -> CopyPlan:
    """Every other KiB of ours, one after another there."""
    each = np.arange(n, dtype=np.int64) * KIB
    return CopyPlan(pair.memory.ctypes.data + 2 * each, pointer + each, np.full(n, KIB, np.int64))


async def test_slices_arrive_in_a_sixtieth_of_the_blocks(pair: tuple[Pair, Spy]) -> None:
    stage, spy = pair
    far = await stage.far()
    stage.memory[:] = 255
    n_blocks = 1024 * KIB // STAGE_NBYTES
    stage.memory.reshape(-1, 2 * KIB)[:1024, :KIB] = np.repeat(np.arange(n_blocks), 1024 // n_blocks)[:, None] + 1
    await stage.engine.write(far.session, slices(stage, far.pointer, 1), deadline_s=30)
    for _ in range(5):
        before = spy.submitted
        await stage.engine.write(far.session, slices(stage, far.pointer, 1024), deadline_s=30)
        assert spy.submitted - before == n_blocks
        assert [await far.count(n + 1) for n in range(n_blocks)] == [STAGE_NBYTES] * n_blocks
        assert await far.count(255) == 0


async def test_memory_that_is_mapped_no_more_fails_its_own_write_and_nobody_elses(pair: tuple[Pair, Spy]) -> None:
    """Read by ourselves, it would have ended this process."""
    stage, _ = pair
    far = await stage.far()
    await stage.engine.write(far.session, slices(stage, far.pointer, 4), deadline_s=30)
    fd = os.memfd_create("pool")
    os.truncate(fd, 1 << 20)
    pool = mmap.mmap(fd, 1 << 20)
    array = np.frombuffer(pool, np.uint8)
    region = Region(array.ctypes.data, array.nbytes)
    await stage.engine.register(region)
    os.truncate(fd, 4096)
    each = np.arange(64, dtype=np.int64) * KIB
    lost = CopyPlan(region.pointer + 8 * each, far.pointer + each, np.full(64, KIB, np.int64))
    error = await failure(stage.engine.write(far.session, lost, deadline_s=30))
    assert error.cause is Cause.LOCAL
    assert "is not there any more (Bad address)" in str(error)
    stage.memory[:] = 3
    await stage.engine.write(far.session, slices(stage, far.pointer, 64), deadline_s=30)
    assert await far.count(3) == 64 * KIB
    await stage.engine.unregister(region)
    os.close(fd)
