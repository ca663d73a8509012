"""Large strings: records of their own in segments, written whole or as they come in, read whole or in checked pieces.

A string that was in memory is written by the commit thread in the round that commits it; if the round fails, the append
position has not moved and the next try writes over it. One that is received straight into a segment (receive.py) waits
there for its round, which syncs the segment first. A record may belong to several entries: COPY shares it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from blake3 import blake3

from kvdb.errors import CorruptError
from kvdb.store.entries import PIECE_BYTES, HeldString, LargeValue, StringRef, Sync, place_of
from kvdb.store.errors import as_kvdb_error
from kvdb.store.files import Files
from kvdb.store.read import Reader, RecordPlace
from kvdb.store.records import Reservation
from kvdb.store.segments import Segments, segment_name
from kvdb.store.work import Extent
from kvdb_protocol.errors import FormatError
from kvdb_protocol.record import (
    HEADER_BYTES,
    RecordType,
    crc32c,
    crc32c_join,
    decode_header,
    pack_header,
    padding,
    record_bytes,
)

WRITER = "strings"

LargeString = tuple[int, bytes, bytes | HeldString]  # (database, key, value)
Refs = Mapping[tuple[int, bytes], StringRef | None]
Piece = bytes | bytearray | memoryview


class Sums:
    """The checksums of a string, added up as its bytes come."""

    def __init__(self) -> None:
        self._crc = 0
        self._piece_crc = 0
        self._left = PIECE_BYTES
        self._crcs = bytearray()
        self._hash = blake3()
        self.n_bytes = 0

    def add(self, data: Piece) -> None:
        """The next bytes."""
        self._hash.update(data)
        view = memoryview(data)
        self.n_bytes += len(view)
        while view:
            part, view = view[: self._left], view[self._left :]
            self._piece_crc = crc32c([part], self._piece_crc)
            self._left -= len(part)
            if not self._left:
                self._end_piece(PIECE_BYTES)

    def _end_piece(self, n_bytes: int) -> None:
        self._crcs += self._piece_crc.to_bytes(4, "little")
        self._crc = crc32c_join(self._crc, self._piece_crc, n_bytes)
        self._piece_crc, self._left = 0, PIECE_BYTES

    def end(self, segment: int, offset: int) -> tuple[bytes, StringRef]:
        """The record's header, and the reference to a record that lies there."""
        if self._left < PIECE_BYTES:
            self._end_piece(PIECE_BYTES - self._left)
        digest = self._hash.digest()
        crcs = bytes(self._crcs) if self.n_bytes > PIECE_BYTES else b""
        head = pack_header(RecordType.STRING, digest, self.n_bytes, self._crc)
        return head, StringRef(segment, offset, self.n_bytes, digest[:16], crcs)


def write_record(files: Files, fd: int, reservation: Reservation, offset: int, pieces: Iterable[Piece]) -> StringRef:
    """Write a string's record at `offset` of the reserved segment. Raises OSError, and what `pieces` raises."""
    sums = Sums()
    for piece in pieces:
        files.write(fd, piece, offset + HEADER_BYTES + sums.n_bytes)
        sums.add(piece)
    head, ref = sums.end(reservation.segment_id, offset)
    files.write(fd, padding(ref.n_bytes), offset + HEADER_BYTES + ref.n_bytes)
    files.write(fd, head, offset)
    return ref


@dataclass(slots=True)
class Stored:
    """Strings of a round. refs: None for one that was lost. ends: committed lengths by segment. syncs: to wait for."""

    refs: dict[tuple[int, bytes], StringRef | None] = field(default_factory=dict)
    ends: dict[int, tuple[int, int]] = field(default_factory=dict)
    fresh: list[HeldString] = field(default_factory=list)
    syncs: list[Sync] = field(default_factory=list)
    reservation: Reservation | None = None
    end: int = 0
    is_lossy: bool = False

    def extend(self, segment: int, end: int, created_ms: int) -> None:
        """Bytes of the segment up to `end` are needed."""
        if end > self.ends.get(segment, (0, 0))[0]:
            self.ends[segment] = (end, created_ms)

    def wait(self) -> None:
        """Wait until all bytes are on the disk. Raises OSError."""
        for sync in self.syncs:
            if (problem := sync.result()) is not None:
                raise OSError(*problem)


def store_strings(segments: Segments, files: Files, strings: Sequence[LargeString]) -> Stored:
    """Make the large strings of a round durable: write those in memory, sync those that were received into segments.

    Syncs that are under way already are left to Stored.wait. Raises OSError. After a failed sync the segment is given
    up: what was received into it is copied by the next round, checked, since the bytes that could not be synced may be
    lost.
    """
    stored = Stored()
    unwritten: list[LargeString] = []
    unsynced = set()
    for db, key, value in strings:
        if isinstance(value, bytes):
            unwritten.append((db, key, value))
            continue
        ref = place_of(value)
        if not value.is_committed and not value.is_synced and segments.is_abandoned(ref.segment):
            unwritten.append((db, key, value))
            continue
        stored.refs[db, key] = ref
        stored.extend(ref.segment, ref.offset + record_bytes(ref.n_bytes), value.created_ms)
        # If it was committed, the entry that named it may be gone since, and its range free but for this one's holding
        # it; if not, a collection may have taken it for garbage.
        segments.pins.reclaim(Extent(ref.segment, ref.offset, record_bytes(ref.n_bytes)))
        if not value.is_committed:
            stored.fresh.append(value)
            if value.is_synced:
                continue
            if value.sync is not None:
                stored.syncs.append(value.sync)
            else:
                unsynced.add(ref.segment)
    if unwritten:
        unsynced.add(_write_strings(segments, files, unwritten, stored))
    for segment in unsynced:
        segments.datasync(segment)
    return stored


def _write_strings(segments: Segments, files: Files, strings: Sequence[LargeString], stored: Stored) -> int:
    reservation = segments.reserve(WRITER, sum(record_bytes(len(value)) for _, _, value in strings))
    offset = reservation.offset
    fd = files.open(reservation.path, write=True)
    written: dict[int, StringRef] = {}  # a string that several keys share is written once
    try:
        for db, key, value in strings:
            if id(value) in written:
                stored.refs[db, key] = written[id(value)]
                continue
            pieces = [value] if isinstance(value, bytes) else read_pieces(segments, files, value)
            try:
                ref = write_record(files, fd, reservation, offset, pieces)
            except CorruptError:
                stored.refs[db, key] = None
                continue
            stored.refs[db, key] = written[id(value)] = ref
            offset += record_bytes(ref.n_bytes)
    finally:
        files.close(fd)
    stored.extend(reservation.segment_id, offset, reservation.created_ms)
    stored.reservation, stored.end = reservation, offset
    return reservation.segment_id


def string_place(folder: Path, ref: StringRef) -> RecordPlace:
    """A large string's place. folder: the segments' folder. Its id is known in part only."""
    path = folder / segment_name(ref.segment)
    return RecordPlace(RecordType.STRING, ref.id16, ref.segment, path, ref.offset, ref.n_bytes)


class StringReader:
    """Reads one large string in pieces, each checked before it is given away. From one thread at a time."""

    def __init__(self, folder: Path, files: Files, ref: StringRef) -> None:
        """Nothing is read yet."""
        self.ref = ref
        self._place = string_place(folder, ref)
        self._offset = ref.offset + HEADER_BYTES
        self._files = files
        self._fd = -1
        self._crcs = ref.crcs
        self._payload_crc = 0

    def __enter__(self) -> StringReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the segment."""
        if self._fd >= 0:
            self._files.close(self._fd)
            self._fd = -1

    def piece(self, number: int) -> bytes:
        """The piece at number * PIECE_BYTES. Raises CorruptError."""
        offset, n_bytes = self._range(number)
        try:
            data = self._read(n_bytes, offset)
        except OSError as error:
            raise as_kvdb_error(error, self._place.words) from error
        self._check(number, data)
        return data

    def read_into(self, start: int, buffer: memoryview) -> int:
        """Fill the buffer with whole pieces from `start`, where one begins; bytes read. Raises CorruptError."""
        data = self._part(start, buffer)
        try:
            n_bytes = self._files.read_into(self._fd, data, self._offset + start)
        except OSError as error:
            raise as_kvdb_error(error, self._place.words) from error
        if n_bytes < len(data):
            raise CorruptError(f"{self._place.words}: the segment file ends early")
        return self._checked(start, data)

    def read_cached(self, start: int, buffer: memoryview) -> int:
        """The same if it can be had without waiting for a disk, else 0. Raises CorruptError."""
        data = self._part(start, buffer)
        return self._checked(start, data) if self._files.read_cached(self._fd, data, self._offset + start) else 0

    def _part(self, start: int, buffer: memoryview) -> memoryview:
        n_bytes = self.ref.n_bytes - start
        return buffer[:n_bytes] if n_bytes <= len(buffer) else buffer[: len(buffer) // PIECE_BYTES * PIECE_BYTES]

    def _checked(self, start: int, data: memoryview) -> int:
        number = start // PIECE_BYTES
        for at in range(0, len(data), PIECE_BYTES):
            self._check(number, data[at : at + PIECE_BYTES])
            number += 1
        return len(data)

    def open(self) -> None:
        """Open the segment and check the record's header: comes first. Raises CorruptError.

        For an entry without checksums of its pieces this reads the whole string.
        """
        with self._named():
            self._open()
            self._check_header(self._files.read(self._fd, HEADER_BYTES, self.ref.offset))
            if not self._crcs:
                one = self._payload_crc.to_bytes(4, "little")
                self._crcs = one if self.n_pieces == 1 else self._sum_up().crcs

    def open_cached(self) -> bool:
        """The same if it need not wait for a disk; False if it must. Raises CorruptError."""
        with self._named():
            self._open()
            head = bytearray(HEADER_BYTES)
            if not self._crcs or not self._files.read_cached(self._fd, head, self.ref.offset):
                return False
            self._check_header(head)
            return True

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise CorruptError(f"{self._place.words}: the segment file is missing") from error
        except FormatError as error:
            raise CorruptError(f"{self._place.words}: {error}") from error
        except OSError as error:
            raise as_kvdb_error(error, self._place.words) from error

    def _open(self) -> None:
        if self._fd < 0:
            self._fd = self._files.open(self._place.path, write=False)

    def _check_header(self, head: Piece) -> None:
        ref, header = self.ref, decode_header(head)
        if (header.type, header.id16, header.payload_bytes) != (RecordType.STRING, ref.id16, ref.n_bytes):
            raise FormatError("another record lies there")
        self._payload_crc = header.payload_crc

    def check_whole(self) -> None:
        """Open, read everything, and compare it with the record's id, too. Raises CorruptError."""
        self._crcs = self._crcs or b"\0"  # `open` need not read for them
        self.open()
        try:
            found = self._sum_up()
        except OSError as error:
            raise as_kvdb_error(error, self._place.words) from error
        if found.id16 != self.ref.id16:
            raise CorruptError(f"{self._place.words}: the bytes do not hash to the record's id")

    @property
    def n_pieces(self) -> int:
        """How many pieces there are."""
        return -(-self.ref.n_bytes // PIECE_BYTES)

    def _range(self, number: int) -> tuple[int, int]:
        offset = number * PIECE_BYTES
        return offset, min(PIECE_BYTES, self.ref.n_bytes - offset)

    def _read(self, n_bytes: int, offset: int) -> bytes:
        return self._files.read(self._fd, n_bytes, self.ref.offset + HEADER_BYTES + offset)

    def _sum_up(self) -> StringRef:
        """Read everything and compare it with the header's checksum; return what the entry should be."""
        sums = Sums()
        for number in range(self.n_pieces):
            offset, n_bytes = self._range(number)
            sums.add(self._read(n_bytes, offset))
        head, ref = sums.end(self.ref.segment, self.ref.offset)
        if ref.n_bytes < self.ref.n_bytes or decode_header(head).payload_crc != self._payload_crc:
            raise CorruptError(f"{self._place.words}: record payload checksum mismatch")
        return ref

    def _check(self, number: int, data: Piece) -> None:
        crc = int.from_bytes(self._crcs[4 * number : 4 * number + 4], "little")
        if len(data) < self._range(number)[1] or crc32c([data]) != crc:
            raise CorruptError(f"{self._place.words}: record payload checksum mismatch")


def read_pieces(segments: Segments, files: Files, value: LargeValue, first: int = 0) -> Iterator[Piece]:
    """A large string's pieces from the one with this number on. Raises CorruptError."""
    with StringReader(segments.folder, files, place_of(value)) as reader:
        reader.open()
        for number in range(first, reader.n_pieces):
            yield reader.piece(number)


def read_string(segments: Segments, files: Files, value: LargeValue, start: int = 0, stop: int | None = None) -> bytes:
    """A large string's bytes from `start` to before `stop`, checked. Raises CorruptError."""
    n_bytes = place_of(value).n_bytes
    stop = n_bytes if stop is None else min(stop, n_bytes)
    if start >= stop:
        return b""
    first = start // PIECE_BYTES
    with StringReader(segments.folder, files, place_of(value)) as reader:
        reader.open()
        pieces = [reader.piece(number) for number in range(first, (stop - 1) // PIECE_BYTES + 1)]
    data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
    if start == first * PIECE_BYTES and len(data) == stop - start:
        return data
    return data[start - first * PIECE_BYTES : stop - first * PIECE_BYTES]


def check_string(reader: Reader, place: RecordPlace) -> None:
    """Compare a large string with its header's checksum and with its id. Raises CorruptError."""
    ref = StringRef(place.segment_id, place.offset, place.payload_bytes, place.id[:16])
    with StringReader(place.path.parent, reader.files, ref) as string:
        string.check_whole()
