"""Reads records back, checked: places in reading order, payloads, tails, token ids.

Whatever fails a check raises CorruptError that names the record, its first position, its segment and offset. Nothing
here holds a transaction while it reads files.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from kvdb.errors import CorruptError, SnapshotGoneError
from kvdb.store.errors import as_kvdb_error
from kvdb.store.files import Files
from kvdb.store.index import Txn
from kvdb.store.rows import PageRow, SnapshotRow, record_name
from kvdb_protocol.errors import FormatError
from kvdb_protocol.ids import NO_PAGE, content_id, extend_prefix
from kvdb_protocol.page import page_head
from kvdb_protocol.record import (
    HEADER_BYTES,
    RecordType,
    decode_header,
    decode_record,
    decode_record_head,
    record_bytes,
)
from kvdb_protocol.tail import Tail, tail_head

# Header, text and ids of a page of 512 tokens fit in this; reading more would fetch rows nobody asked for.
PAGE_HEAD_BYTES = 8192
# A tail of the largest geometry is about 24 MB; a buffer of that size is kept by each reading thread, since a fresh
# one costs more (page faults) than the read from the page cache.
KEPT_BUFFER_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class RecordPlace:
    """Where a record lies. first: position of its first token. prefix: of pages, the prefix hash after it."""

    type: RecordType
    id: bytes
    segment_id: int
    path: Path
    offset: int
    payload_bytes: int
    first: int = 0
    prefix: bytes = b""

    @property
    def record_bytes(self) -> int:
        """Bytes of the whole record on disk."""
        return record_bytes(self.payload_bytes)

    @property
    def words(self) -> str:
        """The place in words, for errors and reports."""
        name = record_name(self.type)
        return f"{name} {self.id[:8].hex()} (first position {self.first}) in {self.path.name} at {self.offset}"


@lru_cache(maxsize=4096)
def segment_path(folder: Path, segment_id: int) -> Path:
    """Where a segment lies. Kept: a plan names one for each of thousands of pages, and making a path takes 10 us."""
    return folder / f"{segment_id:08d}.seg"


def page_place(folder: Path, page_id: bytes, row: PageRow) -> RecordPlace:
    """A page's place. folder: the segments' folder."""
    path = segment_path(folder, row.segment)
    return RecordPlace(
        RecordType.PAGE, page_id, row.segment, path, row.offset, row.payload_bytes, row.first, row.prefix
    )


def tail_place(folder: Path, snapshot_id: bytes, row: SnapshotRow) -> RecordPlace:
    """A snapshot's tail's place."""
    path = segment_path(folder, row.segment)
    return RecordPlace(RecordType.TAIL, snapshot_id, row.segment, path, row.offset, row.payload_bytes, row.first)


def plan(txn: Txn, folder: Path, snapshot_id: bytes) -> list[RecordPlace]:
    """The places of a state in order: pages from position 0 on, then the tail."""
    row = txn.snapshot(snapshot_id)
    if row is None:
        raise SnapshotGoneError(f"there is no snapshot {snapshot_id.hex()}")
    places = [tail_place(folder, snapshot_id, row)]
    page_id = row.leaf
    while page_id != NO_PAGE:
        page = txn.page(page_id)
        if page is None:
            raise CorruptError(f"page {page_id[:8].hex()} of snapshot {snapshot_id[:8].hex()} is not in the index")
        places.append(page_place(folder, page_id, page))
        page_id = page.parent
    places.reverse()
    return places


class _Kept(threading.local):
    def __init__(self) -> None:
        self.buffer = bytearray(1 << 20)


_kept = _Kept()


def _buffer(n_bytes: int) -> memoryview:
    if n_bytes > KEPT_BUFFER_BYTES:
        return memoryview(bytearray(n_bytes))
    if len(_kept.buffer) < n_bytes:
        _kept.buffer = bytearray(n_bytes)
    return memoryview(_kept.buffer)[:n_bytes]


class Reader:
    """Reads records of one plan; keeps the current segment open. Use as a context manager, from one thread."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self._path: Path | None = None
        self._fd = -1

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        if self._path is not None:
            self._files.close(self._fd)
            self._path = None

    @property
    def files(self) -> Files:
        """Where it reads."""
        return self._files

    def _bytes(self, place: RecordPlace, n_bytes: int) -> memoryview:
        """The first `n_bytes` of a record in this thread's buffer: valid until its next read."""
        try:
            if place.path != self._path:
                self.__exit__()
                self._fd = self._files.open(place.path, write=False)
                self._path = place.path
            view = _buffer(n_bytes)
            got = self._files.read_into(self._fd, view, place.offset)
        except FileNotFoundError as error:
            raise CorruptError(f"{place.words}: the segment file is missing") from error
        except OSError as error:
            raise as_kvdb_error(error, place.words) from error
        return view[:got]

    def payload(self, place: RecordPlace) -> memoryview:
        """A record's payload after its checksums and id were compared: valid until this thread's next read."""
        with _corrupt(place):
            header, payload = decode_record(self._bytes(place, HEADER_BYTES + place.payload_bytes))
            _compare(place, header.type, header.id16, header.payload_bytes)
            return payload

    def verified_payload(self, place: RecordPlace) -> memoryview:
        """Like `payload`, and the whole id is recomputed from the bytes (pages and tails)."""
        payload = self.payload(place)
        if content_id([payload]) != place.id:
            raise CorruptError(f"{place.words}: the bytes do not hash to the record's id")
        return payload

    def header(self, place: RecordPlace) -> None:
        """Check a record's header only."""
        with _corrupt(place):
            header = decode_header(self._bytes(place, HEADER_BYTES))
            _compare(place, header.type, header.id16, header.payload_bytes)

    def page_ids(self, place: RecordPlace, parent_prefix: bytes) -> bytes:
        """A page's token ids, checked against its prefix hash; the rows are not read."""
        with _corrupt(place):
            data = self._bytes(place, min(PAGE_HEAD_BYTES, HEADER_BYTES + place.payload_bytes))
            header = decode_header(data)
            _compare(place, header.type, header.id16, header.payload_bytes)
            try:
                ids = bytes(page_head(data[HEADER_BYTES:]).ids)
            except FormatError:
                ids = bytes(page_head(self.payload(place)).ids)  # a page with a long text
            if extend_prefix(parent_prefix, ids) != place.prefix:
                raise FormatError("the token ids do not hash to the page's prefix hash")
            return ids

    def tail(self, place: RecordPlace) -> Tail:
        """A tail without its sections; owns its bytes. Only the record's head is read where it has one."""
        with _corrupt(place):
            header = decode_header(self._bytes(place, HEADER_BYTES))
            _compare(place, header.type, header.id16, header.payload_bytes)
            if header.head_bytes:
                _, payload = decode_record_head(self._bytes(place, HEADER_BYTES + header.head_bytes))
            else:
                payload = self.payload(place)
            head = tail_head(payload)
        return replace(head, ids=bytes(head.ids), logits=bytes(head.logits))

    def token_ids(self, places: Sequence[RecordPlace], root: bytes) -> bytes:
        """Token ids (u32 little-endian) of a whole plan. root: the prefix hash of zero tokens."""
        pieces = []
        prefix = root
        for place in places[:-1]:
            pieces.append(self.page_ids(place, prefix))
            prefix = place.prefix
        pieces.append(bytes(self.tail(places[-1]).ids))
        return b"".join(pieces)


@contextmanager
def _corrupt(place: RecordPlace) -> Iterator[None]:
    try:
        yield
    except FormatError as error:
        raise CorruptError(f"{place.words}: {error}") from error


def _compare(place: RecordPlace, record_type: RecordType, id16: bytes, payload_bytes: int) -> None:
    if record_type != place.type or id16 != place.id[:16] or payload_bytes != place.payload_bytes:
        raise FormatError("another record lies there")
