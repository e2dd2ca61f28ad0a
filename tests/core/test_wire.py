"""Messages survive the trip, strangers' bytes never do more than BadFrames, and every refusal names the frame."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdctl.core.address import Endpoint
from pdctl.core.frames import MAX_TEXT
from pdctl.core.transfer import Phase
from pdctl.core.wire import (
    MAX_FRAMES,
    Abort,
    AbortAck,
    AuxData,
    Bootstrap,
    Matched,
    Metadata,
    RegisterBuffers,
    Status,
    Unknown,
    parse_to_decode,
    parse_to_prefill,
)
from pdctl.errors import BadFrames, LayoutMismatch

Parser = Callable[[list[bytes]], object]
HERE = Endpoint("10.0.0.7", 40123)
SESSION = "10.0.0.7:15999"

u64 = st.integers(0, 2**64 - 1)
u32 = st.integers(0, 2**32 - 1)
counts = st.integers(0, 2**31 - 1)
rooms = st.integers(0, 2**64 - 1)
hosts = st.sampled_from(["127.0.0.1", "10.1.2.3", "::1", "fe80::1", "decode-0.example"])
endpoints = st.builds(Endpoint, hosts, st.integers(1, 65535))
sessions = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=60)


def lists(of: st.SearchStrategy[int]) -> st.SearchStrategy[tuple[tuple[int, ...], ...]]:
    return st.lists(st.lists(of, max_size=3).map(tuple), max_size=3).map(tuple)


def numbers(of: st.SearchStrategy[int]) -> st.SearchStrategy[tuple[int, ...]]:
    return st.lists(of, max_size=5).map(tuple)


pages = st.lists(counts, max_size=20).map(lambda p: np.array(p, np.int32))

registrations = st.builds(
    RegisterBuffers,
    reply=endpoints,
    session=sessions,
    kv_pointers=numbers(u64),
    aux_pointers=numbers(u64),
    wants_sums=st.booleans(),
    tp_rank=counts,
    tp_size=st.integers(1, 64),
    kv_item_len=counts,
    kv_item_lens=numbers(u64),
    state_pointers=lists(u64),
    state_item_lens=lists(u32),
    state_dims=lists(u32),
    kv_layer_ids=numbers(u32),
    state_layer_ids=lists(u32),
    dcp_size=st.integers(1, 8),
    dcp_rank=counts,
    staging_slots=numbers(u64),
)
metadatas = st.builds(
    Metadata,
    room=rooms,
    reply=endpoints,
    session=sessions,
    pages=pages,
    aux_row=counts,
    required=st.integers(1, 64),
    prefix_len=counts,
    state_rows=lists(st.integers(-(2**31), 2**31 - 1)),
)
reasons = st.one_of(st.none(), st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=80))
aborts = st.one_of(
    st.builds(Abort, rooms), st.builds(Abort, rooms, endpoints), st.builds(Abort, rooms, endpoints, counts, reasons)
)
to_prefill = st.one_of(
    registrations, metadatas, aborts, st.builds(Bootstrap, rooms, endpoints), st.builds(Matched, rooms, sessions)
)
to_decode = st.one_of(
    st.builds(Status, rooms, st.sampled_from(Phase), counts, reasons),
    st.builds(AbortAck, rooms),
    st.builds(AbortAck, rooms, counts),
    st.builds(AbortAck, rooms, counts, counts, st.booleans()),
    st.builds(AuxData, rooms, counts, counts, st.binary(max_size=50)),
)


def registration(**changes: object) -> RegisterBuffers:
    values: dict = {
        "reply": HERE,
        "session": SESSION,
        "kv_pointers": (4096, 8192),
        "aux_pointers": (64,),
        "tp_rank": 0,
        "tp_size": 1,
        "kv_item_len": 512,
        "kv_item_lens": (512, 512),
    }
    return RegisterBuffers(**{**values, **changes})


def metadata(**changes: object) -> Metadata:
    values: dict = {"room": 7, "reply": HERE, "session": SESSION, "pages": np.array([3, 1], np.int32), "aux_row": 2}
    return Metadata(**{**values, **changes})


# --- both directions


@given(to_prefill)
def test_what_decode_says_is_what_prefill_hears(message: RegisterBuffers | Metadata | Abort | Bootstrap) -> None:
    heard = parse_to_prefill(message.to_frames())
    assert isinstance(heard, type(message))
    assert heard.to_frames() == message.to_frames()
    if not isinstance(message, Metadata):
        assert heard == message


@given(to_decode)
def test_what_prefill_says_is_what_decode_hears(message: Status | AbortAck | AuxData) -> None:
    assert parse_to_decode(message.to_frames()) == message


@given(to_prefill, st.lists(st.binary(max_size=8), max_size=4))
def test_frames_that_a_later_release_adds_are_tolerated(
    message: RegisterBuffers | Metadata | Bootstrap | Abort, extra: list[bytes]
) -> None:
    if (isinstance(message, Abort) and message.generation is None) or isinstance(message, Metadata):
        return  # their last frames are optional, so one more is not extra
    heard = parse_to_prefill([*message.to_frames(), *extra])
    assert heard == message


# --- strangers

tags = st.sampled_from(
    [b"None", b"ABORT", b"BOOTSTRAP", b"ABORT_ACK", b"AUX_DATA", b"WATERMARK", b"KV_STATUS", b"7", b"-7", b"", b"\xff"]
)
plausible = st.sampled_from(
    [
        *(b"", b"0", b"1", b"4", b"9" * 20, b"9" * 30, b"40123", b"70000"),
        *(b"1_0", b" 7", b"7\n", b"-1", b"\xd9\xa3", b"127.0.0.1", b"::1", b"\x00" * 8),
        *(struct.pack("<I", 2**32 - 1), struct.pack("<II", 1, 2**32 - 1), struct.pack("<iI", -1, 3)),
    ]
)
hostile = st.tuples(tags, st.lists(st.one_of(plausible, st.binary(max_size=24)), max_size=24)).map(
    lambda parts: [parts[0], *parts[1]]
)


def said_of(parse: Parser, frames: list[bytes]) -> str:
    """What the parser says against it, if anything; any other exception is the test's failure."""
    try:
        parse(frames)
    except BadFrames as error:
        return str(error)
    return ""


@settings(max_examples=500, deadline=None)
@given(hostile)
def test_no_bytes_make_a_parser_raise_anything_but_bad_frames(frames: list[bytes]) -> None:
    for parse in (parse_to_prefill, parse_to_decode):
        said = said_of(parse, frames)
        assert len(said) < 400
        assert not said or said.isprintable()


@settings(max_examples=200, deadline=None)
@given(st.one_of(to_prefill, to_decode), st.data())
def test_one_spoilt_frame_is_survived(message: RegisterBuffers | Status, data: st.DataObject) -> None:
    frames = message.to_frames()
    spoilt = data.draw(st.integers(0, len(frames) - 1))
    frames[spoilt] = data.draw(st.one_of(plausible, st.binary(max_size=24)))
    for parse in (parse_to_prefill, parse_to_decode):
        said_of(parse, frames)


def test_a_count_of_lists_that_the_frame_cannot_hold_costs_no_memory() -> None:
    frames = registration().to_frames()
    frames[6] = struct.pack("<I", 2**32 - 1)
    tracemalloc.start()
    with pytest.raises(BadFrames, match="frame 6"):
        parse_to_prefill(frames)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("parse", [parse_to_prefill, parse_to_decode])
@pytest.mark.parametrize("n_frames", [0, MAX_FRAMES + 1])
def test_a_message_has_a_number_of_frames_that_makes_sense(parse: Parser, n_frames: int) -> None:
    with pytest.raises(BadFrames, match=str(n_frames)):
        parse([b"7"] * n_frames)


@pytest.mark.parametrize("tag", [b"WATERMARK", b"STAGING_RSP", b"NixlMsgGuard", b"MoriMsgGuard"])
def test_a_prefill_tolerates_messages_it_has_no_use_for(tag: bytes) -> None:
    assert parse_to_prefill([tag, b"\xff\xff"]) == Unknown(tag.decode())


@pytest.mark.parametrize("tag", [b"STAGING_REQ", b"CHUNK_READY", b"KV_STATUS"])
def test_a_decode_tolerates_messages_it_has_no_use_for(tag: bytes) -> None:
    assert parse_to_decode([tag, b"\xff\xff"]) == Unknown(tag.decode())


# --- registration


def test_a_registration_has_twenty_frames() -> None:
    assert len(registration().to_frames()) == 20


def test_an_old_registration_of_ten_frames_has_one_page_length_for_all() -> None:
    old = parse_to_prefill(registration(kv_item_lens=()).to_frames()[:10])
    assert isinstance(old, RegisterBuffers)
    assert old.kv_pool().item_lens == (512, 512)


def test_a_registration_that_contradicts_itself_has_no_pool() -> None:
    with pytest.raises(LayoutMismatch, match=r"2 pointers but 3 item lengths"):
        registration(kv_item_lens=(1, 2, 3)).kv_pool()


def test_aux_buffers_of_another_number_cannot_be_paired() -> None:
    with pytest.raises(LayoutMismatch, match=r"sender has 2 buffers and the receiver 1"):
        registration().aux_pool((8, 8))


@pytest.mark.parametrize(
    ("index", "raw", "said"),
    [
        (2, b"65536", "host and port"),
        (2, b"0", "host and port"),
        (1, b"not a host", "host and port"),
        (1, b"\xff", "host and port"),
        (3, b"", "session"),
        (3, b"a b", "session"),
        (3, b"s" * (MAX_TEXT + 1), "session"),
        (4, b"1234567", "KV pointers"),
        (5, b"1", "aux pointers"),
        (7, b"-1", "TP rank"),
        (8, b"0", "TP size"),
        (9, b"1e3", "KV bytes a page"),
        (10, struct.pack("<II", 1, 8), "state item lengths"),
        (19, b"\x00" * 9, "of each entry"),
    ],
)
def test_a_refused_registration_names_the_frame(index: int, raw: bytes, said: str) -> None:
    frames = registration().to_frames()
    frames[index] = raw
    with pytest.raises(BadFrames, match=rf"buffer registration frame {index if index != 2 else '[12]'} .*{said}"):
        parse_to_prefill(frames)


# --- metadata


def test_no_pages_and_no_row_is_a_dummy() -> None:
    heard = parse_to_prefill(metadata(pages=np.empty(0, np.int32), aux_row=None).to_frames())
    assert isinstance(heard, Metadata)
    assert heard.is_dummy


def test_no_pages_with_a_row_is_a_request_whose_prefix_decode_has() -> None:
    heard = parse_to_prefill(metadata(pages=np.empty(0, np.int32), aux_row=0, prefix_len=64).to_frames())
    assert isinstance(heard, Metadata)
    assert (heard.is_dummy, heard.aux_row, heard.prefix_len) == (False, 0, 64)


def test_pages_without_a_row_are_refused() -> None:
    frames = metadata().to_frames()
    frames[5] = b""
    with pytest.raises(BadFrames, match=r"metadata frame 5 \(aux row\)"):
        parse_to_prefill(frames)


@pytest.mark.parametrize(
    ("index", "raw", "said"),
    [
        (0, b"99999999999999999999", "room"),
        (4, b"123", "no whole number of i32"),
        (4, struct.pack("<i", -1), "page -1 is below 0"),
        (7, b"0", "number of decode ranks"),
        (7, b"1000000", "number of decode ranks"),
        (8, b"x", "prefix length"),
    ],
)
def test_refused_metadata_names_the_frame(index: int, raw: bytes, said: str) -> None:
    frames = metadata().to_frames()
    frames[index] = raw
    with pytest.raises(BadFrames, match=f"metadata frame {index} .*{said}"):
        parse_to_prefill(frames)


def test_metadata_of_older_ranks_ends_after_the_count() -> None:
    heard = parse_to_prefill(metadata(prefix_len=9).to_frames()[:8])
    assert isinstance(heard, Metadata)
    assert (heard.prefix_len, heard.device_pages) == (0, None)


# --- status, acks, aux


def test_the_reason_of_a_failure_travels_in_a_fourth_frame() -> None:
    frames = Status(7, Phase.FAILED, 1, "decode was stopped").to_frames()
    assert frames == [b"7", b"0", b"1", b"decode was stopped"]


@pytest.mark.parametrize("is_permanent", [False, True])
def test_a_failure_says_whether_another_room_could_go_better(is_permanent: bool) -> None:
    said = Status(7, Phase.FAILED, 1, "no fit", use=3, is_permanent=is_permanent)
    assert parse_to_decode(said.to_frames()) == said


def test_a_reason_cannot_break_a_log_line() -> None:
    heard = parse_to_decode([b"7", b"0", b"1", b"a\nlevel=info\x1b[31m\xff" + b"x" * 10_000])
    assert isinstance(heard, Status)
    assert heard.reason is not None
    assert heard.reason.isprintable()
    assert len(heard.reason) <= MAX_TEXT


def test_an_unknown_phase_is_refused() -> None:
    with pytest.raises(BadFrames, match=r"status frame 1 \(status\): b'5'"):
        parse_to_decode([b"7", b"5", b"0"])


def test_aux_data_whose_length_lies_is_refused() -> None:
    frames = AuxData(7, 0, 1, b"12345678").to_frames()
    frames[4] = struct.pack("<I", 8)
    with pytest.raises(BadFrames, match=r"aux data frame 4 \(length\)"):
        parse_to_decode(frames)


@pytest.mark.parametrize("frames", [[b"ABORT", b"7", b"127.0.0.1"], [b"ABORT", b"x"], [b"ABORT"]])
def test_half_an_abort_is_refused(frames: list[bytes]) -> None:
    with pytest.raises(BadFrames, match="abort"):
        parse_to_prefill(frames)
