"""The rows of the index: what each table's values mean, as msgpack arrays.

Rows are named tuples and not dataclasses: a restore at 1M tokens decodes thousands of them, and a named tuple is
made straight from the decoded array. Fields are only ever added at the end; readers fill missing ones with defaults.
The tables and their keys are drawn in docs/format.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum
from typing import NamedTuple

import msgpack

from kvdb_protocol.record import HEADER_BYTES, RecordType, record_bytes


class Reason(IntEnum):
    """Why a snapshot was taken. On disk as an integer; 1 to 4 are ds4's numbers."""

    COLD = 1
    CONTINUED = 2
    EVICT = 3
    SHUTDOWN = 4
    MANUAL = 7
    IMPORT = 8


class ModelRow(NamedTuple):
    """A model whose states are stored. Pages and snapshots name it by its number."""

    number: int
    name: str
    family: bytes
    layout: bytes

    @classmethod
    def decode(cls, data: bytes) -> ModelRow:
        """Inverse of pack."""
        return cls._make(msgpack.unpackb(data))


class SegmentRow(NamedTuple):
    """A segment that exists. Bytes past `committed` do not exist; of those before, `live` belong to records.

    untidy: some dead bytes may still have blocks; the next start or GC gives them back.
    """

    created_ms: int
    committed: int
    live: int
    untidy: bool

    @classmethod
    def decode(cls, data: bytes) -> SegmentRow:
        """Inverse of pack."""
        return cls._make(msgpack.unpackb(data))


class PageRow(NamedTuple):
    """A stored page. refs counts its child pages and the snapshots whose leaf it is.

    chain_bytes: bytes on disk of its record and of all its ancestors' records.
    """

    epoch: int
    model: int
    parent: bytes
    prefix: bytes
    first: int
    n_tokens: int
    segment: int
    offset: int
    payload_bytes: int
    refs: int
    chain_bytes: int

    @classmethod
    def decode(cls, data: bytes) -> PageRow:
        """Inverse of pack."""
        return cls._make(msgpack.unpackb(data))

    @property
    def record_bytes(self) -> int:
        """Bytes of its record on disk."""
        return record_bytes(self.payload_bytes)


class SnapshotRow(NamedTuple):
    """A stored snapshot and the place of its tail. refs counts the key entries that name it, plus one if cached.

    parent: id of the snapshot it continued, or empty. prefix, tail_hash: prefix hash of the leaf, and of leaf and tail.
    cached: nobody named it; it lives until eviction drops it.
    """

    model: int
    leaf: bytes
    n_tokens: int
    first: int
    parent: bytes
    reason: int
    created_ms: int
    segment: int
    offset: int
    payload_bytes: int
    prefix: bytes
    tail_hash: bytes
    refs: int
    cached: bool

    @classmethod
    def decode(cls, data: bytes) -> SnapshotRow:
        """Inverse of pack."""
        return cls._make(msgpack.unpackb(data))

    @property
    def record_bytes(self) -> int:
        """Bytes of its tail's record on disk."""
        return record_bytes(self.payload_bytes)


class PlaceRow(NamedTuple):
    """Which record lies at a place of a segment; the inverse of the places in pages, snapshots and strings."""

    type: int
    id: bytes
    payload_bytes: int

    @classmethod
    def decode(cls, data: bytes) -> PlaceRow:
        """Inverse of pack; of a string's row with the first of its names."""
        return cls._make(msgpack.unpackb(data)[:3])

    @property
    def record_bytes(self) -> int:
        """Bytes of the record on disk."""
        return record_bytes(self.payload_bytes)


def pack_string_place(names: Iterable[bytes], payload_bytes: int) -> bytes:
    """The row in PLACES of a string that the entries with these name keys share."""
    first, *others = sorted(names)
    row = [int(RecordType.STRING), first, payload_bytes]
    data: bytes = msgpack.packb([*row, others] if others else row)
    return data


def string_names(data: bytes) -> list[bytes]:
    """The name keys of the entries that share a string, from its row in PLACES."""
    row = msgpack.unpackb(data)
    return [row[1], *(row[3] if len(row) > 3 else ())]


def pack(row: tuple[object, ...]) -> bytes:
    """A row as the msgpack array that the index stores."""
    data: bytes = msgpack.packb(row)
    return data


def record_name(record_type: int) -> str:
    """A record type in words, for errors and reports."""
    return RecordType(record_type).name.lower()


__all__ = [
    "HEADER_BYTES",
    "ModelRow",
    "PageRow",
    "PlaceRow",
    "Reason",
    "RecordType",
    "SegmentRow",
    "SnapshotRow",
    "pack",
    "record_name",
]
