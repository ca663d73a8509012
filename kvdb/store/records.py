"""What writers and the store say to each other about records: reserved, written, committed, stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kvdb.store.rows import Reason
from kvdb_protocol.ids import NO_PAGE
from kvdb_protocol.record import RecordType, record_bytes


@dataclass(frozen=True, slots=True)
class ModelRecord:
    """A model as the store knows it. layout_bytes: Layout.to_bytes()."""

    name: str
    fingerprint: bytes
    family: bytes
    layout_bytes: bytes


@dataclass(frozen=True, slots=True)
class Reservation:
    """Where a writer may write records: the append position of its own segment."""

    segment_id: int
    path: Path
    offset: int
    created_ms: int = 0


@dataclass(frozen=True, slots=True)
class WrittenRecord:
    """A record that a writer put at `offset` of the reserved segment.

    parent, prefix, first, n_tokens are of pages: parent page id, prefix hash after its tokens, its span.
    """

    type: RecordType
    id: bytes
    offset: int
    payload_bytes: int
    parent: bytes = NO_PAGE
    prefix: bytes = b""
    first: int = 0
    n_tokens: int = 0

    @property
    def end(self) -> int:
        """Offset after the record and its padding."""
        return self.offset + record_bytes(self.payload_bytes)


@dataclass(frozen=True, slots=True)
class NewSnapshot:
    """A snapshot to commit. `written` holds its tail and those of its pages that the writer did not know as stored.

    leaf: its last full page, or NO_PAGE. prefix: its prefix hash. tail_ids: u32 little-endian ids after it.
    parent: the snapshot it continues, if any.
    is_cached: keep it though no key names it; the store sets this when it is committed without a key.
    """

    id: bytes
    fingerprint: bytes
    leaf: bytes
    n_tokens: int
    prefix: bytes
    tail_ids: bytes
    reason: Reason
    created_ms: int
    written: Sequence[WrittenRecord]
    reservation: Reservation
    parent: bytes | None = None
    is_cached: bool = False


@dataclass(frozen=True, slots=True)
class CommittedSnapshot:
    """What a commit did. Bytes are of whole records on disk; existed: the very same state was stored already."""

    id: bytes
    bytes_new: int
    bytes_shared: int
    pages_new: int
    existed: bool


@dataclass(frozen=True, slots=True)
class SnapshotRecord:
    """A stored snapshot. first: tokens in its full pages. tail_bytes, chain_bytes: on disk, its tail and its pages."""

    id: bytes
    fingerprint: bytes
    leaf: bytes
    n_tokens: int
    first: int
    parent: bytes | None
    reason: Reason
    created_ms: int
    refs: int
    is_cached: bool
    tail_bytes: int
    chain_bytes: int


@dataclass(frozen=True, slots=True)
class Usage:
    """A snapshot's bytes on disk. own: what only it needs, freed when nothing names it any more."""

    n_pages: int
    own_bytes: int
    shared_bytes: int
