"""Archive: one snapshot with all its pages, as a file of its own.

      0   8  magic "KVDBARC1"
      8   4  u32 version = 1
     12   4  u32 description bytes
     16   4  u32 crc32c of the description
     20   4  u32 number of records
     24   8  zero
     32   .  description: msgpack [model name, fingerprint, family fingerprint, layout, tokens, reason, created ms]
      .   .  zeros to the next multiple of 4096
      .   .  records (record.py) as in a segment: the pages in order, then the tail

Records keep their bytes, so whoever imports an archive can check every id and share what is stored already.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import msgpack

from kvdb_protocol.errors import ChecksumError, FormatError, VersionError
from kvdb_protocol.ids import Buffer
from kvdb_protocol.record import HEADER_BYTES, RecordHeader, aligned, crc32c, decode_header, decode_record

MAGIC = b"KVDBARC1"
VERSION = 1
_HEAD = struct.Struct("<8sIIII8x")


@dataclass(frozen=True, slots=True)
class Archive:
    """What an archive says of its snapshot. layout: Layout.to_bytes(). reason: as in the index."""

    model: str
    fingerprint: bytes
    family: bytes
    layout: bytes
    n_tokens: int
    reason: int
    created_ms: int
    n_records: int


def encode_head(archive: Archive) -> bytes:
    """The bytes before the first record."""
    described: bytes = msgpack.packb(
        (
            *(archive.model, archive.fingerprint, archive.family, archive.layout),
            *(archive.n_tokens, archive.reason, archive.created_ms),
        )
    )
    head = _HEAD.pack(MAGIC, VERSION, len(described), crc32c([described]), archive.n_records) + described
    return head.ljust(aligned(len(head)), b"\0")


def head_bytes(data: Buffer) -> int:
    """Bytes before the first record, from the first 32 bytes of an archive."""
    if len(data) < _HEAD.size:
        raise FormatError(f"archive is truncated: {len(data)} bytes")
    magic, version, described_bytes, _, _ = _HEAD.unpack_from(data)
    if magic != MAGIC:
        raise FormatError(f"not a kvdb archive: magic {magic!r}")
    if version != VERSION:
        raise VersionError(f"archive version {version} is not supported")
    return aligned(_HEAD.size + int(described_bytes))


def decode_head(data: Buffer) -> Archive:
    """Read the bytes before the first record."""
    n_bytes = head_bytes(data)
    _, _, described_bytes, crc, n_records = _HEAD.unpack_from(data)
    described = bytes(data[_HEAD.size : _HEAD.size + described_bytes])
    if len(data) < n_bytes or len(described) < described_bytes:
        raise FormatError("archive is truncated inside its description")
    if crc32c([described]) != crc:
        raise ChecksumError("archive description checksum mismatch")
    try:
        model, fingerprint, family, layout, n_tokens, reason, created_ms = msgpack.unpackb(described)
    except (ValueError, TypeError) as error:
        raise FormatError(f"bad archive description: {error}") from error
    return Archive(model, fingerprint, family, layout, n_tokens, reason, created_ms, n_records)


def decode_records(data: Buffer, n_records: int) -> Iterator[tuple[RecordHeader, memoryview]]:
    """The records of an archive that is in memory, checked one by one. Views point into `data`."""
    view = memoryview(data).cast("B")
    at = head_bytes(view)
    for _ in range(n_records):
        header, payload = decode_record(view[at : at + HEADER_BYTES + decode_header(view[at:]).payload_bytes])
        yield header, payload
        at += header.record_bytes
    if at != len(view):
        raise FormatError(f"archive has {len(view)} bytes, its records end at {at}")


__all__ = ["Archive", "decode_head", "decode_records", "encode_head", "head_bytes"]
