"""The journal in a real etcd: several writers, what they tell each other, who is let in, and what is thrown away."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
import pytest_asyncio
import trustme
from aetcd import rpc
from structlog.testing import capture_logs

from pdctl.core.address import Endpoint
from pdctl.core.kinds import ChangeKind
from pdctl.core.lives import Record
from pdctl.errors import Behind, ConfigError, JournalUnavailable, JournalUnusable, Unreachable
from pdctl.persistence import etcd as module
from pdctl.persistence.base import Learned, Shared
from pdctl.persistence.etcd import EtcdJournal, open_etcd_journal
from pdctl.persistence.etcd_place import EtcdPlace, EtcdSettings
from pdctl.persistence.etcd_wire import Etcd, KeyValue, open_etcd
from tests.faults.replicas import Relay
from tests.patience import until_told
from tests.persistence.etcd import Cluster, cluster
from tests.persistence.rows import change, claim, life, records

DEADLINE_S = 60.0

pytestmark = pytest.mark.asyncio(loop_scope="module")  # gRPC's own threads outlive a loop, and complain of its end


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("etcd")) as made:
        yield made


@pytest_asyncio.fixture(loop_scope="module")
async def writers(etcd: Cluster, tmp_path: Path) -> AsyncIterator[list[EtcdJournal]]:
    async with AsyncExitStack() as stack:
        opened = [open_etcd_journal(etcd.url(str(tmp_path)), EtcdSettings(), rooms_kept_s=60.0) for _ in range(2)]
        yield [await stack.enter_async_context(each) for each in opened]


class Ears:
    """What a writer was told of the others."""

    def __init__(self, journal: EtcdJournal) -> None:
        self.learned: list[Learned] = []
        self.pulses: list[tuple[Record, float | None]] = []
        self._news = asyncio.Event()
        journal.subscribe(self._hear, self._pulse)

    def _hear(self, learned: Learned) -> None:
        self.learned.append(learned)
        self._news.set()

    def _pulse(self, record: Record, over_in_s: float | None) -> None:
        self.pulses.append((record, over_in_s))
        self._news.set()

    async def until(self, n_learned: int = 0, n_pulses: int = 0) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while len(self.learned) < n_learned or len(self.pulses) < n_pulses:
                self._news.clear()
                await self._news.wait()


async def test_it_is_a_shared_journal_and_says_so(writers: list[EtcdJournal]) -> None:
    assert all(isinstance(each, Shared) for each in writers)


async def test_what_one_writes_the_other_is_told_whole_and_in_order(writers: list[EtcdJournal]) -> None:
    a, b = writers
    ears = Ears(b)
    await a.append([change(life(1), 1), change(life(2, claim(1)), 2)])
    gone = replace(change(life(1), 3, ChangeKind.LEFT), why="said goodbye")
    await a.append([gone])
    await a.append([], [(7, 1), (2**70, 2)])
    await a.note([("keys", "k", b"v"), ("keys", "short", b"")])
    await a.note([("keys", "short", None)])
    await ears.until(5)
    first, second, rooms, notes, struck = ears.learned
    assert [record.epoch for record in first.records["default"]] == [1, 2]
    assert [record.epoch for record in second.records["default"]] == [2]
    assert [(word.kind, word.epoch, word.why) for word in second.words] == [("left", 1, "said goodbye")]
    assert list(rooms.rooms) == [(7, 1), (2**70, 2)]
    assert list(notes.notes) == [("keys", "k", b"v"), ("keys", "short", b"")]
    assert list(struck.notes) == [("keys", "short", None)]
    assert (second.last_epoch, await records(b)) == (2, [life(2, claim(1)).record()])
    assert Ears(a).learned == []  # its own


@pytest.mark.parametrize("ttl_s", [None, 60.0])
async def test_who_decided_on_less_than_there_is_is_told_so_and_nothing_is_written(
    writers: list[EtcdJournal], ttl_s: float | None
) -> None:
    """A lease too, which is asked for first: what comes meanwhile was not decided on either."""
    a, b = writers
    ears = Ears(b)
    outcomes = await asyncio.gather(
        a.append([change(life(1, claim(ttl_s=ttl_s)), 1)]),
        b.append([change(life(1, claim(1)), 1)]),
        return_exceptions=True,
    )
    behind = [isinstance(each, Behind) for each in outcomes]
    if behind == [False, True]:
        assert [record.epoch for record in ears.learned[0].records["default"]] == [1]
    assert behind in ([False, True], [True, False])
    await writers[behind.index(True)].append([change(life(2, claim(1)), 2)])

    async def agree() -> bool:
        return [[record.epoch for record in await records(each)] for each in writers] == [[1, 2], [1, 2]]

    await until_told(agree)


async def test_notes_are_of_one_book_and_who_decided_on_less_of_it_is_told_so(writers: list[EtcdJournal]) -> None:
    a, b = writers
    ears = Ears(a), Ears(b)
    outcomes = await asyncio.gather(
        a.note([("keys", "k", b"a")]), b.note([("keys", "k", b"b")]), return_exceptions=True
    )
    behind = [isinstance(each, Behind) for each in outcomes]
    assert sorted(behind) == [False, True]
    loser = behind.index(True)
    await ears[loser].until(1)
    assert list(ears[loser].learned[0].notes) == [("keys", "k", b"ba"[loser : loser + 1])]
    await asyncio.gather(a.note([("keys", "k", b"c")]), b.note([("fleet", "k", b"d")]))  # nobody is in nobody's way


async def test_a_lease_lasts_while_any_writer_hears_its_holder_and_no_longer(writers: list[EtcdJournal]) -> None:
    a, b = writers
    ears = Ears(a)
    await a.append([change(life(1, claim(ttl_s=4.0)), 1)])
    await until_told(held_by(b, True))
    began = asyncio.get_running_loop().time()
    while asyncio.get_running_loop().time() - began < 10.0:  # two leases and a half
        b.heard(1)
        await asyncio.sleep(0.3)
        assert a.is_held(1)
    await until_told(held_by(a, False))
    record, over_in_s = ears.pulses[-1]
    assert (record.epoch, over_in_s) == (1, 3.0)


def held_by(journal: EtcdJournal, held: bool) -> Callable[[], Awaitable[bool]]:
    async def is_so() -> bool:
        return journal.is_held(1) is held

    return is_so


async def test_an_instance_of_thousands_is_one_group(writers: list[EtcdJournal]) -> None:
    a, b = writers
    ears = Ears(b)
    await a.append([change(life(n, claim(n, size=4096)), n) for n in range(1, 4001)])
    await ears.until(1)
    assert len(ears.learned[0].records["default"]) == 4000


async def test_history_that_etcd_has_thrown_away_is_not_needed(etcd: Cluster, writers: list[EtcdJournal]) -> None:
    a, b = writers
    for n in range(1, 6):
        await a.append([change(life(n, claim(n)), n)])
    async with grpc.aio.insecure_channel(str(EtcdPlace.parse(etcd.url("x")).endpoints[0])) as channel:
        kv = rpc.KVStub(channel)
        now = (await kv.Range(rpc.RangeRequest(key=b"x"))).header.revision
        await kv.Compact(rpc.CompactionRequest(revision=now))
    await a.append([change(life(6, claim(6)), 6)])

    async def is_known() -> bool:
        return [record.epoch for record in await records(b)] == [1, 2, 3, 4, 5, 6]

    await until_told(is_known)


async def test_what_others_wrote_while_an_empty_copy_was_cut_off_is_told(etcd: Cluster, tmp_path: Path) -> None:
    """The first rows ever too: who began with nothing has nothing to compare with."""
    url, port = etcd.url(str(tmp_path)), etcd.nodes[0].client
    relay = Relay(port)
    async with AsyncExitStack() as stack:
        stack.callback(relay.close)
        behind = url.replace(str(port), str(relay.port))
        cut = await stack.enter_async_context(open_etcd_journal(behind, EtcdSettings(), rooms_kept_s=60.0))
        well = await stack.enter_async_context(open_etcd_journal(url, EtcdSettings(), rooms_kept_s=60.0))
        ears = Ears(cut)
        relay.cut()
        await well.append([change(life(1), 1)])
        relay.mend()
        await ears.until(1)
    assert [record.epoch for record in ears.learned[0].records["default"]] == [1]
    assert ears.learned[0].last_epoch == 1


async def test_a_row_that_cannot_be_read_is_trouble_that_says_so_and_no_end(
    etcd: Cluster, writers: list[EtcdJournal], tmp_path: Path
) -> None:
    a, _ = writers
    await a.append([change(life(1), 1)])
    place = EtcdPlace.parse(etcd.url(str(tmp_path)))
    async with grpc.aio.insecure_channel(str(place.endpoints[0])) as channel:
        key = place.key("head").encode()
        await rpc.KVStub(channel).Put(rpc.PutRequest(key=key, value=b"not ours"))

    async def has_trouble() -> bool:
        return a.trouble is not None and "written by others than pdctl" in a.trouble

    await until_told(has_trouble)
    assert [record.epoch for record in await records(a)] == [1]
    with pytest.raises(JournalUnavailable, match="restart this registry"):
        await a.append([change(life(2), 2)])


async def test_without_etcd_nothing_is_served_from_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "START_S", 0.5)
    with pytest.raises(JournalUnusable, match=r"etcd at 127\.0\.0\.1:1 does not answer"):
        async with open_etcd_journal("etcd://127.0.0.1:1", EtcdSettings(timeout_s=0.2), rooms_kept_s=1.0):
            pass


async def test_who_has_the_certificate_and_the_password_is_let_in_and_nobody_else(tmp_path: Path) -> None:
    ca = trustme.CA()
    server, client = ca.issue_cert("127.0.0.1"), ca.issue_cert("client@example.org")
    files = {name: tmp_path / f"{name}.pem" for name in ("ca", "server", "server_key", "client", "client_key")}
    ca.cert_pem.write_to_path(str(files["ca"]))
    for name, issued in (("server", server), ("client", client)):
        issued.cert_chain_pems[0].write_to_path(str(files[name]))
        issued.private_key_pem.write_to_path(str(files[f"{name}_key"]))
    flags = (
        *("--cert-file", str(files["server"]), "--key-file", str(files["server_key"])),
        *("--trusted-ca-file", str(files["ca"]), "--client-cert-auth"),
    )
    proper = EtcdSettings(ca=files["ca"], cert=files["client"], key=files["client_key"])
    with cluster(tmp_path, flags=flags) as secret:
        await _want_a_password(secret, proper)
        allowed = replace(proper, username="root", password="open")
        async with open_etcd_journal(secret.url("p"), allowed, rooms_kept_s=60.0) as journal:
            await journal.append([change(life(1, claim(ttl_s=60.0)), 1)], [(5, 0)])
            assert [record.epoch for record in await records(journal)] == [1]
        for wrong in (EtcdSettings(ca=files["ca"]), EtcdSettings(), replace(allowed, password="shut"), proper):
            await _is_kept_out(secret, wrong)


async def _want_a_password(secret: Cluster, settings: EtcdSettings) -> None:
    ca, key, cert = settings.read()
    credentials = grpc.ssl_channel_credentials(ca, key, cert)
    async with grpc.aio.secure_channel(str(EtcdPlace.parse(secret.url("x")).endpoints[0]), credentials) as channel:
        auth = rpc.AuthStub(channel)
        await auth.UserAdd(rpc.AuthUserAddRequest(name="root", password="open"))
        await auth.UserGrantRole(rpc.AuthUserGrantRoleRequest(user="root", role="root"))
        await auth.AuthEnable(rpc.AuthEnableRequest())


async def _is_kept_out(secret: Cluster, settings: EtcdSettings) -> None:
    opening = open_etcd_journal(secret.url("p"), replace(settings, timeout_s=0.5), rooms_kept_s=60.0)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(2.0), opening:
            pytest.fail("it was let in")


class Late:
    """etcd, whose answers about one key are held back."""

    def __init__(self, etcd: Etcd) -> None:
        self._etcd = etcd
        self.asked, self.go_on = asyncio.Event(), asyncio.Event()
        self.fails_when_cancelled = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._etcd, name)

    async def get(self, key: str) -> KeyValue | None:
        found = await self._etcd.get(key)
        self.asked.set()
        try:
            await self.go_on.wait()
        except asyncio.CancelledError:
            if self.fails_when_cancelled:
                raise Unreachable("gone at that moment") from None
            raise
        return found


@asynccontextmanager
async def late(etcd: Cluster, name: str) -> AsyncIterator[tuple[EtcdJournal, Late]]:
    place = EtcdPlace.parse(etcd.url(name))
    async with open_etcd(place.endpoints, EtcdSettings()) as opened:
        held = Late(opened)
        journal = EtcdJournal(cast(Etcd, held), place, rooms_kept_s=60.0)
        await journal.start()
        await asyncio.wait_for(held.asked.wait(), DEADLINE_S)
        yield journal, held
        await asyncio.wait_for(journal.aclose(), DEADLINE_S)


async def _asks(etcd: Etcd) -> None:
    await etcd.get("k")


async def _renews(etcd: Etcd) -> None:
    async with etcd.keep_alive() as stream:
        await stream.renew(1)
        await stream.answer()


async def _watches(etcd: Etcd) -> None:
    async with etcd.watch("k", 1) as watch:
        await watch.news()


@pytest.mark.parametrize("call", [_asks, _renews, _watches])
@pytest.mark.parametrize("user", [{}, {"username": "u", "password": "p"}], ids=["nobody", "a user"])
async def test_a_call_whose_channel_is_closed_by_another_has_failed_and_is_not_cancelled(
    call: Callable[[Etcd], Awaitable[None]], user: dict[str, str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        async with open_etcd([Endpoint("127.0.0.1", mute.getsockname()[1])], EtcdSettings(**user)) as etcd:  # type: ignore[arg-type]
            asking = asyncio.ensure_future(call(etcd))
            with (await asyncio.to_thread(mute.accept))[0]:
                await etcd.aclose()
                with pytest.raises(Unreachable):
                    await asyncio.wait_for(asking, DEADLINE_S)


async def test_an_answer_that_the_watch_has_overtaken_is_no_loss(etcd: Cluster, tmp_path: Path) -> None:
    with capture_logs() as said:
        async with late(etcd, str(tmp_path)) as (journal, held):
            await journal.append([change(life(1), 1)])
            held.asked.clear()
            held.go_on.set()
            await asyncio.wait_for(held.asked.wait(), DEADLINE_S)  # and the next one is asked for
    assert said == []


async def test_a_watch_that_fails_while_it_is_closed_is_closed(etcd: Cluster, tmp_path: Path) -> None:
    async with late(etcd, str(tmp_path)) as (_, held):
        held.fails_when_cancelled = True


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("etcd://", "give etcd://HOST:PORT"),
        ("etcd://h:1/path", "give etcd://HOST:PORT"),
        ("etcd://h:1,h", "has no port"),
        ("etcd://h:1?prefix=", "give etcd://HOST:PORT"),
        ("etcd://h:1?tls=1", "give etcd://HOST:PORT"),
    ],
)
async def test_a_url_that_is_none_is_refused(url: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        EtcdPlace.parse(url)


async def test_a_url_has_members_and_a_prefix() -> None:
    place = EtcdPlace.parse("etcd://10.0.0.1:2379,[::1]:2379?prefix=/a/b/")
    assert ([str(each) for each in place.endpoints], place.prefix) == (["10.0.0.1:2379", "[::1]:2379"], "a/b")
    assert EtcdPlace.parse("etcd://h:1").prefix == "pdctl"


@pytest.mark.parametrize("half", [{"username": "u"}, {"password": "p"}, {"cert": Path("c")}, {"timeout_s": 0.0}])
async def test_settings_that_are_half_are_refused(half: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="etcd"):
        EtcdSettings(**half)  # type: ignore[arg-type]
