"""The door of a service over real sockets: addresses, tokens, TLS and mTLS, over IPv4, IPv6 and one for the other."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import structlog
import trustme
from fastapi import APIRouter, Request

from pdctl.client import RegistryClient
from pdctl.core.lives import Owner
from pdctl.credentials import AccessSettings, Credentials, Reloaded, listening, rules, server_tls
from pdctl.errors import ConfigError, RegistryRefused, Unreachable
from pdctl.guard import SAY_EVERY_S, Guard
from pdctl.metrics import Metrics
from pdctl.retry import RetryPolicy
from pdctl.server import app, bind, bound, serve
from tests.conftest import Clock
from tests.scripted import scripted
from tests.test_client import ROW
from tests.test_credentials import change, write_pair
from tests.test_server import needs_ipv6

TOKEN = "a-token-for-prefill-ranks"
WITH_TOKEN = {"Authorization": f"Bearer {TOKEN}"}
OWN = ("/livez", "/readyz", "/metrics")
QUICK = RetryPolicy(first_wait_s=0.01, max_wait_s=0.01, max_attempts=3)


def whoami() -> APIRouter:
    """Two paths that say who the app believes to speak."""
    api = APIRouter()

    @api.api_route("/route", methods=["GET", "PUT"])
    @api.get("/v1/whoami")
    async def who(request: Request) -> dict[str, Any]:
        owner: Owner = request.state.caller
        return {"host": owner.host, "principal": owner.principal}

    return api


class Door:
    """A service that is open; `reload` is what its follower does once a second."""

    def __init__(self, url: str, metrics: Metrics, files: list[Reloaded[Any]], clock: Clock) -> None:
        self.url = url
        self.metrics = metrics
        self.clock = clock
        self._files = files

    def at(self, host: str) -> str:
        """The same port by another of its addresses."""
        return f"{self.url.partition('://')[0]}://{host}:{self.url.rpartition(':')[2]}"

    def reload(self) -> None:
        for file in self._files:
            file.refresh()

    def count(self, reason: str) -> float | None:
        return self.metrics._registry.get_sample_value("pdctl_access_denied_total", {"reason": reason})


@asynccontextmanager
async def door(host: str = "127.0.0.1", *, stock_only: bool = False, **access: Any) -> AsyncIterator[Door]:
    settings, metrics, clock = AccessSettings(**access), Metrics(), Clock()
    held, certificate = rules(settings), server_tls(settings)
    api = app([whoami()], metrics, unready=list)
    guarded = Guard(api, lambda: held.value, metrics.access, clock, stock_only=stock_only)
    tls = None if certificate is None else listening(certificate)
    with bind(host, 0) as sock:
        server = asyncio.create_task(serve(guarded, sock, grace_s=1.0, tls=tls))
        scheme = "http" if tls is None else "https"
        yield Door(f"{scheme}://{bound(sock)}", metrics, [held, *([certificate] if certificate else [])], clock)
        server.cancel()
        await asyncio.wait({server})


async def ask(
    url: str, headers: Any = None, *, come_from: str | None = None, tls: ssl.SSLContext | bool = True, **more: Any
) -> tuple[int, str]:
    local = None if come_from is None else (come_from, 0)
    connector = aiohttp.TCPConnector(local_addr=local, ssl=tls)
    async with aiohttp.ClientSession(connector=connector) as http, http.get(url, headers=headers, **more) as answer:
        return answer.status, await answer.text()


async def who(url: str, headers: Any = None, **more: Any) -> Any:
    status, text = await ask(url, headers, **more)
    assert status == 200, text
    return json.loads(text)


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    file = tmp_path / "tokens"
    file.write_text(f"prefill:{TOKEN}\n")
    return file


@pytest.fixture
def lines() -> Iterator[list[Any]]:
    with structlog.testing.capture_logs() as captured:
        yield captured


# --- by address


async def test_a_trusted_address_is_let_in_and_named() -> None:
    async with door() as service:
        assert await who(f"{service.url}/route") == {"host": "127.0.0.1", "principal": None}
        assert await who(f"{service.url}/v1/whoami") == {"host": "127.0.0.1", "principal": None}


async def test_another_address_is_refused_counted_and_told_what_to_do() -> None:
    async with door(trust="127.0.0.1") as service:
        status, text = await ask(f"{service.url}/route", come_from="127.0.0.2")
        assert status == 403
        assert text.startswith("127.0.0.2 is outside of the trusted networks")
        assert "--trust" in text
        status, text = await ask(f"{service.url}/v1/whoami", come_from="127.0.0.2")
        assert (status, list(json.loads(text))) == (403, ["error"])
        assert (await ask(f"{service.url}/docs", come_from="127.0.0.2"))[0] == 403
        assert (await ask(f"{service.url}/nowhere", come_from="127.0.0.2"))[0] == 403
        assert service.count("untrusted") == 4
        assert (await ask(f"{service.url}/route", come_from="127.0.0.1"))[0] == 200


async def test_a_stranger_cannot_claim_to_come_from_inside() -> None:
    forged = {"X-Forwarded-For": "127.0.0.1", "Forwarded": "for=127.0.0.1", "X-Real-IP": "127.0.0.1"}
    async with door(trust="127.0.0.1") as service:
        assert (await ask(f"{service.url}/route", forged, come_from="127.0.0.2"))[0] == 403


@pytest.mark.parametrize("path", OWN)
async def test_what_watches_the_service_needs_nothing(path: str, token_file: Path) -> None:
    async with door(trust="127.0.0.1", token_file=token_file) as service:
        assert (await ask(service.url + path, come_from="127.0.0.2"))[0] == 200


async def test_the_open_paths_can_be_closed() -> None:
    async with door(trust="127.0.0.1", open_paths="/livez") as service:
        assert (await ask(f"{service.url}/livez", come_from="127.0.0.2"))[0] == 200
        assert (await ask(f"{service.url}/metrics", come_from="127.0.0.2"))[0] == 403
        assert (await ask(f"{service.url}/metrics", come_from="127.0.0.1"))[0] == 200


@pytest.mark.parametrize("path", ["/v1/../route", "//route", "/livez/../route", "/livez%2f..%2froute", "/LIVEZ", "/v1"])
async def test_no_spelling_of_a_path_opens_it(path: str) -> None:
    async with door(trust="127.0.0.1") as service:
        port = int(service.url.rpartition(":")[2])
        status = await raw_status(port, f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert status == 403


async def raw_status(port: int, request: str) -> int:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=("127.0.0.2", 0))
    writer.write(request.encode())
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    return int(answer.split()[1])


@needs_ipv6
async def test_ipv6_peers_are_judged_like_others() -> None:
    async with door("::1") as service:
        assert await who(f"{service.url}/route") == {"host": "::1", "principal": None}
    async with door("::1", trust="10.0.0.0/8") as service:
        status, text = await ask(f"{service.url}/route")
        assert (status, text.startswith("::1 is outside")) == (403, True)


@needs_ipv6
async def test_an_ipv4_peer_of_a_dual_stack_socket_is_judged_by_its_ipv4_address() -> None:
    async with door("::", trust="127.0.0.1") as service:
        assert await who(f"{service.at('127.0.0.1')}/route") == {"host": "127.0.0.1", "principal": None}
        assert (await ask(f"{service.at('127.0.0.1')}/route", come_from="127.0.0.2"))[0] == 403
        assert (await who(f"{service.at('[::1]')}/route"))["host"] == "::1", "this very host, by its other address"


async def test_a_scanner_fills_the_counter_and_not_the_log(lines: list[Any]) -> None:
    async with door(trust="10.0.0.0/8") as service:
        for _ in range(20):
            await ask(f"{service.url}/route")
        service.clock.forward(SAY_EVERY_S)
        await ask(f"{service.url}/{'x' * 1000}")
        assert service.count("untrusted") == 21
    said = [line for line in lines if line["event"] == "request denied"]
    assert [line["unsaid"] for line in said] == [0, 19]
    assert said[0] | {"unsaid": 0, "reason": "untrusted", "peer": "127.0.0.1", "path": "/route"} == said[0]
    assert len(said[1]["path"]) < 300


# --- by token


async def test_v1_needs_a_token_where_there_are_tokens(token_file: Path) -> None:
    async with door(token_file=token_file) as service:
        async with aiohttp.ClientSession() as http, http.get(f"{service.url}/v1/whoami") as answer:
            assert answer.status == 401
            assert answer.headers["WWW-Authenticate"].startswith("Bearer")
            assert "needs a token" in (await answer.json())["error"]["message"]
        assert (await ask(f"{service.url}/v1/whoami", {"Authorization": "Bearer wrong"}))[0] == 401
        assert (service.count("no_token"), service.count("bad_token")) == (1, 1)
        assert (await who(f"{service.url}/v1/whoami", WITH_TOKEN))["principal"] == "prefill"


async def test_a_stock_engine_is_let_in_by_its_address_though_there_are_tokens(token_file: Path) -> None:
    async with door(token_file=token_file) as service:
        assert await who(f"{service.url}/route") == {"host": "127.0.0.1", "principal": None}


async def test_a_token_opens_the_plain_paths_from_anywhere(token_file: Path) -> None:
    async with door(trust="10.0.0.0/8", token_file=token_file) as service:
        assert (await ask(f"{service.url}/route"))[0] == 403
        assert (await who(f"{service.url}/route", WITH_TOKEN))["principal"] == "prefill"


async def test_two_authorizations_are_none(token_file: Path) -> None:
    both = [("Authorization", f"Bearer {TOKEN}"), ("Authorization", "Bearer x")]
    async with door(token_file=token_file) as service:
        assert (await ask(f"{service.url}/v1/whoami", both))[0] == 401
        assert (await ask(f"{service.url}/v1/whoami", both[::-1]))[0] == 401


async def test_a_revoked_token_is_refused_on_the_connection_that_it_opened(token_file: Path) -> None:
    async with door(token_file=token_file) as service, aiohttp.ClientSession(headers=WITH_TOKEN) as http:
        async with http.get(f"{service.url}/v1/whoami") as answer:
            assert answer.status == 200
        change(token_file, "prefill:another-token-for-prefill\n")
        service.reload()
        async with http.get(f"{service.url}/v1/whoami") as answer:
            assert answer.status == 401


async def test_no_token_is_ever_logged(token_file: Path, lines: list[Any]) -> None:
    async with door(token_file=token_file) as service:
        await ask(f"{service.url}/v1/whoami", WITH_TOKEN)
        await ask(f"{service.url}/v1/whoami", {"Authorization": "Bearer a-wrong-one-of-somebody"})
        change(token_file, f"prefill:{TOKEN} \nbroken")
        service.reload()
    assert TOKEN not in str(lines)
    assert "a-wrong-one" not in str(lines)


# --- TLS


class Authority:
    """A certificate authority and its files."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        self.ca = trustme.CA()
        self.file = folder / "ca.pem"
        self.file.write_bytes(self.ca.cert_pem.bytes())

    def client(self, *, certified: bool = True) -> Credentials:
        """For a client that believes this authority, and is certified by it."""
        if not certified:
            return Credentials(tls_ca=self.file)
        (self.folder / "client").mkdir(exist_ok=True)
        cert, key = write_pair(self.ca, self.folder / "client", "rank@cluster.example")
        return Credentials(tls_ca=self.file, tls_cert=cert, tls_key=key)

    def server(self, host: str = "127.0.0.1") -> dict[str, Any]:
        cert, key = write_pair(self.ca, self.folder, host)
        return {"tls_cert": cert, "tls_key": key}


@pytest.fixture
def ours(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "ours")


@pytest.fixture
def theirs(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "theirs")


async def answered(url: str, credentials: Credentials) -> bool:
    """Whether the service speaks to somebody with these, over a connection of its own."""
    async with RegistryClient(url, credentials=credentials) as client:
        try:
            await client.topology()
        except Unreachable as error:
            return "is no registry" in str(error)  # it has answered: /route of this service says who we are
        return True


async def test_a_client_that_believes_the_authority_is_served(ours: Authority) -> None:
    async with door(**ours.server()) as service:
        assert service.url.startswith("https://")
        assert await answered(service.url, ours.client(certified=False))


async def test_a_client_believes_no_other_authority(ours: Authority, theirs: Authority) -> None:
    async with door(**ours.server()) as service:
        for stranger in (Credentials(), theirs.client(certified=False)):
            async with RegistryClient(service.url, credentials=stranger) as client:
                with pytest.raises(Unreachable, match="unable to get local issuer certificate"):
                    await client.topology()


async def test_a_certificate_for_another_name_is_not_believed(ours: Authority) -> None:
    async with (
        door(**ours.server("registry.example")) as service,
        RegistryClient(service.url, credentials=ours.client(certified=False)) as client,
    ):
        with pytest.raises(Unreachable, match=r"127\.0\.0\.1"):
            await client.topology()


async def test_plain_http_gets_nothing_where_there_is_tls(ours: Authority) -> None:
    async with door(**ours.server()) as service:
        with pytest.raises(aiohttp.ClientError):
            await ask(service.url.replace("https", "http") + "/livez")


@needs_ipv6
async def test_tls_over_ipv6(ours: Authority) -> None:
    async with door("::1", **ours.server("::1")) as service:
        assert service.url.startswith("https://[::1]:")
        assert await answered(service.url, ours.client(certified=False))


async def test_a_new_certificate_is_shown_to_new_connections_and_old_ones_go_on(
    ours: Authority, theirs: Authority
) -> None:
    believing = aiohttp.TCPConnector(ssl=ssl.create_default_context(cafile=ours.file))
    async with door(**ours.server()) as service, aiohttp.ClientSession(connector=believing) as before:
        async with before.get(f"{service.url}/livez") as answer:
            assert answer.status == 200
        exchange(theirs, ours)
        service.reload()
        async with before.get(f"{service.url}/livez") as answer:
            assert answer.status == 200, "a connection is not broken for a new certificate"
        assert await answered(service.url, Credentials(tls_ca=theirs.file))
        assert not await answered(service.url, ours.client(certified=False))


def exchange(new: Authority, old: Authority) -> None:
    """Put a certificate of `new` where that of `old` stands."""
    cert, key = write_pair(new.ca, new.folder)
    cert.replace(old.folder / cert.name)
    key.replace(old.folder / key.name)


async def test_only_certified_clients_get_through_where_an_authority_is_asked_for(
    ours: Authority, theirs: Authority
) -> None:
    async with door(**ours.server(), tls_client_ca=ours.file) as service:
        assert await answered(service.url, ours.client())
        assert not await answered(service.url, ours.client(certified=False))
        forged = theirs.client()
        assert not await answered(
            service.url, Credentials(tls_ca=ours.file, tls_cert=forged.tls_cert, tls_key=forged.tls_key)
        )


async def test_a_client_authority_that_is_taken_out_is_believed_no_more(
    ours: Authority, theirs: Authority, tmp_path: Path
) -> None:
    authorities = tmp_path / "clients.pem"
    authorities.write_bytes(ours.file.read_bytes() + theirs.file.read_bytes())
    mine, foreign = ours.client(), theirs.client()
    another = Credentials(tls_ca=ours.file, tls_cert=foreign.tls_cert, tls_key=foreign.tls_key)
    async with door(**ours.server(), tls_client_ca=authorities) as service:
        assert await answered(service.url, mine)
        assert await answered(service.url, another)
        change(authorities, ours.file.read_text())
        service.reload()
        assert await answered(service.url, mine)
        assert not await answered(service.url, another)


async def test_a_session_is_not_resumed_past_a_client_authority_that_was_taken_out(
    ours: Authority, theirs: Authority, tmp_path: Path
) -> None:
    """A resumed session is not verified again, so none may be."""
    authorities = tmp_path / "clients.pem"
    authorities.write_bytes(theirs.file.read_bytes())
    foreign = theirs.client()
    context = ssl.create_default_context(cafile=ours.file)
    assert foreign.tls_cert is not None
    context.load_cert_chain(foreign.tls_cert, foreign.tls_key)
    async with door(**ours.server(), tls_client_ca=authorities) as service:
        port = int(service.url.rpartition(":")[2])
        session = await asyncio.to_thread(blocking_get, context, port, None)
        assert session is None or not session.has_ticket
        change(authorities, ours.file.read_text())
        service.reload()
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await asyncio.to_thread(blocking_get, context, port, session)


def blocking_get(context: ssl.SSLContext, port: int, session: ssl.SSLSession | None) -> ssl.SSLSession | None:
    with (
        socket.create_connection(("127.0.0.1", port), timeout=60) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1", session=session) as tls,
    ):
        tls.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        if not tls.recv(100):
            raise ConnectionError("closed without an answer")
        return tls.session


async def test_a_listener_in_the_clear_serves_stock_engines_and_nobody_else(token_file: Path) -> None:
    async with door(stock_only=True, token_file=token_file) as service:
        assert (await who(f"{service.url}/route"))["host"] == "127.0.0.1"
        assert (await ask(f"{service.url}/livez"))[0] == 200
        status, text = await ask(f"{service.url}/v1/whoami", WITH_TOKEN)
        assert (status, "over https" in text, service.count("no_tls")) == (403, True, 1)


# --- the client's side


async def test_a_client_shows_its_token_and_reads_it_again(token_file: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    change(own, f"{TOKEN}\n")
    async with (
        door(trust="10.0.0.0/8", token_file=token_file) as service,
        RegistryClient(service.url, credentials=Credentials(token_file=own)) as client,
    ):
        await client.register(ROW)
        change(token_file, "prefill:another-token-for-prefill\n")
        service.reload()
        assert not await client.healthy()
        change(own, "another-token-for-prefill\n")
        await client.register(ROW)


async def test_a_wrong_token_is_an_answer_and_not_a_reason_to_go_on_for_ever(token_file: Path) -> None:
    async with door(trust="10.0.0.0/8", token_file=token_file) as service:
        async with RegistryClient(service.url, credentials=Credentials(token="x" * 20)) as client:
            with pytest.raises(RegistryRefused, match="401: the token is not known here"):
                await client.register(ROW)
        async with RegistryClient(service.url) as client:
            with pytest.raises(RegistryRefused, match=r"403: .*outside of the trusted networks"):
                await client.register(ROW)


async def test_a_rank_whose_token_file_lags_behind_waits_for_it(token_file: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    change(own, "the-token-of-yesterday\n")
    refused: list[float] = []

    async def sleep(seconds: float) -> None:
        refused.append(seconds)
        change(own, f"{TOKEN}\n")

    async with door(trust="10.0.0.0/8", token_file=token_file) as service:
        credentials = Credentials(token_file=own)
        async with RegistryClient(service.url, policy=QUICK, credentials=credentials, sleep=sleep) as client:
            await client.register(ROW)
    assert len(refused) == 1


@needs_ipv6
@pytest.mark.parametrize(("host", "times"), [("127.0.0.1", 0), ("[::ffff:127.0.0.1]", 0), ("0.0.0.0", 1)])
async def test_a_token_in_the_clear_is_warned_of_once_unless_it_stays_on_this_host(
    host: str, times: int, token_file: Path, lines: list[Any]
) -> None:
    async with (
        door("::", token_file=token_file) as service,
        RegistryClient(service.at(host), credentials=Credentials(token=TOKEN)) as client,
    ):
        for _ in range(3):
            await client.register(ROW)
    assert [line["event"] for line in lines].count("token goes over plain HTTP, anyone on the way can read it") == times
    assert TOKEN not in str(lines)


async def test_a_client_without_credentials_shows_nothing() -> None:
    async with scripted() as server, RegistryClient(server.url) as client:
        await client.register(ROW)
    assert server.asked == [("PUT", "/route", ROW.to_body())]


def test_a_token_file_that_is_not_there_is_a_setting_to_mend(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        RegistryClient("http://127.0.0.1:1", credentials=Credentials(token_file=tmp_path / "none"))
