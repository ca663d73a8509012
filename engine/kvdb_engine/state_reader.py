"""Reads the records of one snapshot, checked, in the order in which an engine wants them.

The tail is read first, into memory of its own. Pages are read one after the other through one kept buffer: a state of
a million tokens, several gigabytes, streams through a megabyte, and a buffer that is used again costs no page faults.

Invariant: what comes out has the id the daemon asked for. A record's checksums cover its first 16 id bytes and its
payload, and a page names its parent; so a page in the wrong place or of another chain cannot pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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


class BadRecordError(Exception):
    """A record is damaged, missing or not the one that was asked for; the message names it."""


class StateReader:
    """The records at `places`: pages in order, then the tail. Use as a context manager."""

    def __init__(self, layout: Layout, places: Sequence[Place]) -> None:
        self._layout = layout
        self._places = places
        self._buffer = bytearray()
        self._path = ""
        self._file: FileIO | None = None
        self.page_ids = [place[3] for place in places[:-1]]
        self.n_read = 0

    def __enter__(self) -> StateReader:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def tail(self) -> Tail:
        """The tail; owns its bytes. Raises BadRecordError."""
        place = self._places[-1]
        try:
            tail = decode_tail(self._layout, self._payload(place, RecordType.TAIL, bytearray(place[2])))
            if tail.leaf != (self.page_ids[-1] if self.page_ids else NO_PAGE):
                raise FormatError("tail names another leaf page")
        except (FormatError, OSError) as error:
            raise BadRecordError(_words("tail", place, error)) from error
        return tail

    def pages(self) -> Iterator[Page]:
        """Each page in order; its views are valid until the next one is asked for. Raises BadRecordError."""
        parent = NO_PAGE
        for number, place in enumerate(self._places[:-1]):
            if len(self._buffer) < place[2]:
                self._buffer = bytearray(place[2])
            try:
                page = decode_page(self._layout, self._payload(place, RecordType.PAGE, self._buffer))
                if page.parent != parent:
                    raise FormatError("page names another parent")
            except (FormatError, OSError) as error:
                raise BadRecordError(_words(f"page {number}", place, error)) from error
            yield page
            parent = place[3]

    def _payload(self, place: Place, kind: RecordType, buffer: bytearray) -> memoryview:
        """Read a record into `buffer` and check it."""
        path, offset, size, record_id = place
        if self._file is None or path != self._path:
            self.__exit__()
            self._file = FileIO(path)
            self._path = path
        view = memoryview(buffer)[:size]
        self._file.seek(offset)
        got = 0
        while got < size and (n := self._file.readinto(view[got:])):
            got += n
        self.n_read += got
        header, payload = decode_record(view[:got])
        if header.type is not kind:
            raise FormatError(f"record holds a {header.type.name.lower()}")
        if header.id16 != record_id[:16]:
            raise FormatError("another record lies there")
        return payload


def _words(what: str, place: Place, error: Exception) -> str:
    return f"{what} ({Path(place[0]).name} offset {place[1]}): {error}"
