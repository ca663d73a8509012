"""Where every byte of a data directory is: live, shared, dead, index, journal, log."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kvdb.store.change_log import LOG_NAME
from kvdb.store.errors import as_kvdb_error
from kvdb.store.files import Files
from kvdb.store.index import Index, Table, Txn
from kvdb.store.rows import PageRow, SnapshotRow
from kvdb.store.segments import Segments
from kvdb_protocol.ids import NO_PAGE
from kvdb_protocol.record import SEGMENT_HEADER_BYTES


@dataclass(frozen=True, slots=True)
class StoreStats:
    """Figures of STORE STATS, in bytes unless named otherwise.

    live_unique: records that one snapshot needs; live_shared: pages that several need; strings: records of large
    strings. dead: committed bytes without
    a record. segments_disk: what the file system has allocated for segments (dead bytes that were punched are not).
    journal: the part of `index` that token journals take. log: the change log's file.
    """

    snapshots: int
    cached_snapshots: int
    pages: int
    segments: int
    live_unique: int
    live_shared: int
    strings: int
    dead: int
    headers: int
    segments_disk: int
    index: int
    journal: int
    log: int

    @property
    def live(self) -> int:
        """Bytes of all live records."""
        return self.live_unique + self.live_shared + self.strings


def shared_pages(txn: Txn) -> dict[bytes, int]:
    """Number of snapshots that reach each page."""
    pages = {key: PageRow.decode(value) for key, value in txn.scan(Table.PAGES)}
    reached = dict.fromkeys(pages, 0)
    for _, value in txn.scan(Table.SNAPSHOTS):
        leaf = SnapshotRow.decode(value).leaf
        if leaf in reached:
            reached[leaf] += 1
    # A page begins after its parent, so in falling order of position every child is counted before its parent.
    for page_id, page in sorted(pages.items(), key=lambda item: item[1].first, reverse=True):
        if page.parent != NO_PAGE and page.parent in reached:
            reached[page.parent] += reached[page_id]
    return reached


def measure(index: Index, segments: Segments, files: Files) -> StoreStats:
    """Count everything. Walks the tables of pages and snapshots: for a reader thread."""
    with index.read() as txn:
        reached = shared_pages(txn)
        unique = shared = 0
        for key, value in txn.scan(Table.PAGES):
            n_bytes = PageRow.decode(value).record_bytes
            if reached[key] > 1:
                shared += n_bytes
            else:
                unique += n_bytes
        cached = 0
        for _, value in txn.scan(Table.SNAPSHOTS):
            row = SnapshotRow.decode(value)
            unique += row.record_bytes
            cached += row.cached
        rows = txn.segments()
        headers = SEGMENT_HEADER_BYTES * len(rows)
        committed = sum(row.committed for row in rows.values())
        live = sum(row.live for row in rows.values())
        strings = live - unique - shared  # every other live record
        figures = (txn.count(Table.SNAPSHOTS), cached, len(reached), len(rows))
        journal = txn.table_bytes(Table.JOURNAL)
    dead = committed - headers - live
    disk = sum(_disk_bytes(files, segments.path(segment_id)) for segment_id in rows)
    change_log = _disk_bytes(files, segments.folder.with_name(LOG_NAME))
    return StoreStats(*figures, unique, shared, strings, dead, headers, disk, index.file_bytes, journal, change_log)


def _disk_bytes(files: Files, path: Path) -> int:
    try:
        fd = files.open(path, write=False)
    except FileNotFoundError:
        return 0  # unlinked since, or damage that VERIFY reports
    except OSError as error:
        raise as_kvdb_error(error, "measuring files") from error
    try:
        return files.disk_bytes(fd)
    finally:
        files.close(fd)
