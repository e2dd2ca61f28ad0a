"""A frozen interpreter is never the outcome: the loop goes on while the store's master is not there, late, or hung.

The wheel alone holds it for 4.4 s (refused, blackholed), and for as long as its RPC time-out where the master hangs,
which is 5 s in these tests; at its own settings for 90 s and longer. `python -m tests.bench store` has the figures. The
bound is far below those, and above what eight busy processes on two cores cost (2.6 s were seen, with a set-up in it).
"""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from pdctl.core.kvstore import KVStoreConfig, SetUp, StoreRank
from pdctl.core.warmup import Report
from pdctl.device.open import open_device
from pdctl.errors import StoreCause, StoreFailed, StoreNotReady, StoreUnusable
from pdctl.kvstore import open_store
from pdctl.lag import watched
from pdctl.retry import RetryPolicy
from pdctl.store.patience import StorePatience
from pdctl.store.rehearsal import rehearse
from tests.store.master import Master, master
from tests.store.race import Rank

BOUND_S = 7.0
"""Of what this process's own set-up would hold the loop for, ten seconds; of a rank's, see there."""
BRIEFLY = StorePatience(
    ask_s=0.3, until_ready=RetryPolicy(first_wait_s=0.2, multiplier=1.0, max_wait_s=0.2, give_up_after_s=1.5)
)


@pytest.fixture(autouse=True)
def patient_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator's own value, which wins over ours: so that a set-up in this process would be seen."""
    monkeypatch.setenv("MC_RPC_TIMEOUT_MS", "10000")


def config(at: Master, **changes: object) -> KVStoreConfig:
    made = KVStoreConfig(
        master_server_address=at.address,
        master_metrics_port=at.http,
        protocol="tcp",
        local_hostname="127.0.0.1",
        global_segment_size=32 << 20,
    )
    return replace(made, **changes)  # type: ignore[arg-type]


async def refused(of: KVStoreConfig) -> tuple[Report, float]:
    """What was said, and by how much the loop came late meanwhile."""
    import mooncake.store  # noqa: F401  once in a process, and no matter of the store's master

    async with open_device("cpu") as device, watched(time.monotonic, 0.005) as worst:
        with pytest.raises((StoreNotReady, StoreUnusable)) as caught:
            async with open_store(of, StoreRank(), device, patience=BRIEFLY):
                pass
        report: Report = caught.value.report  # type: ignore[attr-defined]
        return report, worst()


@contextmanager
def blackhole() -> Iterator[int]:
    """A port whose queue of connections is full: the kernel drops what comes, as a firewall does."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(0)
        callers = [socket.socket() for _ in range(4)]
        try:
            for caller in callers:
                caller.setblocking(False)
                caller.connect_ex(listening.getsockname())
            yield int(listening.getsockname()[1])
        finally:
            for caller in callers:
                caller.close()


async def test_with_nobody_there_the_loop_goes_on() -> None:
    report, late_s = await refused(config(Master()))
    assert (report.step, report.cause) == ("master", StoreCause.MASTER_UNREACHABLE)
    assert late_s < BOUND_S


async def test_with_a_master_that_hangs_the_loop_goes_on() -> None:
    with master() as hung:
        hung.stop()
        report, late_s = await refused(config(hung))
    assert (report.step, report.cause) == ("master", StoreCause.TIMED_OUT)
    assert late_s < BOUND_S


async def test_with_a_master_that_swallows_packets_the_loop_goes_on() -> None:
    with blackhole() as port:
        report, late_s = await refused(config(Master(), master_server_address=f"127.0.0.1:{port}"))
    assert (report.step, report.cause) == ("master", StoreCause.TIMED_OUT)
    assert late_s < BOUND_S


async def test_a_master_that_hangs_after_its_http_has_answered_freezes_another_process() -> None:
    """The question cannot see it, the rehearsal does."""
    with master() as hung:
        hung.stop()
        report, late_s = await refused(config(hung, master_metrics_port=0))
    assert (report.step, report.code) == ("set-up", -1)
    assert late_s < BOUND_S


def test_with_a_master_that_is_late_it_comes_up_and_the_loop_goes_on() -> None:
    late = Master()
    try:
        with Rank(late, 0, 1, segment=32 << 20) as rank:
            time.sleep(1.0)
            late.start()
            report = rank.line(60.0)
        assert report["ready"], report["said"]
        assert report["lag_s"] < 3.5
    finally:
        late.kill()


def test_the_end_of_a_store_whose_master_hangs_does_not_hold_the_loop() -> None:
    """The wheel's own close would: for 4.0 s at our settings, for 62 s at its own."""
    with master() as running, Rank(running, 0, 1, segment=32 << 20) as rank:
        assert rank.line(60.0)["ready"]
        running.stop()
        ended = rank.ask_now("close")
        assert ended["closed"]
        assert ended["lag_s"] < 3.5


# --- the rehearsal itself

PLAN = SetUp("127.0.0.1:12999", "P2PHANDSHAKE", 1 << 30, 16 << 20, "tcp", "", "127.0.0.1:1")


def scout(program: str) -> tuple[str, ...]:
    return (sys.executable, "-c", program)


@pytest.mark.parametrize(
    ("program", "cause"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", StoreCause.SET_UP_REFUSED),
        ("import time; time.sleep(60)", StoreCause.TIMED_OUT),
        ('print(\'{"code": -901, "error": "", "seconds": 1.0}\')', StoreCause.TIMED_OUT),
        ('print(\'{"code": -1300, "error": "", "seconds": 1.0}\')', StoreCause.NO_OFFLOAD),
        ('print(\'{"code": -1, "error": "TypeError: no", "seconds": 0}\')', StoreCause.SET_UP_REFUSED),
    ],
    ids=["a crash", "a hang", "a code", "another", "an exception"],
)
async def test_whatever_set_up_does_to_a_process_is_known_before_it_is_done_to_ours(
    program: str, cause: StoreCause
) -> None:
    with pytest.raises(StoreFailed) as caught:
        await rehearse(PLAN, scout(program), deadline_s=1.0 if "sleep" in program else 20.0)
    assert (caught.value.cause, caught.value.step) == (cause, "set-up")


async def test_a_rehearsal_gives_no_memory_and_takes_no_name_nor_directory_of_ours() -> None:
    check = (
        "import json, sys; plan = json.load(sys.stdin); "
        "good = plan['segment_nbytes'] == 0 and plan['local_hostname'] == '127.0.0.1' and plan['options'] == "
        "{'tenant_id': 'acme'}; print(json.dumps({'code': 0 if good else -600, 'error': '', 'seconds': 0}))"
    )
    options = {"tenant_id": "acme", "enable_ssd_offload": True, "ssd_offload_path": "/ssd"}
    await rehearse(replace(PLAN, options=options), scout(check), deadline_s=20.0)


async def test_where_no_process_can_be_started_the_set_up_goes_unrehearsed() -> None:
    await rehearse(PLAN, ("/nonexistent/python",), deadline_s=1.0)
    await rehearse(PLAN, scout("raise SystemExit(3)"), deadline_s=20.0)
