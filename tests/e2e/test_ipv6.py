"""A cluster that has IPv6 and nothing else: registry, control links, handshakes and bytes, all over ::1."""

from __future__ import annotations

import dataclasses
import json
import re
import socket
import urllib.request
from pathlib import Path

import aiohttp

from pdctl.client import RegistryClient
from pdctl.core.address import Endpoint
from pdctl.core.route import Announcement, Seat, Shape
from tests.e2e.kv import MHA
from tests.e2e.test_rooms import digest, rank, why
from tests.service import Service, service, until
from tests.test_cli import ended
from tests.test_server import needs_ipv6

pytestmark = needs_ipv6

SHAPE = Shape(attn_tp_size=1, attn_cp_size=1, dp_size=1, pp_size=1, page_size=16, kv_cache_dtype="bfloat16")
SEAT = Seat(0, 0, 0, 0)
WHERE = "/route?prefill_dp_rank=0&prefill_cp_rank=0&target_tp_rank=0&target_pp_rank=0"


def got(url: str) -> object:
    with urllib.request.urlopen(url, timeout=60) as answer:
        return json.load(answer)


async def test_a_room_moves_between_ranks_that_found_each_other_over_ipv6_alone(tmp_path: Path) -> None:
    with service(tmp_path / "log", "--host", "::1") as registry:
        assert registry.url == f"http://[::1]:{registry.port}"
        with rank("prefill", MHA, "::1") as prefill, rank("decode", MHA, "::1") as decode:
            listens = Endpoint.parse(prefill.hello["link"])
            assert listens.host == "::1"
            async with RegistryClient(registry.url) as client:
                await client.register(Announcement(SEAT, SHAPE, listens))
                found = await client.rank(SEAT)
            assert found == listens
            await prefill.ask("send", room=7, chunks=[[5, 6], [7]], row=2)
            await decode.ask("receive", room=7, prefill=str(found), pages=[9, 10, 11], row=5)
            assert await why(decode, 7) == await why(prefill, 7) == ""
            assert await digest(decode, [9, 10, 11], 5) == await digest(prefill, [5, 6, 7], 2)


async def test_a_rank_is_registered_and_found_by_its_ipv6_address_from_the_command_line(tmp_path: Path) -> None:
    with service(tmp_path / "log", "--host", "::1") as registry:
        status, _, err = await ended(
            *("register", "--registry", registry.url, "--rank-host", "fd00::7", "--rank-port", "40123"),
        )
        assert status == 0, err
        assert got(registry.url + WHERE) == {"rank_ip": "fd00::7", "rank_port": 40123}


def test_every_address_means_both_families_and_the_caller_is_known_by_his_own(tmp_path: Path) -> None:
    with service(tmp_path / "log", "--host", "::") as registry:
        for host, known_as in (("127.0.0.1", "127.0.0.1"), ("::1", "::1")):
            with socket.create_connection((host, registry.port), timeout=60) as sock:
                sock.sendall(b"PUT /route HTTP/1.1\r\nHost: r\r\nContent-Length: 1\r\nConnection: close\r\n\r\n{")
                assert sock.makefile("rb").readline().split()[1] == b"400"
            assert f" peer={known_as} " in registry.log()


async def test_every_wire_and_a_lease_are_spoken_over_ipv6(tmp_path: Path) -> None:
    with service(tmp_path / "log", "--host", "::1", "--listen", "prefill-a=[::1]:0") as registry:
        await_line(registry, "serving prefill-a at ")
        found = re.search(r"serving prefill-a at (http://\[::1\]:\d+)", registry.log())
        assert found, registry.log()
        async with aiohttp.ClientSession() as http:
            lease = {"host": "::1", "port": 40123, "shape": dataclasses.asdict(SHAPE), "ttl_s": 5.0}
            worker = {"engine_id": "e", "dp_rank": 0, "tp_rank": 0, "pp_rank": 0, "addr": "tcp://[::1]:40125"}
            handshake = {"ip_or_host_name": "::1", "rpc_port": 40126}
            for method, path, body in (
                ("PUT", "/v1/instances/prefill-a/ranks/tp0", lease),
                ("POST", "/register", worker),
                ("PUT", "/metadata?key=mooncake%2Frpc_meta%2Fn", handshake),
            ):
                async with http.request(method, registry.url + path, json=body) as answer:
                    assert answer.status == 200, await answer.text()
            assert got(found[1] + WHERE) == {"rank_ip": "::1", "rank_port": 40123}
            assert got(registry.url + "/metadata?key=mooncake%2Frpc_meta%2Fn") == handshake
            async with http.get(f"{registry.url}/v1/instances/prefill-a") as answer:
                assert (await answer.json())["alive_seats"][0]["address"] == "[::1]:40123"


def await_line(registry: Service, words: str) -> None:
    until(lambda: words in registry.log())
