"""Settings in seconds: one promise for all of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest

from pdctl.core.feed import WatchLimits
from pdctl.core.fleet import FleetPolicy
from pdctl.core.metadata import KeyWitness
from pdctl.core.seconds import check_seconds
from pdctl.core.transfer import RoomTimeouts
from pdctl.core.witness import WitnessPolicy
from pdctl.engine.settings import MooncakeSettings
from pdctl.errors import ConfigError
from pdctl.peer import LinkSettings
from pdctl.retry import RetryPolicy
from pdctl.sections import NodeSettings, ServeSettings

NO_SECONDS = (-1.0, math.nan, math.inf, -math.inf)


@dataclass(frozen=True)
class Waits:
    """`often` is no number of seconds, whatever it holds."""

    first_s: float = 1.0
    last_s: float | None = None
    often: float = 0.0


def test_what_has_every_wait_above_0_passes() -> None:
    check_seconds(Waits(), "test")
    check_seconds(Waits(first_s=1, last_s=1e9, often=-1.0), "test")


@pytest.mark.parametrize("value", [0.0, *NO_SECONDS])
def test_what_is_no_number_of_seconds_is_named_with_the_remedy(value: float) -> None:
    with pytest.raises(ConfigError, match=rf"^test last_s is {value}: give a number of seconds above 0$"):
        check_seconds(Waits(last_s=value), "test")


def test_a_wait_that_may_be_0_may_be_nothing_else() -> None:
    check_seconds(Waits(first_s=0.0), "test", or_zero=("first_s",))
    with pytest.raises(ConfigError, match=r"^test first_s is nan: give 0 or more seconds$"):
        check_seconds(Waits(first_s=math.nan), "test", or_zero=("first_s",))
    with pytest.raises(ConfigError, match="last_s is 0"):
        check_seconds(Waits(first_s=0.0, last_s=0.0), "test", or_zero=("first_s",))


EVERYWHERE = [
    (ServeSettings, "room_ttl_s"),
    (ServeSettings, "grace_s"),
    (NodeSettings, "announce_every_s"),
    (RetryPolicy, "max_wait_s"),
    (RetryPolicy, "give_up_after_s"),
    (WitnessPolicy, "retry_s"),
    (RoomTimeouts, "transfer_s"),
    (RoomTimeouts, "drain_margin_s"),
    (LinkSettings, "flush_s"),
    (WatchLimits, "heartbeat_s"),
    (MooncakeSettings, "recheck_s"),
    (FleetPolicy, "settle_s"),
    (KeyWitness, "every_s"),
    (MooncakeSettings, "handshake_timeout_s"),
]


@pytest.mark.parametrize(("policy", "field"), EVERYWHERE, ids=lambda each: getattr(each, "__name__", each))
@pytest.mark.parametrize("value", NO_SECONDS)
def test_no_setting_takes_what_is_no_number_of_seconds(policy: type, field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f" {field} is {value}: give "):
        policy(**{field: value})
