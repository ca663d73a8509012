"""What the items of one round do besides changing rows: the bytes they free, the references they drop.

Items collect these effects; `settle` applies them once, at the end of the round's transaction, and `tidy` gives the
bytes back after the commit. Freeing at the end makes the order inside a round irrelevant: a rename that drops a
reference before it adds the new one frees nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from kvdb.store.index import Table, Txn, u16, u64
from kvdb.store.rows import SegmentRow
from kvdb_protocol.record import SEGMENT_HEADER_BYTES


class Extent(NamedTuple):
    """A range of a segment."""

    segment: int
    offset: int
    n_bytes: int

    @property
    def end(self) -> int:
        """The first byte behind it."""
        return self.offset + self.n_bytes

    def overlaps(self, other: Extent) -> bool:
        """Whether some byte lies in both."""
        return self.segment == other.segment and self.offset < other.end and other.offset < self.end

    def without(self, other: Extent) -> list[Extent]:
        """What is left of it where the other does not lie: up to two ranges."""
        if not self.overlaps(other):
            return [self]
        before = Extent(self.segment, self.offset, other.offset - self.offset)
        behind = Extent(self.segment, other.end, self.end - other.end)
        return [extent for extent in (before, behind) if extent.n_bytes > 0]


def merged(extents: Iterable[Extent]) -> list[Extent]:
    """The same ranges of one segment with neighbours joined, in order."""
    result: list[Extent] = []
    for extent in sorted(extents):
        if result and result[-1].end >= extent.offset:
            last = result[-1]
            end = max(last.end, extent.end)
            result[-1] = Extent(last.segment, last.offset, end - last.offset)
        else:
            result.append(extent)
    return result


@dataclass(slots=True)
class Work:
    """Effects of one item, or of a whole round after `merge`.

    unreferenced: snapshots whose last reference went away.
    freed: ranges without a live record now. live_delta: change of live bytes by segment.
    committed: new committed length and creation time by segment. key_delta: change of the number of keys by database.
    uids: session uid -> whether an entry still names it. unlinked: segments without a row, set by `settle`.
    """

    unreferenced: set[bytes] = field(default_factory=set)
    freed: list[Extent] = field(default_factory=list)
    live_delta: dict[int, int] = field(default_factory=dict)
    committed: dict[int, tuple[int, int]] = field(default_factory=dict)
    key_delta: dict[int, int] = field(default_factory=dict)
    uids: dict[bytes, bool] = field(default_factory=dict)
    unlinked: list[int] = field(default_factory=list)

    def free(self, extent: Extent) -> None:
        """A live record's range becomes dead."""
        self.freed.append(extent)
        self.add_live(extent.segment, -extent.n_bytes)

    def use(self, extent: Extent) -> None:
        """A range holds a live record from now on, also if it was freed earlier in this round (a renamed string)."""
        if extent in self.freed:
            self.freed.remove(extent)
        self.add_live(extent.segment, extent.n_bytes)

    def add_live(self, segment: int, n_bytes: int) -> None:
        """Change a segment's live bytes."""
        self.live_delta[segment] = self.live_delta.get(segment, 0) + n_bytes

    def commit_up_to(self, segment: int, end: int, created_ms: int) -> None:
        """Bytes of the segment before `end` exist after this round."""
        if end > self.committed.get(segment, (0, 0))[0]:
            self.committed[segment] = (end, created_ms)

    def count_key(self, db: int, delta: int) -> None:
        """A key appeared or disappeared."""
        self.key_delta[db] = self.key_delta.get(db, 0) + delta

    def merge(self, later: Work) -> None:
        """Add the effects of an item that ran after those collected here."""
        self.unreferenced |= later.unreferenced
        self.freed += later.freed
        for segment, n_bytes in later.live_delta.items():
            self.add_live(segment, n_bytes)
        for segment, (end, created_ms) in later.committed.items():
            self.commit_up_to(segment, end, created_ms)
        for db, delta in later.key_delta.items():
            self.count_key(db, delta)
        self.uids.update(later.uids)


def size_name(db: int) -> bytes:
    """Name in META of a database's number of keys."""
    return b"size" + u16(db)


def settle(txn: Txn, work: Work, busy: Iterable[int]) -> None:
    """Write the counters of a round; drop segments that hold nothing, unless a writer is using them (`busy`)."""
    for db, delta in work.key_delta.items():
        txn.put_meta(size_name(db), txn.meta(size_name(db)) + delta)
    for uid, is_named in work.uids.items():
        if not is_named:
            txn.delete(Table.SESSIONS, uid)
            for key, _ in list(txn.scan(Table.JOURNAL, prefix=uid)):
                txn.delete(Table.JOURNAL, key)
    in_use = set(busy)
    freed_in = {extent.segment for extent in work.freed}
    for segment in work.live_delta.keys() | work.committed.keys() | freed_in:
        row = txn.segment(segment)
        end, created_ms = work.committed.get(segment, (0, 0))
        if row is None:
            if not end:
                # It never got a commit. If only ranges of it were freed, it does not exist, or somebody still writes
                # there; one that was retired is in `live_delta`, and its file goes.
                if segment in work.live_delta and segment not in in_use:
                    work.unlinked.append(segment)
                continue
            row = SegmentRow(created_ms, SEGMENT_HEADER_BYTES, 0, False)
            txn.put_meta(b"next_segment", max(txn.meta(b"next_segment", 1), segment + 1))
        row = row._replace(
            committed=max(row.committed, end),
            live=row.live + work.live_delta.get(segment, 0),
            untidy=row.untidy or segment in freed_in,
        )
        if row.live == 0 and segment not in in_use:
            txn.delete(Table.SEGMENTS, u64(segment))
            work.unlinked.append(segment)
        else:
            txn.put_segment(segment, row)
