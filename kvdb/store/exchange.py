"""States in and out as archives, and the plain file names they may have.

Export streams records as they lie on disk, checked on the way. Import trusts nothing: every checksum, id, parent,
position and section is checked before a record is written, and what the store has already is not written again. An
archive in a file is read twice, record by record: once to check it whole, once to write; never is more than one
record in memory.
Everything here does file I/O or hashing: for a thread.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from kvdb.errors import CorruptError, KvdbError
from kvdb.store.files import Files
from kvdb.store.read import Reader, RecordPlace
from kvdb.store.records import NewSnapshot, Reservation, WrittenRecord
from kvdb.store.rows import Reason
from kvdb_protocol.archive import Archive, decode_head, decode_records, encode_head, head_bytes
from kvdb_protocol.errors import FormatError
from kvdb_protocol.ids import NO_PAGE, Buffer, content_id, extend_prefix, root_prefix
from kvdb_protocol.layout import Layout
from kvdb_protocol.page import decode_page
from kvdb_protocol.record import (
    HEADER_BYTES,
    RecordHeader,
    RecordType,
    decode_header,
    decode_record,
    padding,
    record_bytes,
)
from kvdb_protocol.tail import decode_tail, state_header

NAME_BYTES = 200


def plain_name(name: bytes) -> str:
    """A client's file name: letters of UTF-8, no folder, nothing hidden. Raises KvdbError.

    Clients must not make the daemon touch a path outside its transfer folder.
    """
    try:
        text = name.decode()
    except UnicodeDecodeError:
        raise KvdbError("a file name must be valid UTF-8") from None
    if not text or len(name) > NAME_BYTES or text[0] == "." or any(char in "/\\\0" or ord(char) < 32 for char in text):
        raise KvdbError(
            f"'{text[:64]}' is not a plain file name: no folders, no leading dot, at most {NAME_BYTES} bytes"
        )
    return text


def write_file(files: Files, path: Path, pieces: Iterable[Buffer]) -> int:
    """Write a file that is there as a whole or not at all; return its length. Raises OSError."""
    files.make_dir(path.parent)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    fd = files.create(temporary)
    n_bytes = 0
    try:
        try:
            for piece in pieces:
                view = memoryview(piece).cast("B")
                files.write(fd, view, n_bytes)
                n_bytes += len(view)
            files.datasync(fd)
        finally:
            files.close(fd)
        files.rename(temporary, path)
    except BaseException:
        files.unlink(temporary)
        raise
    files.sync_dir(path.parent)
    return n_bytes


def read_file(files: Files, path: Path, n_bytes: int | None = None) -> memoryview:
    """A file of the transfer folder, or its beginning. Raises KvdbError if there is none, OSError."""
    try:
        fd = files.open(path, write=False)
    except FileNotFoundError:
        raise KvdbError(f"there is no file '{path.name}' in the transfer folder") from None
    try:
        size = files.size(fd)
        buffer = memoryview(bytearray(size if n_bytes is None else min(size, n_bytes)))
        return buffer[: files.read_into(fd, buffer, 0)]
    finally:
        files.close(fd)


def export_archive(files: Files, archive: Archive, places: Iterable[RecordPlace]) -> Iterator[Buffer]:
    """The pieces of an archive. Each is valid until the next one is asked for. Raises CorruptError."""
    yield encode_head(archive)
    with Reader(files) as reader:
        for place in places:
            payload = reader.verified_payload(place)
            yield state_header(place.type, place.id, [payload])
            yield payload
            yield padding(len(payload))


@dataclass(frozen=True, slots=True)
class InFile:
    """A payload that lies in an archive."""

    path: Path
    offset: int
    n_bytes: int

    def read(self, files: Files, record_id: bytes) -> list[Buffer]:
        """The payload, which must still be what was checked. Raises CorruptError, OSError."""
        fd = files.open(self.path, write=False)
        try:
            data = files.read(fd, self.n_bytes, self.offset)
        finally:
            files.close(fd)
        if content_id([data]) != record_id:
            raise CorruptError(f"the file '{self.path.name}' changed while it was imported")
        return [data]


@dataclass(frozen=True, slots=True)
class Incoming:
    """A record to store. Offsets are decided when it is written."""

    type: RecordType
    id: bytes
    payload: list[Buffer] | InFile
    parent: bytes = NO_PAGE
    prefix: bytes = b""
    first: int = 0
    n_tokens: int = 0

    @property
    def payload_bytes(self) -> int:
        """Bytes of the payload."""
        if isinstance(self.payload, InFile):
            return self.payload.n_bytes
        return sum(memoryview(piece).nbytes for piece in self.payload)


@dataclass(frozen=True, slots=True)
class IncomingState:
    """A checked state: pages in order, then its tail. tail_ids: u32 little-endian."""

    fingerprint: bytes
    n_tokens: int
    tail_ids: bytes
    records: list[Incoming]

    @property
    def n_bytes(self) -> int:
        """Bytes of all its records on disk."""
        return sum(record_bytes(record.payload_bytes) for record in self.records)


Checked = Iterator[tuple[RecordHeader, memoryview, list[Buffer] | InFile]]


def read_archive(data: Buffer) -> tuple[Archive, IncomingState]:
    """Check an archive whole. Payloads are views into `data`. Raises CorruptError naming the record."""
    try:
        archive = decode_head(data)
    except FormatError as error:
        raise CorruptError(f"archive: {error}") from error
    return archive, _check(archive, ((*found, [found[1]]) for found in decode_records(data, archive.n_records)))


def read_archive_file(files: Files, path: Path) -> tuple[Archive, IncomingState]:
    """Check an archive in a file, one record in memory at a time. Raises CorruptError naming the record, OSError."""
    fd = files.open(path, write=False)
    try:
        try:
            archive = decode_head(files.read(fd, head_bytes(files.read(fd, HEADER_BYTES, 0)), 0))
        except FormatError as error:
            raise CorruptError(f"archive: {error}") from error
        return archive, _check(archive, _records_in(files, fd, path, archive.n_records))
    finally:
        files.close(fd)


def _records_in(files: Files, fd: int, path: Path, n_records: int) -> Checked:
    size = files.size(fd)
    at = head_bytes(files.read(fd, HEADER_BYTES, 0))
    for _ in range(n_records):
        n_bytes = decode_header(files.read(fd, HEADER_BYTES, at)).payload_bytes
        if at + HEADER_BYTES + n_bytes > size:
            raise FormatError("archive is truncated")
        header, payload = decode_record(files.read(fd, HEADER_BYTES + n_bytes, at))
        yield header, payload, InFile(path, at + HEADER_BYTES, n_bytes)
        at += header.record_bytes
    if at != size:
        raise FormatError(f"archive has {size} bytes, its records end at {at}")


def _check(archive: Archive, found: Checked) -> IncomingState:
    records: list[Incoming] = []
    prefix, parent, position, tail_ids = root_prefix(archive.family), NO_PAGE, 0, b""
    try:
        layout = Layout.from_bytes(archive.layout)
        for header, payload, kept in found:
            record_id = content_id([payload])
            if header.id16 != record_id[:16]:
                raise FormatError("the bytes do not hash to the record's id")
            if len(records) == archive.n_records - 1:
                tail = decode_tail(layout, payload)
                facts = (header.type, tail.fingerprint, tail.leaf, tail.first, tail.n_tokens)
                wanted = (RecordType.TAIL, archive.fingerprint, parent, position, archive.n_tokens)
                tail_ids = bytes(tail.ids)
            else:
                page = decode_page(layout, payload)
                facts = (header.type, page.fingerprint, page.parent, page.first, page.n_tokens)
                wanted = (RecordType.PAGE, archive.fingerprint, parent, position, layout.page_tokens)
                prefix = extend_prefix(prefix, page.ids)
            if facts != wanted:
                raise FormatError("it does not continue the record before it")
            span = (position, facts[4] if header.type is RecordType.PAGE else 0)
            records.append(Incoming(header.type, record_id, kept, parent, prefix, *span))
            if header.type is RecordType.PAGE:
                parent, position = record_id, position + layout.page_tokens
        if not records or records[-1].type is not RecordType.TAIL:
            raise FormatError("it has no tail")
    except FormatError as error:
        raise CorruptError(f"archive, record {len(records)}: {error}") from error
    return IncomingState(archive.fingerprint, archive.n_tokens, tail_ids, records)


def write_state(
    files: Files,
    state: IncomingState,
    reservation: Reservation,
    is_stored: Callable[[bytes], bool],
    *,
    reason: Reason,
    created_ms: int,
) -> NewSnapshot:
    """Write the records that are not stored yet into the reserved range. Raises OSError, CorruptError."""
    written: list[WrittenRecord] = []
    offset = reservation.offset
    tail = state.records[-1]
    fd = files.open(reservation.path, write=True)
    try:
        for record in state.records:
            if record is not tail and is_stored(record.id):
                continue
            at = offset
            kept = record.payload
            payload = kept.read(files, record.id) if isinstance(kept, InFile) else kept
            for piece in (state_header(record.type, record.id, payload), *payload):
                files.write(fd, piece, at)
                at += memoryview(piece).nbytes
            files.write(fd, padding(record.payload_bytes), at)
            span = (record.parent, record.prefix, record.first, record.n_tokens)
            written.append(WrittenRecord(record.type, record.id, offset, record.payload_bytes, *span))
            offset = written[-1].end
    finally:
        files.close(fd)
    return NewSnapshot(
        id=tail.id,
        fingerprint=state.fingerprint,
        leaf=tail.parent,
        n_tokens=state.n_tokens,
        prefix=tail.prefix,
        tail_ids=state.tail_ids,
        reason=reason,
        created_ms=created_ms,
        written=written,
        reservation=reservation,
    )
