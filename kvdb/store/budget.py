"""`maxstore`: what the store takes, and making room before a write that would pass it.

Counted are the live records, the segments' headers and the index file. Dead bytes are punched out and do not count;
where the file system cannot punch, they do.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from kvdb.errors import KvdbError, NoSpaceError
from kvdb.keyspace import Keyspace
from kvdb.store.committer import Committer
from kvdb.store.entries import SnapshotValue
from kvdb.store.evict import POLICIES, Eviction, load, plan_eviction
from kvdb.store.holds import Holds
from kvdb.store.index import Index, Txn
from kvdb.store.snapshots import uncache_snapshot
from kvdb.store.threads import Threads
from kvdb.store.uses import Use, Uses
from kvdb.store.work import Work

log = logging.getLogger("kvdb.store")

# A little more than needed is freed, so that a full store does not plan an eviction for every snapshot.
SLACK = 0.01
# A commit also makes the index grow, by some pages of 4096 bytes: a write counts as so much larger.
INDEX_MARGIN = 64 << 10


class Budget:
    """The limit and what is done about it. Event-loop thread."""

    def __init__(
        self,
        index: Index,
        committer: Committer,
        keyspace: Keyspace,
        holds: Holds,
        uses: Uses,
        pool: Threads,
        used_bytes: Callable[[], int],
    ) -> None:
        self._index = index
        self._committer = committer
        self._keyspace = keyspace
        self._holds = holds
        self._uses = uses
        self._pool = pool
        self._used_bytes = used_bytes
        self._lock = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        self.maxstore = 0
        self.policy = "noeviction"
        self.evicted_keys = 0
        self.evicted_bytes = 0
        self.on_evicted: Callable[[int, bytes], None] = lambda db, key: None

    def configure(self, maxstore: int, policy: str) -> None:
        """Set the limit in bytes (0 for none) and the policy. If the store is over it already, eviction begins."""
        if policy not in POLICIES:
            raise KvdbError(f"unknown policy '{policy}': use one of {', '.join(POLICIES)}")
        self.maxstore, self.policy = maxstore, policy
        self.enforce_soon()

    def excess(self, n_bytes: int = 0) -> int:
        """By how much `n_bytes` more would pass the limit; 0 or less if they fit."""
        return self._used_bytes() + n_bytes - self.maxstore if self.maxstore else 0

    def check(self) -> None:
        """For writes whose size is not known before: refuse them while the store is over its limit.

        Raises NoSpaceError under `noeviction`; under other policies eviction begins in the background.
        """
        if self.maxstore and self.excess() > 0:
            if self.policy == "noeviction":
                raise self._full(0)
            self.enforce_soon()

    def enforce_soon(self) -> None:
        """Bring the store under its limit in the background."""
        if self.excess() > 0 and self.policy != "noeviction" and (self._task is None or self._task.done()):
            self._task = asyncio.get_running_loop().create_task(self._enforce())

    async def _enforce(self) -> None:
        try:
            await self.make_room(0)
        except KvdbError as error:
            log.warning("maxstore: %s", error)

    async def idle(self) -> None:
        """Wait for the background task."""
        if self._task is not None:
            await self._task

    async def make_room(self, n_bytes: int) -> None:
        """Evict until `n_bytes` more fit. Raises NoSpaceError when they cannot."""
        n_bytes += INDEX_MARGIN if n_bytes else 0
        if self.excess(n_bytes + self._committer.logged_bytes) <= 0:
            return
        if n_bytes <= self.maxstore and self._keyspace.owes_commit:
            with suppress(KvdbError):
                await self._keyspace.flush()  # what was deleted or logged a moment ago counts from a commit on
        if self.excess(n_bytes) <= 0:
            return
        if self.policy == "noeviction" or n_bytes > self.maxstore:
            raise self._full(n_bytes)
        async with self._lock:
            # What was deleted or renamed a moment ago must be in the index before it is asked who may go.
            await self._keyspace.flush()
            while (needed := self.excess(n_bytes)) > 0:
                needed += int(SLACK * self.maxstore) if n_bytes else 0
                chosen = await self._pool.run(partial(self._plan, needed, self._uses.fresh()))
                freed = await self._evict(chosen)
                if not freed:
                    raise self._full(n_bytes)

    def _full(self, n_bytes: int) -> NoSpaceError:
        need = f"{n_bytes} bytes more do not fit" if n_bytes else f"it takes {self._used_bytes()} bytes"
        reason = "policy noeviction" if self.policy == "noeviction" else "nothing may be evicted"
        return NoSpaceError(f"maxstore is {self.maxstore} bytes and {need} ({reason}): delete keys or raise maxstore")

    def _plan(self, needed: int, fresh: dict[bytes, Use]) -> list[Eviction]:
        scope, _, order = self.policy.partition("-")
        with self._index.read() as txn:
            stored = load(txn, fresh, self._holds.held(), only_volatile=scope == "volatile")
        return plan_eviction(stored, order, needed, time.time_ns() // 1_000_000)

    async def _evict(self, chosen: list[Eviction]) -> int:
        """Delete what was chosen if it is still what it was; return the bytes that frees."""
        freed = 0
        for eviction in chosen:
            if self._holds.is_held(eviction.snapshot_id) or not all(
                self._still_names(db, key, eviction.snapshot_id) for db, key in eviction.names
            ):
                continue
            for db, key in eviction.names:
                self._keyspace.delete(db, key)
                self.evicted_keys += 1
                self.on_evicted(db, key)
            if eviction.is_cached:
                self._committer.submit(_uncache(eviction.snapshot_id))
            freed += eviction.freed_bytes
        self.evicted_bytes += freed
        await self._keyspace.flush()
        return freed

    def _still_names(self, db: int, key: bytes, snapshot_id: bytes) -> bool:
        entry = self._keyspace.get(db, key)
        return (
            entry is not None
            and isinstance(entry.value, SnapshotValue)
            and entry.value.id == snapshot_id
            and not entry.value.pinned
            # PERSIST may have come since it was chosen.
            and (entry.expire_ms > 0 or not self.policy.startswith("volatile"))
        )


def _uncache(snapshot_id: bytes) -> Callable[[Txn, Work], bool]:
    return lambda txn, work: uncache_snapshot(txn, work, snapshot_id)
