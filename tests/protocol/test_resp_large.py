"""Large bulk strings go to a sink as they come: every way of cutting the stream gives the same."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from kvdb_protocol.requests import LARGE_BULK_BYTES, Request, RequestParser

VALUE = random.Random(1).randbytes(LARGE_BULK_BYTES + 3)
SET = b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$%d\r\n%b\r\n" % (len(VALUE), VALUE)
PING = b"*1\r\n$4\r\nPING\r\n"


class Gathered:
    """A sink that keeps what it gets."""

    def __init__(self, request: Request, n_bytes: int) -> None:
        self.begun = list(request)
        self.n_bytes = n_bytes
        self.data = b""
        self.has_ended = False

    def feed(self, data: bytes) -> None:
        assert data and not self.has_ended
        self.data += data

    def end(self) -> bytes:
        self.has_ended = True
        return b"a place"


def parse(pieces: list[bytes]) -> tuple[list[Request], list[Gathered], str | None]:
    parser = RequestParser()
    sinks: list[Gathered] = []

    def take(request: Request, n_bytes: int) -> Gathered:
        sinks.append(Gathered(request, n_bytes))
        return sinks[-1]

    parser.take_bulk = take
    requests = []
    for piece in pieces:
        requests += parser.feed(piece)
        assert parser.buffered_bytes < 70_000
    return requests, sinks, str(parser.error) if parser.error else None


def cut(data: bytes, *places: int) -> list[bytes]:
    ends = [0, *places, len(data)]
    return [data[begin:end] for begin, end in pairwise(ends)]


HEAD = SET.index(VALUE)
PLACES = [*range(1, HEAD + 2), HEAD + 1000, *range(HEAD + len(VALUE) - 2, len(SET) + 3)]


@pytest.mark.parametrize("place", PLACES)
def test_cut_anywhere(place: int) -> None:
    pieces = [part[at : at + 60_000] for part in cut(SET + PING, place) for at in range(0, len(part), 60_000)]
    requests, (sink,), error = parse(pieces)
    assert (requests, error) == ([[b"SET", b"k", b"a place"], [b"PING"]], None)
    assert (sink.begun, sink.n_bytes, sink.data == VALUE, sink.has_ended) == ([b"SET", b"k"], len(VALUE), True, True)


def test_byte_by_byte_at_both_ends() -> None:
    ends = [bytes([byte]) for byte in SET[-4:] + PING]
    pieces = [bytes([byte]) for byte in SET[: HEAD + 2]] + cut(SET[HEAD + 2 : -4], 500_000) + ends
    requests, (sink,), _ = parse(pieces)
    assert requests == [[b"SET", b"k", b"a place"], [b"PING"]]
    assert sink.data == VALUE


def test_several_in_one_request_and_what_lies_between() -> None:
    mset = b"*5\r\n$4\r\nMSET\r\n$1\r\na\r\n" + SET[HEAD - 10 :] + b"$1\r\nb\r\n" + SET[HEAD - 10 :]
    data = PING + mset + PING + SET
    requests, sinks, error = parse([data[at : at + 99_991] for at in range(0, len(data), 99_991)])
    assert error is None
    assert [request[0] for request in requests] == [b"PING", b"MSET", b"PING", b"SET"]
    assert [sink.data == VALUE for sink in sinks] == [True, True, True]
    assert sinks[1].begun == [b"MSET", b"a", b"a place", b"b"]


def test_a_wrong_end_is_an_error_and_the_sink_is_not_ended() -> None:
    for tail in (b"xx", b"\rx", b"x\n"):
        requests, (sink,), error = parse(cut(PING + SET[:-2] + tail + PING, 100, 200_000, len(PING) + len(SET) - 1))
        assert (requests, error) == ([[b"PING"]], "invalid CRLF in request")
        assert not sink.has_ended


def test_without_a_sink_it_is_a_value_in_memory() -> None:
    parser = RequestParser()
    parser.take_bulk = lambda request, n_bytes: None
    (request,) = [request for piece in cut(SET, 1000, 300_000) for request in parser.feed(piece)]
    assert request == [b"SET", b"k", VALUE]
