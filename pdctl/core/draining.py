"""
When a drain is over at a stock engine, which tells the registry nothing: what its own load says, if it is asked.

No sockets, no clock: `now` comes in (seconds, monotonic, any zero), as do answers of SGLang's `GET /v1/loads`.

What is known of a stock rank without asking: that it has registered, and, of an instance with several DP ranks that
does not follow the room's number, that rooms began (`/register_dp_rank`). Never that one ended, so that no count of
what is under way can be made of it, and silence is no sign: an instance with one DP rank announces nothing. Hence the
engine is asked, where the operator has said how, and it is believed only when it says for `quiet_s` that nothing runs,
waits or moves and that no page is in use, with counts that it goes on making: a scheduler that stands still shows the
last ones for ever, and one that prefills a long prompt in chunks shows no request between two of them, but its pages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pdctl.core.instances import InstanceView
from pdctl.core.lives import Life
from pdctl.core.route import as_integer, as_object, needed
from pdctl.core.seconds import check_seconds
from pdctl.core.witness import check_template, filled
from pdctl.errors import BadField, ConfigError

_COUNTS = ("num_running_reqs", "num_waiting_reqs", "num_used_tokens")
_DISAGGREGATION = ("prefill_bootstrap_queue_reqs", "prefill_inflight_queue_reqs")
_QUEUES = ("waiting", "grammar", "paused", "retracted")


@dataclass(frozen=True, slots=True)
class DrainPolicy:
    """Whether stock engines that drain are asked what is under way.

    loads_url       "", nobody is asked, and a drain of stock ranks ends with its grace. Else the engine's load, with
                    {host}, {http_port} and {instance} as in witness.http_url: `http://{host}:{http_port}/v1/loads`
    every_s         between two questions to one engine
    quiet_s         for how long it has to say that nothing is under way. 5 s: the time that a request may take from
                    the router to the engine's queue, and some more
    deadline_s      what one question may take
    max_concurrent  questions in flight
    """

    loads_url: str = ""
    every_s: float = 1.0
    quiet_s: float = 5.0
    deadline_s: float = 2.0
    max_concurrent: int = 64

    def __post_init__(self) -> None:
        check_seconds(self, "drain")
        if self.max_concurrent < 1:
            raise ConfigError(f"drain max_concurrent is {self.max_concurrent}: give at least 1")
        if self.loads_url:
            check_template(self.loads_url, "drain loads_url")

    def url(self, view: InstanceView) -> str | None:
        """Where the instance's load is asked for: at the lowest seat that says an API port. None: nobody says one."""
        for _, life in sorted(view.alive.items()):
            http_port = life.announcement.prefill_http_port
            if http_port is not None or "{http_port}" not in self.loads_url:
                return filled(self.loads_url, life.address.host, http_port, view.name)
        return None


@dataclass(frozen=True, slots=True)
class Load:
    """What a DP rank has under way, in requests and tokens; `made_at` by the engine's own clock."""

    under_way: int
    made_at: float


def read_loads(body: object) -> dict[int, Load]:
    """By DP rank. Raises BadField for what is not the whole of a load: what is not said may be under way."""
    rows = needed(as_object(body), "loads")
    if not isinstance(rows, list) or not rows:
        raise BadField("loads", "has nobody's load in it")
    loads = dict(_load(as_object(row)) for row in rows)
    if len(loads) < len(rows):
        raise BadField("loads", "has two loads of one DP rank")
    return loads


def load_of(loads: Mapping[int, Load], dp: int, dp_size: int) -> Load | None:
    """Of one DP rank; of all of them together, where the engine counts them in another way than the ranks do."""
    if set(loads) == set(range(dp_size)):
        return loads[dp]
    if not loads:
        return None
    return Load(sum(load.under_way for load in loads.values()), min(load.made_at for load in loads.values()))


def _load(row: Mapping[str, Any]) -> tuple[int, Load]:
    within = {"disaggregation": _DISAGGREGATION, "queues": _QUEUES}
    counts = [_count(row, name) for name in _COUNTS]
    counts += [_count(as_object(needed(row, part)), name) for part, names in within.items() for name in names]
    made_at = needed(row, "timestamp")
    if isinstance(made_at, bool) or not isinstance(made_at, int | float):
        raise BadField("timestamp", "is no number of seconds")
    return as_integer(needed(row, "dp_rank"), "dp_rank"), Load(sum(counts), float(made_at))


def _count(row: Mapping[str, Any], name: str) -> int:
    count = as_integer(needed(row, name), name)
    if count < 0:
        raise BadField(name, f"is {count}: a count is 0 or more")
    return count


def draining(view: InstanceView) -> dict[int, list[Life]]:
    """Stock ranks that drain, by DP rank: who holds a lease says by itself how many rooms it has."""
    groups: dict[int, list[Life]] = {}
    for _, life in sorted(view.alive.items()):
        if life.is_draining and life.ttl_s is None:
            groups.setdefault(life.seat.dp, []).append(life)
    return groups


class Quiet:
    """For how long one DP rank's engine has said that it has nothing under way."""

    def __init__(self, epochs: Sequence[int]) -> None:
        self.epochs = tuple(epochs)
        self._since: float | None = None
        self._first: Load | None = None
        self._last: Load | None = None

    def heard(self, load: Load | None, now: float) -> None:
        """None: it has not said, or not of this rank. Then nothing is known of the time before, either."""
        if load is None or load.under_way:
            self._since = self._first = self._last = None
            return
        if self._since is None or self._first is None:
            self._since, self._first = now, load
        self._last = load

    def for_s(self, now: float) -> float:
        """By our clock and by the engine's: the shorter one."""
        if self._since is None or self._first is None or self._last is None:
            return 0.0
        return min(now - self._since, self._last.made_at - self._first.made_at)
