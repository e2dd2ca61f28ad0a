"""
What a `ProbePolicy` promises, in the oracle's own arithmetic: how long a link may be out, and how often let back.

Written from the words of the policy and not from the table's code, which it is there to judge.
"""

from __future__ import annotations

from pdctl.core.ejection import ProbePolicy

SLACK_S = 0.05
"""For the answers themselves: each takes a few milliseconds."""


def bound_s(policy: ProbePolicy, wait_s: float, deadline_s: float, crowd: int) -> float:
    """How long a link that is well, and whose hold is over, may still be out.

        wait + deadline + (good_answers - 1) * interval / 2 + places

    wait: the longest until the next question: `wanted_interval_s` from the moment when a request wants the link, and
    `unwanted_wait_s` without one. deadline: the question under way when the link became well may go unanswered.
    (good_answers - 1) * interval / 2: the good answers after the first. places: with more sessions out than
    `max_concurrent`, `crowd` of them, each of the questions may have to wait for the deadlines of those before it.
    """
    places_s = deadline_s * (crowd // policy.max_concurrent) * (1 + policy.good_answers)
    return wait_s + deadline_s + (policy.good_answers - 1) * policy.interval_s / 2 + places_s + SLACK_S


def unwanted_wait_s(policy: ProbePolicy, out_for_s: float) -> float:
    """The longest wait between two questions about a session that has been out for so long when the first has ended:

    interval + (multiplier - 1) * out_for, at most `max_interval_s`
    """
    share_s = policy.interval_s + (policy.multiplier - 1) * out_for_s
    return min(share_s, max(policy.interval_s, policy.max_interval_s))


def hold_s(policy: ProbePolicy, ejections: int, *, jitter: float = 0.0) -> float:
    """How long the last of so many ejections holds: the first not at all, then doubled each time up to a cap."""
    if ejections < 2:
        return 0.0
    return float(min(policy.max_hold_s, policy.hold_s * 2.0 ** min(ejections - 2, 64) * (1 + jitter)))


def lifts_within(policy: ProbePolicy, window_s: float) -> int:
    """How often a link may be let back that fails whenever it is: each time after a longer hold than the last.

    Within a window in which no ejection is forgotten; each `decay_s` of it may spare one hold.
    """
    lifts, held_s = 1, hold_s(policy, 2)
    while held_s <= window_s:
        lifts += 1
        held_s += hold_s(policy, lifts + 1)
    return lifts + int(window_s / policy.decay_s)
