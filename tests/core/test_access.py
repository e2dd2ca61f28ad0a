"""Who may speak: networks in every spelling, tokens that are never shown, and each cell of path, address and token."""

from __future__ import annotations

import hashlib
import ipaddress
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdctl.core.access import (
    MAX_TOKENS,
    Denial,
    Denied,
    Rules,
    Tokens,
    TrustList,
    check_advertised,
    open_paths,
    plain_host,
)
from pdctl.core.address import Endpoint
from pdctl.core.lives import Owner
from pdctl.errors import BadField, ConfigError

PRIVATE = TrustList.parse("private")
SECRET = "prefill-team-secret-1"
OTHER = "decode-team-secret-22"
TOKENS = Tokens.parse(f"prefill:{SECRET}\ndecode:{OTHER}\n")


# --- networks


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "127.9.9.9", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1"),
        *("::1", "fd00::2", "fe80::1", "fe80::1%eth0", "fc00::1"),
        *("::ffff:127.0.0.1", "::ffff:10.1.2.3", "::FFFF:192.168.0.9", "0:0:0:0:0:ffff:a00:1"),
    ],
)
def test_private_hosts_are_trusted_in_every_spelling(host: str) -> None:
    assert PRIVATE.trusts(host)


@pytest.mark.parametrize(
    "host",
    [
        *("8.8.8.8", "172.32.0.1", "172.15.0.1", "192.169.0.1", "11.0.0.1", "100.64.0.1", "169.254.0.1", "0.0.0.0"),
        *("2001:db8::1", "::", "::ffff:8.8.8.8", "::ffff:172.32.0.1", "::2", "fec0::1"),
        *("unknown", "localhost", "", "10.0.0.1 ", "10.0.0", "010.0.0.1", "10.0.0.1:80", "[::1]"),
    ],
)
def test_everybody_else_is_not(host: str) -> None:
    assert not PRIVATE.trusts(host)


def test_networks_addresses_and_words_can_be_mixed() -> None:
    trust = TrustList.parse(" loopback, 203.0.113.0/24 2001:db8::7,")
    assert [host for host in ("127.0.0.1", "::1", "203.0.113.9", "2001:db8::7") if not trust.trusts(host)] == []
    assert [host for host in ("10.0.0.1", "203.0.114.1", "2001:db8::8") if trust.trusts(host)] == []


@given(st.ip_addresses())
def test_any_is_everybody(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> None:
    assert TrustList.parse("any").trusts(str(ip))


@given(st.ip_addresses(v=4), st.integers(0, 32))
def test_a_mapped_address_is_judged_as_the_one_inside(ip: ipaddress.IPv4Address, prefix: int) -> None:
    network = ipaddress.ip_network((ip, prefix), strict=False)
    trust = TrustList.parse(str(network))
    for inside in (network[0], network[-1]):
        assert trust.trusts(f"::ffff:{inside}")
    neighbour = ipaddress.IPv4Address(int(network[-1]) ^ (1 << (32 - prefix))) if prefix else None
    assert neighbour is None or not trust.trusts(f"::ffff:{neighbour}")


def test_a_connection_from_the_address_it_goes_to_is_from_this_host() -> None:
    assert PRIVATE.trusts("203.0.113.5", here="203.0.113.5")
    assert PRIVATE.trusts("::ffff:203.0.113.5", here="203.0.113.5")
    assert not PRIVATE.trusts("203.0.113.6", here="203.0.113.5")
    assert not TrustList.parse("10.0.0.0/8").trusts("203.0.113.5", here="203.0.113.5")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "trust is empty"),
        (" , ", "trust is empty"),
        ("10.0.0.1/8", "host bits"),
        ("10.0.0.0/33", "10.0.0.0/33"),
        ("everyone", "any, loopback, private"),
        ("::ffff:10.0.0.0/104", r"write 10\.0\.0\.0/8"),
    ],
)
def test_a_list_that_cannot_be_meant_is_refused(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        TrustList.parse(text)


@pytest.mark.parametrize(
    ("host", "plain"),
    [("::ffff:10.0.0.1", "10.0.0.1"), ("10.0.0.1", "10.0.0.1"), ("fd00::2", "fd00::2"), ("unknown", "unknown")],
)
def test_an_ipv4_peer_is_named_as_one(host: str, plain: str) -> None:
    assert plain_host(host) == plain


# --- tokens


def test_a_token_names_its_holder() -> None:
    assert TOKENS.holder(SECRET) == "prefill"
    assert TOKENS.holder(OTHER) == "decode"


@pytest.mark.parametrize(
    "token", ["", "x", SECRET[:-1], SECRET + "1", SECRET.upper(), " " + SECRET, "\udcff", "é" * 20]
)
def test_another_token_names_nobody(token: str) -> None:
    assert TOKENS.holder(token) is None


def test_a_digest_does_as_well_as_the_token() -> None:
    digest = hashlib.sha256(SECRET.encode()).hexdigest()
    tokens = Tokens.parse(f"prefill:sha256:{digest.upper()}")
    assert tokens.holder(SECRET) == "prefill"
    assert tokens.holder(digest) is None, "whoever has read the file has no token yet"


def test_a_name_may_have_an_old_token_and_a_new_one() -> None:
    tokens = Tokens.parse(f"# changing over until Friday\n\nprefill:{SECRET}\nprefill:{OTHER}\n")
    assert {tokens.holder(SECRET), tokens.holder(OTHER)} == {"prefill"}


def test_who_has_the_admin_role_says_the_file_and_nothing_else() -> None:
    digest = hashlib.sha256(OTHER.encode()).hexdigest()
    third = SECRET + "-third"
    tokens = Tokens.parse(f"ops:admin:{SECRET}\nops:admin:sha256:{digest}\nadmin:{third}\n")
    admitted = [Rules(PRIVATE, tokens).admit(NATIVE, IN, True, f"Bearer {each}") for each in (SECRET, OTHER, third)]
    owners = [each for each in admitted if isinstance(each, Owner)]
    assert [(each.principal, each.admin) for each in owners] == [("ops", True), ("ops", True), ("admin", False)]
    assert not Owner("10.0.0.1", "ops").admin


def test_no_token_is_in_any_text() -> None:
    assert SECRET not in repr(TOKENS)
    for text in (f"a:root:{SECRET}", f"a:admin:b:{SECRET}"):
        with pytest.raises(ConfigError) as refusal:
            Tokens.parse(text)
        assert SECRET not in str(refusal.value)
    for text in (f"bad name:{SECRET}", f"{SECRET}", f"a:{SECRET}\nb:{SECRET}", f"a:{SECRET} x", "a:sha256:" + "f" * 63):
        with pytest.raises(ConfigError) as refusal:
            Tokens.parse(text)
        assert SECRET not in str(refusal.value)
        assert "line" in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no token in it"),
        ("# nobody\n", "no token in it"),
        ("a:short", "line 1: the token has 5 characters"),
        (f"a:{SECRET}\nb:{SECRET}", "line 2: 'b' has the token of 'a'"),
        (f"{SECRET}{SECRET}", "line 1: is not name:token"),
        ("a:sha256:12", "64 hex digits"),
        ("a:admin:sha256:12", "64 hex digits"),
        ("a:admin:short", "line 1: the token has 5 characters"),
        ("admin:short", "line 1: the token has 5 characters"),
        (f"a:admin:{SECRET}\na:{OTHER}", "line 2: 'a' is an admin in one line and none in another"),
        ("\n".join(f"n{i}:{SECRET}{i}" for i in range(MAX_TOKENS + 1)), f"more than {MAX_TOKENS}"),
    ],
)
def test_a_file_that_cannot_be_meant_is_refused_with_the_line(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Tokens.parse(text)


# --- the rules

OPEN, PLAIN, NATIVE = "/metrics", "/route", "/v1/instances"
IN = Owner("10.0.0.1")
PREFILL = Owner("10.0.0.1", "prefill")


@pytest.mark.parametrize(
    ("tokens", "path", "trusted", "shown", "verdict"),
    [
        # no tokens configured: the address decides, whatever is shown
        (None, OPEN, False, None, IN),
        (None, PLAIN, True, None, IN),
        (None, PLAIN, False, None, Denial.UNTRUSTED),
        (None, NATIVE, True, None, IN),
        (None, NATIVE, False, None, Denial.UNTRUSTED),
        (None, NATIVE, False, f"Bearer {SECRET}", Denial.UNTRUSTED),
        (None, PLAIN, True, "Bearer whatever", IN),
        # with tokens: /v1 needs one, plain paths take one instead of an address
        (TOKENS, OPEN, False, None, IN),
        (TOKENS, OPEN, False, "Bearer whatever", IN),
        (TOKENS, PLAIN, True, None, IN),
        (TOKENS, PLAIN, False, None, Denial.UNTRUSTED),
        (TOKENS, PLAIN, False, f"Bearer {SECRET}", PREFILL),
        (TOKENS, PLAIN, True, f"Bearer {SECRET}", PREFILL),
        (TOKENS, PLAIN, True, "Bearer whatever", Denial.BAD_TOKEN),
        (TOKENS, NATIVE, True, None, Denial.NO_TOKEN),
        (TOKENS, NATIVE, False, None, Denial.NO_TOKEN),
        (TOKENS, NATIVE, False, f"Bearer {SECRET}", PREFILL),
        (TOKENS, NATIVE, True, f"bearer  {SECRET} ", PREFILL),
        (TOKENS, NATIVE, True, f"Basic {SECRET}", Denial.BAD_TOKEN),
        (TOKENS, NATIVE, True, SECRET, Denial.BAD_TOKEN),
        (TOKENS, NATIVE, True, "Bearer", Denial.BAD_TOKEN),
        (TOKENS, NATIVE, True, f"Bearer {SECRET}, Bearer {SECRET}", Denial.BAD_TOKEN),
        (TOKENS, "/v1", True, None, Denial.NO_TOKEN),
        (TOKENS, "/v10", True, None, IN),
        (TOKENS, "/metrics/", False, None, Denial.UNTRUSTED),
    ],
)
def test_path_address_and_token_decide(
    tokens: Tokens | None, path: str, trusted: bool, shown: str | None, verdict: Owner | Denial
) -> None:
    found = Rules(PRIVATE, tokens).admit(path, IN, trusted, shown)
    assert (found.why if isinstance(found, Denied) else found) == verdict


def test_a_denial_says_what_to_do_and_no_secret() -> None:
    rules = Rules(PRIVATE, TOKENS)
    untrusted = rules.admit(PLAIN, Owner("203.0.113.9"), False, None)
    wrong = rules.admit(NATIVE, Owner("203.0.113.9"), True, "Bearer not-a-token-of-anybody")
    assert isinstance(untrusted, Denied)
    assert isinstance(wrong, Denied)
    assert (untrusted.status, wrong.status) == (403, 401)
    assert "203.0.113.9 is outside of the trusted networks" in untrusted.text
    assert "not-a-token-of-anybody" not in wrong.text
    assert json.dumps(wrong.text)


def test_the_open_paths_are_what_one_says() -> None:
    assert open_paths("/livez, /metrics") == {"/livez", "/metrics"}
    closed = Rules(PRIVATE, TOKENS, open_paths("")).admit("/metrics", Owner("203.0.113.9"), False, None)
    assert isinstance(closed, Denied)
    with pytest.raises(ConfigError, match="'metrics' is no path"):
        open_paths("metrics")


# --- what may be announced


@pytest.mark.parametrize("announced", ["127.0.0.1", "localhost", "::1", "::ffff:127.0.0.1", "127.8.8.8"])
def test_loopback_announced_from_another_host_is_refused_with_the_fix(announced: str) -> None:
    with pytest.raises(BadField, match=r"speaks from 10\.0\.0\.5: start the rank with that address") as refusal:
        check_advertised(Endpoint(announced, 40123), "::ffff:10.0.0.5")
    assert refusal.value.field == "rank_ip"


@pytest.mark.parametrize(
    ("announced", "host"),
    [("127.0.0.1", "127.0.0.1"), ("::1", "::1"), ("127.0.0.1", "::ffff:127.0.0.1"), ("10.0.0.5", "10.0.0.6")],
)
def test_what_the_speaker_can_be_reached_at_is_taken(announced: str, host: str) -> None:
    check_advertised(Endpoint(announced, 40123), host)
