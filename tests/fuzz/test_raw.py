"""
Raw bytes at the hot paths, over real sockets to a real `pdctl serve`: whatever comes, no 500, nothing of ours is told,
and the next client is served.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.service import LEAKS, Service, service, until

HEARD_S = 0.25
"""How long an answer is waited for: most of what is sent here gets none, because it never ends."""
SERVED_S = 60.0
MIB = 1 << 20
CLOSE = "Connection: close"
STATUS = re.compile(rb"HTTP/1\.[01] (\d{3}) ")
ALIVE = b"GET /livez HTTP/1.1\r\nHost: r\r\nConnection: close\r\n\r\n"
RANK = {
    "attn_tp_size": 1, "attn_tp_rank": 0, "attn_cp_size": 1, "attn_cp_rank": 0, "attn_dp_size": 1, "attn_dp_rank": 0,
    "pp_size": 1, "pp_rank": 0, "system_dp_size": 1, "system_dp_rank": 0, "rank_ip": "127.0.0.1", "rank_port": 40123,
    "page_size": 16, "kv_cache_dtype": "bfloat16",
}  # fmt: skip
WHERE = "/route?prefill_dp_rank={}&prefill_cp_rank={}&target_tp_rank={}&target_pp_rank={}"


def request(method: str, path: str, body: object = None, *headers: str) -> bytes:
    """A well-formed request; `body` is bytes as they are, or an object as JSON."""
    payload = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    length = [] if body is None else [f"Content-Length: {len(payload)}"]
    lines = [f"{method} {path} HTTP/1.1", "Host: r", *length, *headers, "", ""]
    return "\r\n".join(lines).encode() + payload


SHAPE = {"attn_tp_size": 1, "attn_cp_size": 1, "dp_size": 1, "pp_size": 1, "page_size": 16, "kv_cache_dtype": None}
LEASED = {"host": "127.0.0.1", "port": 40124, "shape": SHAPE, "ttl_s": 5.0, "labels": {"zone": "a"}, "metadata": {}}
WORKER = {"engine_id": "e", "dp_rank": 0, "tp_rank": 0, "pp_rank": 0, "addr": "tcp://127.0.0.1:40125"}
HANDSHAKE = {"ip_or_host_name": "127.0.0.1", "rpc_port": 1}

HOT = [
    request("GET", WHERE.format(0, 0, 0, 0)),
    request("GET", WHERE.format(-1, -1, -1, -1)),
    request("GET", "/health"),
    request("PUT", "/route", RANK),
    request("POST", "/register_dp_rank", {"bootstrap_room": 2**62, "dp_rank": 0}),
    request("POST", "/query_dp_ranks", {"bootstrap_rooms": [2**62, 7]}),
    request("GET", "/v1/instances"),
    request("GET", "/v1/instances/default"),
    request("PUT", "/v1/instances/leased/ranks/tp0", LEASED),
    request("POST", "/v1/instances/leased/ranks/tp0/renew", {"epoch": 1, "rooms": 0}),
    request("POST", "/v1/instances/leased/drain", {"grace_s": 1.0}),
    request("DELETE", "/v1/instances/leased/ranks/tp0?epoch=1"),
    request("GET", "/v1/watch?since=0"),
    request("POST", "/register", WORKER),
    request("GET", "/e/e/query"),
    request("PUT", "/metadata?key=mooncake%2Frpc_meta%2Fn", HANDSHAKE),
    request("GET", "/metadata?key=mooncake%2Frpc_meta%2Fn"),
]


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One for all: what an earlier test has broken, a later one meets."""
    with service(tmp_path_factory.mktemp("raw") / "log") as running:
        yield running
        assert running.complaints() == []


async def say(port: int, sent: bytes, heard_s: float = HEARD_S) -> bytes:
    """What comes back until the service closes, or falls silent."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    heard = bytearray()
    try:
        writer.write(sent)
        async with asyncio.timeout(heard_s):
            while chunk := await reader.read(MIB):
                heard += chunk
    except (TimeoutError, ConnectionError):
        pass
    finally:
        writer.transport.abort()
    return bytes(heard)


async def volley(port: int, shots: list[bytes]) -> list[bytes]:
    """All at once, each on a connection of its own; then a good request has to be served."""
    answers = await asyncio.gather(*(say(port, shot) for shot in shots))
    assert b"\r\n\r\nOK" in await say(port, ALIVE, SERVED_S)
    return answers


def check(answer: bytes, sent: bytes) -> None:
    statuses = [int(status) for status in STATUS.findall(answer)]
    assert all(status < 500 or status == 503 for status in statuses), (sent[:300], answer[:500])
    assert not LEAKS.search(answer), (sent[:300], answer[:500])


def after_volley(port: int, shots: list[bytes]) -> None:
    for sent, answer in zip(shots, asyncio.run(volley(port, shots)), strict=True):
        check(answer, sent)


CLAIMS: list[tuple[str, str, dict[str, object]]] = [
    ("PUT", "/route", {**RANK}),
    ("PUT", "/v1/instances/leased/ranks/tp0", {**LEASED}),
    ("PUT", "/v1/instances/shaped/ranks/tp0", {**LEASED, "shape": {**SHAPE, "page_size": "16"}}),
    ("POST", "/v1/instances/leased/ranks/tp0/renew", {"epoch": 1, "rooms": 0}),
    ("POST", "/v1/instances/leased/drain", {"grace_s": 1.0}),
    ("POST", "/register", {**WORKER}),
    ("PUT", "/metadata?key=mooncake%2Frpc_meta%2Fn", {**HANDSHAKE}),
]

# --- what hypothesis thinks of

SPLICES = [
    b"\r\n", b"\n", b"\0", b"\xff\xfe", b"%00", b"%ff", b"%0d%0a", b"&&==", b"#", b"?", b"//..//", b"{", b"]", b'"',
    b"\\ud800", b"-1", b"1e999", b"NaN", b"9" * 5000, b"Transfer-Encoding: chunked\r\n", b"Content-Length: 5\r\n",
    b"Connection: upgrade\r\n", b" HTTP/1.0\r\n", b"GET / HTTP/1.1\r\n\r\n",
]  # fmt: skip


@st.composite
def wrecked(draw: st.DrawFn) -> bytes:
    """A good request that something has happened to: cut, doubled, torn out, spliced."""
    sent = draw(st.sampled_from(HOT))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(sent)))
        upto = min(len(sent), at + draw(st.integers(0, 24)))
        instead = draw(st.one_of(st.sampled_from(SPLICES), st.binary(max_size=16), st.just(sent[at:upto] * 2)))
        sent = sent[:at] + instead + sent[upto:]
    return sent


@st.composite
def with_any_body(draw: st.DrawFn) -> bytes:
    """A good head, and a body that is anything: bytes, or JSON of any kind."""
    line = draw(st.sampled_from([sent for sent in HOT if b"Content-Length" in sent])).split(b"\r\n")[0].decode()
    method, where, _ = line.split()
    return request(method, where, draw(st.one_of(st.binary(max_size=200), ANY_JSON)))


ATOMS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20))
ANY_JSON = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.sampled_from([*RANK, "bootstrap_room", "dp_rank", "bootstrap_rooms"]), inner, max_size=16),
    ),
    max_leaves=24,
)


@settings(max_examples=12, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(
    shots=st.lists(st.one_of(wrecked(), wrecked(), with_any_body(), st.binary(max_size=400)), min_size=40, max_size=40)
)
def test_wrecked_requests_are_refused_or_dropped_and_the_next_client_is_served(
    registry: Service, shots: list[bytes]
) -> None:
    after_volley(registry.port, shots)


@settings(max_examples=150, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(claim=st.sampled_from(CLAIMS), data=st.data())
def test_one_field_of_a_claim_may_be_anything(
    registry: Service, claim: tuple[str, str, dict[str, object]], data: st.DataObject
) -> None:
    method, path, body = claim
    sent = request(method, path, body | {data.draw(st.sampled_from(list(body))): data.draw(ANY_JSON)}, CLOSE)
    answer = asyncio.run(say(registry.port, sent, SERVED_S))
    assert STATUS.match(answer), sent
    check(answer, sent)


# --- what attackers and broken clients are known for


def chunked(*chunks: bytes) -> bytes:
    head = b"POST /query_dp_ranks HTTP/1.1\r\nHost: r\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
    return head + b"".join(chunks)


def get(path: bytes, *headers: bytes) -> bytes:
    return b"\r\n".join([b"GET " + path + b" HTTP/1.1", b"Host: r", CLOSE.encode(), *headers, b"", b""])


def where(*ranks: str) -> bytes:
    return WHERE.format(*ranks).encode()


def post(body: bytes, *headers: str) -> bytes:
    return request("POST", "/query_dp_ranks", body, CLOSE, *headers)


def put(body: bytes, *headers: str) -> bytes:
    return request("PUT", "/route", body, CLOSE, *headers)


GOOD = json.dumps({"bootstrap_rooms": [1]}).encode()
HOSTILE = {
    "a length below zero": request("PUT", "/route", None, "Content-Length: -5"),
    "a length of 2**64": request("PUT", "/route", None, "Content-Length: 18446744073709551616"),
    "two lengths": put(b"{}", "Content-Length: 200"),
    "a length and chunks": post(b"0\r\n\r\n", "Transfer-Encoding: chunked"),
    "an unknown transfer encoding": post(GOOD, "Transfer-Encoding: gzip"),
    "a chunk size that is no number": chunked(b"zz\r\n{}\r\n0\r\n\r\n"),
    "a chunk size beyond 64 bits": chunked(b"fffffffffffffffff\r\n{}\r\n0\r\n\r\n"),
    "chunks with trailers": chunked(b"%x\r\n" % len(GOOD), GOOD, b"\r\n0\r\nX-Trailer: 1\r\n\r\n"),
    "a thousand one-byte chunks": chunked(b"1\r\n \r\n" * 1000, b"%x\r\n" % len(GOOD), GOOD, b"\r\n0\r\n\r\n"),
    "a header of a MiB": get(b"/health", b"X-Long: " + b"a" * MIB),
    "ten thousand headers": get(b"/health", *(b"X-%d: 1" % n for n in range(10_000))),
    "a header without a name": get(b"/health", b": nobody"),
    "a header with a NUL": get(b"/health", b"X: a\0b"),
    "a folded header": get(b"/health", b"X: a\r\n b"),
    "a path of a MiB": get(b"/" + b"a" * MIB),
    "a query of a MiB": get(b"/route?" + b"prefill_dp_rank=1&" * 60_000),
    "a path that is no UTF-8": get(b"/v1/instances/%ff%fe"),
    "a NUL in the path": get(b"/v1/instances/%00"),
    "a path that climbs": get(b"/v1/instances/..%2f..%2f..%2fetc%2fpasswd"),
    "a query that is no UTF-8": get(where("%ff", "%fe", "%00", "%c3")),
    "numbers of other scripts": get(where("٠", "０", "०", "²")),
    "a number with underscores": get(where("0_0", "0", "0", "0")),
    "a number of 5,000 digits": get(where("9" * 5000, "0", "0", "0")),
    "the whole URL": get(b"http://elsewhere.example/route?prefill_dp_rank=-1"),
    "no path": b"GET  HTTP/1.1\r\nHost: r\r\n\r\n",
    "the asterisk": b"OPTIONS * HTTP/1.1\r\nHost: r\r\nConnection: close\r\n\r\n",
    "CONNECT": b"CONNECT example:443 HTTP/1.1\r\nHost: r\r\n\r\n",
    "TRACE": b"TRACE /route HTTP/1.1\r\nHost: r\r\nCookie: secret=1\r\nConnection: close\r\n\r\n",
    "a method nobody knows": b"FROBNICATE /route HTTP/1.1\r\nHost: r\r\nConnection: close\r\n\r\n",
    "a method of a MiB": b"A" * MIB,
    "no host": b"GET /health HTTP/1.1\r\nConnection: close\r\n\r\n",
    "two hosts": get(b"/health", b"Host: another"),
    "a host that is no name": b"GET /health HTTP/1.1\r\nHost: \xff[:]:99999999999/../x\r\nConnection: close\r\n\r\n",
    "HTTP/0.9": b"GET /health\r\n",
    "HTTP/9.9": b"GET /health HTTP/9.9\r\nHost: r\r\n\r\n",
    "HTTP/2 by prior knowledge": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(64),
    "HTTP/2 by upgrade": get(b"/health", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABkAAQAAP__"),
    "a web socket": get(b"/v1/watch", b"Upgrade: websocket", b"Sec-WebSocket-Key: x", b"Sec-WebSocket-Version: 13"),
    "TLS to a plain port": bytes.fromhex("16030100f8010000f40303") + bytes(240),
    "an expectation": put(b"{}", "Expect: 100-continue"),
    "another expectation": put(b"{}", "Expect: the-worst"),
    "a body with a GET": request("GET", "/health", b"{" * 1000, CLOSE),
    "a HEAD with a body": request("HEAD", "/health", b"x" * 1000, CLOSE),
    "a body of nothing": put(b""),
    "a byte order mark": put(b"\xef\xbb\xbf{}"),
    "UTF-16": put(json.dumps(RANK).encode("utf-16")),
    "compressed": put(b"\x1f\x8b\x08" + bytes(30), "Content-Encoding: gzip"),
    "nested without end": put(b"[" * 500_000),
    "objects without end": put(b'{"a":' * 100_000),
    "not a number": put(json.dumps(RANK | {"page_size": float("nan")}).encode()),
    "beyond a float": put(json.dumps(RANK).replace("16", "1e999").encode()),
    "an integer of 100,000 digits": put(json.dumps(RANK).replace("16", "9" * 100_000).encode()),
    "the same key twice": put(b'{"rank_ip": "10.0.0.1", ' + json.dumps(RANK)[1:].encode()),
    "half a surrogate": put(json.dumps(RANK | {"kv_cache_dtype": "\ud800"}).encode()),
    "half a surrogate as a name": put(json.dumps(RANK | {"rank_ip": "\udfff"}).encode()),
    "a million rooms that are none": post(b'{"bootstrap_rooms": [' + b"[]," * 300_000 + b"[]]}"),
    "a body over the limit": put(b" " * (16 * MIB)),
    "a value over the limit": request("PUT", "/metadata?key=mooncake/ram/n", b"x" * (2 * MIB), CLOSE),
    "a key of 60,000 characters": get(b"/metadata?key=" + b"k" * 60_000),
    "a key of NULs": request("PUT", "/metadata?key=%00%00", b"x", CLOSE),
    "a cursor of 5,000 digits": get(b"/v1/watch?since=" + b"9" * 5000),
    "a cursor that is none": get(b"/v1/watch?since=%ff-%00"),
    "a seat that is none": request("PUT", "/v1/instances/x/ranks/tp99999999999999999999", LEASED, CLOSE),
    "a seat of another script": request("PUT", "/v1/instances/x/ranks/tp%D9%A0", LEASED, CLOSE),
    "a lease without end": request("PUT", "/v1/instances/x/ranks/tp0", LEASED | {"ttl_s": float("inf")}, CLOSE),
    "a lease of no time": request("PUT", "/v1/instances/x/ranks/tp0", LEASED | {"ttl_s": 5e-324}, CLOSE),
    "metadata without end": request("PUT", "/v1/instances/x/ranks/tp0", LEASED | {"metadata": {"a": "x" * MIB}}, CLOSE),
    "ten thousand labels": request(
        "PUT", "/v1/instances/x/ranks/tp0", LEASED | {"labels": {str(n): "" for n in range(10_000)}}, CLOSE
    ),
    "an epoch of 5,000 digits": request("DELETE", "/v1/instances/x/ranks/tp0?epoch=" + "9" * 5000, None, CLOSE),
    "an address that is no address": request("POST", "/register", WORKER | {"addr": "tcp://[::1"}, CLOSE),
    "an address with a newline": request("POST", "/register", WORKER | {"addr": "tcp://a\nb:1"}, CLOSE),
}  # fmt: skip


@pytest.mark.parametrize("sent", HOSTILE.values(), ids=HOSTILE)
def test_hostile_http_is_refused_or_dropped_and_the_next_client_is_served(registry: Service, sent: bytes) -> None:
    after_volley(registry.port, [sent, sent])


PUT_RANK = request("PUT", "/route", RANK)
# Ways of several kinds through the service, each with an answer that tells it from the others
MIXED = [
    *(request("POST", "/register_dp_rank", {"bootstrap_room": 10**9 + n, "dp_rank": n}) for n in range(4)),
    *(request("POST", "/query_dp_ranks", {"bootstrap_rooms": [10**9 + n, 10**10 + n]}) for n in range(4)),
    request("POST", "/query_dp_ranks", {"bootstrap_rooms": [*range(5000)]}),
    request("GET", "/health"),
    request("GET", "/livez"),
    request("GET", where("7", "0", "0", "0").decode()),
    request("GET", "/v1/instances/nobody"),
    request("PUT", "/route", b"{"),
    PUT_RANK,
    request("DELETE", "/route"),
]


def answers_in(heard: bytes) -> list[tuple[int, bytes]]:
    """(status, body) of each answer, by its length."""
    found = []
    while heard:
        head, _, rest = heard.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)\r\ncontent-length: (\d+)", head)
        assert length, heard[:300]
        found.append((int(head.split()[1]), rest[: int(length[1])]))
        heard = rest[int(length[1]) :]
    return found


async def dribble(port: int, pieces: list[bytes], heard_s: float) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        for piece in pieces:
            writer.write(piece)
            await asyncio.sleep(0.001)
        async with asyncio.timeout(heard_s):
            return await reader.read()
    finally:
        writer.transport.abort()


@settings(max_examples=25, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(
    order=st.lists(st.integers(0, len(MIXED) - 1), min_size=2, max_size=40),
    places=st.lists(st.floats(0, 1), max_size=12),
)
def test_however_the_bytes_are_cut_each_question_gets_its_own_answer_in_its_turn(
    registry: Service, order: list[int], places: list[float]
) -> None:
    known = asyncio.run(dribble(registry.port, [*MIXED[:4], PUT_RANK, ALIVE], SERVED_S))
    assert {status for status, _ in answers_in(known)} == {200}  # from here on no answer changes
    alone = {n: answers_in(asyncio.run(dribble(registry.port, [MIXED[n], ALIVE], SERVED_S)))[0] for n in {*order}}
    stream = b"".join(MIXED[n] for n in order) + ALIVE
    cuts = sorted(int(place * len(stream)) for place in places)
    pieces = [stream[at:upto] for at, upto in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    heard = asyncio.run(dribble(registry.port, pieces, SERVED_S))
    assert answers_in(heard) == [*(alone[n] for n in order), (200, b"OK")]


def test_who_never_finishes_a_request_keeps_nobody_waiting(registry: Service) -> None:
    async def crowd() -> None:
        openings = await asyncio.gather(*(asyncio.open_connection("127.0.0.1", registry.port) for _ in range(300)))
        for number, (_, writer) in enumerate(openings):
            writer.write([b"G", b"PUT /route HTTP/1.1\r\nContent-Length: 900\r\n\r\n{", ALIVE[:-2]][number % 3])
        assert b"\r\n\r\nOK" in await say(registry.port, ALIVE, SERVED_S)
        for _, writer in openings:
            writer.transport.abort()

    asyncio.run(crowd())


@pytest.mark.parametrize("path", ["/health", "/v1/instances/default", "/metrics"])
def test_who_never_reads_an_answer_fills_no_memory(registry: Service, path: str) -> None:
    """Some 40 MiB of pipelined questions, as far as the service takes them: it stops reading where nobody listens."""

    async def deaf() -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", registry.port, limit=1024)
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        before = registry.resident_nbytes()
        try:
            writer.write(request("GET", path) * 500_000)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(2.0):
                    await writer.drain()
            assert registry.resident_nbytes() - before < 32 * MIB
            assert b"\r\n\r\nOK" in await say(registry.port, ALIVE, SERVED_S)
        finally:
            writer.transport.abort()
            await asyncio.sleep(0)

    asyncio.run(deaf())


@pytest.mark.parametrize(
    "sent",
    [
        request("PUT", "/route", RANK | {"kv_cache_dtype": "x\nevent=forged"}, CLOSE),
        request("PUT", "/route", RANK | {"rank_ip": "10.0.0.1\r\nevent=forged"}, CLOSE),
        get(where("%0aevent=forged", "0", "0", "0")),
        get(b"/v1/instances/x%0aevent=forged"),
        get(b"/v1/instances/x\x1b]0;forged\x07"),
    ],
    ids=["dtype", "address", "query", "path", "terminal"],
)
def test_nobody_can_write_a_line_of_our_log(registry: Service, sent: bytes) -> None:
    asyncio.run(say(registry.port, sent, SERVED_S))
    lines = registry.log().splitlines()
    assert not [line for line in lines if line.startswith("event=forged")]
    assert all(line.startswith(("timestamp=", "serving at ")) for line in lines)
    assert "\x1b" not in registry.log()


def test_after_all_that_no_connection_is_left_and_no_memory_has_run_away(registry: Service) -> None:
    """Last in this file: the listening socket and nothing else."""
    until(lambda: registry.connections() <= len(registry.urls))
    assert registry.resident_nbytes() < 400 * MIB
    assert registry.complaints() == []
