"""Who answers at a URL: each kind of answer, from real sockets."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path

from pdctl.credentials import Credentials
from pdctl.identity import Service, Who, host_of, identify, is_ours, port_of
from tests.ports import free_port
from tests.service import service


@asynccontextmanager
async def saying(words: bytes) -> AsyncIterator[str]:
    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(words)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def test_nobody_is_told_apart_by_why() -> None:
    assert (await identify(f"http://127.0.0.1:{free_port()}")).who is Who.REFUSED
    assert (await identify("http://nowhere.invalid:8998")).who is Who.NO_NAME
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert (await identify(url, deadline_s=0.2)).who is Who.SILENT


async def test_a_program_that_speaks_no_http_is_told_from_one_that_does() -> None:
    async with saying(b"SSH-2.0-OpenSSH_9.2\r\n") as url:
        assert (await identify(url)).who is Who.NO_HTTP
    async with saying(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n") as url:
        assert (await identify(url)).who is Who.OTHER


async def test_plain_http_where_tls_is_meant_is_no_certificate_that_is_believed() -> None:
    async with saying(b"HTTP/1.1 400 Bad Request\r\n\r\n") as url:
        assert (await identify(url.replace("http:", "https:"))).who is Who.UNTRUSTED


async def test_a_registry_is_known_by_its_list_and_shown_the_token_that_it_wants(tmp_path: Path) -> None:
    token = "k" * 40
    (tokens := tmp_path / "tokens").write_text(f"me:{token}\n")
    with service(tmp_path / "log", "--journal", "memory:", "--token-file", str(tokens)) as running:
        assert (await identify(running.url)).who is Who.LOCKED
        assert (await identify(running.url, Credentials(token=token))).who is Who.REGISTRY
        async with Service(running.url, Credentials(token=token)) as asked:
            overview = await asked.get("/v1/overview")
    assert overview.status == 200
    assert overview.date is not None


async def test_which_hosts_are_this_one() -> None:
    assert [await is_ours(host) for host in ("127.0.0.1", "localhost", "203.0.113.7", "nowhere.invalid")] == [
        True,
        True,
        False,
        False,
    ]


def test_a_urls_port_is_its_schemes_where_it_says_none() -> None:
    urls = ("http://h:8998", "http://h", "https://h", "http://[::1]:7")
    assert [port_of(url) for url in urls] == [8998, 80, 443, 7]
    assert host_of(urls[-1]) == "::1"
