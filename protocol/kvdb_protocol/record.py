"""Segments and records: the envelope of everything that is not in the index.

Segment header, 4096 bytes                        Record, starts on a 4096-byte boundary
      0  8  magic "KVDBSEG1"                            0   4  magic "KVR1"
      8  4  u32 version = 1                             4   1  u8 type: 1 page, 2 tail, 3 string
     12  4  u32 zero                                    5   1  u8 version = 1
     16  8  u64 segment id                              6   2  u16 flags = 0
     24  8  u64 creation time, Unix ms                  8   8  u64 payload bytes
     32  4  u32 crc32c of bytes 0..31                  16   8  u64 decoded bytes (= payload bytes: no compression yet)
     36 ..  zero                                       24   4  u32 crc32c of the payload
                                                       28   4  u32 crc32c of this header with this field zero
                                                       32  16  first 16 bytes of the id
                                                       48   4  u32 bytes of the payload's head, 0 for none
                                                       52   4  u32 crc32c of the head
                                                       56   8  zero
                                                       64  ..  payload, then zeros to the next boundary

All integers little-endian. Readers check the header's checksum and the payload's before they look at a payload, or the
head's before they look at its head: of a tail that is all but the rows. Records of earlier versions have no head.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache

from fastcrc.crc32 import iscsi

from kvdb_protocol.errors import ChecksumError, FormatError, VersionError
from kvdb_protocol.ids import Buffer

ALIGN = 4096
HEADER_BYTES = 64
SEGMENT_HEADER_BYTES = ALIGN
SEGMENT_MAGIC = b"KVDBSEG1"
RECORD_MAGIC = b"KVR1"
VERSION = 1

_TYPES = frozenset(range(1, 4))
_SEGMENT = struct.Struct("<8sIIQQ")
_RECORD = struct.Struct("<4sBBHQQII16sII8x")
_CRC_AT = 28
_CASTAGNOLI = 0x82F63B78


class RecordType(IntEnum):
    """What a record's payload is. On disk as u8."""

    PAGE = 1
    TAIL = 2
    STRING = 3


@dataclass(frozen=True, slots=True)
class RecordHeader:
    """A record's 64 header bytes, checked."""

    type: RecordType
    flags: int
    payload_bytes: int
    payload_crc: int
    id16: bytes
    head_bytes: int
    head_crc: int

    @property
    def record_bytes(self) -> int:
        """Bytes of the whole record on disk, rounded up to the alignment."""
        return record_bytes(self.payload_bytes)


def crc32c(buffers: Sequence[Buffer], crc: int = 0) -> int:
    """crc32c (Castagnoli) of the concatenation of the buffers, behind bytes whose crc32c is `crc`.

    The interpreter's lock is free meanwhile: no other thread may change the buffers.
    """
    for buffer in buffers:
        crc = iscsi(buffer, crc)
    return crc


def crc32c_join(first: int, second: int, n_second: int) -> int:
    """crc32c of two byte strings one behind the other, from their own checksums and the length of the second."""
    return _multiply(first, _power_of_x(8 * n_second)) ^ second


def _multiply(a: int, b: int) -> int:
    """Product of two polynomials modulo the checksum's; the coefficient of x**0 is the highest bit."""
    product = 0
    while a:
        if a & 0x80000000:
            product ^= b
        a = a << 1 & 0xFFFFFFFF
        b = b >> 1 ^ (_CASTAGNOLI if b & 1 else 0)
    return product


@lru_cache(maxsize=256)
def _power_of_x(n: int) -> int:
    if n < 32:
        return 0x80000000 >> n
    half = _power_of_x(n // 2)
    square = _multiply(half, half)
    return _multiply(square, 0x40000000) if n % 2 else square


def aligned(n_bytes: int) -> int:
    """Round up to the record alignment."""
    return -(-n_bytes // ALIGN) * ALIGN


def record_bytes(payload_bytes: int) -> int:
    """Bytes that a record with this payload takes in its segment."""
    return aligned(HEADER_BYTES + payload_bytes)


def encode_header(record_type: RecordType, record_id: bytes, payload: Sequence[Buffer], head_bytes: int = 0) -> bytes:
    """Build the 64 header bytes of a record whose payload is given in pieces.

    head_bytes: so much of the payload's begin gets a checksum of its own.
    """
    head, rest = [], []
    left = head_bytes
    for piece in (memoryview(piece).cast("B") for piece in payload):
        head.append(piece[:left])
        rest.append(piece[left:])
        left -= min(left, len(piece))
    head_crc = crc32c(head)
    n_bytes = sum(map(len, (*head, *rest)))
    return pack_header(record_type, record_id, n_bytes, crc32c(rest, head_crc), head_bytes, head_crc)


def pack_header(
    record_type: RecordType, record_id: bytes, n_bytes: int, payload_crc: int, head_bytes: int = 0, head_crc: int = 0
) -> bytes:
    """The 64 header bytes of a record whose payload's length and checksum are known."""
    fields = (RECORD_MAGIC, record_type, VERSION, 0, n_bytes, n_bytes, payload_crc)
    last = (record_id[:16], head_bytes, head_crc)
    return _RECORD.pack(*fields, iscsi(_RECORD.pack(*fields, 0, *last)), *last)


def padding(payload_bytes: int) -> bytes:
    """Zeros that follow a payload up to the next record boundary."""
    return bytes(record_bytes(payload_bytes) - HEADER_BYTES - payload_bytes)


def decode_header(data: Buffer) -> RecordHeader:
    """Read and check a record header from the first 64 bytes of `data`."""
    if len(data) < HEADER_BYTES:
        raise FormatError(f"record header is truncated: {len(data)} of {HEADER_BYTES} bytes")
    head = bytes(data[:HEADER_BYTES])
    magic, record_type, version, flags, n_bytes, decoded_bytes, payload_crc, header_crc, *last = _RECORD.unpack(head)
    id16, head_bytes, head_crc = last
    if magic != RECORD_MAGIC:
        raise FormatError(f"not a record: magic {magic!r}")
    if iscsi(head[:_CRC_AT] + b"\0\0\0\0" + head[_CRC_AT + 4 :]) != header_crc:
        raise ChecksumError("record header checksum mismatch")
    if version != VERSION:
        raise VersionError(f"record version {version} is not supported")
    if record_type not in _TYPES:
        raise FormatError(f"unknown record type {record_type}")
    if decoded_bytes != n_bytes or flags:
        raise VersionError("record uses compression or flags this version does not know")
    if head_bytes > n_bytes:
        raise FormatError(f"the head has {head_bytes} bytes, the payload {n_bytes}")
    return RecordHeader(RecordType(record_type), flags, n_bytes, payload_crc, id16, head_bytes, head_crc)


def decode_record(data: Buffer) -> tuple[RecordHeader, memoryview]:
    """Check a whole record and return its header and a view of its payload. No copy is made."""
    header = decode_header(data)
    view = memoryview(data)[HEADER_BYTES : HEADER_BYTES + header.payload_bytes]
    if len(view) < header.payload_bytes:
        raise FormatError(f"record payload is truncated: {len(view)} of {header.payload_bytes} bytes")
    head_crc = crc32c([view[: header.head_bytes]])
    if crc32c([view[header.head_bytes :]], head_crc) != header.payload_crc or head_crc != header.head_crc:
        raise ChecksumError("record payload checksum mismatch")
    return header, view


def decode_record_head(data: Buffer) -> tuple[RecordHeader, memoryview]:
    """Check the header of a record and the head of its payload; return the header and a view of the head.

    `data` may end where the head ends. The head is empty in a record that was written without one.
    """
    header = decode_header(data)
    view = memoryview(data)[HEADER_BYTES : HEADER_BYTES + header.head_bytes]
    if len(view) < header.head_bytes:
        raise FormatError(f"head of a record is truncated: {len(view)} of {header.head_bytes} bytes")
    if crc32c([view]) != header.head_crc:
        raise ChecksumError("record head checksum mismatch")
    return header, view


def encode_segment_header(segment_id: int, created_ms: int) -> bytes:
    """The 4096 bytes a segment file begins with."""
    head = _SEGMENT.pack(SEGMENT_MAGIC, VERSION, 0, segment_id, created_ms)
    return (head + struct.pack("<I", iscsi(head))).ljust(SEGMENT_HEADER_BYTES, b"\0")


def decode_segment_header(data: Buffer) -> tuple[int, int]:
    """Return (segment id, creation time in Unix ms) of a segment header, checked."""
    if len(data) < _SEGMENT.size + 4:
        raise FormatError(f"segment header is truncated: {len(data)} bytes")
    head = bytes(data[: _SEGMENT.size])
    magic, version, _, segment_id, created_ms = _SEGMENT.unpack(head)
    if magic != SEGMENT_MAGIC:
        raise FormatError(f"not a segment: magic {magic!r}")
    if iscsi(head) != struct.unpack_from("<I", data, _SEGMENT.size)[0]:
        raise ChecksumError("segment header checksum mismatch")
    if version != VERSION:
        raise VersionError(f"segment version {version} is not supported")
    return segment_id, created_ms
