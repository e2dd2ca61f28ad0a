"""
2,000 clients that lost the registry at one moment come back spread out: the client's waits and the registry's door
together, in simulated time. The same with real clients and a real service: tests/bench/herd.py.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from random import Random

import pytest

from pdctl.core.admission import Admission, AdmissionPolicy, Lane
from pdctl.retry import RetryPolicy

CLIENTS = 2000
PERIOD_S = 10.0
WINDOW_S = 0.1
BACK = RetryPolicy().returning(PERIOD_S)
OUTAGES_S = [0.05, 0.5, 2.0, 5.0, 10.0, 20.0, 60.0, 300.0]


def unevenness(times: Sequence[float]) -> float:
    """The fullest window of 100 ms, wherever it begins, over the mean window from 0 to the last of `times`."""
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


@pytest.mark.parametrize("outage_s", OUTAGES_S)
def test_those_who_notice_at_their_next_renewal_come_back_spread_out(outage_s: float) -> None:
    random = Random(20261121)
    knocked, came_in = come_back(
        outage_s, BACK, AdmissionPolicy(), random, lambda: random.uniform(0, PERIOD_S * random.uniform(0.8, 1.0))
    )
    assert len(came_in) == CLIENTS
    assert unevenness(came_in) <= 3
    assert unevenness(knocked) <= 3
    assert max(came_in) <= PERIOD_S + 2


@pytest.mark.parametrize("outage_s", OUTAGES_S)
def test_those_who_notice_at_one_moment_come_back_spread_out(outage_s: float) -> None:
    knocked, came_in = come_back(outage_s, BACK, AdmissionPolicy(), Random(20261121), lambda: 0.0)
    assert unevenness(came_in) <= 3
    assert unevenness(knocked) <= 3


def test_clients_that_all_knock_at_once_are_let_in_at_the_pace() -> None:
    """As after a restart too short for anybody to miss: all knock within a millisecond, and none has waited before."""
    random = Random(20261121)
    _, came_in = come_back(0.0, BACK, AdmissionPolicy(), random, lambda: random.uniform(0, 0.001))
    assert len(came_in) == CLIENTS
    assert unevenness(came_in) <= 3
    assert max(came_in) < 12


@pytest.mark.parametrize("policy", [RetryPolicy(), RetryPolicy(full_jitter=True)], ids=["equal jitter", "full jitter"])
def test_waits_that_double_from_a_second_on_would_not_do(policy: RetryPolicy) -> None:
    """Why there is `returning`: this is what it is for, and fails when it is no longer needed."""
    random = Random(20261121)
    knocked, _ = come_back(
        5.0, policy, AdmissionPolicy(per_s=0), random, lambda: random.uniform(0, PERIOD_S * random.uniform(0.8, 1.0))
    )
    assert unevenness(knocked) > 3
