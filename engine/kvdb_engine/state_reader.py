"""Reads the records of one snapshot, checked, in the order in which an engine wants them.

The tail is read first, then the pages. Both are cut into pieces of about a megabyte. A piece is read and its checksum
computed by one thread while it lies in that processor's cache (read_ahead.py). Pages pass through a few buffers that
are used in turn: a state of a million tokens takes no more memory than one of a thousand, and buffers that are used
again cost no page faults.

Invariant: what comes out has the id the daemon asked for. A record's checksums cover its first 16 id bytes and its
payload, and a page names its parent; so a page in the wrong place or of another chain cannot pass.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kvdb_engine.read_ahead import ReadAhead
from kvdb_protocol.errors import ChecksumError, FormatError
from kvdb_protocol.ids import NO_PAGE
from kvdb_protocol.layout import Layout
from kvdb_protocol.page import Page, decode_page
from kvdb_protocol.record import (
    HEADER_BYTES,
    RecordHeader,
    RecordType,
    crc32c,
    crc32c_join,
    decode_header,
    decode_record,
)
from kvdb_protocol.tail import Tail, decode_tail

# One record: segment path, offset, bytes on disk, id.
Place = tuple[str, int, int, bytes]

# Small enough to be checked in the cache it was read into, large enough that its call does not count.
PIECE_BYTES = 1 << 20
# Buffers of pages: so far may reading be ahead of the engine.
AHEAD = 8


class Buffers:
    """Memory that reading needs, kept from one state to the next: fresh memory costs more than reading into it."""

    def __init__(self) -> None:
        self._kept: dict[str, bytearray] = {}

    def take(self, name: str, n_bytes: int) -> memoryview:
        """The first `n_bytes` of the buffer of this name; what was in it before is gone."""
        buffer = self._kept.get(name)
        if buffer is None or len(buffer) < n_bytes:
            buffer = self._kept[name] = bytearray(n_bytes)
        return memoryview(buffer)[:n_bytes]


class BadRecordError(Exception):
    """A record is damaged, missing or not the one that was asked for; the message names it."""


class StateReader:
    """The records at `places`: pages in order, then the tail. A context manager; `tail` first, then `pages`.

    What it gives out lies in `buffers` and is valid until the next state is read with them.
    """

    def __init__(self, layout: Layout, places: Sequence[Place], buffers: Buffers | None = None) -> None:
        self._layout = layout
        self._tail_place = places[-1]
        self._buffers = buffers or Buffers()
        self._runs = _runs(places[:-1])
        self._tail_file = _File(self._tail_place[0])
        self._ahead: ReadAhead | None = None
        self._parts: list[_Part] = []
        longest = max((run.n_bytes for run in self._runs), default=0)
        # The one given back last is taken first: it is still in the cache.
        self._free = [self._buffers.take(f"run {number}", longest) for number in range(min(AHEAD, len(self._runs)))]
        self.page_ids = [place[3] for place in places[:-1]]
        self.n_read = 0

    def __enter__(self) -> StateReader:
        return self

    def __exit__(self, *_: object) -> None:
        if self._ahead is not None:
            self._ahead.close()
        for file in (self._tail_file, *(run.file for run in self._runs)):
            file.close()

    def tail(self) -> Tail:
        """The tail. Raises BadRecordError."""
        place = self._tail_place
        try:
            header = self._tail_header()
            payload = self._buffers.take("tail", header.payload_bytes)
            self._parts = [
                _Part(place[1] + HEADER_BYTES + at, payload[at : at + PIECE_BYTES])
                for at in range(0, len(payload), PIECE_BYTES)
            ]
            # From here on the pages are read too, behind the tail.
            self._ahead = ReadAhead(self._read_piece, len(self._parts) + len(self._runs), AHEAD)
            crc = 0
            for number, part in enumerate(self._parts):
                self._ahead.wait_for(number)
                crc = crc32c_join(crc, part.crc, len(part.view))
            if crc != header.payload_crc:
                raise ChecksumError("record payload checksum mismatch")
            tail = decode_tail(self._layout, payload)
            if tail.leaf != (self.page_ids[-1] if self.page_ids else NO_PAGE):
                raise FormatError("tail names another leaf page")
        except (FormatError, OSError) as error:
            raise BadRecordError(_words("tail", place, error)) from error
        self.n_read += place[2]
        return tail

    def pages(self) -> Iterator[Page]:
        """Each page in order; its views are valid until the next one is asked for. Raises BadRecordError."""
        assert self._ahead is not None, "the tail comes first"
        parent = NO_PAGE
        for number, run in enumerate(self._runs):
            self._ahead.wait_for(len(self._parts) + number)
            self.n_read += run.n_bytes
            for page_number, (place, payload) in enumerate(zip(run.places, run.payloads, strict=True), run.first):
                try:
                    page = decode_page(self._layout, payload)
                    if page.parent != parent:
                        raise FormatError("page names another parent")
                except FormatError as error:
                    raise BadRecordError(_words(f"page {page_number}", place, error)) from error
                yield page
                parent = place[3]
            self._free.append(run.buffer)

    def _tail_header(self) -> RecordHeader:
        head = memoryview(bytearray(HEADER_BYTES))
        place = self._tail_place
        header = decode_header(head[: self._tail_file.read(place[1], head)])
        _compare(place, RecordType.TAIL, header)
        if header.record_bytes != place[2]:
            raise FormatError(f"record has {header.record_bytes} bytes, the index says {place[2]}")
        return header

    # In any thread from here on.

    def _read_piece(self, number: int) -> None:
        if number < len(self._parts):
            part = self._parts[number]
            if self._tail_file.read(part.offset, part.view) < len(part.view):
                raise FormatError("record payload is truncated")
            part.crc = crc32c([part.view])
        else:
            self._read_run(number - len(self._parts))

    def _read_run(self, number: int) -> None:
        run = self._runs[number]
        # A piece begins only when the one AHEAD before it is not needed any more: a buffer is free.
        run.buffer = self._free.pop()
        buffer = run.buffer[: run.n_bytes]
        first = run.places[0]
        try:
            buffer = buffer[: run.file.read(first[1], buffer)]
        except OSError as error:
            raise BadRecordError(_words(f"page {run.first}", first, error)) from error
        finally:
            run.file.release()
        for page_number, place in enumerate(run.places, run.first):
            at = place[1] - first[1]
            try:
                # A short file gives fewer bytes, which the decoder reports.
                header, payload = decode_record(buffer[at : at + place[2]])
                _compare(place, RecordType.PAGE, header)
            except FormatError as error:
                raise BadRecordError(_words(f"page {page_number}", place, error)) from error
            run.payloads.append(payload)


@dataclass(slots=True)
class _Part:
    """A piece of the tail's payload: where it lies, where it goes, and the checksum of what came."""

    offset: int
    view: memoryview
    crc: int = 0


@dataclass(slots=True)
class _Run:
    """Pages that lie one behind the other in one file. first: number of the first one. payloads: once read, checked."""

    file: _File
    first: int
    places: Sequence[Place]
    n_bytes: int
    buffer: memoryview = field(default_factory=lambda: memoryview(b""))
    payloads: list[memoryview] = field(default_factory=list)


class _File:
    """A segment file, read by several threads; opened by the first read, closed when its last user has released it."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._fd = -1
        self._lock = threading.Lock()
        self.users = 0

    def read(self, offset: int, view: memoryview) -> int:
        """Fill `view` from `offset`; returns the bytes read, fewer at the end of the file. Raises OSError."""
        with self._lock:
            if self._fd < 0:
                self._fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        got = 0
        while got < len(view) and (n := os.preadv(self._fd, [view[got:]], offset + got)):
            got += n
        return got

    def release(self) -> None:
        """One user less."""
        with self._lock:
            self.users -= 1
            if not self.users:
                self._close()

    def close(self) -> None:
        """Close it, whoever has not read yet."""
        with self._lock:
            self._close()

    def _close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _runs(places: Sequence[Place]) -> list[_Run]:
    """Cut pages into runs of at most PIECE_BYTES, or of one record."""
    runs: list[_Run] = []
    file = _File("")
    begin = n_bytes = 0

    def cut(end: int) -> None:
        nonlocal file
        path = places[begin][0]
        if not runs or path != runs[-1].places[0][0]:
            file = _File(path)
        file.users += 1
        runs.append(_Run(file, begin, places[begin:end], n_bytes))

    for number, (path, offset, size, _) in enumerate(places):
        if number > begin:
            last = places[number - 1]
            if (path, offset) != (last[0], last[1] + last[2]) or n_bytes + size > PIECE_BYTES:
                cut(number)
                begin, n_bytes = number, 0
        n_bytes += size
    if n_bytes:
        cut(len(places))
    return runs


def _compare(place: Place, kind: RecordType, header: RecordHeader) -> None:
    if header.type is not kind:
        raise FormatError(f"record holds a {header.type.name.lower()}")
    if header.id16 != place[3][:16]:
        raise FormatError("another record lies there")


def _words(what: str, place: Place, error: Exception) -> str:
    return f"{what} ({Path(place[0]).name} offset {place[1]}): {error}"
