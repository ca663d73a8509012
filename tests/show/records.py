"""Find the records of a stored state by reading segments alone, with no index: for the programs beside this one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kvdb_protocol.errors import FormatError
from kvdb_protocol.record import ALIGN, HEADER_BYTES, SEGMENT_HEADER_BYTES, RecordType, decode_header
from kvdb_protocol.tail import tail_head


@dataclass(frozen=True)
class Found:
    """A record: its file, where it starts, its kind, the beginning of its id, its payload."""

    path: Path
    offset: int
    type: RecordType
    id16: bytes
    payload: bytes

    @property
    def payload_at(self) -> int:
        return self.offset + HEADER_BYTES


def records(directory: Path) -> Iterator[Found]:
    """All records of all segments, live or dead."""
    for path in sorted((directory / "segments").glob("*.seg")):
        data = path.read_bytes()
        at = SEGMENT_HEADER_BYTES
        while at + HEADER_BYTES <= len(data):
            try:
                head = decode_header(memoryview(data)[at:])
            except FormatError:
                at += ALIGN  # a hole
                continue
            payload = data[at + HEADER_BYTES : at + HEADER_BYTES + head.payload_bytes]
            yield Found(path, at, head.type, head.id16, payload)
            at += head.record_bytes


def tail_of(directory: Path, snapshot_id: bytes) -> Found:
    """The tail record of a snapshot."""
    return _by_id(directory, snapshot_id, RecordType.TAIL)


def leaf_of(directory: Path, snapshot_id: bytes) -> Found:
    """The record of a snapshot's last full page."""
    leaf = tail_head(memoryview(tail_of(directory, snapshot_id).payload)).leaf
    return _by_id(directory, leaf, RecordType.PAGE)


def _by_id(directory: Path, record_id: bytes, kind: RecordType) -> Found:
    for found in records(directory):
        if found.id16 == record_id[:16] and found.type is kind:
            return found
    raise LookupError(f"no {kind.name} record {record_id.hex()[:12]}")
