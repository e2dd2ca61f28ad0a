"""Where registries over one etcd serve: known to each other while they live, and put back where etcd has forgotten."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from pdctl.errors import Unreachable
from pdctl.persistence.etcd import EtcdJournal, open_etcd_journal
from pdctl.persistence.etcd_place import EtcdPlace, EtcdSettings
from pdctl.persistence.etcd_presence import MAX_URL, Presence
from pdctl.persistence.etcd_wire import Etcd, KeyValue, open_etcd
from tests.persistence.etcd import Cluster, cluster

SOON_S = 40.0


async def until(what: Callable[[], bool]) -> None:
    async with asyncio.timeout(SOON_S):
        while not what():  # noqa: ASYNC110  another process's doing
            await asyncio.sleep(0.02)


async def until_put_back(etcd: Cluster, n: int) -> None:
    """Until so many have said so to an etcd that knew of none."""
    place = EtcdPlace.parse(etcd.url("fleet"))
    async with open_etcd(place.endpoints, EtcdSettings()) as direct, asyncio.timeout(SOON_S):
        while True:
            with suppress(Unreachable):
                if len((await direct.everything(place.key("replicas/"))).keys) == n:
                    return
            await asyncio.sleep(0.05)


@asynccontextmanager
async def writer(etcd: Cluster, url: str | None) -> AsyncIterator[EtcdJournal]:
    async with open_etcd_journal(etcd.url("fleet"), EtcdSettings(), rooms_kept_s=60.0) as journal:
        if url is not None:
            journal.announce(url)
        yield journal


async def test_each_knows_the_others_that_serve_until_they_end_and_again_when_etcd_was_wiped(tmp_path: Path) -> None:
    with cluster(tmp_path) as etcd:
        async with writer(etcd, "http://a:1") as a:
            async with writer(etcd, "http://b:2") as b, writer(etcd, None) as silent:
                await until(lambda: a.others == {b.writer: "http://b:2"})
                await until(lambda: b.others == {a.writer: "http://a:1"})
                await until(lambda: set(silent.others.values()) == {"http://a:1", "http://b:2"})
                node = etcd.nodes[0]
                node.kill()
                node.wipe()
                node.start()
                await until_put_back(etcd, 2)
                await until(lambda: a.others == {b.writer: "http://b:2"} and b.others == {a.writer: "http://a:1"})
            began = asyncio.get_running_loop().time()
            await until(lambda: a.others == {})
            assert asyncio.get_running_loop().time() - began < SOON_S


@pytest.mark.parametrize("value", [b"", b"{", b"[]", b'{"url": 7}', b'{"url": "ftp://a"}', b"http://a"], ids=repr)
def test_what_a_later_version_writes_there_is_passed_over(value: bytes) -> None:
    place = EtcdPlace.parse("etcd://h:1")
    presence = Presence(Etcd(place.endpoints, EtcdSettings()), place, "me")
    presence.take_event(KeyValue(place.key("replicas/other"), b'{"url": "http://a:1", "more": 1}'))
    assert presence.others == {"other": "http://a:1"}
    presence.take_event(KeyValue(place.key("replicas/other"), value))
    long = b'{"url": "http://%b"}' % (b"a" * MAX_URL)
    presence.take_event(KeyValue(place.key("replicas/long"), long))
    presence.take_event(KeyValue(place.key("replicas/me"), b'{"url": "http://me:1"}'))
    assert presence.others == {}
