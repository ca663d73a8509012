"""Reads the records of one snapshot, checked, in the order in which an engine wants them.

The tail is read first. Pages stream through two buffers of a few megabytes, one being filled
by a thread while the other is checked: a state of a million tokens takes no more memory than one of a thousand, and
buffers that are used again cost no page faults.

Invariant: what comes out has the id the daemon asked for. A record's checksums cover its first 16 id bytes and its
payload, and a page names its parent; so a page in the wrong place or of another chain cannot pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from kvdb_protocol.errors import FormatError
from kvdb_protocol.ids import NO_PAGE
from kvdb_protocol.layout import Layout
from kvdb_protocol.page import Page, decode_page
from kvdb_protocol.record import RecordType, decode_record
from kvdb_protocol.tail import Tail, decode_tail

# One record: segment path, offset, bytes on disk, id.
Place = tuple[str, int, int, bytes]


# Few hand-overs between the threads, and still small enough for the processor's cache.
RUN_BYTES = 4 << 20


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
    """The records at `places`: pages in order, then the tail. Use as a context manager.

    What it gives out lies in `buffers` and is valid until the next state is read with them.
    """

    def __init__(self, layout: Layout, places: Sequence[Place], buffers: Buffers | None = None) -> None:
        self._layout = layout
        self._places = places
        self._buffers = buffers or Buffers()
        self._file: FileIO | None = None
        self._path = ""
        self.page_ids = [place[3] for place in places[:-1]]
        self.n_read = 0

    def __enter__(self) -> StateReader:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def tail(self) -> Tail:
        """The tail. Raises BadRecordError."""
        place = self._places[-1]
        view = self._buffers.take("tail", place[2])
        try:
            got = self._read(place[0], place[1], view)
            tail = decode_tail(self._layout, _payload(place, RecordType.TAIL, view[:got]))
            if tail.leaf != (self.page_ids[-1] if self.page_ids else NO_PAGE):
                raise FormatError("tail names another leaf page")
        except (FormatError, OSError) as error:
            raise BadRecordError(_words("tail", place, error)) from error
        return tail

    def pages(self) -> Iterator[Page]:
        """Each page in order; its views are valid until the next one is asked for. Raises BadRecordError."""
        runs = _runs(self._places[:-1])
        longest = max((run.n_bytes for run in runs), default=0)
        buffers = [self._buffers.take(name, longest) for name in ("even runs", "odd runs")]
        parent = NO_PAGE
        with ThreadPoolExecutor(1, "kvdb-read") as ahead:
            reading = ahead.submit(self._read_run, runs[0], buffers[0]) if runs else None
            for number, run in enumerate(runs):
                assert reading is not None
                try:
                    view = buffers[number % 2][: reading.result()]
                except OSError as error:
                    raise BadRecordError(_words(f"page {run.first}", run.places[0], error)) from error
                if number + 1 < len(runs):
                    reading = ahead.submit(self._read_run, runs[number + 1], buffers[(number + 1) % 2])
                for page_number, place in enumerate(run.places, run.first):
                    at = place[1] - run.places[0][1]
                    try:
                        page = decode_page(self._layout, _payload(place, RecordType.PAGE, view[at : at + place[2]]))
                        if page.parent != parent:
                            raise FormatError("page names another parent")
                    except FormatError as error:
                        raise BadRecordError(_words(f"page {page_number}", place, error)) from error
                    yield page
                    parent = place[3]

    def _read_run(self, run: _Run, buffer: memoryview) -> int:
        return self._read(run.places[0][0], run.places[0][1], buffer[: run.n_bytes])

    def _read(self, path: str, offset: int, view: memoryview) -> int:
        """Fill `view`; a short file gives fewer bytes, which the record decoder reports."""
        if self._file is None or path != self._path:
            self.__exit__()
            self._file = FileIO(path)
            self._path = path
        self._file.seek(offset)
        got = 0
        while got < len(view) and (n := self._file.readinto(view[got:])):
            got += n
        self.n_read += got
        return got


@dataclass(frozen=True, slots=True)
class _Run:
    """Pages that lie one behind the other in one file; `first` is the number of the first of them."""

    first: int
    places: Sequence[Place]
    n_bytes: int


def _runs(places: Sequence[Place]) -> list[_Run]:
    """Cut a plan into runs of at most RUN_BYTES, or of one record."""
    runs: list[_Run] = []
    begin = n_bytes = 0
    for number, (path, offset, size, _) in enumerate(places):
        if number > begin:
            last = places[number - 1]
            if (path, offset) != (last[0], last[1] + last[2]) or n_bytes + size > RUN_BYTES:
                runs.append(_Run(begin, places[begin:number], n_bytes))
                begin, n_bytes = number, 0
        n_bytes += size
    if n_bytes:
        runs.append(_Run(begin, places[begin:], n_bytes))
    return runs


def _payload(place: Place, kind: RecordType, record: memoryview) -> memoryview:
    """The payload of a record that was read, after its checks."""
    header, payload = decode_record(record)
    if header.type is not kind:
        raise FormatError(f"record holds a {header.type.name.lower()}")
    if header.id16 != place[3][:16]:
        raise FormatError("another record lies there")
    return payload


def _words(what: str, place: Place, error: Exception) -> str:
    return f"{what} ({Path(place[0]).name} offset {place[1]}): {error}"
