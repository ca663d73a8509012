"""Finds the longest stored prefix of a prompt and keeps what was found from being freed under its finder."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from kvdb.errors import SnapshotGoneError
from kvdb.store.holds import Holds
from kvdb.store.index import Index
from kvdb.store.lookup import Match, longest_prefix
from kvdb.store.threads import Threads

# A prompt of so many bytes of ids is looked up in a thread: others need not wait for it. The way there and back takes
# longer than looking up a shorter one.
IN_THREAD_BYTES = 64 << 10
HOLD_S = 1.0


class Matches:
    """Looks prompts up. Event-loop thread."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        pool: Threads,
        index: Index,
        holds: Holds,
        release: Callable[[bytes], None],
    ) -> None:
        """release: ends a hold, and has freed what waited for that."""
        self._loop = loop
        self._pool = pool
        self._index = index
        self._holds = holds
        self._release = release
        self._is_closed = False

    async def longest(self, family: bytes, fingerprint: bytes, ids: bytes, cross_quant: bool) -> Match | None:
        """The longest stored prefix of `ids`, held for HOLD_S; None once closed. Raises CorruptError."""
        gone: set[bytes] = set()

        def search() -> Match | None:
            with self._index.read() as txn:
                return longest_prefix(txn, family, fingerprint, ids, cross_quant, lambda found: found not in gone)

        while True:
            match = search() if len(ids) < IN_THREAD_BYTES else await self._pool.run(search)
            if self._is_closed:
                return None
            if match is None or self._hold(match.snapshot_id):
                return match
            gone.add(match.snapshot_id)  # deleted since it was found

    def close(self) -> None:
        """The index is about to be closed."""
        self._is_closed = True

    def _hold(self, snapshot_id: bytes) -> bool:
        try:
            self._holds.hold(snapshot_id)
        except SnapshotGoneError:
            return False  # the round that is running frees it
        with self._index.read() as txn:
            exists = txn.snapshot(snapshot_id) is not None  # or a round has freed it
        if exists:
            self._loop.call_later(HOLD_S, self._release, snapshot_id)
        else:
            self._release(snapshot_id)
        return exists
