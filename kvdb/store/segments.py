"""Segment files: who appends where, what is synced, what is given back.

Every writer (an engine worker, the daemon itself) appends to a segment of its own, so writers never wait for each
other. A writer has one reservation at a time; it may write at and past that offset until the records are submitted
for commit or forgotten. Bytes past a segment's committed length do not exist: start-up cuts them.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kvdb.store.files import Files
from kvdb.store.index import Table, Txn, place_key
from kvdb.store.pins import Pin, Pins
from kvdb.store.records import Reservation
from kvdb.store.rows import PlaceRow, SegmentRow
from kvdb.store.work import Extent, merged
from kvdb_protocol.record import SEGMENT_HEADER_BYTES, encode_segment_header

log = logging.getLogger("kvdb.store")

# A new segment once this many bytes are in one: few enough files for terabytes, small enough to compact in a second.
SEGMENT_BYTES = 256 << 20
# Segments with room left that a restarted daemon continues, one a writer; the rest wait for compaction.
MAX_SPARE = 4
NO_FD = -1


def segment_name(segment_id: int) -> str:
    """File name of a segment."""
    return f"{segment_id:08d}.seg"


@dataclass(slots=True)
class _Open:
    """A segment that can be appended to. The descriptor stays open while writers write: a sync reports only those
    write-back errors that happened after its descriptor was opened."""

    id: int
    fd: int
    position: int
    created_ms: int
    sync_lock: threading.Lock = field(default_factory=threading.Lock)
    n_begun: int = 0  # syncs, and the number of the last one that succeeded
    n_synced: int = 0


class Segments:
    """The segments of one data directory. Thread-safe where the commit thread calls it."""

    def __init__(self, folder: Path, files: Files) -> None:
        self.folder = folder
        self.pins = Pins()
        self._files = files
        self._lock = threading.Lock()
        self._next_id = 1
        self._active: dict[str, _Open] = {}  # by writer
        self._spare: list[_Open] = []  # found at start-up with room left
        self._full: dict[int, _Open] = {}  # no longer appended to, some commits still due
        self._abandoned: set[int] = set()
        self._due: Counter[int] = Counter()  # submitted and not yet resolved commits, by segment
        self._retired: set[int] = set()
        self._can_punch = True
        self._n_files = 0
        self._is_tidying_paused = False
        self._dropped: deque[tuple[Extent, Pin, bool]] = deque()  # received strings that nobody needs in memory

    def path(self, segment_id: int) -> Path:
        """Where a segment lies."""
        return self.folder / segment_name(segment_id)

    def recover(self, rows: dict[int, SegmentRow], next_id: int, live: dict[int, list[Extent]]) -> list[str]:
        """Make the folder agree with the index; return what was wrong, in words.

        rows: the committed segments. live: for untidy segments the extents of their live records.
        """
        self._files.make_dir(self.folder)
        known = {segment_name(segment_id) for segment_id in rows}
        found = self._files.names(self.folder)
        for name in found:
            if name not in known:
                self._files.unlink(self.folder / name)
        problems = [f"segment {name} is missing" for name in sorted(known - set(found))]
        ids = [int(name.removesuffix(".seg")) for name in found if name.removesuffix(".seg").isdigit()]
        self._next_id = max([next_id, *(segment_id + 1 for segment_id in (*rows, *ids))])
        self._n_files = len(rows)
        for segment_id, row in rows.items():
            if segment_name(segment_id) in found:
                problems += self._recover_one(segment_id, row, live.get(segment_id))
        return problems

    def _recover_one(self, segment_id: int, row: SegmentRow, live: list[Extent] | None) -> list[str]:
        fd = self._files.open(self.path(segment_id), write=True)
        try:
            size = self._files.size(fd)
            if size < row.committed:
                return [f"segment {segment_name(segment_id)} has {size} of {row.committed} bytes"]
            if size > row.committed:
                self._files.truncate(fd, row.committed)
            if live is not None:
                for extent in gaps(segment_id, row.committed, live):
                    self._files.punch(fd, extent.offset, extent.n_bytes)
        finally:
            self._files.close(fd)
        if row.committed < SEGMENT_BYTES // 2 and len(self._spare) < MAX_SPARE:
            self._spare.append(_Open(segment_id, NO_FD, row.committed, row.created_ms))
        return []

    def reserve(self, writer: str, n_bytes_hint: int) -> Reservation:
        """The append position of the writer's segment, a new one if `n_bytes_hint` does not fit. Does file I/O.

        A reservation that was not submitted is replaced by the writer's next one.
        """
        with self._lock:
            current = self._active.get(writer)
            if current is not None and not self._has_room(current, n_bytes_hint):
                self._retire(writer, current)
                current = None
            if current is None and (current := self._take_spare(n_bytes_hint)) is not None:
                current.fd = self._files.open(self.path(current.id), write=True)
            if current is not None:
                self._active[writer] = current
                return Reservation(current.id, self.path(current.id), current.position, current.created_ms)
            segment_id, self._next_id = self._next_id, self._next_id + 1
        made = self._create(segment_id)
        with self._lock:
            self._n_files += 1
            self._active[writer] = made
        return Reservation(made.id, self.path(made.id), made.position, made.created_ms)

    def reserve_open(self, writer: str, n_bytes: int) -> Reservation | None:
        """The same without file I/O: None if the writer has no segment with room for `n_bytes`."""
        with self._lock:
            current = self._active.get(writer)
            if current is None or not self._has_room(current, n_bytes):
                return None
            return Reservation(current.id, self.path(current.id), current.position, current.created_ms)

    def _has_room(self, segment: _Open, n_bytes: int) -> bool:
        if segment.id in self._abandoned:
            return False
        return segment.position == SEGMENT_HEADER_BYTES or segment.position + n_bytes <= SEGMENT_BYTES

    def _take_spare(self, n_bytes: int) -> _Open | None:
        for number, spare in enumerate(self._spare):
            if self._has_room(spare, n_bytes):
                return self._spare.pop(number)
        return None

    def _create(self, segment_id: int) -> _Open:
        path = self.path(segment_id)
        created_ms = time.time_ns() // 1_000_000
        fd = self._files.create(path)
        try:
            self._files.write(fd, encode_segment_header(segment_id, created_ms), 0)
            self._files.datasync(fd)
            self._files.sync_dir(self.folder)
        except OSError:
            self._files.close(fd)
            self._files.unlink(path)
            raise
        return _Open(segment_id, fd, SEGMENT_HEADER_BYTES, created_ms)

    def _retire(self, writer: str, segment: _Open) -> None:
        del self._active[writer]
        if self._due[segment.id]:
            self._full[segment.id] = segment
        else:
            self._files.close(segment.fd)
            self._retired.add(segment.id)

    def advance(self, writer: str, reservation: Reservation, end: int) -> None:
        """The records up to `end` are about to be submitted: the next reservation starts there."""
        with self._lock:
            current = self._active.get(writer)
            if current is not None and current.id == reservation.segment_id:
                current.position = max(current.position, end)

    def release(self, writer: str) -> None:
        """This writer is done for good: nothing more is appended to its segment."""
        with self._lock:
            if (current := self._active.get(writer)) is not None:
                self._retire(writer, current)

    def submitted(self, segment_id: int) -> None:
        """A commit of records in this segment is due."""
        with self._lock:
            self._due[segment_id] += 1

    def resolved(self, segment_id: int, *, may_be_empty: bool = False) -> None:
        """A due commit is over. may_be_empty: the next round shall look whether anything is left in the segment."""
        with self._lock:
            self._due[segment_id] -= 1
            if may_be_empty:
                self._retired.add(segment_id)
            if not self._due[segment_id]:
                del self._due[segment_id]
                if (full := self._full.pop(segment_id, None)) is not None:
                    self._files.close(full.fd)
                    self._retired.add(segment_id)

    def busy(self) -> frozenset[int]:
        """Segments that must stay even if they hold nothing."""
        with self._lock:
            writing = {segment.id for segment in (*self._active.values(), *self._spare)}
            return frozenset(writing | self._due.keys() | self._full.keys())

    def take_retired(self) -> frozenset[int]:
        """Segments that stopped being busy since the last call: they may hold nothing."""
        with self._lock:
            retired, self._retired = frozenset(self._retired), set()
            return retired

    def writer_of(self, segment_id: int) -> str | None:
        """The writer that appends to a segment."""
        with self._lock:
            return next((writer for writer, segment in self._active.items() if segment.id == segment_id), None)

    def datasync(self, segment_id: int) -> None:
        """Make a segment's bytes durable. Raises OSError; from then on nothing can be appended to it in this process.

        After a failed sync the kernel may have dropped the bytes and call the next sync a success. It also tells a
        write-back error once, to whichever sync comes first, so those of one segment take turns: the next one finds
        it abandoned. Who waited while one began and succeeded need not sync again.
        """
        with self._lock:
            segments = [*self._active.values(), *self._full.values()]
            segment = next((segment for segment in segments if segment.id == segment_id), None)
        given_up = OSError(errno.EIO, f"segment {segment_name(segment_id)} was given up after a failed sync")
        if segment is None:
            raise given_up
        n_begun = segment.n_begun
        with segment.sync_lock:
            if self.is_abandoned(segment_id):
                raise given_up
            if segment.n_synced > n_begun:
                return
            segment.n_begun += 1
            try:
                self._files.datasync(segment.fd)
                segment.n_synced = segment.n_begun
            except BaseException:
                log.error("sync of segment %s failed: its uncommitted part is given up", segment_name(segment_id))
                with self._lock:
                    self._abandoned.add(segment_id)
                raise

    def dropped(self, extent: Extent, pin: Pin, is_committed: bool) -> None:
        """A submitted record that was received is no longer needed in memory. Takes no lock: finalizers call this."""
        self._dropped.append((extent, pin, is_committed))

    @property
    def has_dropped(self) -> bool:
        """Whether received strings that nobody needs wait for a round."""
        return bool(self._dropped)

    def take_dropped(self) -> list[Extent]:
        """Ranges that were given up uncommitted since the last call: they are dead."""
        dead = []
        while self._dropped:
            extent, pin, is_committed = self._dropped.popleft()
            pin.release()
            if not is_committed:
                dead.append(extent)
            self.resolved(extent.segment, may_be_empty=not is_committed)
        return dead

    def is_abandoned(self, segment_id: int) -> bool:
        """Whether a sync of this segment has failed: what was not committed there may be lost."""
        with self._lock:
            return segment_id in self._abandoned

    def tidy(self, freed: Sequence[Extent] = (), unlinked: Sequence[int] = ()) -> None:
        """Give freed bytes back to the file system, these and what `pins` has. Failures cost space, not data: they are
        logged."""
        with self._lock:
            if self._is_tidying_paused:
                self.pins.free(freed, unlinked)
                return
        freed, unlinked = self.pins.sort(freed, unlinked)
        gone = set(unlinked)
        try:
            for segment_id in unlinked:
                with contextlib.suppress(FileNotFoundError):  # one without a row may be retired more than once
                    self._files.unlink(self.path(segment_id))
                    self._n_files -= 1
            if unlinked:
                self._files.sync_dir(self.folder)
            by_segment: dict[int, list[Extent]] = {}
            for extent in freed:
                if extent.segment not in gone:
                    by_segment.setdefault(extent.segment, []).append(extent)
            for segment_id, extents in by_segment.items():
                self.punch(segment_id, merged(extents))
        except OSError as error:
            log.warning("could not give back freed bytes: %s", error)

    def pause_tidying(self) -> None:
        """Keep freed bytes and emptied files for now: a backup reads them."""
        with self._lock:
            self._is_tidying_paused = True

    def resume_tidying(self, run: Callable[[Callable[[], None]], None]) -> None:
        """Give back what was freed meanwhile, through `run`."""
        with self._lock:
            self._is_tidying_paused = False
        run(self.tidy)

    def punch(self, segment_id: int, extents: Sequence[Extent]) -> bool:
        """Punch ranges of one segment; False if the file system cannot."""
        fd = self._files.open(self.path(segment_id), write=True)
        try:
            punched = all([self._files.punch(fd, extent.offset, extent.n_bytes) for extent in extents])
            self._can_punch = self._can_punch and punched
            return punched
        finally:
            self._files.close(fd)

    def overhead_bytes(self, live_bytes: int) -> int:
        """Bytes that segments take besides their live records."""
        if self._can_punch:
            return SEGMENT_HEADER_BYTES * self._n_files
        sizes = 0
        for name in self._files.names(self.folder):
            fd = self._files.open(self.folder / name, write=False)
            sizes += self._files.size(fd)
            self._files.close(fd)
        return sizes - live_bytes

    def close(self) -> None:
        """Close every descriptor."""
        with self._lock:
            for segment in (*self._active.values(), *self._full.values()):
                self._files.close(segment.fd)
            self._active.clear()
            self._spare.clear()
            self._full.clear()


def live_extents(txn: Txn, segment_id: int) -> list[Extent]:
    """The live records of a segment, in order."""
    prefix = place_key(segment_id, 0)[:8]
    return [
        Extent(segment_id, int.from_bytes(key[8:], "big"), PlaceRow.decode(value).record_bytes)
        for key, value in txn.scan(Table.PLACES, prefix=prefix)
    ]


def gaps(segment_id: int, committed: int, live: Sequence[Extent]) -> list[Extent]:
    """The dead ranges of a segment: all that is neither header nor live record."""
    result = []
    position = SEGMENT_HEADER_BYTES
    for extent in live:
        if extent.offset > position:
            result.append(Extent(segment_id, position, extent.offset - position))
        position = extent.offset + extent.n_bytes
    if position < committed:
        result.append(Extent(segment_id, position, committed - position))
    return result
