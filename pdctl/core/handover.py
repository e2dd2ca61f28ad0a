"""
What an engine in another process hands over: where its pool lies, and what lies there. JSON bodies, both directions.

Memory is named, never pointed at: an address means nothing in another process. Each entry of a pool is so many bytes
from the beginning of one of the memories, and `Offer.pools` makes pointers of that where they have been mapped. All
that is said is checked here, against itself and against the sizes, before anybody maps or registers a byte. Nothing is
opened or mapped here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

from pdctl.core.device import is_uuid
from pdctl.core.layout import Heads, Kind, KvLayout, Pool, RankPools, Region, Share, Slices
from pdctl.core.route import Seat, Shape, shape_from_topology, topology_body
from pdctl.errors import BadField, LayoutMismatch

MOST_MEMORIES, MOST_ENTRIES, MOST_STATES = 1024, 65_536, 64  # an engine may allocate each layer by itself
_LONGEST = 4096  # of a path, and of any other text


class Role(StrEnum):
    PREFILL = "prefill"
    DECODE = "decode"


class Store(StrEnum):
    """Where a memory lives, and so by what it is named."""

    SHM = "shm"  # POSIX shared memory: the name that was given to shm_open
    FILE = "file"  # a file that both processes see under one path, such as in a shared memory volume
    CUDA_IPC = "cuda_ipc"  # memory of a device: what cudaIpcGetMemHandle gave, in base64


_NAMED_BY = {Store.SHM: "name", Store.FILE: "path", Store.CUDA_IPC: "handle"}


@dataclass(frozen=True, slots=True)
class Memory:
    """`nbytes` of one memory, `offset` bytes from its beginning on.

    `device`: whose memory it is, by the UUID that the driver gives it (GPU-...); empty for the host's. A number would
    mean another device in a process that sees others.
    """

    store: Store
    name: str
    nbytes: int
    offset: int = 0
    device: str = ""

    def to_body(self) -> dict[str, Any]:
        body: dict[str, Any] = {"kind": self.store.value, _NAMED_BY[self.store]: self.name}
        body |= {"nbytes": self.nbytes, "offset": self.offset}
        return body | ({"device": self.device} if self.store is Store.CUDA_IPC else {})


class Handed(NamedTuple):
    """A memory, and where it lies in the process that hands it over."""

    memory: Memory
    region: Region


@dataclass(frozen=True, slots=True)
class Mapped:
    """Another process's memory, at `region` here for as long as somebody has `holder`."""

    region: Region
    holder: object


class Place(NamedTuple):
    """Where the first item of an entry lies: in which memory, how far from its beginning, how long each item is."""

    memory: int
    offset: int
    item_nbytes: int


@dataclass(frozen=True, slots=True)
class Entries:
    """A pool without an address."""

    n_items: int
    places: tuple[Place, ...]

    def at(self, regions: Sequence[Region]) -> Pool:
        pointers = tuple(regions[place.memory].pointer + place.offset for place in self.places)
        return Pool(pointers, tuple(place.item_nbytes for place in self.places), self.n_items)

    def to_body(self) -> dict[str, Any]:
        return {"n_items": self.n_items, "entries": [place._asdict() for place in self.places]}

    @classmethod
    def of(cls, pool: Pool, memory: Sequence[Handed], what: str) -> Entries:
        """Raises BadField for an entry that lies, or reaches, outside of all that is handed over."""
        regions = pool.regions()
        places = zip(regions, pool.item_lens, strict=True)
        found = tuple(_place(region, nbytes, memory, f"{what} entry {n}") for n, (region, nbytes) in enumerate(places))
        return cls(pool.n_items or 0, found)


def _place(entry: Region, item_nbytes: int, memory: Sequence[Handed], what: str) -> Place:
    for number, handed in enumerate(memory):
        if entry in handed.region:
            return Place(number, entry.pointer - handed.region.pointer, item_nbytes)
    raise BadField(what, f"{entry} is not inside the memory that is handed over: cut all pools from that memory")


@dataclass(frozen=True, slots=True)
class Offer:
    """A rank whose engine is in another process.

    registry: in place of the agent's own. instance: which one the rank belongs to; a decode is listed in the registry
    only if it says so.
    """

    role: Role
    memory: tuple[Memory, ...]
    kv: Entries
    aux: Entries
    states: tuple[Entries, ...]
    layout: KvLayout
    state_layer_ids: tuple[tuple[int, ...], ...]
    state_slices: tuple[tuple[Slices, ...], ...]
    seat: Seat
    shape: Shape
    registry: str | None = None
    instance: str | None = None

    @property
    def device(self) -> str:
        """The UUID of the device that some of its memory is on; empty where all is the host's."""
        return max(memory.device for memory in self.memory)

    def pools(self, regions: Sequence[Region]) -> RankPools:
        """The same with pointers: `regions` says where each memory lies here."""
        states = tuple(state.at(regions) for state in self.states)
        kv, aux = self.kv.at(regions), self.aux.at(regions)
        return RankPools(kv, aux, self.layout, states, self.state_layer_ids, self.state_slices)

    def to_body(self) -> dict[str, Any]:
        return {
            "role": self.role.value,
            "memory": [memory.to_body() for memory in self.memory],
            "kv": self.kv.to_body(),
            "aux": self.aux.to_body(),
            "states": [state.to_body() for state in self.states],
            "state_layer_ids": [list(ids) for ids in self.state_layer_ids],
            "state_units": [[each.heads.total for each in slices] for slices in self.state_slices],
            "state_rows": [[each.rows for each in slices] for slices in self.state_slices],
            "layout": _layout_body(self.layout),
            "seat": self.seat._asdict(),
            "shape": topology_body(self.shape, None),
            "registry": self.registry,
            "instance": self.instance,
        }

    @classmethod
    def of(
        cls,
        role: Role,
        pools: RankPools,
        memory: Sequence[Handed],
        seat: Seat,
        shape: Shape,
        registry: str | None = None,
        instance: str | None = None,
    ) -> Offer:
        """What an engine has, by its own pointers. Raises BadField for a pool outside of `memory`."""
        if any(each.parts for slices in pools.state_slices for each in slices):
            raise BadField("state_slices", "has entries of several parts: only a rank of this process can have those")
        return cls(
            role,
            tuple(handed.memory for handed in memory),
            Entries.of(pools.kv, memory, "kv"),
            Entries.of(pools.aux, memory, "aux"),
            tuple(Entries.of(state, memory, f"states.{n}") for n, state in enumerate(pools.states)),
            pools.layout,
            pools.state_layer_ids,
            pools.state_slices,
            seat,
            shape,
            registry,
            instance,
        )

    @classmethod
    def from_body(cls, body: object) -> Offer:
        """Raises BadField with the field's path, and LayoutMismatch for what does not fit itself."""
        row = Row.of(body)
        memory = tuple(map(_memory, row.rows("memory", 1, MOST_MEMORIES)))
        _check_one_device(memory)
        states = tuple(_entries(state, memory) for state in row.rows("states", 0, MOST_STATES))
        kv, layout = _entries(row.row("kv"), memory), _layout(row.row("layout", optional=True))
        if layout.layer_ids and len(layout.layer_ids) != len(kv.places):
            raise BadField(
                "layout.layer_ids", f"has {len(layout.layer_ids)} for {len(kv.places)} entries of kv: give each one"
            )
        seat, shape = _seat(row.row("seat", optional=True)), _shape(row)
        if seat not in shape:
            raise BadField("seat", f"{seat} is outside the shape: ranks count from 0 to size - 1")
        it = cls(
            role=Role(row.choice("role", tuple(Role))),
            memory=memory,
            kv=kv,
            aux=_entries(row.row("aux"), memory),
            states=states,
            layout=layout,
            state_layer_ids=row.lists("state_layer_ids"),
            state_slices=_slices(row, seat, shape),
            seat=seat,
            shape=shape,
            registry=row.text("registry", None),
            instance=row.text("instance", None),
        )
        row.end()
        return it


class Row:
    """A JSON object that is read field by field: what is wrong is named by its path, what nobody reads as well."""

    def __init__(self, body: Mapping[str, Any], path: str = "") -> None:
        self._body, self._path, self._read = body, path, set[str]()

    @classmethod
    def of(cls, body: object, path: str = "") -> Row:
        if not isinstance(body, Mapping):
            raise BadField(path or "body", f"is {_kind(body)}: send an object")
        return cls(body, f"{path}." if path else "")

    def wrong(self, name: str, why: str) -> BadField:
        return BadField(f"{self._path}{name}", why)

    def get(self, name: str) -> Any:
        self._read.add(name)
        return self._body.get(name)

    def end(self) -> None:
        """Raises BadField for a field that has not been read: it is misspelt, and its default would be used."""
        for name in self._body:
            if name not in self._read:
                raise self.wrong(name[:64], f"is no field: there are {', '.join(sorted(self._read))}")

    def integer(self, name: str, least: int, default: int | None = None, most: int = 2**63 - 1) -> int:
        value = self.get(name)
        if value is None and default is not None:
            return default
        if type(value) is not int:
            raise self.wrong(name, f"is {_kind(value)}: send an integer")
        if not least <= value <= most:
            raise self.wrong(name, f"is {value}: give {least} to {most}")
        return value

    def text(self, name: str, default: str | None = "") -> str | None:
        value = self.get(name)
        if value is None and default is None:
            return None
        if not isinstance(value, str) or not 0 < len(value) <= _LONGEST or "\0" in value:
            raise self.wrong(name, f"is {_kind(value)}: send a text of 1 to {_LONGEST} characters")
        return value

    def choice(self, name: str, among: Sequence[str]) -> str:
        value = self.get(name)
        if not isinstance(value, str) or value not in among:
            raise self.wrong(name, f"is {_kind(value)}: send one of {', '.join(among)}")
        return value

    def row(self, name: str, *, optional: bool = False) -> Row:
        value = self.get(name)
        return Row.of({} if value is None and optional else value, f"{self._path}{name}")

    def rows(self, name: str, least: int, most: int) -> Iterator[Row]:
        value = self.get(name)
        value = [] if value is None and not least else value
        if not isinstance(value, list) or not least <= len(value) <= most:
            n = f"{len(value)} of them" if isinstance(value, list) else _kind(value)
            raise self.wrong(name, f"is {n}: send a list of {least} to {most} objects")
        return (Row.of(each, f"{self._path}{name}.{number}") for number, each in enumerate(value))

    def integers(self, name: str, most: int = 2**31 - 1) -> list[int]:
        """An optional list of integers from 0 to `most`."""
        value = self.get(name)
        return [] if value is None else self._integers(value, name, most)

    def lists(self, name: str, most: int = 2**31 - 1) -> tuple[tuple[int, ...], ...]:
        """An optional list of lists of integers."""
        value = self.get(name)
        if value is None:
            return ()
        if not isinstance(value, list):
            raise self.wrong(name, f"is {_kind(value)}: send a list of lists of integers")
        return tuple(tuple(self._integers(each, f"{name}.{n}", most)) for n, each in enumerate(value))

    def _integers(self, value: object, name: str, most: int) -> list[int]:
        if not isinstance(value, list) or not {int}.issuperset(map(type, value)):
            raise self.wrong(name, "is no list of integers: send one")
        if value and not (min(value) >= 0 and max(value) <= most):
            raise self.wrong(name, f"has {min(value)} to {max(value)}: give 0 to {most}")
        return value


def _memory(row: Row) -> Memory:
    store = Store(row.choice("kind", tuple(Store)))
    name = row.text(_NAMED_BY[store]) or ""
    device = _uuid(row) if store is Store.CUDA_IPC else ""
    it = Memory(store, name, row.integer("nbytes", 1), row.integer("offset", 0, 0), device)
    row.end()
    return it


def _check_one_device(memory: Sequence[Memory]) -> None:
    devices = sorted({each.device for each in memory} - {""})
    if len(devices) > 1:
        raise BadField("memory", f"is on {' and '.join(devices)}: hand over each device's pool to an agent of its own")


def _uuid(row: Row) -> str:
    text = row.text("device") or ""
    if not is_uuid(text):
        raise row.wrong(
            "device", f"is {text!r}: give the device's UUID (GPU-...), as nvidia-smi -L and cuDeviceGetUuid say"
        )
    return text


def _entries(row: Row, memory: Sequence[Memory]) -> Entries:
    n_items = row.integer("n_items", 1, most=2**31 - 1)
    places = tuple(_checked(each, n_items, memory) for each in row.rows("entries", 1, MOST_ENTRIES))
    row.end()
    return Entries(n_items, places)


def _checked(row: Row, n_items: int, memory: Sequence[Memory]) -> Place:
    place = Place(
        row.integer("memory", 0, 0, most=len(memory) - 1), row.integer("offset", 0), row.integer("item_nbytes", 1)
    )
    row.end()
    end, nbytes = place.offset + n_items * place.item_nbytes, memory[place.memory].nbytes
    if end > nbytes:
        raise row.wrong(
            "offset",
            f"is {place.offset}, and {n_items} items of {place.item_nbytes} bytes from there end at {end}, but memory "
            f"{place.memory} has {nbytes} bytes: hand over the whole pool",
        )
    return place


def _layout(row: Row) -> KvLayout:
    kind = Kind(row.choice("kind", tuple(Kind))) if row.get("kind") is not None else Kind.MHA
    page_size, first_layer = row.integer("page_size", 1, 1), row.integer("first_layer", 0, 0)
    ids = tuple(row.integers("layer_ids"))
    heads = None if row.get("heads") is None else _heads(row.row("heads"))
    pages, tokens = (_share(row.row(name, optional=True)) for name in ("pages", "tokens"))
    row.end()
    return KvLayout(kind, page_size, heads, first_layer, ids, pages, tokens)


def _share(row: Row) -> Share:
    size = row.integer("size", 1, 1, most=2**31 - 1)
    it = Share(size, row.integer("rank", 0, 0, most=size - 1))
    row.end()
    return it


def _slices(row: Row, seat: Seat, shape: Shape) -> tuple[tuple[Slices, ...], ...]:
    """`state_units`: how many each entry has over all TP ranks; `state_rows`: of so many units each, by default 1."""
    units, rows = row.lists("state_units"), row.lists("state_rows")
    rows = rows or tuple((1,) * len(each) for each in units)
    if [*map(len, units)] != [*map(len, rows)]:
        raise row.wrong("state_rows", "is not as long as state_units, list by list: give each entry one of both")
    try:
        return tuple(
            tuple(Slices(Heads(n, shape.attn_tp_size, seat.tp), m) for n, m in zip(*lists, strict=True))
            for lists in zip(units, rows, strict=True)
        )
    except LayoutMismatch as error:
        raise row.wrong("state_units", str(error)) from None


def _heads(row: Row) -> Heads:
    sizes = [row.integer(name, least, most=2**31 - 1) for name, least in (("total", 1), ("tp_size", 1), ("tp_rank", 0))]
    row.end()
    try:
        return Heads(*sizes)
    except LayoutMismatch as error:
        raise row.wrong("total", str(error)) from None


def _seat(row: Row) -> Seat:
    seat = Seat(*(row.integer(name, 0, 0, most=2**31 - 1) for name in Seat._fields))
    row.end()
    return seat


def _shape(row: Row) -> Shape:
    try:
        return shape_from_topology(row.get("shape"))
    except BadField as error:
        raise BadField("shape" if error.field == "body" else f"shape.{error.field}", _words(error)) from None


def _words(error: BadField) -> str:
    return str(error).removeprefix(f"{error.field}: ")


def _layout_body(layout: KvLayout) -> dict[str, Any]:
    heads = layout.heads
    return {
        "kind": layout.kind.value,
        "page_size": layout.page_size,
        "first_layer": layout.first_layer,
        "layer_ids": list(layout.layer_ids),
        "heads": heads and {"total": heads.total, "tp_size": heads.tp_size, "tp_rank": heads.tp_rank},
        "pages": {"size": layout.pages.size, "rank": layout.pages.rank},
        "tokens": {"size": layout.tokens.size, "rank": layout.tokens.rank},
    }


def _kind(value: object) -> str:
    if value is None:
        return "missing"
    if isinstance(value, str):
        return f"the text {value[:64]!r}"
    return {dict: "an object", list: "a list", bool: "a boolean"}.get(type(value), f"{value!r:.64}")
