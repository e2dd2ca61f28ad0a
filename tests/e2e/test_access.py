"""Access as an operator sets it up: real `pdctl serve` and `pdctl register`, real files, over IPv6 as well."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import TypeVar

import aiohttp
import pytest
import trustme

from pdctl.client import RegistryClient
from pdctl.core.native import Registration
from pdctl.core.news import Listed
from pdctl.credentials import Credentials
from pdctl.errors import RegistryRefused
from tests.test_cli import pdctl
from tests.test_client import MOVED, ROW
from tests.test_credentials import change, write_pair
from tests.test_server import needs_ipv6

T = TypeVar("T")

SOON_S = 60.0
TOKEN = "the-token-of-prefill-ranks"
SEAT = "dp0-cp0-tp0-pp0"
RANK = ("--rank-host", "10.0.0.1", "--rank-port", "40123")


def teller(http: aiohttp.ClientSession) -> Callable[..., Awaitable[tuple[int, str]]]:
    """Who asks with a token: (token, method, url, body) -> status and text."""

    async def tell(token: str, method: str, url: str, body: object = None) -> tuple[int, str]:
        headers = {"Authorization": f"Bearer {token}"}
        async with http.request(method, url, json=body, headers=headers) as answer:
            return answer.status, await answer.text()

    return tell


@asynccontextmanager
async def served(*args: str) -> AsyncIterator[str]:
    async with pdctl("serve", "--port", "0", *args) as child:
        assert child.stdout is not None
        line = (await asyncio.wait_for(child.stdout.readline(), SOON_S)).decode()
        found = re.search(r"serving at (https?://\S+)", line)
        assert found, line
        yield found[1]


async def ended(*args: str) -> tuple[int, str]:
    """Exit status and standard error."""
    async with pdctl(*args) as child:
        _, err = await asyncio.wait_for(child.communicate(), SOON_S)
        assert child.returncode is not None
        return child.returncode, err.decode()


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder: ca.pem, cert.pem and key.pem of the server for ::1, rank/*.pem, tokens, token."""
    ca = trustme.CA()
    ca.cert_pem.write_to_path(tmp_path / "ca.pem")
    write_pair(ca, tmp_path, "::1")
    (tmp_path / "rank").mkdir()
    write_pair(ca, tmp_path / "rank", "rank.example")
    (tmp_path / "tokens").write_text(f"prefill:sha256:{hashlib.sha256(TOKEN.encode()).hexdigest()}\n")
    (tmp_path / "token").write_text(TOKEN + "\n")
    return tmp_path


@needs_ipv6
async def test_a_rank_registers_over_ipv6_with_a_certificate_and_a_token(files: Path) -> None:
    serve = ("--host", "::1", "--trust", "10.0.0.0/8", "--token-file", f"{files}/tokens")
    tls = ("--tls-cert", f"{files}/cert.pem", "--tls-key", f"{files}/key.pem", "--tls-client-ca", f"{files}/ca.pem")
    shown = ("--tls-cert", f"{files}/rank/cert.pem", "--tls-key", f"{files}/rank/key.pem")
    token = ("--token-file", f"{files}/token")
    async with served(*serve, *tls) as url:
        assert url.startswith("https://[::1]:")
        register = ("register", "--registry", url, *RANK, "--max-attempts", "1", "--tls-ca", f"{files}/ca.pem")
        assert (await ended(*register, *shown, *token))[0] == 0
        status, err = await ended(*register, *shown)
        assert status == 2, err
        assert "needs a token" in err or "outside of the trusted networks" in err, "by either wire"
        status, err = await ended(*register, *token)
        assert (status, "may want a certificate, and we have none (tls_cert)" in err) == (69, True), err


async def test_a_stranger_gets_nothing_of_the_plain_paths_and_a_token_opens_them(files: Path) -> None:
    """Of the paths that are answered in the parser's own callback too."""
    asked = [("GET", "/health"), ("GET", "/route"), ("PUT", "/route"), ("POST", "/query_dp_ranks"), ("GET", "/query")]
    token = {"Authorization": f"Bearer {TOKEN}"}
    async with served("--trust", "10.0.0.0/8", "--token-file", f"{files}/tokens") as url:
        for headers, denied in ((None, True), (token, False)):
            async with aiohttp.ClientSession(headers=headers) as http:
                for method, path in asked:
                    async with http.request(method, url + path) as answer:
                        assert (answer.status == 403) is denied, (method, path)
        async with aiohttp.ClientSession() as http:
            assert 'pdctl_access_denied_total{reason="untrusted"} 5.0' in await text(http, url + "/metrics")


async def test_a_token_that_is_added_holds_within_seconds_and_without_a_restart(files: Path) -> None:
    async with served("--token-file", f"{files}/tokens") as url, aiohttp.ClientSession() as http:
        assert await status_of_v1(http, url, "another-token-of-them") == 401
        change(files / "tokens", (files / "tokens").read_text() + "decode:another-token-of-them\n")
        await eventually(lambda: status_of_v1(http, url, "another-token-of-them"), lambda status: status == 200)
        assert await status_of_v1(http, url, TOKEN) == 200, "the old one holds as before"


async def test_a_broken_token_file_shows_in_the_metrics_and_locks_nobody_out(files: Path) -> None:
    async with served("--token-file", f"{files}/tokens") as url, aiohttp.ClientSession() as http:
        assert 'pdctl_access_files_stale{what="tokens"} 0.0' in await text(http, url + "/metrics")
        change(files / "tokens", "no colon in it\n")
        stale = 'pdctl_access_files_stale{what="tokens"} 1.0'
        await eventually(lambda: text(http, url + "/metrics"), lambda metrics: stale in metrics)
        assert await status_of_v1(http, url, TOKEN) == 200


async def test_a_row_is_changed_by_its_owner_only(files: Path) -> None:
    """By the holder of the name under which it was registered, whichever of the name's tokens is shown."""
    theirs, ours_too = "the-token-of-somebody-else", "the-next-token-of-prefill"
    change(files / "tokens", f"prefill:{TOKEN}\nprefill:{ours_too}\nother:{theirs}\n")
    row = Registration.of(ROW, ttl_s=60.0).to_body()
    async with served("--token-file", f"{files}/tokens") as url, aiohttp.ClientSession() as http:
        seat = f"{url}/v1/instances/a/ranks/{SEAT}"

        tell = teller(http)
        status, granted = await tell(TOKEN, "PUT", seat, row)
        assert status == 200
        for method, path, body in (("PUT", seat, row | {"port": 40999}), ("DELETE", seat, None)):
            status, said = await tell(theirs, method, path, body)
            assert (status, "other at 127.0.0.1" in said) == (409, True), (method, said)
            assert TOKEN not in said
        status, said = await tell(theirs, "POST", f"{seat}/renew", {"epoch": json.loads(granted)["epoch"]})
        assert status == 409, said
        assert (await tell(ours_too, "PUT", seat, row | {"port": 40999}))[0] == 200
        async with http.put(f"{url}/route", json=MOVED.to_body()) as stock:
            assert stock.status == 200, "another instance: `default`, which has no owner yet"
        assert (await tell(ours_too, "DELETE", seat))[0] == 200


@needs_ipv6
async def test_a_watch_shows_the_token_and_believes_the_authority_that_it_is_told(files: Path) -> None:
    tls = ("--tls-cert", f"{files}/cert.pem", "--tls-key", f"{files}/key.pem")
    ours = Credentials(token=TOKEN, tls_ca=files / "ca.pem")
    async with served("--host", "::1", "--token-file", f"{files}/tokens", *tls) as url:
        async with RegistryClient(url, credentials=ours) as client, aclosing(client.watch()) as news:
            async with asyncio.timeout(SOON_S):
                assert isinstance(await anext(news), Listed)
        nobody = Credentials(tls_ca=files / "ca.pem")
        async with RegistryClient(url, credentials=nobody) as client, aclosing(client.watch()) as news:
            with pytest.raises(RegistryRefused, match="needs a token"):
                await anext(news)


async def test_an_operator_with_the_admin_role_ends_what_others_have_registered(files: Path) -> None:
    theirs, admins = "the-token-of-somebody-else", "the-token-of-an-operator"
    change(files / "tokens", f"prefill:{TOKEN}\nother:{theirs}\nops:admin:{admins}\n")
    row = Registration.of(ROW, ttl_s=60.0).to_body()
    vllm = {"engine_id": "p", "dp_rank": 0, "tp_rank": 0, "pp_rank": 0}
    async with served("--token-file", f"{files}/tokens") as url, aiohttp.ClientSession() as http:
        v1, seat = f"{url}/v1", f"{url}/v1/instances/a/ranks/{SEAT}"

        tell = teller(http)
        status, granted = await tell(TOKEN, "PUT", seat, row)
        assert status == 200
        for path in (f"{v1}/instances/a/drain", f"{seat}/drain"):
            status, said = await tell(theirs, "POST", path)
            assert (status, "a token of the admin role" in said) == (409, True), said
        renewal = {"epoch": json.loads(granted)["epoch"]}
        assert (await tell(admins, "POST", f"{seat}/renew", renewal))[0] == 409, "its lease is not theirs to keep alive"
        assert (await tell(admins, "POST", f"{v1}/instances/a/drain"))[0] == 200
        assert '"draining"' in (await tell(TOKEN, "POST", f"{seat}/renew", renewal))[1]
        assert (await tell(theirs, "DELETE", seat))[0] == 409
        assert (await tell(admins, "DELETE", seat))[0] == 200
        assert (await tell(admins, "DELETE", seat))[0] == 404
        elsewhere = aiohttp.TCPConnector(local_addr=("127.0.0.2", 0))
        with socket.create_server(("127.0.0.2", 0)) as worker:
            row = vllm | {"addr": f"tcp://127.0.0.2:{worker.getsockname()[1]}"}
            async with (
                aiohttp.ClientSession(connector=elsewhere) as there,
                there.post(f"{url}/register", json=row) as it,
            ):
                assert it.status == 200, await it.text()
            status, said = await tell(theirs, "DELETE", f"{v1}/engines/p")
            assert (status, "a token of the admin role" in said) == (409, True), said
            assert (await tell(admins, "DELETE", f"{v1}/engines/p"))[0] == 200


async def eventually(ask: Callable[[], Awaitable[T]], is_so: Callable[[T], bool]) -> None:
    async with asyncio.timeout(SOON_S):
        while True:
            if is_so(await ask()):
                return
            await asyncio.sleep(0.05)


async def status_of_v1(http: aiohttp.ClientSession, url: str, token: str) -> int:
    async with http.get(url + "/v1/instances", headers={"Authorization": f"Bearer {token}"}) as answer:
        return answer.status


async def text(http: aiohttp.ClientSession, url: str) -> str:
    async with http.get(url) as answer:
        return await answer.text()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--trust", "everybody"), "'everybody'"),
        (("--token-file", "/nowhere/tokens"), "token file /nowhere/tokens cannot be used"),
        (("--tls-cert", "/nowhere/cert.pem"), "certificate /nowhere/cert.pem cannot be used"),
        (("--tls-key", "/nowhere/key.pem"), "without tls_cert"),
    ],
)
async def test_a_setting_that_cannot_be_used_starts_nothing(flags: tuple[str, ...], says: str) -> None:
    status, err = await ended("serve", "--port", "0", *flags)
    assert (status, says in err) == (2, True), err


async def test_a_loopback_address_from_another_host_is_refused_over_a_real_network() -> None:
    """This host by an address that is not loopback is another host to the registry, as a rank's would be."""
    address = own_address()
    if address is None:
        pytest.skip("this host has no address but loopback")
    async with served("--host", "0.0.0.0", "--trust", "any") as url:
        registry = f"http://{address}:{url.rpartition(':')[2]}"
        status, err = await ended("register", "--registry", registry, "--rank-host", "127.0.0.1", "--rank-port", "1")
        assert f"but it speaks from {address}" in err
        assert (status, "start the rank with that address (--host or SGLANG_HOST_IP)" in err) == (2, True), err


def own_address() -> str | None:
    """Asked of the routing table: no packet is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("198.51.100.1", 9))
        except OSError:
            return None
        host: str = probe.getsockname()[0]
    return None if host.startswith("127.") else host


async def test_stock_engines_get_a_listener_in_the_clear_beside_tls(files: Path) -> None:
    """They speak no TLS. Nothing of /v1 is to be had there, with whatever token."""
    tls = ("--tls-cert", f"{files}/cert.pem", "--tls-key", f"{files}/key.pem", "--tls-client-ca", f"{files}/ca.pem")
    async with pdctl(
        "serve", "--port", "0", "--token-file", f"{files}/tokens", *tls, "--listen", "a=127.0.0.1:0"
    ) as child:
        assert child.stdout is not None
        lines = [(await asyncio.wait_for(child.stdout.readline(), SOON_S)).decode() for _ in range(2)]
        assert re.fullmatch(r"serving at https://\S+\n", lines[0]), lines
        found = re.fullmatch(r"serving a at (http://\S+)\n", lines[1])
        assert found, lines
        async with aiohttp.ClientSession() as http:
            async with http.put(f"{found[1]}/route", json=MOVED.to_body()) as answer:
                assert answer.status == 200
            assert await status_of_v1(http, found[1], TOKEN) == 403
