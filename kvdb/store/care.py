"""Care of a running store: collection, compaction, backup. Slow work goes to threads, commits to the committer."""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from pathlib import Path

from kvdb.errors import CorruptError
from kvdb.store.backup import BackupReport, back_up
from kvdb.store.committer import Committer
from kvdb.store.compact import batches, commit_moves, copy_records, holds_strings, sparse_segments
from kvdb.store.errors import as_kvdb_error
from kvdb.store.files import Files
from kvdb.store.holds import Holds
from kvdb.store.index import Index, Txn
from kvdb.store.segments import Segments, gaps, live_extents
from kvdb.store.threads import Threads
from kvdb.store.work import Extent, Work

log = logging.getLogger("kvdb.store")

COMPACTOR = "compaction"


class Care:
    """One of each kind of care at a time. Event-loop thread."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        pool: Threads,
        index: Index,
        files: Files,
        segments: Segments,
        holds: Holds,
        committer: Committer,
    ) -> None:
        self._loop = loop
        self._pool = pool
        self._index = index
        self._files = files
        self._segments = segments
        self._holds = holds
        self._committer = committer
        self._compacting = asyncio.Lock()
        self._backing_up = asyncio.Lock()
        self._moved_from: set[int] = set()  # compacted, and someone may still read there

    async def gc(self) -> int:
        """Give every dead byte back, also those that a crash or a failed punch left; return their number."""
        waiting = frozenset(self._moved_from)

        def item(txn: Txn, work: Work) -> int:
            dead: list[Extent] = []
            for segment_id, row in txn.segments().items():
                if segment_id in waiting:
                    continue
                dead += gaps(segment_id, row.committed, live_extents(txn, segment_id))
                work.add_live(segment_id, 0)
            work.freed += dead
            return sum(extent.n_bytes for extent in dead)

        return await self._committer.submit(item)

    async def compact(self) -> tuple[int, int]:
        """Move the live records of sparse segments together; return (bytes moved, segments emptied).

        A segment with a damaged record is left alone: VERIFY names it.
        """
        async with self._compacting:
            with self._index.read() as txn:
                sparse = sparse_segments(txn.segments().items(), self._segments.busy())
                chosen = [segment_id for segment_id in sparse if not holds_strings(txn, segment_id)]
            moved = emptied = 0
            for segment_id in chosen:
                self._segments.submitted(segment_id)  # its file stays while someone may read the old places
                self._moved_from.add(segment_id)
                try:
                    moved += await self._move_records(segment_id)
                    emptied += 1
                except CorruptError as error:
                    log.error("segment %d is not compacted: %s", segment_id, error)
                finally:
                    self._holds.when_free(partial(self._loop.call_soon_threadsafe, self._retire, segment_id))
            return moved, emptied

    async def _move_records(self, segment_id: int) -> int:
        with self._index.read() as txn:
            work = batches(txn, self._segments.folder, segment_id)
        total = 0
        for places in work:
            try:
                reservation = await self._pool.run(partial(self._segments.reserve, COMPACTOR, 0))
                moved = await self._pool.run(partial(copy_records, self._files, places, reservation))
            except OSError as error:
                raise as_kvdb_error(error, "compaction") from error
            end = moved[-1].offset + moved[-1].place.record_bytes
            self._segments.advance(COMPACTOR, reservation, end)
            extent = Extent(reservation.segment_id, reservation.offset, end - reservation.offset)
            item = partial(commit_moves, reservation=reservation, moved=moved, end=end)
            total += await asyncio.shield(self._committer.submit(item, extent))
        return total

    def _retire(self, segment_id: int) -> None:
        self._moved_from.discard(segment_id)
        self._segments.resolved(segment_id, may_be_empty=True)
        self._committer.kick()

    async def backup(self, target: Path) -> BackupReport:
        """Copy the store as of now into `target`. Clients go on; freed bytes are given back when it is done."""
        async with self._backing_up:
            await self._committer.flush()
            self._segments.pause_tidying()
            try:
                return await self._pool.run(partial(back_up, self._index, self._segments.folder, self._files, target))
            except OSError as error:
                raise as_kvdb_error(error, f"backup to {target.name}") from error
            finally:
                self._segments.resume_tidying(self._committer.in_thread)
