# ruff: noqa: E501, RUF005
"""The request parser against its invariant and Redis' limits; the reply encoder against hiredis."""

from __future__ import annotations

from itertools import pairwise

import hiredis
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvdb_protocol.replies import (
    NIL_ARRAY,
    OK,
    Encoded,
    Failure,
    Push,
    Simple,
    Verbatim,
    encode,
    encode_error,
    format_double,
)
from kvdb_protocol.requests import RequestParser, split_inline


def pack(*words: bytes) -> bytes:
    packed: bytes = hiredis.pack_command(words)
    return packed


def outcome(pieces: list[bytes], **options: object) -> tuple[list[list[bytes]], str | None]:
    """All requests, and the error's text, after feeding the pieces."""
    parser = RequestParser(**options)  # type: ignore[arg-type]
    requests = []
    for piece in pieces:
        one = parser.feed_one(piece)
        requests += [one] if one is not None else parser.feed(piece)
    return requests, str(parser.error) if parser.error else None


def bytewise(data: bytes) -> list[bytes]:
    return [data[at : at + 1] for at in range(len(data))]


words = st.binary(max_size=12) | st.sampled_from([b"\r\n", b"$3\r\n", b"*1\r\n", b"a\r", b"\n", b"GET"])
requests_ = st.lists(words, min_size=1, max_size=5)
fragments = st.one_of(
    requests_.map(lambda request: pack(*request)),
    st.sampled_from(
        [b"PING\r\n", b"get  a\n", b"*0\r\n", b"*-1\r\n", b"\r\n", b'set "a b" \'c\'\r\n', b"*1\r\n$-1\r\n", b"*2\r\n$1\r\na\r\n"]
        + [b"*1\r\n+PING\r\n", b"*1\r\n$4\r\nPINGxx", b"*x\r\n", b"*1\r\n$4x\r\n", b"*1000000\r\n", b"$1\r\n", b"%1\r\n", b"*1\r\n*1\r\n$1\r\na\r\n"]
        + [b"*1\r\n=7\r\ntxt:abc\r\n", b"*1\r\n$03\r\nabc\r\n", b"*1\r\n$1\r\n\r\r\n", b"*01\r\n", b'"open\r\n']
    ),
    st.binary(max_size=20),
)  # fmt: skip


@settings(max_examples=500, deadline=None)
@given(st.lists(fragments, max_size=8).map(b"".join), st.data())
def test_pieces_do_not_matter(data: bytes, draw: st.DataObject) -> None:
    whole = outcome([data])
    assert outcome(bytewise(data)) == whole
    cuts = sorted(draw.draw(st.lists(st.integers(0, len(data)), max_size=4)))
    edges = [0, *cuts, len(data)]
    assert outcome([data[a:b] for a, b in pairwise(edges)]) == whole


@settings(max_examples=200, deadline=None)
@given(st.lists(requests_, max_size=30))
def test_requests_come_back(requests: list[list[bytes]]) -> None:
    assert outcome([b"".join(pack(*request) for request in requests)]) == (requests, None)


@given(st.binary(max_size=300))
@settings(max_examples=1000, deadline=None)
def test_noise_never_raises(noise: bytes) -> None:
    outcome([noise])
    outcome([b"*" + noise], authenticated=False)


def test_a_pipeline_whose_values_imitate_the_framing() -> None:
    requests = [[b"SET", b"$1\r\na", b"*3\r\n$3\r\nSET"], [b"SET", b"\r\n\r\n", b""]]
    assert outcome([b"".join(pack(*request) for request in requests)]) == (requests, None)


def test_a_bad_trailer_that_a_value_makes_up_for_is_seen() -> None:
    # As many CRLFs as there should be: one is inside a value, one is missing behind another.
    data = pack(b"GET", b"a\r\nb") + b"*2\r\n$3\r\nGET\r\n$1\r\naxx"
    assert outcome([data]) == ([[b"GET", b"a\r\nb"]], "invalid CRLF in request")


LIMITS = [
    (b"*abc\r\n", "invalid multibulk length"),
    (b"*\r\n", "invalid multibulk length"),
    (b"*+1\r\n", "invalid multibulk length"),
    (b"* 1\r\n", "invalid multibulk length"),
    (b"*01\r\n", "invalid multibulk length"),
    (b"*2147483648\r\n", "invalid multibulk length"),
    (b"*99999999999999999999\r\n", "invalid multibulk length"),
    (b"*" + b"1" * 70_000, "too big mbulk count string"),
    (b"*1\r\n$" + b"1" * 70_000, "too big bulk count string"),
    (b"*1\r\nx\r\n", "expected '$', got 'x'"),
    (b"*1\r\n:1\r\n", "expected '$', got ':'"),
    (b"*1\r\n$abc\r\n", "invalid bulk length"),
    (b"*1\r\n$\r\n", "invalid bulk length"),
    (b"*1\r\n$-1\r\n", "invalid bulk length"),
    (b"*1\r\n$536870913\r\n", "invalid bulk length"),
    (b"*1\r\n$1\r\nabc\r\n", "invalid CRLF in request"),
    (b"x" * 70_000, "too big inline request"),
    (b'set "a\r\n', "unbalanced quotes in request"),
    (b"set 'a'b\r\n", "unbalanced quotes in request"),
]


@pytest.mark.parametrize(("data", "message"), LIMITS, ids=[message + str(at) for at, (_, message) in enumerate(LIMITS)])
def test_limits(data: bytes, message: str) -> None:
    assert outcome([data]) == ([], message)
    assert outcome([pack(b"PING") + data]) == ([[b"PING"]], message)
    parser = RequestParser()
    parser.feed(data)
    assert parser.feed(pack(b"PING")) == [] and str(parser.error) == message, "nothing is read after an error"


@pytest.mark.parametrize("data", [b"*0\r\n", b"*-1\r\n", b"*-10\r\n", b"\r\n", b"\n", b"  \r\n"])
def test_empty_requests_are_ignored(data: bytes) -> None:
    assert outcome([data + pack(b"PING")]) == ([[b"PING"]], None)


def test_largest_bulk_is_accepted() -> None:
    assert outcome([b"*1\r\n$536870912\r\n"]) == ([], None)
    assert outcome([b"*1\r\n$2097152\r\n"], max_bulk_bytes=1 << 20) == ([], "invalid bulk length")


def test_a_long_inline_line_with_its_end_is_fine() -> None:
    assert outcome([b"x" * 60_000 + b"\n"])[0] == [[b"x" * 60_000]]


def test_strangers_have_small_limits() -> None:
    assert outcome([b"*11\r\n"], authenticated=False)[1] == "unauthenticated multibulk length"
    assert outcome([b"*2\r\n$16385\r\n"], authenticated=False)[1] == "unauthenticated bulk length"
    assert outcome([pack(b"AUTH", b"x" * 16384)], authenticated=False)[1] is None


def test_a_huge_count_does_not_allocate() -> None:
    parser = RequestParser()
    assert parser.feed(b"*2147483647\r\n$1\r\na\r\n") == [] and parser.error is None
    assert parser.buffered_bytes < 100


def test_large_values_in_pieces() -> None:
    value = bytes(range(256)) * 4096
    data = pack(b"SET", b"k", value) + pack(b"PING")
    pieces = [data[at : at + 65_536] for at in range(0, len(data), 65_536)]
    assert outcome(pieces) == ([[b"SET", b"k", value], [b"PING"]], None)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"a b  c", [b"a", b"b", b"c"]),
        (b'"a b" c', [b"a b", b"c"]),
        (rb'"\x41\n\t\"\\"', [b'A\n\t"\\']),
        (rb"'a\'b' \"", None),
        (rb"'a\'b'", [b"a'b"]),
        (rb"'a\n'", [rb"a\n"]),
        (b'""', [b""]),
        (b"", []),
        (b'a"b c"', [b"ab c"]),
        (b'"a"b', None),
        (b"get a\0b", [b"get", b"a"]),
    ],
)
def test_split_inline(line: bytes, expected: list[bytes] | None) -> None:
    assert split_inline(line) == expected


REPLIES = [
    (None, b"$-1\r\n", b"_\r\n"),
    (NIL_ARRAY, b"*-1\r\n", b"_\r\n"),
    (True, b":1\r\n", b"#t\r\n"),
    (False, b":0\r\n", b"#f\r\n"),
    (-7, b":-7\r\n", b":-7\r\n"),
    (1.5, b"$3\r\n1.5\r\n", b",1.5\r\n"),
    (b"a\r\n", b"$3\r\na\r\n\r\n", b"$3\r\na\r\n\r\n"),
    ("ü", b"$2\r\n\xc3\xbc\r\n", b"$2\r\n\xc3\xbc\r\n"),
    (bytearray(b"x"), b"$1\r\nx\r\n", b"$1\r\nx\r\n"),
    (memoryview(b"x"), b"$1\r\nx\r\n", b"$1\r\nx\r\n"),
    (Simple("OK"), b"+OK\r\n", b"+OK\r\n"),
    (OK, b"+OK\r\n", b"+OK\r\n"),
    ([1, [b"a"], None], b"*3\r\n:1\r\n*1\r\n$1\r\na\r\n$-1\r\n", b"*3\r\n:1\r\n*1\r\n$1\r\na\r\n_\r\n"),
    ({"a": 1}, b"*2\r\n$1\r\na\r\n:1\r\n", b"%1\r\n$1\r\na\r\n:1\r\n"),
    ({b"b", b"a"}, b"*2\r\n$1\r\na\r\n$1\r\nb\r\n", b"~2\r\n$1\r\na\r\n$1\r\nb\r\n"),
    (Push(("message", 1)), b"*2\r\n$7\r\nmessage\r\n:1\r\n", b">2\r\n$7\r\nmessage\r\n:1\r\n"),
    (Verbatim("hi"), b"$2\r\nhi\r\n", b"=6\r\ntxt:hi\r\n"),
    ([Failure("ERR no")], b"*1\r\n-ERR no\r\n", b"*1\r\n-ERR no\r\n"),
    (Encoded(b":1\r\n"), b":1\r\n", b":1\r\n"),
    (float("inf"), b"$3\r\ninf\r\n", b",inf\r\n"),
]


@pytest.mark.parametrize(("reply", "resp2", "resp3"), REPLIES, ids=[repr(reply[0])[:20] for reply in REPLIES])
def test_encode(reply: object, resp2: bytes, resp3: bytes) -> None:
    assert (encode(reply, 2), encode(reply, 3)) == (resp2, resp3)  # type: ignore[arg-type]


def test_what_is_no_reply_is_refused() -> None:
    with pytest.raises(TypeError, match="object is not a reply"):
        encode(object())  # type: ignore[arg-type]


def test_errors_stay_on_one_line() -> None:
    assert encode_error("ERR a\r\nb") == b"-ERR a  b\r\n"


@given(st.floats(allow_nan=False))
def test_doubles_keep_their_value(value: float) -> None:
    assert float(format_double(value)) == value


def test_doubles_look_as_in_redis() -> None:
    values = [3.0, -0.0, 0.1, 1e20, 1e-7, float("-inf"), 1 / 3, 123456789012345680.0]
    shown = ["3", "-0", "0.10000000000000001", "1e+20", "9.9999999999999995e-08", "-inf", "0.33333333333333331"]
    assert [format_double(value) for value in values] == [*shown, "1.2345678901234568e+17"]
