"""Compaction: move the live records of sparse segments into a new one, then remove the old files.

Hole punching gives most bytes back already; what is left to gain is the number of segments, and space on file systems
that cannot punch. A record is copied whole and checked, never rewritten: its id, checksums and bytes stay. The old
file stays until everybody who was reading when the move was committed is done, since they know the old places.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvdb.store.files import Files
from kvdb.store.index import Table, Txn, place_key
from kvdb.store.read import Reader, RecordPlace, page_place, tail_place
from kvdb.store.records import Reservation
from kvdb.store.rows import PageRow, PlaceRow, RecordType, SegmentRow, SnapshotRow, pack
from kvdb.store.work import Extent, Work
from kvdb_protocol.record import SEGMENT_HEADER_BYTES, padding, record_bytes
from kvdb_protocol.tail import state_header

log = logging.getLogger("kvdb.store")

SPARSE = 0.5  # segments with a smaller live share are compacted
BATCH_BYTES = 64 << 20  # moved and committed at a time


@dataclass(frozen=True, slots=True)
class Moved:
    """A record that was copied to `offset` of the reserved segment."""

    place: RecordPlace
    offset: int


def sparse_segments(rows: Iterable[tuple[int, SegmentRow]], busy: Iterable[int]) -> list[int]:
    """Segments worth compacting: less than half live, and nobody appends to them."""
    in_use = set(busy)
    return [
        segment_id
        for segment_id, row in rows
        if segment_id not in in_use and 0 < row.live < SPARSE * (row.committed - SEGMENT_HEADER_BYTES)
    ]


def batches(txn: Txn, folder: Path, segment_id: int) -> list[list[RecordPlace]]:
    """The live records of a segment in order, in batches of about BATCH_BYTES."""
    found: list[list[RecordPlace]] = []
    n_bytes = BATCH_BYTES
    for _, value in txn.scan(Table.PLACES, prefix=place_key(segment_id, 0)[:8]):
        row = PlaceRow.decode(value)
        place = _place(txn, folder, row)
        if place is None:
            continue
        if n_bytes >= BATCH_BYTES:
            found.append([])
            n_bytes = 0
        found[-1].append(place)
        n_bytes += place.record_bytes
    return found


def holds_strings(txn: Txn, segment_id: int) -> bool:
    """Whether large strings lie in a segment. Those are left where they are: they are punched one by one."""
    rows = txn.scan(Table.PLACES, prefix=place_key(segment_id, 0)[:8])
    return any(PlaceRow.decode(value).type == RecordType.STRING for _, value in rows)


def _place(txn: Txn, folder: Path, row: PlaceRow) -> RecordPlace | None:
    if row.type == RecordType.PAGE:
        page = txn.page(row.id)
        return None if page is None else page_place(folder, row.id, page)
    snapshot = txn.snapshot(row.id)
    return None if snapshot is None else tail_place(folder, row.id, snapshot)


def copy_records(files: Files, places: Sequence[RecordPlace], reservation: Reservation) -> list[Moved]:
    """Copy records to the reserved position. Raises CorruptError for one that fails its checks, OSError."""
    moved = []
    offset = reservation.offset
    fd = files.open(reservation.path, write=True)
    try:
        with Reader(files) as reader:
            for place in places:
                payload = reader.payload(place)
                head = state_header(place.type, place.id, [payload])
                files.write(fd, head, offset)
                files.write(fd, payload, offset + len(head))
                files.write(fd, padding(len(payload)), offset + len(head) + len(payload))
                moved.append(Moved(place, offset))
                offset += record_bytes(len(payload))
    finally:
        files.close(fd)
    return moved


def commit_moves(txn: Txn, work: Work, reservation: Reservation, moved: Sequence[Moved], end: int) -> int:
    """Point the rows to the new places; return the bytes moved. Records that were freed meanwhile are dead copies.

    The old extents are not given to `work.freed`: their segment is removed as a whole once it is safe.
    """
    segment = reservation.segment_id
    work.commit_up_to(segment, end, reservation.created_ms)
    n_bytes = 0
    for one in moved:
        place = one.place
        extent = Extent(segment, one.offset, place.record_bytes)
        row: PageRow | SnapshotRow | None
        row = txn.page(place.id) if place.type == RecordType.PAGE else txn.snapshot(place.id)
        if row is None or (row.segment, row.offset) != (place.segment_id, place.offset):
            work.freed.append(extent)
            continue
        table = Table.PAGES if place.type == RecordType.PAGE else Table.SNAPSHOTS
        txn.put(table, place.id, pack(row._replace(segment=segment, offset=one.offset)))
        txn.delete(Table.PLACES, place_key(place.segment_id, place.offset))
        txn.put(
            Table.PLACES, place_key(segment, one.offset), pack(PlaceRow(int(place.type), place.id, place.payload_bytes))
        )
        work.add_live(place.segment_id, -place.record_bytes)
        work.add_live(segment, place.record_bytes)
        n_bytes += place.record_bytes
    return n_bytes
