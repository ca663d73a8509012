"""Layers: changes of the keyspace on top of what lies below them, in memory or packed for the change log.

A layer's packed form, msgpack:

    [cleared databases, [[db, key, entry or nil], ...], [[uid, [[position, ids or nil, drop], ...]], ...],
     [[segment, end, created ms], ...]]

Entries are those of table KEYS (entries.py): large strings by the places of their records. The last list is how far
the segments of these records reach: a segment that is new has no row in the index yet.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Mapping
from typing import Any

import msgpack

from kvdb.store.entries import (
    DATABASES,
    LARGE_STRING_BYTES,
    Entry,
    HeldString,
    decode_entry,
    encode_entry,
)
from kvdb.store.entry_writes import clear_database, cut_journal, drop_journal, write_entry, write_journal
from kvdb.store.index import Table, Txn
from kvdb.store.strings import LargeString, Refs
from kvdb.store.work import Work
from kvdb_protocol.errors import FormatError

MISSING: Any = object()
Ends = Mapping[int, tuple[int, int]]  # segment -> (committed length, creation time in Unix ms)


class JournalChange:
    """One change of a session's journal: `ids` is None for a cut, and with `drop` for forgetting the beginning."""

    __slots__ = ("drop", "ids", "position")

    def __init__(self, position: int, ids: bytearray | None, drop: bool = False) -> None:
        self.position = position
        self.ids = ids
        self.drop = drop


class Layer:
    """Entries (None: deleted), cleared databases, changes of journals."""

    __slots__ = ("below", "cleared", "due", "journal", "maps", "ordered", "seen")

    def __init__(self) -> None:
        self.maps: list[dict[bytes, Entry | None]] = [{} for _ in range(DATABASES)]
        self.cleared: set[int] = set()
        self.due: list[tuple[int, int, bytes]] = []  # heap of (expire ms, db, key); stale items are harmless
        self.journal: dict[bytes, list[JournalChange]] = {}
        # Keys never leave a map before the layer does, so these describe its first `seen[db]` keys for good:
        self.seen = [0] * DATABASES
        self.below = [0] * DATABASES  # how many of them also exist below this layer
        self.ordered: list[list[tuple[int, bytes]]] = [[] for _ in range(DATABASES)]  # (hash, key), sorted

    def __bool__(self) -> bool:
        return bool(self.cleared or self.journal or any(self.maps))

    def forget_counts(self) -> None:
        """What lies below has changed."""
        self.seen = [0] * DATABASES
        self.below = [0] * DATABASES

    def clear(self, db: int) -> None:
        """Every key of a database is deleted."""
        self.maps[db].clear()
        self.ordered[db].clear()
        self.seen[db] = self.below[db] = 0
        self.cleared.add(db)

    def find(self, db: int, key: bytes) -> Any:
        """What this layer says of a key: its entry, None if it is deleted, MISSING if that is not said here."""
        entry = self.maps[db].get(key, MISSING)
        return None if entry is MISSING and db in self.cleared else entry

    def take(self, newer: Layer, without: Collection[tuple[int, bytes]] = ()) -> None:
        """Make the changes of a newer layer in this one, but for some keys; `take_due` does the same for expiries.

        `newer` keeps its own.
        """
        for db in newer.cleared:
            self.clear(db)
        for db, (mine, theirs) in enumerate(zip(self.maps, newer.maps, strict=True)):
            if without:
                theirs = {key: entry for key, entry in theirs.items() if (db, key) not in without}
            mine.update(theirs)
        for uid, changes in newer.journal.items():
            self.journal.setdefault(uid, []).extend(changes)

    def take_due(self, newer: Layer) -> None:
        """Know of the newer layer's expiries. On the event loop, which alone uses `due`."""
        for item in newer.due:
            heapq.heappush(self.due, item)

    @property
    def large(self) -> list[LargeString]:
        """Strings that are, or become, records of their own (committer.Changes)."""
        return [
            (db, key, value)
            for db, entries in enumerate(self.maps)
            for key, entry in entries.items()
            if entry is not None
            and ((type(value := entry[2]) is bytes and len(value) >= LARGE_STRING_BYTES) or type(value) is HeldString)
        ]

    def apply(self, txn: Txn, work: Work, refs: Refs) -> None:
        """Make the changes, in the commit thread (committer.Changes). A layer does not change meanwhile."""
        for db in self.cleared:
            clear_database(txn, work, db)
        for db, entries in enumerate(self.maps):
            for key, entry in entries.items():
                if refs and entry is not None and (ref := refs.get((db, key))) is not None:
                    entry = entry._replace(value=ref)
                write_entry(txn, work, db, key, entry)
        for uid, changes in self.journal.items():
            if txn.get(Table.SESSIONS, uid) is None:
                continue  # the session came and went between two commits: no key names its journal
            for change in changes:
                if change.drop:
                    drop_journal(txn, uid, change.position)
                elif change.ids is None:
                    cut_journal(txn, uid, change.position)
                else:
                    write_journal(txn, uid, change.position, bytes(change.ids))

    def pack(self, refs: Refs, ends: Ends) -> bytes:
        """The changes for the change log (committer.Changes). refs: where every large string lies."""
        entries: list[tuple[int, bytes, bytes | None]] = []
        for db, changed in enumerate(self.maps):
            for key, entry in changed.items():
                if entry is not None and (ref := refs.get((db, key))) is not None:
                    entry = entry._replace(value=ref)
                entries.append((db, key, None if entry is None else encode_entry(key, entry)))
        journal = [(uid, [(one.position, one.ids, one.drop) for one in done]) for uid, done in self.journal.items()]
        packed: bytes = msgpack.packb([sorted(self.cleared), entries, journal, [(one, *ends[one]) for one in ends]])
        return packed


def unpack(data: bytes) -> tuple[Layer, Ends]:
    """Inverse of Layer.pack; large strings are references. Raises FormatError."""
    layer = Layer()
    try:
        cleared, entries, journal, ends = msgpack.unpackb(data)
        layer.cleared.update(cleared)
        for db, key, entry in entries:
            layer.maps[db][key] = None if entry is None else decode_entry(entry)
        for uid, changes in journal:
            layer.journal[uid] = [
                JournalChange(position, None if ids is None else bytearray(ids), drop)
                for position, ids, drop in changes
            ]
        return layer, {segment: (end, created_ms) for segment, end, created_ms in ends}
    except (ValueError, TypeError, IndexError, KeyError) as error:
        raise FormatError(f"changes that were logged cannot be read: {error}") from error
