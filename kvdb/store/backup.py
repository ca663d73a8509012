"""Backup: a consistent copy of a live data directory, and only what an existing copy lacks.

The index is copied first, as of one commit. While its records are copied nothing is punched or unlinked, so whatever
that index names is still there. A record that is live in two indexes did not change between them, so a copy that was
made before needs only the records that its own index does not name. They may lie below the length that it has: a
received string can be committed after one that lies behind it. The new index is put in place last: until then the old
backup is whole.

A backup is a data directory: serve it, or copy it back.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from kvdb.errors import KvdbError
from kvdb.store.files import Files
from kvdb.store.index import Index
from kvdb.store.lock import Lock
from kvdb.store.rows import SegmentRow
from kvdb.store.segments import gaps, live_extents, segment_name
from kvdb.store.work import Extent, merged
from kvdb_protocol.record import SEGMENT_HEADER_BYTES

CHUNK_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class BackupReport:
    """What a backup did. bytes_live: of all records in it; bytes_copied: of those that it lacked."""

    segments: int
    bytes_live: int
    bytes_copied: int
    ms: float


def back_up(index: Index, source: Path, files: Files, target: Path) -> BackupReport:
    """Copy a store into `target`. source: its segments' folder; nothing there may be punched or unlinked meanwhile.

    Raises KvdbError if `target` is something else than a backup or is being served, OSError.
    """
    began = time.monotonic()
    folder = target / "segments"
    if target.exists() and any(target.iterdir()) and not (target / "LOCK").exists():
        raise KvdbError(f"{target} is not empty and not a kvdb backup: choose another name")
    files.make_dir(folder)
    lock = Lock(target / "LOCK")
    try:
        fresh = target / "index.new"
        shutil.rmtree(fresh, ignore_errors=True)
        files.make_dir(fresh)
        index.copy(fresh)
        rows, live = _contents(fresh)
        before, had = _contents(target / "index") if (target / "index" / "data.mdb").exists() else ({}, {})
        copied = 0
        present = set(files.names(folder))
        for segment_id, row in rows.items():
            old = before.get(segment_id)
            has_old = old is not None and old.created_ms == row.created_ms and segment_name(segment_id) in present
            start = old.committed if old is not None and has_old else 0
            kept = frozenset(had[segment_id]) if start else frozenset()
            lacking = [extent for extent in live[segment_id] if extent not in kept]
            copied += _copy_segment(files, source, folder, segment_id, row, lacking, start)
        files.sync_dir(folder)
        _replace_index(files, target, fresh)
        _drop_the_rest(files, folder, rows, live, before)
    finally:
        lock.release()
    return BackupReport(len(rows), sum(row.live for row in rows.values()), copied, (time.monotonic() - began) * 1e3)


def _contents(path: Path) -> tuple[dict[int, SegmentRow], dict[int, list[Extent]]]:
    index = Index(path, read_only=True)
    try:
        with index.read() as txn:
            rows = txn.segments()
            return rows, {segment_id: live_extents(txn, segment_id) for segment_id in rows}
    finally:
        index.close()


def _copy_segment(
    files: Files, source: Path, folder: Path, segment_id: int, row: SegmentRow, lacking: list[Extent], start: int
) -> int:
    """Copy the extents that the copy lacks, and the header if it starts anew; return their bytes.

    start: the length that the copy has, 0 if there is none.
    """
    name = segment_name(segment_id)
    wanted = merged(lacking)
    if start and start == row.committed and not wanted:
        return 0
    if not start and (folder / name).exists():
        files.unlink(folder / name)  # of an interrupted backup, or of another store
    header = [] if start else [Extent(segment_id, 0, SEGMENT_HEADER_BYTES)]
    from_fd = files.open(source / name, write=False)
    try:
        to_fd = files.open(folder / name, write=True) if start else files.create(folder / name)
        try:
            for extent in header + wanted:
                _copy(files, from_fd, to_fd, extent)
            files.truncate(to_fd, row.committed)
            files.datasync(to_fd)
        finally:
            files.close(to_fd)
    finally:
        files.close(from_fd)
    return sum(extent.n_bytes for extent in wanted)


def _copy(files: Files, from_fd: int, to_fd: int, extent: Extent) -> None:
    buffer = memoryview(bytearray(min(CHUNK_BYTES, extent.n_bytes)))
    for offset in range(extent.offset, extent.offset + extent.n_bytes, CHUNK_BYTES):
        view = buffer[: min(CHUNK_BYTES, extent.offset + extent.n_bytes - offset)]
        got = files.read_into(from_fd, view, offset)
        # A source that is shorter than its committed length is damaged; its copy shows the same damage.
        files.write(to_fd, view[:got], offset)


def _replace_index(files: Files, target: Path, fresh: Path) -> None:
    fd = files.open(fresh / "data.mdb", write=True)
    try:
        files.datasync(fd)
    finally:
        files.close(fd)
    files.make_dir(target / "index")
    (target / "index" / "lock.mdb").unlink(missing_ok=True)  # readers of the old index; there are none under our lock
    files.rename(fresh / "data.mdb", target / "index" / "data.mdb")
    files.sync_dir(target / "index")
    files.sync_dir(target)
    shutil.rmtree(fresh, ignore_errors=True)


def _drop_the_rest(
    files: Files,
    folder: Path,
    rows: dict[int, SegmentRow],
    live: dict[int, list[Extent]],
    before: dict[int, SegmentRow],
) -> None:
    """Remove what the new index does not name any more."""
    known = {segment_name(segment_id) for segment_id in rows}
    for name in files.names(folder):
        if name not in known:
            files.unlink(folder / name)
    for segment_id in rows.keys() & before.keys():
        fd = files.open(folder / segment_name(segment_id), write=True)
        try:
            for extent in gaps(segment_id, rows[segment_id].committed, live[segment_id]):
                files.punch(fd, extent.offset, extent.n_bytes)
        finally:
            files.close(fd)
