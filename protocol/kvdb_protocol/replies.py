"""Replies of RESP2 and RESP3 without I/O: `encode`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

# Bulk strings below this size have the header of their reply ready.
SHORT_BYTES = 1024
BULK_HEADERS = tuple(b"$%d\r\n" % n_bytes for n_bytes in range(SHORT_BYTES))


@dataclass(frozen=True, slots=True)
class Simple:
    """A simple string reply; `text` has no CR or LF."""

    text: str


@dataclass(frozen=True, slots=True)
class Push:
    """A push frame (RESP3); an array in RESP2. The first item is its kind."""

    items: Sequence[Reply]


@dataclass(frozen=True, slots=True)
class Verbatim:
    """Text with a three-letter format, `txt` or `mkd`; a bulk string in RESP2."""

    text: str
    format: str = "txt"


@dataclass(frozen=True, slots=True)
class Failure:
    """An error inside an array (EXEC); `line` is the error without its dash."""

    line: str


@dataclass(frozen=True, slots=True)
class Encoded:
    """A reply that is encoded already."""

    data: bytes


class NilArray:
    """A null array in RESP2 (`*-1`), null in RESP3."""


NIL_ARRAY = NilArray()
OK = Encoded(b"+OK\r\n")
QUEUED = Encoded(b"+QUEUED\r\n")
PONG = Encoded(b"+PONG\r\n")

# A recursive alias would need a string for itself; lists are typed as sequences of any reply.
Reply = (
    None
    | bool
    | int
    | float
    | bytes
    | bytearray
    | memoryview
    | str
    | Simple
    | Push
    | Verbatim
    | Failure
    | Encoded
    | NilArray
    | Sequence["Reply"]
    | Mapping[Any, "Reply"]  # keys are bytes or str; with both in the union mypy infers neither
    | AbstractSet[bytes]
)


def encode(reply: Reply, resp: int = 2) -> bytes:
    """Encode a reply for protocol version `resp` (2 or 3)."""
    value: Any = reply
    kind = type(value)
    if kind is bytes:
        return b"$%d\r\n%b\r\n" % (len(value), value)
    if kind is int:
        return b":%d\r\n" % value
    if value is None:
        return b"$-1\r\n" if resp == 2 else b"_\r\n"
    out: list[bytes] = []
    encode_into(out.append, reply, resp)
    return b"".join(out)


def encode_error(line: str) -> bytes:
    """An error reply; `line` begins with its word. CR and LF become spaces."""
    return b"-%b\r\n" % line.replace("\r", " ").replace("\n", " ").encode("utf-8", "surrogateescape")


def format_double(value: float) -> str:
    """A double as Redis prints scores: integers without a point, otherwise 17 significant digits at most."""
    if value != value:
        return "nan"
    if value in (float("inf"), float("-inf")):
        return "inf" if value > 0 else "-inf"
    if value == int(value) and abs(value) < 1e17:
        return "-0" if value == 0 and str(value)[0] == "-" else str(int(value))
    return f"{value:.17g}"


def encode_into(add: Callable[[bytes], object], reply: Reply, resp: int) -> None:
    """Encode a reply of any kind by calling `add` with its pieces. Raises TypeError for what is not a reply."""
    if reply is None:
        add(b"$-1\r\n" if resp == 2 else b"_\r\n")
    elif isinstance(reply, bytes | bytearray | memoryview):
        add(b"$%d\r\n" % len(reply))
        add(reply if isinstance(reply, bytes) else bytes(reply))
        add(b"\r\n")
    elif isinstance(reply, bool):
        if resp == 2:
            add(b":1\r\n" if reply else b":0\r\n")
        else:
            add(b"#t\r\n" if reply else b"#f\r\n")
    elif isinstance(reply, int):
        add(b":%d\r\n" % reply)
    elif isinstance(reply, str):
        encode_into(add, reply.encode("utf-8", "surrogateescape"), resp)
    elif isinstance(reply, float):
        text = format_double(reply)
        add(b",%b\r\n" % text.encode() if resp == 3 else b"$%d\r\n%b\r\n" % (len(text), text.encode()))
    elif isinstance(reply, list | tuple):
        add(b"*%d\r\n" % len(reply))
        for item in reply:
            encode_into(add, item, resp)
    elif isinstance(reply, dict):
        add(b"%%%d\r\n" % len(reply) if resp == 3 else b"*%d\r\n" % (2 * len(reply)))
        for key, value in reply.items():
            encode_into(add, key, resp)
            encode_into(add, value, resp)
    elif isinstance(reply, set | frozenset):
        add(b"~%d\r\n" % len(reply) if resp == 3 else b"*%d\r\n" % len(reply))
        for item in sorted(reply):
            encode_into(add, item, resp)
    else:
        _encode_special(add, reply, resp)


def _encode_special(add: Callable[[bytes], object], reply: object, resp: int) -> None:
    if isinstance(reply, Encoded):
        add(reply.data)
    elif isinstance(reply, Simple):
        add(b"+%b\r\n" % reply.text.encode("utf-8", "surrogateescape"))
    elif isinstance(reply, Failure):
        add(encode_error(reply.line))
    elif isinstance(reply, NilArray):
        add(b"*-1\r\n" if resp == 2 else b"_\r\n")
    elif isinstance(reply, Push):
        add(b">%d\r\n" % len(reply.items) if resp == 3 else b"*%d\r\n" % len(reply.items))
        for item in reply.items:
            encode_into(add, item, resp)
    elif isinstance(reply, Verbatim):
        text = reply.text.encode("utf-8", "surrogateescape")
        if resp == 3:
            add(b"=%d\r\n%b:%b\r\n" % (len(text) + 4, reply.format.encode(), text))
        else:
            add(b"$%d\r\n%b\r\n" % (len(text), text))
    else:
        raise TypeError(f"{type(reply).__name__} is not a reply")
