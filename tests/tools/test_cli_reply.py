from __future__ import annotations

import io

import pytest

from kvdb_tools.cli.reply import (
    BadReply,
    ConnectionClosed,
    ErrorReply,
    Map,
    Push,
    Reply,
    Set,
    Status,
    Verbatim,
    encode_command,
    read_reply,
)


@pytest.mark.parametrize(
    ("wire", "reply"),
    [
        (b"+OK\r\n", Status("OK")),
        (b"-ERR no\r\n", ErrorReply("ERR no")),
        (b"!6\r\nERR no\r\n", ErrorReply("ERR no")),
        (b":-3\r\n", -3),
        (b"(123456789012345678901234567890\r\n", 123456789012345678901234567890),
        (b",1.5\r\n", 1.5),
        (b",inf\r\n", float("inf")),
        (b"#t\r\n", True),
        (b"#f\r\n", False),
        (b"_\r\n", None),
        (b"$-1\r\n", None),
        (b"*-1\r\n", None),
        (b"$4\r\na\r\nb\r\n", b"a\r\nb"),
        (b"=7\r\ntxt:abc\r\n", Verbatim("txt", b"abc")),
        (b"*2\r\n:1\r\n*0\r\n", [1, []]),
        (b"~1\r\n+a\r\n", Set((Status("a"),))),
        (b"%2\r\n$1\r\nb\r\n:1\r\n$1\r\na\r\n:2\r\n", Map(((b"b", 1), (b"a", 2)))),
        (b">2\r\n$8\r\nprogress\r\n:1\r\n", Push((b"progress", 1))),
        (b"|1\r\n+ttl\r\n:9\r\n:7\r\n", 7),
    ],
)
def test_every_type_is_read_whole(wire: bytes, reply: Reply) -> None:
    stream = io.BytesIO(wire + b"+next\r\n")
    assert read_reply(stream) == reply
    assert read_reply(stream) == Status("next")


@pytest.mark.parametrize("wire", [b"", b"+OK", b"$5\r\nabc", b"*2\r\n:1\r\n"])
def test_a_closed_connection_is_told_apart(wire: bytes) -> None:
    with pytest.raises(ConnectionClosed):
        read_reply(io.BytesIO(wire))


@pytest.mark.parametrize(
    "wire", [b"HTTP/1.1 400 Bad Request\r\n", b":x\r\n", b"#x\r\n", b"$x\r\n", b"*1\r\n" * 100_000]
)
def test_what_is_not_resp_is_refused(wire: bytes) -> None:
    with pytest.raises(BadReply):
        read_reply(io.BytesIO(wire))


def test_commands_are_arrays_of_bulk_strings() -> None:
    assert encode_command([b"SET", b"k", b""]) == b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$0\r\n\r\n"
