"""Mooncake's keys: whose they are, what a restart does to them, and where they end."""

from __future__ import annotations

import json

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pdctl.core.address import Endpoint
from pdctl.core.metadata import KeyBook, KeyLimits, Row, handshake_address, name_of
from pdctl.errors import BadField, LimitReached, Occupied, TooLarge

A, B = "10.0.0.1", "10.0.0.2"
META, RAM = "mooncake/rpc_meta/node", "mooncake/ram/node"


def meta(port: int = 15000, host: str = A) -> bytes:
    return json.dumps({"ip_or_host_name": host, "rpc_port": port}).encode()


def write(book: KeyBook, key: str, value: bytes, host: str = A, **how: bool) -> list[Row]:
    rows = book.put(key, value, host, **how)
    book.apply(rows)
    return rows


@pytest.fixture
def book() -> KeyBook:
    """One engine, as it comes up: its address, then its memory."""
    book = KeyBook()
    write(book, META, meta())
    write(book, RAM, b"{memory}")
    return book


def held(book: KeyBook) -> dict[str, bytes]:
    return {key: value for segment in book for key, value in segment.values.items()}


def test_what_was_written_is_read_byte_for_byte(book: KeyBook) -> None:
    assert book.get(META) == meta()
    assert book.get(RAM) == b"{memory}"
    assert book.get("mooncake/ram/nobody") is None


@pytest.mark.parametrize("key", [META, RAM])
def test_the_same_bytes_again_change_nothing(book: KeyBook, key: str) -> None:
    value = book.get(key)
    assert value is not None
    assert book.put(key, value, A) == []


def test_a_descriptor_is_written_anew_as_often_as_its_engine_likes(book: KeyBook) -> None:
    assert write(book, RAM, b"{more memory}") == [Row(RAM, b"{more memory}", A)]
    assert held(book) == {META: meta(), RAM: b"{more memory}"}


def test_one_address_written_in_two_ways_is_one_process(book: KeyBook) -> None:
    again = b'{ "rpc_port" : 15000,\n "ip_or_host_name" : "10.0.0.1" }'
    write(book, META, again)
    assert held(book) == {META: again, RAM: b"{memory}"}


def test_nothing_is_changed_before_it_is_applied(book: KeyBook) -> None:
    before = held(book)
    assert book.put(RAM, b"{other}", A)
    assert book.delete(META, A)
    assert held(book) == before


def test_a_restart_takes_the_name_and_the_memory_of_the_dead_goes(book: KeyBook) -> None:
    heir = meta(port=15001)
    rows = write(book, META, heir, holder_gone=True)
    assert rows == [Row(RAM, None, A), Row(META, heir, A)]
    assert held(book) == {META: heir}


@pytest.mark.parametrize("host", [A, B], ids=["on the same host", "on another host"])
def test_a_living_holder_keeps_its_name(book: KeyBook, host: str) -> None:
    newcomer = meta(port=15001, host=host)
    rival = book.rival(META, newcomer, host)
    assert rival is not None
    assert rival.witness == Endpoint(A, 15000)
    with pytest.raises(Occupied) as refused:
        book.put(META, newcomer, host)
    assert (refused.value.holder, refused.value.claimant) == (A, host)
    assert A in str(refused.value)
    assert host in str(refused.value)


def test_another_host_may_neither_rewrite_nor_delete_what_lives(book: KeyBook) -> None:
    with pytest.raises(Occupied):
        book.put(RAM, b"{mine}", B)
    for key in (RAM, META):
        with pytest.raises(Occupied):
            book.delete(key, B)
    assert held(book) == {META: meta(), RAM: b"{memory}"}


def test_another_host_gets_all_keys_of_a_holder_that_is_gone(book: KeyBook) -> None:
    write(book, META, meta(host=B), B, holder_gone=True)
    assert held(book) == {META: meta(host=B)}
    write(book, RAM, b"{memory of B}", B)
    with pytest.raises(Occupied):
        book.put(RAM, b"{late word of A}", A)


def test_its_own_host_deletes_and_an_absent_key_is_no_change(book: KeyBook) -> None:
    assert book.delete(RAM, A) == [Row(RAM, None, A)]
    book.apply(book.delete(RAM, A))
    book.apply(book.delete(META, A))
    assert book.delete(META, A) == []
    assert (len(book), book.nbytes, list(book)) == (0, 0, [])


def test_who_gave_no_address_keeps_its_keys_against_another_host_and_not_against_its_own() -> None:
    book = KeyBook()
    for key in (RAM, META):
        write(book, key, b"no address")
        write(book, key, b"still none")
    with pytest.raises(Occupied, match="no address to ask at"):
        book.put(RAM, b"mine", B)
    assert held(book) == {RAM: b"still none", META: b"still none"}
    write(book, META, meta())
    assert held(book) == {RAM: b"still none", META: meta()}


def test_clusters_and_names_do_not_meet() -> None:
    book = KeyBook()
    write(book, "mooncake/ram/node", b"1", A)
    write(book, "mooncake/blue/ram/node", b"2", B)
    write(book, "mooncake/ram/node/ram/x", b"3", B)
    write(book, "something/else", b"4", B)
    assert len(list(book)) == 4
    assert name_of("mooncake/blue/ram/node") == name_of("mooncake/blue/rpc_meta/node") != name_of(META)


def test_whose_address_another_engine_has_now_is_gone(book: KeyBook) -> None:
    segment = book.rival(META, meta(port=15001), A)
    assert segment is not None
    assert not book.replaced(segment)
    write(book, "mooncake/rpc_meta/other", meta(port=15000))  # the port that was the dead one's
    assert book.replaced(segment)


@pytest.mark.parametrize(
    "value",
    [b"", b"nonsense", b"[]", b"{}", b'{"ip_or_host_name": "h"}', b'{"ip_or_host_name": "h", "rpc_port": "x"}',
     b'{"ip_or_host_name": "h", "rpc_port": 0}', b'{"ip_or_host_name": 7, "rpc_port": 1}', b"[" * 5000, b"\xff"],
)  # fmt: skip
def test_an_address_that_says_nothing_is_no_witness(value: bytes) -> None:
    assert handshake_address(value) is None


def test_the_limit_is_named_and_the_rest_goes_on_working() -> None:
    book = KeyBook(KeyLimits(max_keys=2, max_value_nbytes=10, max_nbytes=15, max_key_length=30))
    write(book, "mooncake/ram/a", b"12345")
    write(book, "mooncake/ram/b", b"12345")
    with pytest.raises(LimitReached, match="max_keys"):
        book.put("mooncake/ram/c", b"1", A)
    with pytest.raises(TooLarge, match="max_value_nbytes"):
        book.put("mooncake/ram/a", b"12345678901", A)
    with pytest.raises(TooLarge, match="max_key_length"):
        book.put("mooncake/ram/" + "n" * 30, b"1", A)
    with pytest.raises(BadField, match="printed"):
        book.put("mooncake/ram/\n", b"1", A)
    write(book, "mooncake/ram/a", b"1234567890")
    with pytest.raises(LimitReached, match="max_nbytes"):
        book.put("mooncake/ram/b", b"123456", A)
    write(book, "mooncake/ram/b", b"123")


def test_a_book_over_its_limit_still_shrinks() -> None:
    book = KeyBook(KeyLimits(max_keys=1, max_nbytes=4))
    book.apply([Row("mooncake/ram/a", b"123456", A), Row("mooncake/ram/b", b"1", A)])  # a journal with other limits
    write(book, "mooncake/ram/a", b"12345")
    book.apply(book.delete("mooncake/ram/b", A))
    assert held(book) == {"mooncake/ram/a": b"12345"}


class Keys(RuleBasedStateMachine):
    """Against the obvious model: a dict of values, and a host and an address for each name."""

    hosts = st.sampled_from([A, B])
    names = st.sampled_from(["x", "y", "z"])
    ports = st.sampled_from([15000, 15001])

    def __init__(self) -> None:
        super().__init__()
        self.book = KeyBook(KeyLimits(max_keys=4))
        self.values: dict[str, bytes] = {}
        self.owner: dict[str, str] = {}

    def of(self, name: str) -> list[str]:
        return [key for key in (f"mooncake/rpc_meta/{name}", f"mooncake/ram/{name}") if key in self.values]

    @rule(name=names, host=hosts, port=ports, gone=st.booleans(), ram=st.booleans())
    def put(self, name: str, host: str, port: int, gone: bool, ram: bool) -> None:
        key = f"mooncake/{'ram' if ram else 'rpc_meta'}/{name}"
        value = b"memory %d" % port if ram else meta(port, host)
        stranger = bool(self.of(name)) and self.owner[name] != host
        other = not ram and key in self.values and self.values[key] != value
        ended = set(self.of(name)) - {key} if stranger or other else set()
        after = (set(self.values) - ended) | {key}
        if (stranger or other) and not gone:
            with pytest.raises(Occupied):
                self.book.put(key, value, host)
        elif len(after) > 4 and len(after) > len(self.values):
            with pytest.raises(LimitReached):
                self.book.put(key, value, host, holder_gone=gone)
        else:
            write(self.book, key, value, host, holder_gone=gone)
            self.values = {held: self.values[held] for held in self.values if held not in ended} | {key: value}
            self.owner[name] = host

    @rule(name=names, host=hosts, gone=st.booleans(), ram=st.booleans())
    def delete(self, name: str, host: str, gone: bool, ram: bool) -> None:
        key = f"mooncake/{'ram' if ram else 'rpc_meta'}/{name}"
        if key in self.values and self.owner[name] != host and not gone:
            with pytest.raises(Occupied):
                self.book.delete(key, host)
            return
        self.book.apply(self.book.delete(key, host, holder_gone=gone))
        self.values.pop(key, None)

    @invariant()
    def agrees(self) -> None:
        assert held(self.book) == self.values
        assert len(self.book) == len(self.values)
        assert self.book.nbytes == sum(map(len, self.values.values()))


TestKeys = Keys.TestCase
