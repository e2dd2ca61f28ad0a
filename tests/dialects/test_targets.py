"""Prometheus asks the registry whom to scrape: ranks that said where they answer, each believed for its own host."""

from __future__ import annotations

from typing import Any

import pytest

from pdctl.core.address import Endpoint
from pdctl.core.lives import Claim, Owner
from pdctl.core.naming import HTTP_KEY
from pdctl.core.registry import Registry
from pdctl.core.route import Announcement, Seat, Shape
from pdctl.core.targets import targets

SHAPE = Shape(attn_tp_size=2, attn_cp_size=1, dp_size=1, pp_size=1, page_size=16, kv_cache_dtype="float16")


def told(said: Any, *, host: str = "10.0.0.7") -> list[dict[str, Any]]:
    """What Prometheus is told of a fleet of one rank that says so of itself."""
    registry = Registry()
    announcement = Announcement(Seat(0, 0, 1, 0), SHAPE, Endpoint(host, 9000))
    metadata = {} if said is None else {HTTP_KEY: said}
    registry.claim(Claim("a", announcement, Owner(host), "decode", metadata=metadata, ttl_s=10.0), 0.0)
    view = registry.view("a")
    assert view
    return [target.to_body() for target in targets([view])]


def test_a_rank_that_says_where_it_answers_is_scraped_there_under_its_name() -> None:
    labels = {
        "__scheme__": "https",
        "pdctl_instance": "a",
        "pdctl_role": "decode",
        "pdctl_seat": "dp0/cp0/tp1/pp0",
    }
    assert told("https://10.0.0.7:41234") == [{"targets": ["10.0.0.7:41234"], "labels": labels}]


def test_an_address_of_ipv6_keeps_its_brackets() -> None:
    (found,) = told("http://[fd00::7]:41234", host="fd00::7")
    assert found["targets"] == ["[fd00::7]:41234"]


@pytest.mark.parametrize(
    "said",
    [None, 7, "", "10.0.0.7:41234", "http://10.0.0.7", "ftp://10.0.0.7:1", "http://10.0.0.8:1", "http://[::1", "http://u@10.0.0.7:1"],
    ids=["stock", "a number", "empty", "no scheme", "no port", "not http", "another host", "broken", "a password"],
)  # fmt: skip
def test_what_is_no_address_of_its_own_is_left_out(said: Any) -> None:
    assert told(said) == []
