"""Addresses: what is read, how it is written, and what nobody can listen at."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdctl.core.address import Endpoint
from pdctl.errors import BadField


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("10.0.0.1:8998", "10.0.0.1", 8998),
        ("[::1]:80", "::1", 80),
        ("[fe80::1%eth0]:80", "fe80::1%eth0", 80),
        ("prefill-0.pods.svc:1", "prefill-0.pods.svc", 1),
        (" host:65535 ", "host", 65535),
    ],
)
def test_an_address_is_read_and_written_the_same(text: str, host: str, port: int) -> None:
    endpoint = Endpoint.parse(text)
    assert (endpoint.host, endpoint.port) == (host, port)
    assert str(endpoint) == text.strip()
    assert endpoint.tcp == f"tcp://{text.strip()}"


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("host", "has no port"),
        ("host:", "has no port"),
        ("host:x", "has no port"),
        ("host:-1", "has no port"),
        ("host:１", "has no port"),
        ("::1:80", "brackets"),
        (":80", "host: is empty"),
        ("[]:80", "host: is empty"),
        ("host:0", "port: is 0"),
        ("host:65536", "port: is 65536"),
        ("http://host:80", "brackets"),
    ],
)
def test_text_that_is_no_address_is_refused_with_the_reason(text: str, names: str) -> None:
    with pytest.raises(BadField, match=names.replace("[", r"\[")):
        Endpoint.parse(text)


@pytest.mark.parametrize("host", ["a b", "a\n", "[::1]", "a/b", "user@a", "a,b", "1:2", "::x", "a" * 254, "\ud800"])
def test_text_that_is_no_host_is_refused(host: str) -> None:
    with pytest.raises(BadField) as refusal:
        Endpoint(host, 80)
    assert refusal.value.field == "host"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "0:0:0:0:0:0:0:0", "::ffff:0.0.0.0", "*"])
def test_every_interface_is_no_place_to_dial(host: str) -> None:
    assert Endpoint(host, 80).is_wildcard


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1", "localhost", "LOCALHOST"])
def test_loopback_is_seen_in_every_spelling(host: str) -> None:
    assert Endpoint(host, 80).is_loopback


@pytest.mark.parametrize("host", ["10.0.0.1", "fd00::7", "fe80::1%eth0", "prefill-0", "localhost.example"])
def test_an_ordinary_host_is_neither(host: str) -> None:
    endpoint = Endpoint(host, 80)
    assert not endpoint.is_wildcard
    assert not endpoint.is_loopback


@given(st.ip_addresses(), st.integers(1, 65535))
def test_every_ip_address_survives_writing_and_reading(ip: object, port: int) -> None:
    endpoint = Endpoint(str(ip), port)
    assert Endpoint.parse(str(endpoint)) == endpoint
