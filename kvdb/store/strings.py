"""Large strings: records of their own in segments, written by the commit thread in the round that commits them.

The value stays in the overlay until then. Nothing here is shared: an entry owns its record, and writing the entry
again writes a new record. If the round fails, the append position has not moved and the next try writes over it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from blake3 import blake3

from kvdb.errors import CorruptError
from kvdb.store.entries import StringRef
from kvdb.store.errors import as_kvdb_error
from kvdb.store.files import Files
from kvdb.store.read import Reader, RecordPlace
from kvdb.store.records import Reservation
from kvdb.store.segments import Segments, segment_name
from kvdb_protocol.errors import FormatError
from kvdb_protocol.ids import content_id
from kvdb_protocol.record import (
    HEADER_BYTES,
    RecordType,
    crc32c,
    decode_header,
    encode_header,
    padding,
    record_bytes,
)

WRITER = "strings"

LargeString = tuple[int, bytes, bytes]  # (database, key, value)
Refs = Mapping[tuple[int, bytes], StringRef]


def write_strings(
    segments: Segments, files: Files, strings: Sequence[LargeString]
) -> tuple[dict[tuple[int, bytes], StringRef], Reservation, int]:
    """Write each string's record and make them durable; return where they are, and the end of the last one.

    Raises OSError. After a failed sync the segment is given up.
    """
    total = sum(record_bytes(len(value)) for _, _, value in strings)
    reservation = segments.reserve(WRITER, total)
    refs = {}
    offset = reservation.offset
    fd = files.open(reservation.path, write=True)
    try:
        for db, key, value in strings:
            head = encode_header(RecordType.STRING, blake3(value).digest(), [value])
            files.write(fd, head, offset)
            files.write(fd, value, offset + len(head))
            files.write(fd, padding(len(value)), offset + len(head) + len(value))
            refs[db, key] = StringRef(reservation.segment_id, offset, len(value), head[32:48])
            offset += record_bytes(len(value))
    finally:
        files.close(fd)
    try:
        segments.datasync(reservation.segment_id)
    except OSError:
        segments.abandon(reservation.segment_id)
        raise
    return refs, reservation, offset


def string_place(folder: Path, ref: StringRef) -> RecordPlace:
    """A large string's place. folder: the segments' folder. Its id is known in part only."""
    path = folder / segment_name(ref.segment)
    return RecordPlace(RecordType.STRING, ref.id16, ref.segment, path, ref.offset, ref.n_bytes)


def read_string(segments: Segments, files: Files, ref: StringRef) -> bytes:
    """A large string, checked; copied once, from the page cache into the result. Raises CorruptError."""
    place = string_place(segments.folder, ref)
    try:
        fd = files.open(place.path, write=False)
        try:
            header = decode_header(files.read(fd, HEADER_BYTES, ref.offset))
            value = files.read(fd, ref.n_bytes, ref.offset + HEADER_BYTES)
        finally:
            files.close(fd)
        if (header.type, header.id16, header.payload_bytes) != (RecordType.STRING, ref.id16, ref.n_bytes):
            raise FormatError("another record lies there")
        if len(value) < ref.n_bytes or crc32c([value]) != header.payload_crc:
            raise FormatError("record payload checksum mismatch")
    except FileNotFoundError as error:
        raise CorruptError(f"{place.words}: the segment file is missing") from error
    except FormatError as error:
        raise CorruptError(f"{place.words}: {error}") from error
    except OSError as error:
        raise as_kvdb_error(error, place.words) from error
    return value


def check_string(reader: Reader, place: RecordPlace) -> None:
    """Compare a large string with its id, too. Raises CorruptError."""
    if content_id([reader.payload(place)])[:16] != place.id[:16]:
        raise CorruptError(f"{place.words}: the bytes do not hash to the record's id")
