"""
The requests of which stock SGLang's answers are kept: what is asked, after what, and where pdctl answers otherwise.

Only questions stand here, and how they are asked; the answers come from the stock server (capture.py) and are never
typed by hand.
"""

from __future__ import annotations

import dataclasses
import http.client
import json
from dataclasses import dataclass, field
from typing import Any

HEADERS = ("content-type", "allow")  # those that a client could read something from

JSON = dict[str, Any]
Body = JSON | list[Any] | str | None


@dataclass(frozen=True, slots=True)
class Request:
    """`text` goes out as it is, followed by `spaces` blanks (JSON does not mind them)."""

    method: str
    path: str
    text: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    spaces: int = 0

    def payload(self) -> bytes | None:
        return None if self.text is None else (self.text + " " * self.spaces).encode()


@dataclass(frozen=True, slots=True)
class Instead:
    """pdctl does not copy this answer: it gives `status`, and its text names `names` (the field, or the reason)."""

    status: int
    names: str
    why: str


@dataclass(frozen=True, slots=True)
class Pair:
    """One question after some others, to a registry that was empty before."""

    name: str
    note: str
    request: Request
    before: tuple[Request, ...] = ()
    defect: Instead | None = None
    only_status: bool = False  # the text is the HTTP library's own

    def to_json(self) -> JSON:
        plain = dataclasses.asdict(self)
        return {key: plain[key] for key in ("note", "before", "request", "defect", "only_status")}

    @classmethod
    def from_json(cls, name: str, content: JSON) -> Pair:
        return cls(
            name=name,
            note=content["note"],
            request=Request(**content["request"]),
            before=tuple(Request(**each) for each in content["before"]),
            defect=Instead(**content["defect"]) if content["defect"] else None,
            only_status=content["only_status"],
        )


def ask(address: str, request: Request) -> JSON:
    """The answer of the registry at `host:port`, over a connection of its own that adds no header."""
    connection = http.client.HTTPConnection(address, timeout=60)
    connection.request(request.method, request.path, body=request.payload(), headers=request.headers)
    reply = connection.getresponse()
    headers = {name: value for name in HEADERS if (value := reply.getheader(name))}
    answer = {"status": reply.status, "headers": headers, "body": reply.read().decode()}
    connection.close()
    return answer


AS_JSON = {"Content-Type": "application/json"}


def asked(method: str, path: str, body: Body, headers: dict[str, str] | None = None, spaces: int = 0) -> Request:
    text = body if isinstance(body, str) or body is None else json.dumps(body)
    return Request(method, path, text, AS_JSON if headers is None else headers, spaces)


def rank(**changes: object) -> JSON:
    """What rank 0 of a single-rank prefill instance PUTs; a change to `...` leaves the field out."""
    body: JSON = {
        "attn_tp_size": 1,
        "attn_tp_rank": 0,
        "attn_cp_size": 1,
        "attn_cp_rank": 0,
        "attn_dp_size": 1,
        "attn_dp_rank": 0,
        "pp_size": 1,
        "pp_rank": 0,
        "system_dp_size": 1,
        "system_dp_rank": 0,
        "rank_ip": "10.0.0.1",
        "rank_port": 40000,
        "page_size": 16,
        "kv_cache_dtype": "bfloat16",
        "kv_layout": None,
        "dsv41_spec_layout": None,
        "load_balance_method": "follow_bootstrap_room",
        "enable_dsa_cache_layer_split": False,
        "enable_kv_cache_sharding": False,
        "prefill_http_port": 30000,
        "decode_allocation_policy": "early",
    }
    return {name: value for name, value in (body | changes).items() if value is not ...}


def put(**changes: object) -> Request:
    return asked("PUT", "/route", rank(**changes))


def tp(index: int, size: int = 2, **changes: object) -> Request:
    return put(attn_tp_size=size, attn_tp_rank=index, rank_port=40000 + index, **changes)


def get(dp: object = -1, cp: object = -1, tp: object = -1, pp: object = -1, extra: str = "") -> Request:
    query = f"prefill_dp_rank={dp}&prefill_cp_rank={cp}&target_tp_rank={tp}&target_pp_rank={pp}{extra}"
    return Request("GET", f"/route?{query}")


def room(number: object, dp_rank: object = 0, **changes: object) -> Request:
    body = {"bootstrap_room": number, "dp_rank": dp_rank} | changes
    return asked("POST", "/register_dp_rank", {k: v for k, v in body.items() if v is not ...})


def query(rooms: object) -> Request:
    return asked("POST", "/query_dp_ranks", {"bootstrap_rooms": rooms})


SPEC_LAYOUT = {
    "num_draft_tokens": 5,
    "compression_ratios": [4, 2],
    "kv_layer_ids": [0, 1],
    "kv_item_lens": [4096, 4096],
    "state_types": ["swa", "swa"],
    "state_item_lens": [[512], [512]],
}
TWO_BY_TWO = tuple(
    put(attn_dp_size=2, attn_dp_rank=d, attn_tp_size=2, attn_tp_rank=t, rank_port=40000 + 2 * d + t)
    for d in range(2)
    for t in range(2)
)
OPTIONAL = dict.fromkeys(
    (
        "kv_layout",
        "dsv41_spec_layout",
        "load_balance_method",
        "enable_dsa_cache_layer_split",
        "enable_kv_cache_sharding",
        "prefill_http_port",
        "decode_allocation_policy",
    ),
    ...,
)
HUGE = 2**63 + 5


def topologies() -> list[Pair]:
    def kept(name: str, note: str, *before: Request) -> Pair:
        return Pair(f"topology_{name}", note, get(), before)

    return [
        kept("one_rank", "the smallest instance", put()),
        kept("dp2_tp2", "four ranks, all there", *TWO_BY_TWO),
        kept("defaults", "every optional field left out", put(**OPTIONAL)),
        kept("null_dtype", "kv_cache_dtype may be null", put(kv_cache_dtype=None)),
        kept("numeric_text", "page_size and ports as text become integers", put(page_size="16", rank_port="40000")),
        kept("kv_layout", "a DeepSeek-V4 pool", put(kv_layout="flashmla")),
        kept("spec_layout", "DeepSeek-V4.1 DSpark", put(dsv41_spec_layout=SPEC_LAYOUT)),
        kept("round_robin", "rooms do not name their dp rank", put(load_balance_method="round_robin")),
        kept("switches", "all switches on", put(enable_dsa_cache_layer_split=True, enable_kv_cache_sharding=True)),
        kept("prefill_complete", "the later policy", put(decode_allocation_policy="prefill_complete")),
        kept("no_http_port", "no API port", put(prefill_http_port=None)),
        kept(
            "system_dp",
            "two replicas: their rank comes from system_dp_rank",
            *(put(system_dp_size=2, system_dp_rank=d, rank_port=40000 + d) for d in range(2)),
        ),
        kept(
            "cp2_pp2",
            "context and pipeline ranks",
            *(put(attn_cp_size=2, attn_cp_rank=c, pp_size=2, pp_rank=p, rank_port=40000 + 2 * c + p)
              for c in range(2) for p in range(2)),
        ),
        kept("empty", "nobody registered", *()),
        kept("incomplete", "one of two ranks", tp(0)),
    ]  # fmt: skip


def rank_lookups() -> list[Pair]:
    return [
        Pair("rank", "one rank's address", get(1, 0, 1, 0), TWO_BY_TWO),
        Pair("rank_extra_query", "unknown parameters are ignored", get(0, 0, 0, 0, "&colour=red"), (put(),)),
        Pair("rank_numeric_text_port", "the port is an integer", get(0, 0, 0, 0), (put(rank_port="40000"),)),
        Pair("rank_ipv6", "the address is passed through", get(0, 0, 0, 0), (put(rank_ip="fd00::7"),)),
        Pair("rank_name", "a host name too", get(0, 0, 0, 0), (put(rank_ip="prefill-0.example"),)),
        Pair("rank_unknown", "no such seat", get(0, 0, 7, 0), (put(),)),
        Pair("rank_some_minus_one", "-1 in some only is an ordinary, unknown rank", get(-1, 0, 0, 0), (put(),)),
        Pair("rank_not_ready", "before all are there, not even those that are", get(0, 0, 0, 0), (tp(0),)),
        Pair("rank_moved", "a row seen again replaces the old one", get(0, 0, 0, 0), (put(), put(rank_port=40009))),
        Pair("route_no_query", "nothing asked", Request("GET", "/route"), (put(),)),
        Pair("route_missing_query", "three of four", Request("GET", "/route?prefill_dp_rank=0&prefill_cp_rank=0&target_tp_rank=0"), (put(),)),  # noqa: E501
        Pair("route_empty_query", "an empty value is a missing one", get(0, 0, "", 0), (put(),)),
        Pair("route_missing_query_unready", "checked before readiness", Request("GET", "/route")),
    ]  # fmt: skip


def accepted_puts() -> list[Pair]:
    return [
        Pair("put", "a rank announces itself", put()),
        Pair("put_again", "and again: the same seat", put(), (put(),)),
        Pair("put_second", "the second of two", tp(1), (tp(0),)),
        Pair("put_defaults", "every optional field left out", put(**OPTIONAL)),
        Pair("put_unknown_field", "unknown fields are ignored", put(colour="red")),
        Pair("put_plain_text", "the content type is ignored", asked("PUT", "/route", rank(), {"Content-Type": "text/plain"})),  # noqa: E501
        Pair("put_no_content_type", "or absent", asked("PUT", "/route", rank(), {})),
        Pair("put_other_policy", "the policies must agree", tp(1, decode_allocation_policy="prefill_complete"), (tp(0),)),  # noqa: E501
        Pair("put_other_spec_layout", "and so must these", tp(1, dsv41_spec_layout=SPEC_LAYOUT), (tp(0),)),
        Pair("put_too_large", "more than 1 MiB", asked("PUT", "/route", rank(), spaces=2**20), only_status=True),
    ]  # fmt: skip


def room_pairs() -> list[Pair]:
    return [
        Pair("room", "a sender says which dp rank serves its room", room(77, 1), (put(),)),
        Pair("room_early", "even before any rank is registered", room(77, 1)),
        Pair("room_huge", "rooms have no upper bound", room(HUGE, 1)),
        Pair("room_numeric_text", "numeric text is converted", room("77", "1")),
        Pair("rooms", "known ones only", query([77, 78, 79]), (room(77, 1), room(79, 0))),
        Pair("rooms_none", "nothing known", query([1, 2])),
        Pair("rooms_empty", "nothing asked", query([])),
        Pair("rooms_huge", "beyond 2**63", query([HUGE]), (room(HUGE, 3),)),
        Pair("rooms_numeric_text", "text converted, keys in plain decimal", query(["077"]), (room(77, 1),)),
        Pair("rooms_last_wins", "said twice", query([77]), (room(77, 1), room(77, 2))),
    ]


def other_pairs() -> list[Pair]:
    return [
        Pair("health", "nobody registered, still 200", Request("GET", "/health")),
        Pair("health_head", "HEAD too", Request("HEAD", "/health")),
        Pair("route_delete", "no other method", Request("DELETE", "/route")),
        Pair("route_post", "no other method", asked("POST", "/route", rank())),
        Pair("unknown_path", "no other path", Request("GET", "/nothing"), only_status=True),
        Pair("room_get", "no other method", Request("GET", "/register_dp_rank"), only_status=True),
        Pair("rooms_get", "no other method", Request("GET", "/query_dp_ranks"), only_status=True),
        Pair("health_post", "no other method", asked("POST", "/health", {}), only_status=True),
    ]


def _bad_put(name: str, names: str, why: str, request: Request, *before: Request, status: int = 400) -> Pair:
    return Pair(f"defect_put_{name}", why, request, before, Instead(status, names, why))


REQUIRED = (
    "attn_tp_size",
    "attn_tp_rank",
    "attn_cp_size",
    "attn_cp_rank",
    "attn_dp_size",
    "attn_dp_rank",
    "pp_size",
    "pp_rank",
    "system_dp_size",
    "system_dp_rank",
    "rank_ip",
    "rank_port",
    "page_size",
    "kv_cache_dtype",
)


def malformed_puts() -> list[Pair]:
    missing = [_bad_put(f"without_{each}", each, "a needed field is missing", put(**{each: ...})) for each in REQUIRED]
    return [
        *missing,
        _bad_put("bad_json", "JSON", "not JSON at all", asked("PUT", "/route", '{"attn_tp_size": ')),
        _bad_put("list", "object", "JSON, but no object", asked("PUT", "/route", [1, 2])),
        _bad_put("empty", "JSON", "no body", asked("PUT", "/route", "")),
        _bad_put("port_text", "rank_port", "the port is a word", put(rank_port="here")),
        _bad_put("port_null", "rank_port", "the port is null", put(rank_port=None)),
        _bad_put("page_size_text", "page_size", "the page size is a word", put(page_size="big")),
        _bad_put("tp_rank_too_high", "attn_tp_rank", "rank 2 of 2: 200 and counted", tp(2)),
        _bad_put("pp_rank_negative", "pp_rank", "a negative rank: 200", put(pp_rank=-1)),
        _bad_put("cp_size_zero", "attn_cp_size", "no ranks at all, and so ready at once", put(attn_cp_size=0)),
        _bad_put("tp_size_text", "attn_tp_size", "a size as text breaks every later request", put(attn_tp_size="two")),
        _bad_put("tp_size_null", "attn_tp_size", "a null size", put(attn_tp_size=None)),
        _bad_put("tp_rank_null", "attn_tp_rank", "a null rank: 200", put(attn_tp_rank=None)),
        _bad_put("port_zero", "rank_port", "a port that nobody can have: 200", put(rank_port=0)),
        _bad_put("port_too_high", "rank_port", "a port that nobody can have: 200", put(rank_port=70000)),
        _bad_put("ip_empty", "rank_ip", "an address that is none: 200", put(rank_ip="")),
        _bad_put("ip_number", "rank_ip", "an address that is a number: 200", put(rank_ip=7)),
        _bad_put("page_size_zero", "page_size", "pages of no tokens: 200", put(page_size=0)),
    ]


def contradicting_puts() -> list[Pair]:
    def other(name: str, **changes: Any) -> Pair:
        why = "contradicts the instance, is ignored with 200"
        return _bad_put(f"other_{name}", next(iter(changes)), why, tp(1, **changes), tp(0))

    return [
        _bad_put("other_tp_size", "attn_tp_size", "contradicts the instance, 200", tp(1, size=4), tp(0)),
        other("cp_size", attn_cp_size=2),
        _bad_put("other_dp_size", "dp_size", "contradicts the instance, 200", tp(1, attn_dp_size=2), tp(0)),
        other("pp_size", pp_size=2),
        other("page_size", page_size=64),
        other("dtype", kv_cache_dtype="fp8_e4m3"),
        other("kv_layout", kv_layout="flashmla"),
    ]


def other_defects() -> list[Pair]:
    twice = Instead(503, "1 ", "two PUTs of one rank are one seat of two")
    word, absent, bad = "a word for a number", "a needed field is missing", "not JSON at all"

    def post(name: str, names: str, why: str, request: Request) -> Pair:
        return Pair(f"defect_{name}", why, request, (), Instead(400, names, why))

    return [
        Pair("defect_ready_by_count", twice.why, get(), (tp(0), tp(0)), twice),
        Pair("defect_ready_by_count_rank", twice.why, get(0, 0, 0, 0), (tp(0), tp(0)), twice),
        Pair("defect_ready_by_stranger", "rank 5 of 2 fills a seat", get(), (tp(0), tp(5)), twice),
        Pair("defect_route_word", word, get("x", 0, 0, 0), (put(),), Instead(400, "prefill_dp_rank", word)),
        Pair("defect_route_word_tp", word, get(0, 0, "x", 0), (put(),), Instead(400, "target_tp_rank", word)),
        post("room_bad_json", "JSON", bad, asked("POST", "/register_dp_rank", "{")),
        post("room_list", "object", "JSON, but no object", asked("POST", "/register_dp_rank", [])),
        post("room_without_room", "bootstrap_room", absent, room(...)),
        post("room_without_rank", "dp_rank", absent, room(77, ...)),
        post("room_word", "bootstrap_room", word, room("here")),
        post("room_rank_null", "dp_rank", "null for a number", room(77, None)),
        post("rooms_bad_json", "JSON", bad, asked("POST", "/query_dp_ranks", "{")),
        post("rooms_without_rooms", "bootstrap_rooms", absent, asked("POST", "/query_dp_ranks", {})),
        post("rooms_number", "bootstrap_rooms", "a number for a list", query(77)),
        post("rooms_text", "bootstrap_rooms", "a text is taken apart into digits: 200", query("77")),
        post("rooms_word", "bootstrap_rooms", word, query(["here"])),
    ]


PAIRS: tuple[Pair, ...] = (
    *topologies(),
    *rank_lookups(),
    *accepted_puts(),
    *room_pairs(),
    *other_pairs(),
    *malformed_puts(),
    *contradicting_puts(),
    *other_defects(),
)
