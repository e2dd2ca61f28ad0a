"""
2,000 clients that lost the registry at one moment come back spread out: the client's waits and the registry's door
together, in simulated time. The same with real clients and a real service: tests/bench/herd.py.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from random import Random
from statistics import median

import pytest

from pdctl.core.admission import Admission, AdmissionPolicy, Lane
from pdctl.retry import RetryPolicy

CLIENTS = 2000
PERIODS_S = [5.0, 10.0]  # a third of a lease of 15 s, which is what our nodes hold, and of 30 s
WINDOW_S = 0.1
OUTAGES_S = [0.05, 0.5, 2.0, 5.0, 10.0, 20.0, 60.0, 300.0]


def returning(period_s: float) -> RetryPolicy:
    return RetryPolicy().returning(period_s)


def next_renewal(period_s: float, random: Random) -> float:
    """When one of many, each at its own point of the period, speaks next."""
    return random.uniform(0, period_s * random.uniform(0.8, 1.0))


def unevenness(times: Sequence[float]) -> float:
    """The fullest 100 ms, wherever they begin, over the mean of all from 0 to the last of `times`."""
    times = sorted(times)
    first, fullest = 0, 0
    for last, now in enumerate(times):
        while times[first] <= now - WINDOW_S:
            first += 1
        fullest = max(fullest, last - first + 1)
    return fullest / (len(times) * WINDOW_S / times[-1])


def come_back(
    outage_s: float, policy: RetryPolicy, door: AdmissionPolicy, random: Random, lost_at: Callable[[], float]
) -> tuple[list[float], list[float]]:
    """(when somebody knocked, when somebody came in), both in seconds after the registry's return."""
    admission, knocked, came_in = Admission(door), list[float](), list[float]()
    agenda = [(lost_at(), client, 1) for client in range(CLIENTS)]
    heapq.heapify(agenda)
    while agenda:
        now, client, attempt = heapq.heappop(agenda)
        after = None
        if now >= outage_s:
            knocked.append(now - outage_s)
            after = admission.ask(Lane.LEASED, now)
            if after is None:
                came_in.append(now - outage_s)
                continue
        wait = policy.wait_s(attempt, random) if after is None else after + policy.wait_after_hint_s(attempt, random)
        heapq.heappush(agenda, (now + wait, client, attempt + 1))
    return knocked, came_in


@pytest.mark.parametrize("period_s", PERIODS_S)
@pytest.mark.parametrize("outage_s", OUTAGES_S)
def test_those_who_notice_at_their_next_renewal_come_back_spread_out(outage_s: float, period_s: float) -> None:
    random = Random(20261121)
    knocked, came_in = come_back(
        outage_s, returning(period_s), AdmissionPolicy(), random, lambda: next_renewal(period_s, random)
    )
    assert len(came_in) == CLIENTS
    assert unevenness(came_in) <= 3
    assert unevenness(knocked) <= 3
    assert max(came_in) <= max(period_s, CLIENTS / AdmissionPolicy().per_s) + 5


@pytest.mark.parametrize("period_s", PERIODS_S)
@pytest.mark.parametrize("outage_s", OUTAGES_S)
def test_those_who_notice_at_one_moment_come_back_spread_out(outage_s: float, period_s: float) -> None:
    random = Random(20261121)
    lost_at = lambda: returning(period_s).wait_s(1, random)  # noqa: E731 - their first attempt has failed at 0
    knocked, came_in = come_back(outage_s, returning(period_s), AdmissionPolicy(), random, lost_at)
    assert unevenness(came_in) <= 3
    assert unevenness(knocked) <= 3


def test_clients_that_all_knock_at_once_are_let_in_at_the_pace() -> None:
    """As after a restart too short for anybody to miss: all knock within a millisecond, and none has waited before."""
    random = Random(20261121)
    _, came_in = come_back(0.0, returning(10.0), AdmissionPolicy(), random, lambda: random.uniform(0, 0.001))
    assert len(came_in) == CLIENTS
    assert unevenness(came_in) <= 3
    assert max(came_in) < 12


NO_DOOR = AdmissionPolicy(per_s=0)
"""As for renewals."""


@pytest.mark.parametrize("period_s", PERIODS_S)
@pytest.mark.parametrize("outage_s", [*OUTAGES_S, 4.0])
def test_renewals_come_back_spread_out_though_no_door_holds_them_up(outage_s: float, period_s: float) -> None:
    random = Random(20261121)
    policy = returning(period_s)
    for lost_at in (lambda: next_renewal(period_s, random), lambda: policy.wait_s(1, random)):
        knocked, _ = come_back(outage_s, policy, NO_DOOR, random, lost_at)
        assert unevenness(knocked) <= 3


def test_who_has_waited_for_long_is_no_likelier_to_come_at_once_than_later() -> None:
    """Waits that are all drawn from 0 on hold 2.3 times the mean in the first moments."""
    random, policy, worst = Random(20261121), returning(10.0), list[float]()
    for _ in range(9):
        knocked, _ = come_back(60.0, policy, NO_DOOR, random, lambda: next_renewal(10.0, random))
        worst.append(unevenness(knocked))
    assert median(worst) < 2


@pytest.mark.parametrize("policy", [RetryPolicy(), RetryPolicy(full_jitter=True)], ids=["equal jitter", "full jitter"])
def test_waits_that_double_from_a_second_on_would_not_do(policy: RetryPolicy) -> None:
    """Why there is `returning`: this is what it is for, and fails when it is no longer needed."""
    random = Random(20261121)
    knocked, _ = come_back(5.0, policy, AdmissionPolicy(per_s=0), random, lambda: next_renewal(10.0, random))
    assert unevenness(knocked) > 3
