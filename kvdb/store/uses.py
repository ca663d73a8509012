"""When each snapshot was used, and how often: what the eviction policies go by.

Kept in memory and written to table USES now and then: losing the last minute of it in a crash costs a worse guess,
nothing else. A count is stored with the time at which it was right; score.decayed_hits brings it up to date.
"""

from __future__ import annotations

from typing import NamedTuple

import msgpack

from kvdb.store import score
from kvdb.store.index import Table, Txn
from kvdb.store.work import Work

# RESTORE reads a snapshot in several steps: they are one use.
SAME_USE_MS = 1000


class Use(NamedTuple):
    """hits: decayed count at `used_ms` (Unix ms)."""

    hits: float
    used_ms: int


class Uses:
    """Event-loop thread only, but for `lookup`, which reads a snapshot of the dict."""

    def __init__(self) -> None:
        self._fresh: dict[bytes, Use] = {}  # not in the table yet

    def touch(self, txn: Txn, snapshot_id: bytes, now_ms: int) -> None:
        """A snapshot was read."""
        last = self._fresh.get(snapshot_id) or stored_use(txn, snapshot_id)
        if last is None:
            self._fresh[snapshot_id] = Use(1.0, now_ms)
        elif now_ms - last.used_ms >= SAME_USE_MS:
            idle_s = (now_ms - last.used_ms) / 1000
            self._fresh[snapshot_id] = Use(score.decayed_hits(last.hits, idle_s) + 1.0, now_ms)

    def fresh(self) -> dict[bytes, Use]:
        """A copy of what the table does not have yet."""
        return dict(self._fresh)

    def __bool__(self) -> bool:
        return bool(self._fresh)

    def take(self) -> dict[bytes, Use]:
        """What to write now. Should that fail, these uses are forgotten."""
        fresh, self._fresh = self._fresh, {}
        return fresh


def stored_use(txn: Txn, snapshot_id: bytes) -> Use | None:
    """A snapshot's use as the table has it."""
    value = txn.get(Table.USES, snapshot_id)
    return None if value is None else Use._make(msgpack.unpackb(value))


def write_uses(txn: Txn, _work: Work, uses: dict[bytes, Use]) -> None:
    """Write uses of snapshots that still exist."""
    for snapshot_id, use in uses.items():
        if txn.get(Table.SNAPSHOTS, snapshot_id) is not None:
            txn.put(Table.USES, snapshot_id, msgpack.packb(use))
