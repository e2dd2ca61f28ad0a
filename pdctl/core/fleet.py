"""
vLLM's prefill workers: who has registered where, and which prefills may be shown.

No sockets, no clock, no HTTP: `now` is an argument, a claim comes in, the Rows that it would change come out, and
`apply` makes them so.

vLLM names an engine for each data-parallel rank (`ID`, or `ID_dp0`, `ID_dp1`, ...), registers each worker once, and
says neither its sizes nor goodbye. A prefill is all engines of one ID; it is shown when it is complete, else not at
all: a decode takes `tp_size` from the number of workers that it is shown, and keeps that for ever.

    sizes known (set by the operator, or sent along)    complete <=> the seats held are those of the sizes
    a size unknown                                      complete <=> the seats held are a whole block from 0 on, and
                                                        nobody has joined for `settle_s`

The second is a guess that a late worker disproves: where ranks can be further apart than `settle_s`, set the sizes.

A worker that comes to a seat that is held, or to a prefill that was complete, is a restart, or a second prefill of the
same name. The addresses held are asked (`rivals`): who does not answer is gone. Of those who do, one on another host
keeps its seat (Occupied); one on the newcomer's own host gives way, and with it everybody who was in the complete
prefill: the workers of an engine live and die together, and two lives of it must never be mixed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from typing import Any

from pdctl.core.access import check_advertised
from pdctl.core.address import Endpoint
from pdctl.core.naming import DEFAULT
from pdctl.core.seconds import check_seconds
from pdctl.errors import BadField, ConfigError, LimitReached, Occupied, TooLarge

MAX_RANKS = 65_536
MAX_ENGINE_ID = 256

_DP_SUFFIX = re.compile(r"(?P<prefill>.+)_dp\d+", re.ASCII | re.DOTALL)
_TCP = "tcp://"


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """A worker's seat in its prefill."""

    dp: int
    tp: int
    pp: int

    def __str__(self) -> str:
        return f"dp{self.dp}/tp{self.tp}/pp{self.pp}"


@dataclass(frozen=True, slots=True)
class Sizes:
    """How many ranks an axis has; None where nobody has said."""

    dp: int | None = None
    tp: int | None = None
    pp: int | None = None

    def __post_init__(self) -> None:
        for axis, size in asdict(self).items():
            if size is not None and not 1 <= size <= MAX_RANKS:
                raise BadField(f"{axis}_size", f"is {size}: give 1 to {MAX_RANKS}")

    @classmethod
    def parse(cls, text: str) -> Sizes:
        """From `dp=2,tp=4,pp=1`; an axis may be left out."""
        given = dict(part.strip().partition("=")[::2] for part in text.split(",") if part.strip())
        unknown = sorted(set(given) - {"dp", "tp", "pp"})
        if unknown or not all(size.isascii() and size.isdigit() for size in given.values()):
            raise BadField("sizes", f"{text!r} is not understood: write dp=2,tp=4,pp=1, leaving out what is not known")
        return cls(**{axis: int(size) for axis, size in given.items()})

    def over(self, other: Sizes) -> Sizes:
        """These, and the other's where these say nothing."""
        return Sizes(self.dp or other.dp, self.tp or other.tp, self.pp or other.pp)

    @property
    def known(self) -> bool:
        return None not in (self.dp, self.tp, self.pp)


@dataclass(frozen=True, slots=True)
class Worker:
    """One registration. `addr` is what peers get, as it was sent; `host` is where it was sent from.

    `instance`: what its listener, or the host name that it used, stands for (core.naming). `epoch` tells two workers of
    one seat apart, for whoever watches; the fleet gives it.
    """

    engine_id: str
    place: Place
    addr: str
    host: str
    sizes: Sizes = Sizes()
    instance: str = DEFAULT
    epoch: int = field(default=0, compare=False)

    def __post_init__(self) -> None:
        check_engine_id(self.engine_id)
        for axis, rank in asdict(self.place).items():
            if not 0 <= rank < MAX_RANKS:
                raise BadField(f"{axis}_rank", f"is {rank}: ranks count from 0 to {MAX_RANKS - 1} at most")
        if self.address.is_wildcard:
            raise BadField("addr", f"is {self.addr}, where no peer can reach it: start vLLM with VLLM_HOST_IP set")
        check_advertised(self.address, self.host, "addr", "VLLM_HOST_IP")

    @property
    def prefill(self) -> str:
        """The ID that the operator, or vLLM's own start, gave to all engines of the prefill."""
        return prefill_of(self.engine_id)

    @property
    def address(self) -> Endpoint:
        if not self.addr.startswith(_TCP):
            raise BadField("addr", f"{self.addr!r} is no tcp://host:port")
        try:
            return Endpoint.parse(self.addr.removeprefix(_TCP))
        except BadField as error:
            raise BadField("addr", str(error)) from None

    def to_json(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, text: bytes) -> Worker:
        said = json.loads(text)
        return cls(**{**said, "place": Place(**said["place"]), "sizes": Sizes(**said["sizes"])})


@dataclass(frozen=True, slots=True)
class Row:
    """A seat of a prefill as it is from now on: `worker` None means that nobody has it."""

    prefill: str
    place: Place
    worker: Worker | None

    def to_note(self) -> tuple[str, bytes | None]:
        """As a journal keeps it: the seat, then the worker."""
        seat = f"{self.place}/{self.prefill}"
        return seat, None if self.worker is None else self.worker.to_json()

    @classmethod
    def from_note(cls, seat: str, noted: bytes | None) -> Row:
        if noted is None:
            *place, prefill = seat.split("/", 3)
            return cls(prefill, Place(*(int(axis[2:]) for axis in place)), None)
        worker = Worker.from_json(noted)
        return cls(worker.prefill, worker.place, worker)


@dataclass(frozen=True, slots=True)
class Move:
    """A row that holds from now on, and who was in the seat before it."""

    row: Row
    before: Worker | None


@dataclass(slots=True)
class Prefill:
    """All engines of one ID. Live: read it at once, never write it."""

    name: str
    workers: dict[Place, Worker] = field(default_factory=dict)
    joined_at: float = 0.0

    @property
    def last(self) -> Worker:
        """Who came last."""
        return next(reversed(self.workers.values()))

    def sizes(self, configured: Sizes) -> Sizes:
        """The operator's word before that of the worker who came last."""
        return configured.over(self.last.sizes)

    def missing(self, configured: Sizes) -> Iterator[Place]:
        """Seats that nobody has, in order: take what you show, a rank may claim to be the 65,536th."""
        places = (Place(*at) for at in product(*map(range, self.block(configured))))
        return (place for place in places if place not in self.workers)

    def ready_at(self, configured: Sizes, settle_s: float) -> float | None:
        """From when on it is complete, if nothing changes; None while a seat is missing."""
        dp, tp, pp = self.block(configured)
        inside = sum(place.dp < dp and place.tp < tp and place.pp < pp for place in self.workers)
        if not inside == len(self.workers) == dp * tp * pp:
            return None
        return self.joined_at if self.sizes(configured).known else self.joined_at + settle_s

    def block(self, configured: Sizes) -> tuple[int, int, int]:
        """Its sizes in dp, tp and pp, and where one is not known that of the smallest block that holds everybody."""
        sizes, held = self.sizes(configured), self.workers
        return (
            sizes.dp or 1 + max(place.dp for place in held),
            sizes.tp or 1 + max(place.tp for place in held),
            sizes.pp or 1 + max(place.pp for place in held),
        )


@dataclass(frozen=True, slots=True)
class FleetPolicy:
    """When a prefill of vLLM is complete, and how many workers are held.

    sizes        ranks of every vLLM prefill here, as `dp=1,tp=8,pp=1`; left out (the default): see settle_s
    settle_s     where a size is not known: complete when nobody has joined for so long. Ranks of one prefill register
                 within a second of each other, unless they load from different disks; the API answers later still
    ask_others   whether a prefill that begins makes us ask after the others, and drop those whose host says that nobody
                 listens (False): for fleets without lasting IDs, where vLLM makes up a new one at each start
    max_workers  of all prefills; beyond it a new one is answered 429
    """

    sizes: str = ""
    settle_s: float = 5.0
    ask_others: bool = False
    max_workers: int = 10_000

    def __post_init__(self) -> None:
        Sizes.parse(self.sizes)
        check_seconds(self, "vllm", or_zero=("settle_s",))
        if self.max_workers < 1:
            raise ConfigError(f"vllm max_workers is {self.max_workers}: give at least 1")


class Fleet:
    """All prefills of vLLM. One owner, in one event loop."""

    def __init__(self, policy: FleetPolicy | None = None) -> None:
        self._policy = policy or FleetPolicy()
        self.sizes = Sizes.parse(self._policy.sizes)
        self._prefills: dict[str, Prefill] = {}
        self._at: dict[Endpoint, Worker] = {}
        self._last_epoch = 0

    def __iter__(self) -> Iterator[Prefill]:
        return iter(self._prefills.values())

    def __len__(self) -> int:
        """Workers held."""
        return len(self._at)

    def find(self, engine: str) -> Prefill | None:
        """By the ID of a prefill, or of one of its engines."""
        return self._prefills.get(engine) or self._prefills.get(prefill_of(engine))

    def get(self, name: str) -> Prefill | None:
        return self._prefills.get(name)

    def ready_at(self, prefill: Prefill) -> float | None:
        return prefill.ready_at(self.sizes, self._policy.settle_s)

    def is_complete(self, prefill: Prefill, now: float) -> bool:
        ready_at = self.ready_at(prefill)
        return ready_at is not None and now >= ready_at

    def rivals(self, worker: Worker, now: float) -> list[Worker]:
        """Who has to be asked before this claim is judged; nobody for most claims."""
        prefill = self._prefills.get(worker.prefill)
        if prefill is None or prefill.workers.get(worker.place) == worker:
            return []
        if not _in_the_way(prefill, worker) and not self.is_complete(prefill, now):
            return []
        return [held for held in prefill.workers.values() if held.address != worker.address]

    def strangers(self, worker: Worker) -> list[Worker]:
        """One worker of each other prefill, where this claim begins a new one and the policy asks after the others.

        Only who certainly is not there any more should be dropped for it (`drop`): nobody registers twice.
        """
        if worker.prefill in self._prefills or not self._policy.ask_others:
            return []
        return [next(iter(prefill.workers.values())) for prefill in self]

    def claim(self, worker: Worker, gone: Collection[Worker], now: float) -> list[Row]:
        """What it would change. `gone`: which of its rivals do not answer. Raises Occupied, LimitReached, BadField."""
        self._check_sizes(worker)
        prefill = self._prefills.get(worker.prefill) or Prefill(worker.prefill)
        if prefill.workers.get(worker.place) == worker:
            return []
        ended = self._ended(prefill, worker, gone, now)
        rows = [Row(old.prefill, old.place, None) for old in ended if (old.prefill, old.place) != _seat(worker)]
        if len(self) - len(ended) >= self._policy.max_workers:
            raise LimitReached(
                f"{len(self)} vLLM workers are held, the limit (max_workers): drop prefills that are gone, or raise it"
            )
        return [*rows, Row(worker.prefill, worker.place, self._numbered(worker))]

    def drop(self, prefill: Prefill) -> list[Row]:
        """What forgetting it would change."""
        return [Row(prefill.name, place, None) for place in prefill.workers]

    def apply(self, rows: Iterable[Row], now: float) -> list[Move]:
        """Make it so, without judging."""
        return [self._apply(row, now) for row in rows]

    def _apply(self, row: Row, now: float) -> Move:
        prefill = self._prefills.setdefault(row.prefill, Prefill(row.prefill))
        old = prefill.workers.pop(row.place, None)
        if old is not None:
            self._at.pop(old.address, None)
        if row.worker is not None:
            worker = row.worker if row.worker.epoch else self._numbered(row.worker)  # a journal of before has none
            self._last_epoch = max(self._last_epoch, worker.epoch)
            prefill.workers[row.place] = self._at[worker.address] = worker
            prefill.joined_at = now
            row = replace(row, worker=worker)
        if not prefill.workers:
            del self._prefills[row.prefill]
        return Move(row, old)

    def _numbered(self, worker: Worker) -> Worker:
        self._last_epoch += 1
        return replace(worker, epoch=self._last_epoch)

    def _ended(self, prefill: Prefill, worker: Worker, gone: Collection[Worker], now: float) -> list[Worker]:
        """Who ends with this claim: the gone, those who give way, and who was at the newcomer's address before it."""
        in_the_way = _in_the_way(prefill, worker)
        alive = [holder for holder in in_the_way if holder not in gone]
        stranger = next((holder for holder in alive if holder.host != worker.host), None)
        if stranger is not None:
            raise _occupied(stranger, worker)
        everybody = bool(alive) and self.is_complete(prefill, now)
        ended = [held for held in prefill.workers.values() if everybody or held in gone or held in in_the_way]
        before = self._at.get(worker.address)
        return list(dict.fromkeys([*ended, *([before] if before is not None else [])]))

    def _check_sizes(self, worker: Worker) -> None:
        sizes = asdict(self.sizes.over(worker.sizes))
        for axis, rank in asdict(worker.place).items():
            if sizes[axis] is not None and rank >= sizes[axis]:
                raise BadField(
                    f"{axis}_rank",
                    f"is {rank} and a prefill here has {sizes[axis]} {axis} ranks: start it with as many",
                )


def prefill_of(engine_id: str) -> str:
    found = _DP_SUFFIX.fullmatch(engine_id)
    return found["prefill"] if found else engine_id


def check_engine_id(engine_id: str) -> None:
    if not engine_id or not engine_id.isprintable():
        raise BadField("engine_id", f"{engine_id!r} is no name: give a printable one")
    if len(engine_id) > MAX_ENGINE_ID:
        raise TooLarge(f"engine_id: has {len(engine_id)} characters and the limit is {MAX_ENGINE_ID}: choose a shorter")


def shown(prefills: Iterable[Prefill]) -> dict[str, Any]:
    """What /query answers. A second prefill's engines get the next free numbers: decodes look at the ID alone."""
    body: dict[str, Any] = {}
    for prefill in prefills:
        taken, numbers = set(body), dict[int, str]()
        for place, worker in sorted(prefill.workers.items()):
            number = numbers.setdefault(place.dp, _free(place.dp, {*taken, *numbers.values()}))
            entry = body.setdefault(number, {"engine_id": worker.engine_id, "worker_addr": {}})
            entry["worker_addr"].setdefault(str(place.tp), {})[str(place.pp)] = worker.addr
    return body


def _free(wanted: int, taken: Collection[str]) -> str:
    return (
        str(wanted) if str(wanted) not in taken else next(str(n) for n in range(len(taken) + 1) if str(n) not in taken)
    )


def _in_the_way(prefill: Prefill, worker: Worker) -> list[Worker]:
    """Who has the seat, and engines of another name in its DP rank."""
    return [
        held
        for place, held in prefill.workers.items()
        if held.address != worker.address
        and (place == worker.place or (place.dp == worker.place.dp and held.engine_id != worker.engine_id))
    ]


def _seat(worker: Worker) -> tuple[str, Place]:
    return worker.prefill, worker.place


def _occupied(holder: Worker, claimant: Worker) -> Occupied:
    return Occupied(
        f"seat {claimant.place} of engine {claimant.engine_id!r} is held from {holder.host} at {holder.addr}, which "
        f"still answers, and {claimant.host} wants it: give each prefill its own engine_id, or stop the other one",
        holder=holder.host,
        claimant=claimant.host,
    )
