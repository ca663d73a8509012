"""Snapshots that someone is reading: a delete frees them only afterwards.

The event loop holds and releases, the commit thread asks before it frees. Between its question and the end of its
commit a snapshot is *doomed*: holding it fails, as if it were gone already.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from kvdb.errors import SnapshotGoneError
from kvdb.store.index import Table, Txn
from kvdb.store.snapshots import free_snapshot
from kvdb.store.work import Work


class Holds:
    """Counts readers by snapshot id. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._readers: dict[bytes, int] = {}
        self._doomed: set[bytes] = set()
        self._deferred: set[bytes] = set()
        self._barriers: list[tuple[set[bytes], Callable[[], object]]] = []

    def hold(self, snapshot_id: bytes) -> None:
        """Keep a snapshot from being freed. Raises SnapshotGoneError if it is being freed."""
        with self._lock:
            if snapshot_id in self._doomed:
                raise SnapshotGoneError("the snapshot was deleted")
            self._readers[snapshot_id] = self._readers.get(snapshot_id, 0) + 1

    def release(self, snapshot_id: bytes) -> bool:
        """End a hold. True if the snapshot was to be freed meanwhile and nobody holds it any more."""
        with self._lock:
            left = self._readers.pop(snapshot_id) - 1
            if left:
                self._readers[snapshot_id] = left
                return False
            for readers, _ in self._barriers:
                readers.discard(snapshot_id)
            self._pass_barriers()
            if snapshot_id in self._deferred:
                self._deferred.discard(snapshot_id)
                return True
            return False

    def when_free(self, call: Callable[[], object]) -> None:
        """Call once every snapshot that is held now has been free for a moment: whoever reads now is done then."""
        with self._lock:
            self._barriers.append((set(self._readers), call))
            self._pass_barriers()

    def _pass_barriers(self) -> None:
        passed = [call for readers, call in self._barriers if not readers]
        self._barriers = [barrier for barrier in self._barriers if barrier[0]]
        for call in passed:
            call()

    def is_held(self, snapshot_id: bytes) -> bool:
        """Whether someone reads it now."""
        with self._lock:
            return snapshot_id in self._readers

    def held(self) -> frozenset[bytes]:
        """Every snapshot that someone reads now."""
        with self._lock:
            return frozenset(self._readers)

    def doom(self, snapshot_id: bytes) -> bool:
        """Whether the commit thread may free it now; if not, its last release will say so."""
        with self._lock:
            if snapshot_id in self._readers:
                self._deferred.add(snapshot_id)
                return False
            self._doomed.add(snapshot_id)
            return True

    def end_round(self) -> None:
        """The commit that doomed snapshots is over, either way."""
        with self._lock:
            self._doomed.clear()


def sweep(txn: Txn, work: Work, holds: Holds) -> None:
    """Free what nobody references at the end of a round, and what waited for its readers."""
    waiting = {key for key, _ in txn.scan(Table.PENDING)}
    for snapshot_id in waiting | work.unreferenced:
        row = txn.snapshot(snapshot_id)
        if row is not None and row.refs <= 0 and not holds.doom(snapshot_id):
            txn.put(Table.PENDING, snapshot_id, b"")
            continue
        if row is not None and row.refs <= 0:
            free_snapshot(txn, work, snapshot_id, row)
        if snapshot_id in waiting:
            txn.delete(Table.PENDING, snapshot_id)
