"""Any number of registries over one etcd are one: real processes, a real etcd, real faults."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from pdctl.client import RegistryClient
from pdctl.core.exchange import Exchange
from tests.faults.replicas import Fleet, Relay, call, claim, fleet, renew, seen, signalled
from tests.persistence.etcd import cluster
from tests.service import service, until

TTL_S = 4.0
"""Of leases that are renewed over and over: on a busy machine too, the next renewal comes within it."""


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Fleet]:
    with fleet(tmp_path) as made:
        yield made


def test_what_one_registry_was_told_every_other_one_knows(two: Fleet) -> None:
    a, b = two.replicas
    epochs = {claim(a, "p", 0).body["epoch"], claim(b, "p", 1).body["epoch"]}
    two.agree("p", epochs)
    for each in two.replicas:
        until(lambda each=each: call("GET", f"{each.url}/v1/instances/p").body["ready"])  # type: ignore[misc]
    assert call("DELETE", f"{b.url}/v1/instances/p/ranks/tp0").status == 200
    two.agree("p", {max(epochs)})


def test_who_renews_at_one_registry_is_alive_at_all_and_who_is_silent_is_gone_from_all(two: Fleet) -> None:
    a, b = two.replicas
    renewed, silent = (claim(a, "p", tp, ttl_s=TTL_S).body["epoch"] for tp in (0, 1))

    def only_one_is_left() -> bool:
        assert renew(b, "p", 0, renewed).status == 200
        assert seen(a, "p")[renewed] == "alive"
        return all(set(seen(each, "p")) == {renewed} for each in two.replicas)

    two.agree("p", {renewed, silent})
    until(only_one_is_left)
    assert renew(a, "p", 1, silent).status == 404


def test_registries_that_are_asked_at_once_never_give_one_seat_twice(two: Fleet) -> None:
    def take(n: int) -> int:
        answer = claim(two.replicas[n % 2], "p", 0, port=5000 + n, size=1, ttl_s=None)
        assert answer.status == 200, answer
        return int(answer.body["epoch"])

    with ThreadPoolExecutor(8) as pool:
        epochs = list(pool.map(take, range(40)))
    assert len(set(epochs)) == 40
    two.agree("p", {max(epochs)})


def test_of_two_engines_that_take_one_name_at_two_registries_one_is_told_whose_it_is(two: Fleet) -> None:
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        ports = [each.getsockname()[1] for each in (one, other)]

        def take(name: str, n: int) -> int:
            said = {"ip_or_host_name": "127.0.0.1", "rpc_port": ports[n]}
            return call("PUT", f"{two.replicas[n].url}/metadata?key=mooncake/rpc_meta/{name}", said).status

        with ThreadPoolExecutor(2) as pool:
            for n in range(12):
                assert sorted(pool.map(partial(take, f"n{n}"), (0, 1))) == [200, 409]


def test_a_registry_that_starts_later_knows_all_of_it(two: Fleet, tmp_path: Path) -> None:
    epochs = {claim(two.replicas[0], "p", tp).body["epoch"] for tp in (0, 1)}
    assert call("PUT", f"{two.replicas[0].url}/metadata?key=mooncake/ram/h:1", {"a": 1}).status == 200
    until(lambda: call("GET", f"{two.replicas[1].url}/metadata?key=mooncake/ram/h:1").body == {"a": 1})
    with service(tmp_path / "late.log", "--journal", two.etcd.url("fleet")) as late:
        assert set(seen(late, "p")) == epochs
        assert call("GET", f"{late.url}/metadata?key=mooncake/ram/h:1").body == {"a": 1}


def test_etcds_end_ends_nothing_and_its_return_mends_all(two: Fleet) -> None:
    a, b = two.replicas
    epochs = {claim(a, "p", tp, ttl_s=TTL_S).body["epoch"]: tp for tp in (0, 1)}
    two.agree("p", set(epochs))
    two.etcd.nodes[0].kill()

    def is_old() -> bool:
        for epoch, tp in epochs.items():
            assert renew(b, "p", tp, epoch).status == 200
        return call("GET", f"{a.url}/v1/instances/p").age_s >= 2.5 * TTL_S

    until(is_old)
    assert set(seen(a, "p")) == set(seen(b, "p")) == set(epochs)
    refused = claim(a, "q", 0)
    assert (refused.status, int(refused.headers["retry-after"]) >= 1) == (503, True)
    two.etcd.nodes[0].start()

    def is_fresh() -> bool:
        for epoch, tp in epochs.items():
            assert renew(b, "p", tp, epoch).status == 200
        return all(call("GET", f"{each.url}/v1/instances/p").age_s == 0 for each in two.replicas)

    until(is_fresh)
    until(lambda: claim(a, "q", 0).status == 200)
    assert set(seen(a, "p")) == set(seen(b, "p")) == set(epochs)


def test_a_wiped_etcd_is_given_back_what_the_registries_know(two: Fleet) -> None:
    a, b = two.replicas
    epoch = claim(a, "p", 0, size=1, ttl_s=None).body["epoch"]
    two.agree("p", {epoch})
    node = two.etcd.nodes[0]
    node.kill()
    node.wipe()
    node.start()
    until(lambda: claim(b, "q", 0, size=1, ttl_s=None).status == 200)
    two.agree("p", {epoch})
    assert call("GET", f"{b.url}/v1/instances/q").body["epoch"] > epoch
    two.agree("q", {call("GET", f"{b.url}/v1/instances/q").body["epoch"]})


def test_a_registry_that_was_stopped_says_how_old_its_answers_are_and_ends_nobody(two: Fleet) -> None:
    a, b = two.replicas
    held, leaves = (claim(a, "p", tp, ttl_s=TTL_S).body["epoch"] for tp in (0, 1))
    two.agree("p", {held, leaves})
    signalled(b, signal.SIGSTOP)
    assert call("DELETE", f"{a.url}/v1/instances/p/ranks/tp1").status == 200
    new = claim(a, "q", 0, size=1, ttl_s=None).body["epoch"]

    def three_leases_later() -> bool:
        assert renew(a, "p", 0, held).status == 200
        return bool(call("GET", f"{a.url}/v1/instances/p").body["alive_seats"][0]["age_s"] > 3 * TTL_S)

    until(three_leases_later)
    signalled(b, signal.SIGCONT)
    first = call("GET", f"{b.url}/v1/instances/p")
    stale = {row["epoch"] for row in first.body["alive_seats"]}
    assert first.age_s >= 2.5 * TTL_S or stale == {held}
    two.agree("p", {held})
    two.agree("q", {new})
    assert renew(b, "p", 0, held).status == 200


def test_a_registry_that_is_cut_off_alone_says_so_and_a_client_of_both_asks_the_other(tmp_path: Path) -> None:
    with cluster(tmp_path) as etcd:
        relay = Relay(etcd.nodes[0].client)
        url = etcd.url("fleet")
        behind = url.replace(str(etcd.nodes[0].client), str(relay.port))
        with (
            closing(relay),
            service(tmp_path / "cut.log", "--journal", behind) as cut,
            service(tmp_path / "well.log", "--journal", url) as well,
        ):
            both = Fleet(etcd, [cut, well])
            epoch, short = (
                claim(cut, name, 0, ttl_s=ttl_s).body["epoch"] for name, ttl_s in (("p", 60.0), ("q", TTL_S))
            )
            both.agree("p", {epoch})
            both.agree("q", {short})
            relay.cut()
            until(lambda: renew(cut, "q", 0, short).age_s >= 2 * TTL_S)
            seat = f"{cut.url},{well.url}"
            asyncio.run(held_at(seat, epoch, well.url))
            until(lambda: not seen(well, "q"))  # who speaks to nobody but the cut one is gone, and told when it is back
            assert set(seen(cut, "q")) == {short}
            relay.mend()
            both.agree("q", set())
            assert renew(cut, "q", 0, short).status == 404


async def held_at(urls: str, epoch: int, well: str) -> None:
    """One renewal by a client of several registries."""
    async with RegistryClient(urls) as client:
        said = await client.tell(
            Exchange("renewal", "POST", "/v1/instances/p/ranks/tp0/renew", json.loads, body={"epoch": epoch})
        )
        assert (said["standing"], client.url) == ("alive", well)


@pytest.fixture
def three(tmp_path: Path) -> Iterator[Fleet]:
    with fleet(tmp_path, n_replicas=2, n_nodes=3) as made:
        yield made


def test_the_loss_of_any_one_etcd_member_the_leader_too_is_no_loss(three: Fleet) -> None:
    a, b = three.replicas
    epochs = {claim(a, "p", 0, size=8, ttl_s=None).body["epoch"]}
    for n, node in enumerate(three.etcd.nodes, 1):
        node.kill()
        until(lambda n=n: claim(b, "p", n, size=8, ttl_s=None).status == 200)  # type: ignore[misc]
        epochs = set(seen(b, "p"))
        assert len(epochs) == n + 1
        three.agree("p", epochs)
        node.start()
        three.etcd.wait()


def test_a_minority_takes_nothing_and_serves_with_its_age(three: Fleet) -> None:
    a, b = three.replicas
    epoch = claim(a, "p", 0, size=2, ttl_s=None).body["epoch"]
    three.agree("p", {epoch})
    for node in three.etcd.nodes[:2]:
        node.stopped(signal.SIGSTOP)
    until(lambda: call("GET", f"{a.url}/v1/instances/p").age_s >= 4)
    assert set(seen(a, "p")) == {epoch}
    assert claim(b, "p", 1, ttl_s=None).status == 503
    for node in three.etcd.nodes[:2]:
        node.stopped(signal.SIGCONT)
    until(lambda: claim(b, "p", 1, ttl_s=None).status == 200)
    three.agree("p", set(seen(b, "p")))
