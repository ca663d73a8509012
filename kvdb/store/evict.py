"""What to evict: decisions only, over rows that were read once.

A snapshot may go when every key that names it may: not pinned, not a session, with an expiry if the policy is
`volatile-*`; or when it is cached. It must not be in use. Evicting frees its tail and the pages that no other snapshot
reaches; bytes that stay do not count. `plan_eviction` simulates the frees on a copy of the reference counts, so what
the second victim frees is right after the first is gone.
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import msgpack

from kvdb.store import score
from kvdb.store.entries import SnapshotValue, decode_entry, name_key
from kvdb.store.index import Table, Txn
from kvdb.store.rows import PageRow, SnapshotRow
from kvdb.store.uses import Use, stored_use
from kvdb_protocol.ids import NO_PAGE

Name = tuple[int, bytes]

POLICIES = (
    "noeviction",
    *(f"{scope}-{order}" for scope in ("volatile", "allkeys") for order in ("lru", "lfu", "ttl", "value")),
)


@dataclass(slots=True)
class Candidate:
    """A snapshot that may be evicted. expire_ms: the earliest of its keys, 0 for never."""

    row: SnapshotRow
    use: Use
    names: list[Name] = field(default_factory=list)
    expire_ms: int = 0


@dataclass(slots=True)
class Stored:
    """Everything that a plan looks at. cover: the nearest stored ancestor by lineage; continued: its inverse."""

    pages: dict[bytes, PageRow]
    candidates: dict[bytes, Candidate]
    n_tokens: dict[bytes, int]
    cover: dict[bytes, bytes]
    continued: dict[bytes, set[bytes]]


@dataclass(frozen=True, slots=True)
class Eviction:
    """A snapshot to give up, the keys to delete for it, and the bytes that frees."""

    snapshot_id: bytes
    names: tuple[Name, ...]
    is_cached: bool
    freed_bytes: int


def load(txn: Txn, fresh: Mapping[bytes, Use], in_use: Collection[bytes], *, only_volatile: bool) -> Stored:
    """Read what a plan needs. fresh: uses that the table does not have yet. in_use: snapshots being read."""
    stored = Stored(
        pages={key: PageRow.decode(value) for key, value in txn.scan(Table.PAGES)},
        candidates={},
        n_tokens={},
        cover={},
        continued=defaultdict(set),
    )
    rows = {key: SnapshotRow.decode(value) for key, value in txn.scan(Table.SNAPSHOTS)}
    for snapshot_id, row in rows.items():
        stored.n_tokens[snapshot_id] = row.n_tokens
        if row.parent in rows:
            stored.cover[snapshot_id] = row.parent
            stored.continued[row.parent].add(snapshot_id)
        use = fresh.get(snapshot_id) or stored_use(txn, snapshot_id) or Use(0.0, row.created_ms)
        candidate = Candidate(row, use)
        if snapshot_id not in in_use and _may_go(txn, snapshot_id, candidate, only_volatile):
            stored.candidates[snapshot_id] = candidate
    return stored


def _may_go(txn: Txn, snapshot_id: bytes, candidate: Candidate, only_volatile: bool) -> bool:
    for _, value in txn.scan(Table.NAMES, prefix=snapshot_id):
        db, key = msgpack.unpackb(value)
        data = txn.get(Table.KEYS, name_key(db, key))
        entry = None if data is None else decode_entry(data)
        if entry is None or not isinstance(entry.value, SnapshotValue) or entry.value.pinned:
            return False
        if only_volatile and not entry.expire_ms:
            return False
        candidate.names.append((db, key))
        if entry.expire_ms:
            candidate.expire_ms = min(entry.expire_ms, candidate.expire_ms or entry.expire_ms)
    return True


def plan_eviction(stored: Stored, order: str, needed_bytes: int, now_ms: int) -> list[Eviction]:
    """The snapshots to evict until `needed_bytes` are free, cheapest first; all there are, if that is not enough.

    order: lru, lfu, ttl or value. `stored` is used up.
    """
    heap = [(_score(stored, snapshot_id, order, now_ms), snapshot_id) for snapshot_id in stored.candidates]
    heapq.heapify(heap)
    chosen: list[Eviction] = []
    freed = 0
    while heap and freed < needed_bytes:
        scored, snapshot_id = heapq.heappop(heap)
        candidate = stored.candidates.get(snapshot_id)
        if candidate is None:
            continue
        now = _score(stored, snapshot_id, order, now_ms)
        if now > scored:
            heapq.heappush(heap, (now, snapshot_id))  # a neighbour went meanwhile, and this one is worth more
            continue
        n_bytes = _free(stored, snapshot_id, candidate.row)
        freed += n_bytes
        chosen.append(Eviction(snapshot_id, tuple(candidate.names), candidate.row.cached, n_bytes))
        for neighbour in _unlink(stored, snapshot_id):
            # One that is worth less now would stay behind its old score. Stale items are skipped or pushed back.
            heapq.heappush(heap, (_score(stored, neighbour, order, now_ms), neighbour))
    return chosen


def _score(stored: Stored, snapshot_id: bytes, order: str, now_ms: int) -> float:
    candidate = stored.candidates[snapshot_id]
    idle_s = max(0, now_ms - candidate.use.used_ms) / 1000
    if order == "lru":
        return -idle_s
    hits = score.decayed_hits(candidate.use.hits, idle_s)
    if order == "lfu":
        return hits - 1e-12 * idle_s
    if order == "ttl":
        return float(candidate.expire_ms) if candidate.expire_ms else math.inf
    children = len(stored.continued.get(snapshot_id, ()))
    covered = stored.n_tokens.get(stored.cover.get(snapshot_id, b""), 0)
    return score.value(
        hits,
        idle_s,
        float(children),
        float(not children),
        float(candidate.row.n_tokens - covered),
        float(_own_bytes(stored, candidate.row)),
    )


def _own_bytes(stored: Stored, row: SnapshotRow) -> int:
    n_bytes = row.record_bytes
    page = stored.pages.get(row.leaf)
    while page is not None and page.refs == 1:
        n_bytes += page.record_bytes
        page = stored.pages.get(page.parent)
    return n_bytes


def _free(stored: Stored, snapshot_id: bytes, row: SnapshotRow) -> int:
    """What free_snapshot will do, on the copy."""
    del stored.candidates[snapshot_id]
    n_bytes = row.record_bytes
    page_id = row.leaf
    while page_id != NO_PAGE and (page := stored.pages.get(page_id)) is not None:
        if page.refs > 1:
            stored.pages[page_id] = page._replace(refs=page.refs - 1)
            break
        n_bytes += page.record_bytes
        del stored.pages[page_id]
        page_id = page.parent
    return n_bytes


def _unlink(stored: Stored, snapshot_id: bytes) -> list[bytes]:
    """Take a snapshot out of the lineage; return the candidates next to it."""
    above = stored.cover.pop(snapshot_id, b"")
    below = stored.continued.pop(snapshot_id, set())
    del stored.n_tokens[snapshot_id]
    if above:
        stored.continued[above].discard(snapshot_id)
        stored.continued[above] |= below
    for child in below:
        if above:
            stored.cover[child] = above
        else:
            stored.cover.pop(child, None)
    return [neighbour for neighbour in (above, *below) if neighbour in stored.candidates]
