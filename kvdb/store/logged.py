"""What the change log has and the index has not, when a data directory is opened.

A round that logs a large string waits for two syncs at once, of the record and of the string. So the strings that the
last record names may be lacking: then it was never answered, and is not made again. If they are whole, that may be so
in memory only, where a daemon left them that was killed: they are synced first, and the record too.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from kvdb.errors import CorruptError, KvdbError
from kvdb.store.change_log import LOG_NAME, ChangeLog
from kvdb.store.entries import Entry, HeldString, StringRef
from kvdb.store.files import Files
from kvdb.store.index import STAMP, Table, Txn, place_key
from kvdb.store.layer import Ends, Layer, unpack
from kvdb.store.rows import SegmentRow
from kvdb.store.segments import Segments, segment_name
from kvdb.store.strings import StringReader
from kvdb.store.work import Extent
from kvdb_protocol.errors import FormatError
from kvdb_protocol.record import record_bytes

log = logging.getLogger("kvdb.store")


@dataclass(slots=True)
class Logged:
    """Changes that build on the index, in order.

    ends: of each layer, how far it needs each segment, and its creation time. new: records that the index does not
    know; unsynced: those of them that may not be on the disk. is_cut: whether there is a last record that was not
    answered.
    """

    layers: list[Layer] = field(default_factory=list)
    ends: list[Ends] = field(default_factory=list)
    new: set[StringRef] = field(default_factory=set)
    unsynced: set[StringRef] = field(default_factory=set)
    is_cut: bool = False

    def make_durable(self, change_log: ChangeLog, segments: Path, files: Files) -> None:
        """Bring to the disk what a daemon that was killed may have left in memory only. Raises OSError.

        Comes before anything is cut or dropped: what a record supersedes must stay as long as that record may not
        count. If the last one's strings cannot be synced, they were not before, and it was not answered.
        """
        try:
            for segment in {ref.segment for ref in self.unsynced}:
                datasync(files, segments / segment_name(segment))
        except OSError as error:
            self.cut(f"a string that it names cannot be synced: {error}")
            self.layers.pop()
            self.ends.pop()
            self.new -= self.unsynced
            self.unsynced.clear()
        if self.layers:
            change_log.sync()

    def cut(self, why: str) -> None:
        """Leave the last record out."""
        log.warning("the last record of %s was not answered: %s", LOG_NAME, why)
        self.is_cut = True

    def end_of(self, segment: int) -> tuple[int, int]:
        """How far a segment is needed, and its creation time."""
        return max(ends.get(segment, (0, 0)) for ends in self.ends)

    def extend_rows(self, rows: dict[int, SegmentRow], live: dict[int, list[Extent]]) -> None:
        """Make rows of segments, and the live records of untidy ones, what they will be with these changes."""
        for segment in {segment for ends in self.ends for segment in ends}:
            end, created_ms = self.end_of(segment)
            row = rows.get(segment, SegmentRow(created_ms, end, 0, False))
            rows[segment] = row._replace(committed=max(row.committed, end))
        for extent in map(extent_of, self.new):
            if extent.segment in live:
                live[extent.segment] = sorted([*live[extent.segment], extent])

    def held(self, segments: Segments, hold: Callable[[StringRef], HeldString]) -> Iterator[Layer]:
        """The layers, with what holds their large strings. hold: for those that are committed."""
        fresh = {ref: _fresh(segments, ref, self.end_of(ref.segment)[1]) for ref in self.new}
        for layer in self.layers:
            for entries in layer.maps:
                for key, entry in entries.items():
                    if entry is not None and isinstance(ref := entry.value, StringRef):
                        entries[key] = Entry(entry.type, entry.expire_ms, fresh.get(ref) or hold(ref))
            yield layer


def read_logged(change_log: ChangeLog, txn: Txn, segments: Path, files: Files) -> tuple[Logged, str]:
    """What was logged behind the index's last commit, and what is wrong behind that, in words. Changes nothing.

    segments: their folder. Raises OSError, CorruptError.
    """
    records, problem = change_log.read(txn.meta(STAMP))
    logged = Logged()
    for number, record in enumerate(records):
        try:
            layer, ends = unpack(record)
        except FormatError as error:
            raise CorruptError(str(error)) from error
        new = {ref for ref in _strings(layer) if not txn.has(Table.PLACES, place_key(ref.segment, ref.offset))}
        if number == len(records) - 1 and not problem:
            logged.unsynced = new - logged.new
            if not all(_is_whole(segments, files, ref) for ref in logged.unsynced):
                logged.cut("a string that it names is not on the disk")
                logged.unsynced = set()
                break
        logged.layers.append(layer)
        logged.ends.append(ends)
        logged.new |= new
    return logged, problem


def _strings(layer: Layer) -> set[StringRef]:
    values = (entry.value for entries in layer.maps for entry in entries.values() if entry is not None)
    return {value for value in values if isinstance(value, StringRef)}


def _is_whole(segments: Path, files: Files, ref: StringRef) -> bool:
    try:
        fd = files.open(segments / segment_name(ref.segment), write=False)
        try:
            if files.size(fd) < extent_of(ref).end:
                return False
        finally:
            files.close(fd)
        with StringReader(segments, files, ref) as reader:
            reader.check_whole()
    except (CorruptError, FileNotFoundError):
        return False
    except KvdbError:
        pass  # it cannot be read now: its key will say so
    return True


def datasync(files: Files, path: Path) -> None:
    """Bring to the disk what another process may have left in memory only. Raises OSError."""
    fd = files.open(path, write=True)
    try:
        files.datasync(fd)
    finally:
        files.close(fd)


def extent_of(ref: StringRef) -> Extent:
    """The range of a large string's record."""
    return Extent(ref.segment, ref.offset, record_bytes(ref.n_bytes))


def _fresh(segments: Segments, ref: StringRef, created_ms: int) -> HeldString:
    """A string that is on the disk, and that no commit knows: as its client's daemon left it (receive.py)."""
    extent = extent_of(ref)
    segments.submitted(ref.segment)
    string = HeldString(ref.n_bytes)
    string.complete(ref, created_ms, False, partial(segments.dropped, extent, segments.pins.hold(extent)))
    string.is_synced = True
    return string
