"""Replies as a terminal needs them: every RESP type stays distinct, and order stays as sent.

redis-py and hiredis turn simple and bulk strings into the same object and maps into dicts. A program wants that; a
command line has to show `OK` and `"OK"`, and a map in the order the server gave. This file reads one reply at a time
from a buffered binary stream (a socket file, or BytesIO in tests) and knows nothing of what commands mean.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import BinaryIO, TypeAlias


@dataclass(frozen=True, slots=True)
class Status:
    """A simple string: `+OK`."""

    text: str


@dataclass(frozen=True, slots=True)
class ErrorReply:
    """An error reply, without its leading dash."""

    text: str

    @property
    def word(self) -> str:
        """Its first word, which says what kind of error it is."""
        return self.text.split(" ", 1)[0]


@dataclass(frozen=True, slots=True)
class Verbatim:
    """A verbatim string: text with a three-letter format (`txt`, `mkd`)."""

    format: str
    text: bytes


@dataclass(frozen=True, slots=True)
class Map:
    """A map as pairs, in the order sent."""

    pairs: tuple[tuple[Reply, Reply], ...]


@dataclass(frozen=True, slots=True)
class Set:
    """A set, in the order sent."""

    items: tuple[Reply, ...]


@dataclass(frozen=True, slots=True)
class Push:
    """An out-of-band frame: it answers no command."""

    items: tuple[Reply, ...]


Scalar: TypeAlias = Status | ErrorReply | Verbatim | bytes | int | float | bool | None
Reply: TypeAlias = "Scalar | list[Reply] | Map | Set | Push"


class ConnectionClosed(ConnectionError):
    """The server closed the connection, possibly in the middle of a reply."""


class BadReply(ConnectionError):
    """The bytes are not RESP: most likely something else listens on that port."""


def encode_command(words: Iterable[bytes]) -> bytes:
    """One command as a RESP array of bulk strings."""
    words = list(words)
    out = [b"*%d\r\n" % len(words)]
    for word in words:
        out += (b"$%d\r\n" % len(word), word, b"\r\n")
    return b"".join(out)


def read_reply(stream: BinaryIO) -> Reply:
    """Read exactly one reply or push frame. Raises ConnectionClosed or BadReply."""
    line = stream.readline()
    if not line.endswith(b"\r\n"):
        raise ConnectionClosed("server closed the connection")
    kind, rest = line[:1], line[1:-2]
    try:
        return _read(stream, kind, rest)
    except (ValueError, RecursionError) as error:
        raise BadReply(f"not a RESP reply: {line[:80]!r}") from error


def _read(stream: BinaryIO, kind: bytes, rest: bytes) -> Reply:
    match kind:
        case b"+":
            return Status(rest.decode(errors="replace"))
        case b"-":
            return ErrorReply(rest.decode(errors="replace"))
        case b":" | b"(":
            return int(rest)
        case b",":
            return float(rest)
        case b"#":
            return {b"t": True, b"f": False}[rest] if rest in (b"t", b"f") else _refuse(rest)
        case b"_":
            return None
        case b"$":
            return _bulk(stream, int(rest))
        case b"=":
            text = _bulk(stream, int(rest)) or b"txt:"
            return Verbatim(text[:3].decode(errors="replace"), text[4:])
        case b"!":
            return ErrorReply((_bulk(stream, int(rest)) or b"").decode(errors="replace"))
        case b"*":
            return None if int(rest) < 0 else [read_reply(stream) for _ in range(int(rest))]
        case b"~":
            return Set(tuple(read_reply(stream) for _ in range(int(rest))))
        case b">":
            return Push(tuple(read_reply(stream) for _ in range(int(rest))))
        case b"%":
            return Map(tuple((read_reply(stream), read_reply(stream)) for _ in range(int(rest))))
        case b"|":
            # Attributes say something about the reply that follows; nothing here shows them.
            for _ in range(2 * int(rest)):
                read_reply(stream)
            return read_reply(stream)
        case _:
            return _refuse(kind)


def _refuse(what: bytes) -> Reply:
    raise ValueError(what)


def _bulk(stream: BinaryIO, n_bytes: int) -> bytes | None:
    if n_bytes < 0:
        return None
    data = stream.read(n_bytes + 2)
    if len(data) < n_bytes + 2:
        raise ConnectionClosed("server closed the connection in the middle of a reply")
    return data[:-2]
