"""For which instance a plain request speaks: by listener, by host, else the default one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdctl.core.naming import DEFAULT, Hosts, Listener, Names
from pdctl.errors import BadField, ConfigError

HOSTS = Hosts.parse(["prefill-a=a.serving.svc", "prefill-b=10.0.0.2", "six=[fd00::1]", "*.pdctl.svc"])


@pytest.mark.parametrize(
    ("said", "instance"),
    [
        ("a.serving.svc", "prefill-a"),
        ("a.serving.svc:8998", "prefill-a"),
        ("A.Serving.SVC.", "prefill-a"),
        ("10.0.0.2:1", "prefill-b"),
        ("[fd00::1]:8998", "six"),
        ("blue-7.pdctl.svc:8998", "blue-7"),
        ("Blue.pdctl.svc", "blue"),
        ("deep.blue.pdctl.svc", None),
        ("pdctl.svc", None),
        (".pdctl.svc", None),
        ("-x.pdctl.svc", None),
        ("a/b.pdctl.svc", None),
        ("b.serving.svc", None),
        ("localhost:8998", None),
        ("", None),
    ],
)
def test_a_host_stands_for_the_instance_it_was_mapped_to_and_no_other(said: str, instance: str | None) -> None:
    assert HOSTS.of(said) == instance


def test_the_longest_suffix_counts() -> None:
    assert Hosts.parse(["*.svc", "*.pdctl.svc"]).of("x.pdctl.svc") == "x"
    assert Hosts.parse(["*.svc"]).of("x.svc") == "x"


def test_a_listener_comes_before_the_host_and_the_default_last() -> None:
    names = Names({("10.0.0.1", 9001): "one", ("0.0.0.0", 9002): "two", ("::", 9003): "three"}, HOSTS)
    assert names.of(("10.0.0.1", 9001), b"a.serving.svc") == "one"
    assert names.of(("10.0.0.9", 9002), b"") == "two"
    assert names.of(("::1", 9003), b"") == "three"
    assert names.of(("10.0.0.1", 8998), b"a.serving.svc:8998") == "prefill-a"
    assert names.of(("10.0.0.9", 9001), b"unknown") == DEFAULT
    assert names.of(None, b"") == DEFAULT
    assert not names.says_nothing
    assert Names({}, Hosts()).says_nothing


def test_a_client_that_makes_up_hosts_costs_no_memory() -> None:
    names = Names({}, HOSTS)
    for n in range(20_000):
        assert names.of(None, b"h%d" % n) == DEFAULT
    assert len(names._remembered) <= 4096


@given(st.binary(max_size=300))
def test_whatever_a_client_writes_is_a_name_or_the_default(host: bytes) -> None:
    assert Names({}, HOSTS).of(("::1", 1), host)


@pytest.mark.parametrize(
    ("text", "listener"),
    [
        ("a=127.0.0.1:8998", Listener("a", "127.0.0.1", 8998)),
        ("prefill-a.x_1=[::1]:0", Listener("prefill-a.x_1", "::1", 0)),
        ("a=[::]:1", Listener("a", "::", 1)),
    ],
)
def test_a_listener_is_read_as_it_is_written(text: str, listener: Listener) -> None:
    assert Listener.parse(text) == listener


@pytest.mark.parametrize(
    "text", ["", "a", "a=", "a=1", "=h:1", "a=h", "a=h:", "a=h:x", "a=h:65536", "a b=h:1", "a=:1", "-a=h:1", "a=a b:1"]
)
def test_a_listener_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises((ConfigError, BadField), match="listen"):
        Listener.parse(text)


@pytest.mark.parametrize("texts", [["a"], ["a="], ["=h"], ["*."], ["*.*.svc"], ["a=*"], ["a=h", "b=H"], ["a b=h"]])
def test_hosts_that_cannot_be_read_are_refused(texts: list[str]) -> None:
    with pytest.raises(ConfigError, match="map_host"):
        Hosts.parse(texts)


def test_the_same_mapping_twice_is_one() -> None:
    assert Hosts.parse(["a=h", "a=h."]).exact == {"h": "a"}
