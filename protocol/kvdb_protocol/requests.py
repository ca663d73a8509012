"""Requests of RESP2 and RESP3 without I/O: `RequestParser`.

A request is an array of bulk strings or an inline line. Four ways, the quickest first: one request of a few short
arguments, and a batch of requests of one arity, are cut apart at their CRLFs; other batches of well-formed requests are
parsed by hiredis; everything else (half requests, inline lines, errors, large values) goes through the incremental
parser below. hiredis accepts more than a server may: it does not check the CRLF behind a bulk string, takes nested
arrays and any reply type, and has no limits. So for all quick ways the bytes count as well-formed only if encoding the
requests found gives exactly the bytes received. Invariant: fed one byte at a time and fed whole give the same requests
and the same error.

Limits and messages are those of Redis 7; as in Valkey a bulk string without its CRLF is an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Protocol

import hiredis

MAX_INLINE_BYTES = 64 * 1024
MAX_MULTIBULK = 2**31 - 1
MIN_BULK_LIMIT = 1 << 20
UNAUTHENTICATED_MULTIBULK = 10
UNAUTHENTICATED_BULK_BYTES = 16 * 1024
# hiredis allocates an array's pointers as soon as it has read the count, so counts of six digits go to the slow path.
_HUGE_COUNT = re.compile(rb"\*[0-9]{6}")
# The usual counts of arguments and their headers, and the headers of arguments of usual lengths.
_COUNTS = {b"*%d" % count: count for count in range(1, 65)}
# Longer chunks are hardly one request with short arguments.
_ONE_BYTES = 4096
_HEADERS = tuple(b"$%d" % n_bytes for n_bytes in range(1025))
_header = _HEADERS.__getitem__
# Above this a chunk is most likely part of one large value: copying it into hiredis' buffer would be for nothing.
_FAST_CHUNK_BYTES = 256 * 1024
# Bulk strings at least this large get a buffer of their own size at once; smaller ones are cut out of the input.
_OWN_BUFFER_BYTES = 32 * 1024

# Bulk strings at least this large may go somewhere else than into memory: RequestParser.take_bulk.
LARGE_BULK_BYTES = 1 << 20

Request = list[bytes]


class RequestError(ValueError):
    """The client broke the protocol; the message is what Redis says after `Protocol error: `. The connection ends."""


class _Reader:
    """The one hiredis reader of the process: between calls it is always empty, so connections can share it."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.reader = hiredis.Reader(notEnoughData=_INCOMPLETE)
        self.feed = self.reader.feed
        self.gets = self.reader.gets


_INCOMPLETE = object()
_shared = _Reader()
_pack: Callable[[tuple[bytes, ...]], bytes] = hiredis.pack_command  # type: ignore[assignment]


class Sink(Protocol):
    """Takes a large bulk string as it comes in."""

    def feed(self, data: bytes) -> None:
        """The next bytes."""

    def end(self) -> bytes:
        """That was all, and its CRLF was right; returns what stands for the string in the request."""


class RequestParser:
    """Turns received bytes into requests.

    max_bulk_bytes: `proto-max-bulk-len`. authenticated: False applies the small limits for strangers. take_bulk: asked
    where a large bulk string of the request that begins with these arguments goes; None keeps it in memory. All may be
    changed at any time. `error` is set once, when the stream is beyond repair; requests before it are still returned.
    """

    __slots__ = (
        "_bulk",
        "_bulk_at",
        "_bulk_left",
        "_lines",
        "_missing",
        "_request",
        "_sink",
        "authenticated",
        "error",
        "max_bulk_bytes",
        "take_bulk",
    )

    def __init__(self, max_bulk_bytes: int = 512 << 20, authenticated: bool = True) -> None:
        self.max_bulk_bytes = max_bulk_bytes
        self.authenticated = authenticated
        self.error: RequestError | None = None
        self._lines = bytearray()  # received, not yet understood
        self._request: Request | None = None  # arguments of the request being read, None between requests
        self._missing = 0  # bulk strings that are still to come
        self._bulk_left = -1  # bytes of the current bulk string and its CRLF still to come, -1: header not read
        self._bulk: list[bytes] | None = None  # pieces of a large bulk string, joined once
        self._bulk_at = 0  # their bytes
        self._sink: Sink | None = None  # gets the current bulk string, and `_bulk` its CRLF only
        self.take_bulk: Callable[[Request, int], Sink | None] | None = None

    @property
    def buffered_bytes(self) -> int:
        """Bytes held for a request that is not complete (`qbuf` of CLIENT LIST)."""
        in_request = sum([len(argument) for argument in self._request or () if type(argument) is bytes])
        return len(self._lines) + self._bulk_at + in_request

    def feed_one(self, data: bytes) -> Request | None:
        """The request, if `data` is exactly one of up to four short arguments; else None, and `data` is for `feed`."""
        if self._request is not None or self._lines or len(data) > _ONE_BYTES or self.error or not self.authenticated:
            return None
        pieces = data.split(b"\r\n")
        if pieces[-1]:
            return None
        # Written out: a loop over the arguments takes half as long again.
        headers = _HEADERS
        try:
            match len(pieces):
                case 4:
                    count, a_header, a, _ = pieces
                    if count == b"*1" and a_header == headers[len(a)]:
                        return [a]
                case 6:
                    count, a_header, a, b_header, b, _ = pieces
                    if count == b"*2" and a_header == headers[len(a)] and b_header == headers[len(b)]:
                        return [a, b]
                case 8:
                    count, a_header, a, b_header, b, c_header, c, _ = pieces
                    if (
                        count == b"*3"
                        and a_header == headers[len(a)]
                        and b_header == headers[len(b)]
                        and c_header == headers[len(c)]
                    ):
                        return [a, b, c]
                case 10:
                    count, a_header, a, b_header, b, c_header, c, d_header, d, _ = pieces
                    if (
                        count == b"*4"
                        and a_header == headers[len(a)]
                        and b_header == headers[len(b)]
                        and c_header == headers[len(c)]
                        and d_header == headers[len(d)]
                    ):
                        return [a, b, c, d]
        except IndexError:
            pass  # a long argument
        return None

    def feed(self, data: bytes) -> list[Request]:
        """Add received bytes and return the requests that are now complete; empty requests are left out."""
        if self.error is not None:
            return []
        if self._request is None and not self._lines and self.authenticated:
            requests, data = _parse_batch(data)
            if not data:
                return requests
        else:
            requests = []
        try:
            self._parse(data, requests)
        except RequestError as error:
            self.error = error
            self._lines.clear()
            self._bulk = self._sink = None
        return requests

    def _parse(self, data: bytes, requests: list[Request]) -> None:
        if self._bulk is not None:
            data = self._fill(data)
            if self._bulk is not None:
                return
            self._finish_request(requests)
        lines = self._lines
        lines += data
        at = 0
        tried_batch = False
        try:
            while at < len(lines):
                if self._request is None:
                    start = at
                    at = self._read_start(at, requests)
                    if at < 0:
                        at = start
                        return
                    continue
                step = self._read_bulk(at)
                if step < 0:
                    return
                at = step
                if self._bulk is not None:  # the rest of `lines` was moved into the large value
                    return
                self._finish_request(requests)
                if not tried_batch and self._request is None and self.authenticated and len(lines) > at:
                    # What follows a request that came in pieces is mostly well-formed again. Once: trying costs a copy.
                    tried_batch = True
                    batch, rest = _parse_batch(bytes(memoryview(lines)[at:]))
                    requests += batch
                    at = len(lines) - len(rest)
        finally:
            del lines[:at]

    def _finish_request(self, requests: list[Request]) -> None:
        if not self._missing and self._request is not None and self._bulk_left < 0:
            requests.append(self._request)
            self._request = None

    def _read_start(self, at: int, requests: list[Request]) -> int:
        """Read an array header or an inline request; returns the position behind it, or -1 if it is not complete."""
        lines = self._lines
        if lines[at] != 0x2A:
            return self._read_inline(at, requests)
        end = lines.find(b"\r", at)
        if end < 0:
            if len(lines) - at > MAX_INLINE_BYTES:
                raise RequestError("too big mbulk count string")
            return -1
        if end + 1 >= len(lines):
            return -1
        count = _strict_int(lines[at + 1 : end])
        if count is None or count > MAX_MULTIBULK:
            raise RequestError("invalid multibulk length")
        if not self.authenticated and count > UNAUTHENTICATED_MULTIBULK:
            raise RequestError("unauthenticated multibulk length")
        if count > 0:
            self._request = []
            self._missing = count
            self._bulk_left = -1
        return end + 2

    def _read_inline(self, at: int, requests: list[Request]) -> int:
        lines = self._lines
        end = lines.find(b"\n", at)
        if end < 0:
            if len(lines) - at > MAX_INLINE_BYTES:
                raise RequestError("too big inline request")
            return -1
        stop = end - 1 if end > at and lines[end - 1] == 0x0D else end
        words = split_inline(bytes(lines[at:stop]))
        if words is None:
            raise RequestError("unbalanced quotes in request")
        if words:
            requests.append(words)
        return end + 1

    def _read_bulk(self, at: int) -> int:
        """Read one bulk string of the current request; returns the position behind it, or -1 to wait for more."""
        lines = self._lines
        assert self._request is not None
        if lines[at] != 0x24:
            raise RequestError(f"expected '$', got '{chr(lines[at])}'")
        end = lines.find(b"\r", at)
        if end < 0:
            if len(lines) - at > MAX_INLINE_BYTES:
                raise RequestError("too big bulk count string")
            return -1
        if end + 1 >= len(lines):
            return -1
        size = _strict_int(lines[at + 1 : end])
        if size is None or size < 0 or size > self.max_bulk_bytes:
            raise RequestError("invalid bulk length")
        if not self.authenticated and size > UNAUTHENTICATED_BULK_BYTES:
            raise RequestError("unauthenticated bulk length")
        start = end + 2
        if len(lines) >= start + size + 2:
            if lines[start + size : start + size + 2] != b"\r\n":
                raise RequestError("invalid CRLF in request")
            self._request.append(bytes(memoryview(lines)[start : start + size]))
            self._missing -= 1
            return start + size + 2
        if size < _OWN_BUFFER_BYTES:
            return -1
        if size >= LARGE_BULK_BYTES and self.take_bulk is not None:
            self._sink = self.take_bulk(self._request, size)
        self._bulk = []
        self._bulk_left = size + 2
        self._fill(bytes(memoryview(lines)[start:]))
        return len(lines)

    def _fill(self, data: bytes) -> bytes:
        """Add data to the large bulk string; when it is complete append it to the request. Returns what follows it."""
        bulk = self._bulk
        assert bulk is not None and self._request is not None
        if self._sink is not None and self._bulk_left > 2 and data:
            given = data[: self._bulk_left - 2]
            self._sink.feed(given)
            self._bulk_left -= len(given)
            data = data[len(given) :]
        if not data:
            return b""
        taken = min(len(data), self._bulk_left)
        bulk.append(data if taken == len(data) else data[:taken])
        self._bulk_left -= taken
        self._bulk_at += taken
        if self._bulk_left:
            return b""
        if len(bulk) > 1 and len(bulk[-1]) < 2:  # the CRLF came in two pieces
            bulk[-2:] = [bulk[-2] + bulk[-1]]
        if bulk[-1][-2:] != b"\r\n":
            raise RequestError("invalid CRLF in request")
        bulk[-1] = bulk[-1][:-2]
        self._request.append(b"".join(bulk) if self._sink is None else self._sink.end())
        self._sink = None
        self._missing -= 1
        self._bulk = None
        self._bulk_left = -1
        self._bulk_at = 0
        return data[taken:]


def _begins_large(data: bytes) -> bool:
    """Whether one of the first arguments in `data` is longer than all of it."""
    at = data.find(b"\r\n", 0, 16) + 2
    for _ in range(4):
        end = data.find(b"\r\n", at, at + 24)
        if end < 0 or data[at : at + 1] != b"$" or not (digits := data[at + 1 : end]).isdigit():
            return False
        if int(digits) > len(data):
            return True
        at = end + 4 + int(digits)
    return False


def _parse_batch(data: bytes) -> tuple[list[Request], bytes]:
    """Parse the well-formed requests at the start of `data`, a whole batch at a time.

    Returns them and the bytes behind them; no requests if the batch is not of the usual kind.
    """
    if len(data) > _OWN_BUFFER_BYTES and (len(data) > _FAST_CHUNK_BYTES or _begins_large(data)):
        return [], data
    pieces = data.split(b"\r\n")
    n_args = _COUNTS.get(pieces[0])
    if n_args is None:
        return _parse_mixed(data) if data[:1] == b"*" else ([], data)
    # Cut at every CRLF, requests of k arguments give 2k + 1 pieces each. If every first one is the count and each other
    # pair is a length and that many bytes, `data` is exactly the encoding of the arguments found.
    step = 2 * n_args + 1
    try:
        n_requests = (len(pieces) - 1) // step
        end = n_requests * step
        if pieces[0:end:step].count(pieces[0]) != n_requests:
            return _parse_mixed(data)
        columns = []
        for at in range(2, step, 2):
            column, headers = pieces[at:end:step], pieces[at - 1 : end : step]
            if at == 2 and column.count(column[0]) == n_requests:  # the commands' names, mostly the same
                is_good = headers.count(_header(len(column[0]))) == n_requests
            else:
                is_good = headers == list(map(_header, map(len, column)))
            if not is_good:
                return _parse_mixed(data)
            columns.append(column)
    except IndexError:
        return _parse_mixed(data)
    requests = list(map(list, zip(*columns, strict=True)))
    return requests, b"\r\n".join(pieces[end:]) if len(pieces) > end + 1 else pieces[end]


def _parse_mixed(data: bytes) -> tuple[list[Request], bytes]:
    """The same for requests of different arities, long arguments, and arguments that hold a CRLF: by hiredis."""
    # With one star only the first count can be huge.
    has_small_counts = data.find(b"\r", 1, 7) > 0 if data.rfind(b"*") == 0 else not _HUGE_COUNT.search(data)
    if not has_small_counts:
        return [], data
    shared = _shared
    requests: list[Request] = []
    try:
        shared.feed(data)
        while (request := shared.gets()) is not _INCOMPLETE:
            requests.append(request)
        packed = b"".join([_pack(tuple(request)) for request in requests])
    except (TypeError, hiredis.HiredisError, MemoryError):
        shared.reset()
        return [], data
    if packed == data:
        return [request for request in requests if request] if [] in requests else requests, b""
    shared.reset()
    if data.startswith(packed):
        return [request for request in requests if request], data[len(packed) :]
    return [], data


def _strict_int(digits: bytearray) -> int | None:
    """A decimal as Redis reads it: no sign but a leading minus, no spaces, no leading zeros; None if it is not one."""
    text = digits[1:] if digits[:1] == b"-" else digits
    if not text or len(text) > 19 or not text.isdigit() or (text[0] == 0x30 and len(digits) > 1):
        return None
    return int(digits)


_HEX = b"0123456789abcdefABCDEF"
_ESCAPES = {0x6E: 0x0A, 0x72: 0x0D, 0x74: 0x09, 0x62: 0x08, 0x61: 0x07}
_SPACE = b" \t\n\r\v\f"


def split_inline(line: bytes) -> Request | None:
    """Split a line into words as Redis does: "double" quotes with escapes, 'single' quotes; None if unbalanced.

    Also reads lines of a configuration file.
    """
    if b'"' not in line and b"'" not in line and b"\0" not in line:
        return line.split()
    words: Request = []
    at, end = 0, line.find(b"\0") if b"\0" in line else len(line)
    while True:
        while at < end and line[at] in _SPACE:
            at += 1
        if at >= end:
            return words
        word = bytearray()
        while at < end and line[at] not in _SPACE:
            quote = line[at]
            if quote not in b"\"'":
                word.append(quote)
                at += 1
                continue
            at += 1
            closed = False
            while at < end:
                char = line[at]
                if char == quote:
                    closed = True
                    at += 1
                    break
                if char == 0x5C and at + 1 < end:
                    if quote == 0x22:
                        if line[at + 1] == 0x78 and at + 3 < end and line[at + 2] in _HEX and line[at + 3] in _HEX:
                            word.append(int(line[at + 2 : at + 4], 16))
                            at += 4
                        else:
                            word.append(_ESCAPES.get(line[at + 1], line[at + 1]))
                            at += 2
                        continue
                    if line[at + 1] == 0x27:
                        word.append(0x27)
                        at += 2
                        continue
                word.append(char)
                at += 1
            # A closing quote must be followed by a space or by nothing.
            if not closed or (at < end and line[at] not in _SPACE):
                return None
        words.append(bytes(word))
