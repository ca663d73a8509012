"""The store's face to the daemon: opening and recovery, snapshots, reads, lookups, figures.

Methods without `async` do no file I/O beyond index reads and may be called on the event loop; the others do theirs in
the commit thread or in the reader pool.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import lmdb
import msgpack

from kvdb.errors import CorruptError, KvdbError, NoSpaceError, SnapshotGoneError, StalePagesError, WrongModelError
from kvdb.keyspace import Keyspace
from kvdb.store.backup import BackupReport
from kvdb.store.ballast import Ballast
from kvdb.store.budget import INDEX_MARGIN, Budget
from kvdb.store.care import Care
from kvdb.store.change_log import ChangeLog
from kvdb.store.committer import DISK_FULL, Committer
from kvdb.store.entries import Entry, SessionValue
from kvdb.store.entry_writes import rebase_session, write_entry
from kvdb.store.errors import as_kvdb_error
from kvdb.store.exchange import IncomingState, export_archive, write_state
from kvdb.store.files import Files, OsFiles
from kvdb.store.holds import Holds
from kvdb.store.index import STAMP, Index, Table, Txn
from kvdb.store.index_damage import check_while_serving, refuse_damaged
from kvdb.store.large_strings import LargeStrings
from kvdb.store.lock import Lock
from kvdb.store.logged import datasync, read_logged
from kvdb.store.lookup import Match
from kvdb.store.matches import Matches
from kvdb.store.models import put_model
from kvdb.store.pins import Pin
from kvdb.store.read import Reader, RecordPlace, plan, tail_place
from kvdb.store.receive import Receiver
from kvdb.store.records import (
    CommittedSnapshot,
    ModelRecord,
    NewSnapshot,
    Reservation,
    SnapshotRecord,
    Usage,
)
from kvdb.store.rows import ModelRow, Reason, SnapshotRow
from kvdb.store.segments import Segments, live_extents
from kvdb.store.snapshots import check_written, commit_snapshot, uncache_snapshot, usage
from kvdb.store.stats import StoreStats, measure
from kvdb.store.threads import Threads
from kvdb.store.uses import Uses, write_uses
from kvdb.store.verify import Finding, verify
from kvdb.store.work import Extent, Work
from kvdb_protocol.archive import Archive
from kvdb_protocol.ids import Buffer, root_prefix
from kvdb_protocol.layout import Layout
from kvdb_protocol.tail import Tail

log = logging.getLogger("kvdb.store")
T = TypeVar("T")

READER_THREADS = 4
STRING_THREADS = 4
USES_EVERY_S = 60.0
IMPORTER = "import"


class Store:
    """One data directory. Built by `open`; everything but `close` may fail with KvdbError."""

    def __init__(self, folder: Path, loop: asyncio.AbstractEventLoop, files: Files, lock: Lock, index: Index) -> None:
        self.folder = folder
        self._loop = loop
        self._files = files
        self._lock = lock
        self._index = index
        self._segments = Segments(folder / "segments", files)
        self._holds = Holds()
        self._pool = Threads(loop, READER_THREADS, "kvdb-read")
        self._string_pool = Threads(loop, STRING_THREADS, "kvdb-strings")
        self._ballast = Ballast(folder / "ballast", files)
        self._change_log = ChangeLog(folder, files, index.id)
        self._committer = Committer(
            loop,
            index,
            files,
            self._segments,
            self._holds,
            self._ballast,
            self._change_log,
            lambda: self.keyspace.refresh(),
        )
        self.strings = LargeStrings(self._pool, files, self._segments, self._committer)
        self.keyspace = Keyspace(index, self._committer, self.strings.hold)
        self._committer.attach(self.keyspace)
        self._uses = Uses()
        self.budget = Budget(
            index, self._committer, self.keyspace, self._holds, self._uses, self._pool, lambda: self.used_bytes
        )
        self._uses_timer = loop.call_later(USES_EVERY_S, self._write_uses)
        self._models: dict[int, bytes] = {}
        self._importing = asyncio.Lock()  # one writer, one reservation
        self.receiver = Receiver(self._string_pool, self._segments, files, self.reserve)
        self._matches = Matches(loop, self._pool, index, self._holds, self._unhold)
        self._care = Care(loop, self._pool, index, files, self._segments, self._holds, self._committer)
        self._verifying = asyncio.Lock()
        self.verified = (0, 0)  # bytes of records that STORE VERIFY has seen, and of all; of the last one
        self._is_closed = False
        self.problems: list[str] = []  # what recovery found, in words
        self.checking: asyncio.Future[str] | None = None  # the check of a large index: what it found, in words

    @classmethod
    def open(cls, folder: Path, *, loop: asyncio.AbstractEventLoop, files: Files | None = None) -> Store:
        """Lock a data directory, create it if needed, and recover it.

        Recovery makes the changes again that only the change log has, cuts every segment to its committed length,
        removes segments that nobody knows and gives back freed bytes that a crash left. Raises KvdbError if another
        daemon has the directory, CorruptError if index or log are damaged; a large index is checked after opening:
        `checking`.
        """
        files = files or OsFiles()
        lock = None
        try:
            files.make_dir(folder)
            lock = Lock(folder / "LOCK")
            is_checked = refuse_damaged(folder / "index")
            index = Index(folder / "index")
        except OSError as error:
            if lock is not None:
                lock.release()
            raise as_kvdb_error(error, f"opening {folder}") from error
        except BaseException:
            if lock is not None:
                lock.release()
            raise
        store = cls(folder, loop, files, lock, index)
        try:
            store._recover()
        except BaseException as error:
            store._release()
            if isinstance(error, OSError):
                raise as_kvdb_error(error, f"recovery of {folder}") from error
            raise
        if not is_checked:
            store.checking = store._pool.run(partial(check_while_serving, index, lambda: store._is_closed))
        return store

    def _recover(self) -> None:
        # First of all: a daemon that was killed in a commit may have left it in memory only, and what follows cuts,
        # punches and removes what that commit does not name.
        datasync(self._files, self._index.file)
        with self._index.read() as txn:
            rows = txn.segments()
            untidy = {number: live_extents(txn, number) for number, row in rows.items() if row.untidy}
            self._models = {model.number: fingerprint for fingerprint, model in txn.models().items()}
            next_id = txn.meta(b"next_segment", 1)
            has_pending = txn.count(Table.PENDING) > 0
            logged, problem = read_logged(self._change_log, txn, self._segments.folder, self._files)
        if problem:
            raise CorruptError(f"{self.folder}: {problem}; kvdb-check --repair keeps what was logged before it")
        logged.make_durable(self._change_log, self._segments.folder, self._files)
        logged.extend_rows(rows, untidy)
        self.problems = self._segments.recover(rows, next_id, untidy)
        for problem in self.problems:
            log.error("%s: the keys that need it will answer CORRUPT", problem)
        if not self._ballast.fill():
            self._committer.error = NoSpaceError(DISK_FULL)
            log.error("%s: %s", self.folder, DISK_FULL)
        if logged.layers or logged.is_cut:
            # The next round commits them. Until then no other commit may be made, which would make the log void.
            self.keyspace.load(logged.held(self._segments, self.strings.hold))
            self._committer.logged_bytes = sum(ref.n_bytes for ref in logged.new)
            log.info("%d records of the change log go into the index", len(logged.layers))
            self._committer.kick()
            return
        if not untidy or self._mark_tidy(untidy):
            with self._index.read() as txn:
                self._change_log.begin(txn.meta(STAMP))
        if has_pending:
            self._committer.kick()

    def _mark_tidy(self, segments: Iterable[int]) -> bool:
        """Their freed bytes were given back just now. Should this fail, the next start does so again."""
        txn = self._index.begin_write()
        try:
            for segment_id in segments:
                row = txn.segment(segment_id)
                if row is not None:
                    txn.put_segment(segment_id, row._replace(untidy=False))
            txn.commit(self._files.commit)
        except (OSError, lmdb.Error) as error:
            txn.raw.abort()
            log.warning("segments stay marked as untidy: %s", error)
            self.keyspace.refresh()
            return False
        self.keyspace.refresh()
        return True

    async def close(self) -> None:
        """Make everything durable and give the directory up. Raises what the last flush failed with, after closing."""
        try:
            await self.budget.idle()
            if self._uses:
                self._committer.submit(partial(write_uses, uses=self._uses.take()))
            await self.keyspace.flush()
        finally:
            await self._committer.idle()
            self._release()

    def _release(self) -> None:
        self._is_closed = True
        self._matches.close()
        self._uses_timer.cancel()
        self._committer.close()
        self._pool.close()
        self._string_pool.close()
        self.keyspace.close()
        self._segments.close()
        self._index.close()
        self._lock.release()

    @property
    def files(self) -> Files:
        """The file-system calls that everything of this store goes through."""
        return self._files

    @property
    def write_error(self) -> KvdbError | None:
        """Why the last round failed; None while writes can be made durable."""
        return self._committer.error

    @property
    def used_bytes(self) -> int:
        """What counts against `maxstore`: live records, headers and the index; dead bytes where they stay on disk."""
        live = self._committer.live_bytes
        return live + self._segments.overhead_bytes(live) + self._index.file_bytes

    def _write_uses(self) -> None:
        self._uses_timer = self._loop.call_later(USES_EVERY_S, self._write_uses)
        if self._uses:
            self._committer.submit(partial(write_uses, uses=self._uses.take()))

    # Models

    async def register_model(self, model: ModelRecord) -> None:
        """Make a model known; the same fingerprint again only changes its name."""
        Layout.from_bytes(model.layout_bytes)
        with self._index.read() as txn:
            if txn.model(model.fingerprint) is not None and model in self.models():
                return  # nothing to write: a daemon must start on a full disk
        await self._committer.submit(lambda txn, work: put_model(txn, model))
        with self._index.read() as txn:
            self._models = {row.number: fingerprint for fingerprint, row in txn.models().items()}

    def models(self) -> list[ModelRecord]:
        """Every model that was registered."""
        with self._index.read() as txn:
            return [
                ModelRecord(row.name, fingerprint, row.family, row.layout) for fingerprint, row in txn.models().items()
            ]

    def family_of(self, fingerprint: bytes) -> bytes | None:
        """The family fingerprint of a registered model."""
        with self._index.read() as txn:
            row = txn.model(fingerprint)
        return None if row is None else row.family

    def model_name(self, fingerprint: bytes) -> str | None:
        """The name a model was registered with."""
        with self._index.read() as txn:
            row = txn.model(fingerprint)
        return None if row is None else row.name

    def _model(self, txn: Txn, fingerprint: bytes) -> ModelRow:
        row = txn.model(fingerprint)
        if row is None:
            raise WrongModelError("no model with this fingerprint is registered")
        return row

    # Writing

    async def reserve(self, writer: str, n_bytes_hint: int = 0) -> Reservation:
        """Where `writer` may write records next. Each writer has one reservation at a time.

        n_bytes_hint: about how much it will write; room for it is made under `maxstore`. Raises NoSpaceError.
        """
        if isinstance(self.write_error, NoSpaceError):
            await self.keyspace.flush()  # is there space again?
            if self.write_error is not None:
                raise self.write_error
        await self.budget.make_room(n_bytes_hint)
        if n_bytes_hint and (reserved := self._segments.reserve_open(writer, n_bytes_hint)) is not None:
            return reserved
        try:
            return await self._pool.run(partial(self._segments.reserve, writer, n_bytes_hint))
        except OSError as error:
            raise as_kvdb_error(error, "new segment") from error

    def known_pages(self, fingerprint: bytes, prefix_hashes: Sequence[bytes]) -> list[list[bytes]]:
        """For each prefix hash the ids of this model's stored pages that end there."""
        with self._index.read() as txn:
            number = self._model(txn, fingerprint).number
            return [
                [key[16:] for key, row in txn.scan(Table.PREFIXES, prefix=prefix) if msgpack.unpackb(row)[0] == number]
                for prefix in prefix_hashes
            ]

    async def commit_snapshot(
        self,
        new: NewSnapshot,
        *,
        key: tuple[int, bytes] | None = None,
        entry: Entry | None = None,
        session_uid: bytes | None = None,
    ) -> CommittedSnapshot:
        """Make written records a snapshot and, in the same transaction, `entry` the value of `key`.

        session_uid: the session whose state this is; the snapshot becomes its base, and without a key of its own is
        named by the session's. Without both it is cached: it stays until `drop_cached` or eviction. Durable when it
        returns. Raises StalePagesError (write again), NoSpaceError, and on any error changes nothing.
        """
        if (key is None) != (entry is None):
            raise ValueError("a key comes with its entry")
        end = check_written(new)
        reservation = new.reservation
        writer = self._segments.writer_of(reservation.segment_id)
        if writer is not None:
            self._segments.advance(writer, reservation, end)
        extent = Extent(reservation.segment_id, reservation.offset, end - reservation.offset)
        pin = None
        if self.budget.excess(extent.n_bytes + INDEX_MARGIN) > 0:
            pin = await self._make_room_for(extent)
        committing = replace(new, is_cached=new.is_cached or (key is None and session_uid is None))

        def item(txn: Txn, work: Work) -> CommittedSnapshot:
            done = commit_snapshot(txn, work, committing)
            if key is not None:
                write_entry(txn, work, *key, entry)
            elif session_uid is not None:
                base = SessionValue(session_uid, new.fingerprint, new.id, new.n_tokens, new.id)
                rebase_session(txn, work, base)
            return done

        def committed(future: asyncio.Future[CommittedSnapshot]) -> None:
            if pin is not None:
                pin.release()
            if key is not None:
                self.keyspace.committed_elsewhere(*key)
            if session_uid is not None and not future.cancelled() and future.exception() is None:
                self.keyspace.rebase(session_uid, new.fingerprint, new.id, new.n_tokens)

        future = self._committer.submit(item, extent)
        # Added before anyone awaits the future, so it runs before a reply can be sent.
        future.add_done_callback(committed)
        return await asyncio.shield(future)

    async def _make_room_for(self, extent: Extent) -> Pin:
        """Evict for records that are written but not committed; if that fails, give their bytes back.

        Records behind them may be committed meanwhile, and a collection would take them for garbage: they are pinned.
        """
        pin = self._segments.pins.hold(extent)
        self._segments.submitted(extent.segment)  # the segment stays, whatever is evicted
        try:
            await self.budget.make_room(extent.n_bytes)
        except KvdbError:
            pin.release()
            await self._pool.run(partial(self._segments.tidy, [extent], []))
            raise
        finally:
            self._segments.resolved(extent.segment)
        return pin

    async def drop_cached(self, snapshot_id: bytes) -> bool:
        """Give up a snapshot that no key names; False if it was not cached."""
        return await self._committer.submit(lambda txn, work: uncache_snapshot(txn, work, snapshot_id))

    # Reading

    def snapshot(self, snapshot_id: bytes) -> SnapshotRecord | None:
        """A snapshot's facts, or None if there is no such snapshot."""
        with self._index.read() as txn:
            row = txn.snapshot(snapshot_id)
            return None if row is None else self._record(txn, snapshot_id, row)

    def has_snapshot(self, snapshot_id: bytes) -> bool:
        """Whether a snapshot is stored."""
        with self._index.read() as txn:
            return txn.get(Table.SNAPSHOTS, snapshot_id) is not None

    def usage(self, snapshot_id: bytes) -> Usage:
        """A snapshot's bytes: its own and those it shares. Raises SnapshotGoneError."""
        with self._index.read() as txn:
            return usage(txn, snapshot_id)

    def _record(self, txn: Txn, snapshot_id: bytes, row: SnapshotRow) -> SnapshotRecord:
        page = txn.page(row.leaf)
        return SnapshotRecord(
            id=snapshot_id,
            fingerprint=self._models[row.model],
            leaf=row.leaf,
            n_tokens=row.n_tokens,
            first=row.first,
            parent=row.parent or None,
            reason=Reason(row.reason),
            created_ms=row.created_ms,
            refs=row.refs,
            is_cached=row.cached,
            tail_bytes=row.record_bytes,
            chain_bytes=page.chain_bytes if page else 0,
        )

    def lineage(self, snapshot_id: bytes, limit: int = sys.maxsize) -> list[SnapshotRecord]:
        """The snapshot and its ancestors, nearest first, as far as they still exist; at most `limit` in all."""
        found: list[SnapshotRecord] = []
        with self._index.read() as txn:
            while len(found) < limit and snapshot_id and (row := txn.snapshot(snapshot_id)) is not None:
                found.append(self._record(txn, snapshot_id, row))
                snapshot_id = row.parent
        return found

    def children(self, snapshot_id: bytes) -> list[bytes]:
        """Ids of the snapshots that continue this one."""
        with self._index.read() as txn:
            return [key[32:] for key, _ in txn.scan(Table.CHILDREN, prefix=snapshot_id)]

    def keys_of(self, snapshot_id: bytes) -> list[tuple[int, bytes]]:
        """(database, key) of the committed entries that name a snapshot."""
        with self._index.read() as txn:
            rows = [msgpack.unpackb(value) for _, value in txn.scan(Table.NAMES, prefix=snapshot_id)]
        return [(db, key) for db, key in rows]

    @contextmanager
    def hold(self, snapshot_id: bytes) -> Iterator[SnapshotRecord]:
        """Keep a snapshot while it is read or becomes a session's base. Raises SnapshotGoneError."""
        self._holds.hold(snapshot_id)
        try:
            record = self.snapshot(snapshot_id)
            if record is None:
                raise SnapshotGoneError(f"there is no snapshot {snapshot_id.hex()}")
            with self._index.read() as txn:
                self._uses.touch(txn, snapshot_id, time.time_ns() // 1_000_000)
            yield record
        finally:
            self._unhold(snapshot_id)

    def plan(self, snapshot_id: bytes) -> list[RecordPlace]:
        """Places of a state's records: its pages in order, then its tail. Hold the snapshot while using them."""
        with self._index.read() as txn:
            return plan(txn, self._segments.folder, snapshot_id)

    async def read_tail(self, snapshot_id: bytes) -> Tail:
        """A snapshot's tail without its sections: ids, text, logits; checked."""

        def read() -> Tail:
            # Not the last place of a plan: that would look up every page of a long state.
            with self._index.read() as txn:
                row = txn.snapshot(snapshot_id)
                if row is None:
                    raise SnapshotGoneError(f"there is no snapshot {snapshot_id.hex()}")
                place = tail_place(self._segments.folder, snapshot_id, row)
            with Reader(self._files) as reader:
                return reader.tail(place)

        return await self._read(snapshot_id, read)

    async def token_ids(self, snapshot_id: bytes) -> bytes:
        """All token ids of a snapshot, u32 little-endian, checked against its prefix hashes."""

        def read() -> bytes:
            with self._index.read() as txn:
                row = txn.snapshot(snapshot_id)
                if row is None:
                    raise SnapshotGoneError(f"there is no snapshot {snapshot_id.hex()}")
                places = plan(txn, self._segments.folder, snapshot_id)
                root = root_prefix(self._model(txn, self._models[row.model]).family)
            with Reader(self._files) as reader:
                return reader.token_ids(places, root)

        return await self._read(snapshot_id, read)

    async def read_places(self, snapshot_id: bytes, read: Callable[[Files, list[RecordPlace]], T]) -> T:
        """Let `read` work on a snapshot's records in the reader pool, held meanwhile."""
        return await self._read(snapshot_id, lambda: read(self._files, self.plan(snapshot_id)))

    async def in_pool(self, work: Callable[[], T], doing: str) -> T:
        """Run file work in the reader pool; OSError becomes what a client sees."""
        try:
            return await self._pool.run(work)
        except OSError as error:
            raise as_kvdb_error(error, doing) from error

    async def check(self, places: Sequence[RecordPlace]) -> None:
        """Read every record of a plan and compare its checksums. Raises CorruptError."""

        def check() -> None:
            with Reader(self._files) as reader:
                for place in places:
                    reader.payload(place)

        await self._pool.run(check)

    async def _read(self, snapshot_id: bytes, read: Callable[[], T]) -> T:
        with self.hold(snapshot_id):
            return await self._pool.run(read)

    async def longest_prefix(self, family: bytes, fingerprint: bytes, ids: bytes, *, cross_quant: bool) -> Match | None:
        """The longest stored prefix of a prompt (u32 little-endian ids).

        The snapshot is held for a moment, so that the caller can hold it longer or make it a session's base.
        """
        return await self._matches.longest(family, fingerprint, ids, cross_quant)

    def _unhold(self, snapshot_id: bytes) -> None:
        if self._holds.release(snapshot_id) and not self._is_closed:
            self._committer.kick()

    # Care

    async def stats(self) -> StoreStats:
        """Where every byte is."""
        return await self._pool.run(partial(measure, self._index, self._segments, self._files))

    async def verify(self, *, deep: bool, bytes_per_s: float = 0.0) -> list[Finding]:
        """Everything that is wrong in the directory; `deep` also reads every payload. Clients go on meanwhile.

        bytes_per_s: how fast to read, 0 for no limit. `verified` says how far it is.
        """

        def progress(done: int, total: int) -> None:
            self.verified = (done, total)

        def check() -> list[Finding]:
            folder, files = self._segments.folder, self._files
            return list(verify(self._index, folder, files, deep=deep, bytes_per_s=bytes_per_s, progress=progress))

        async with self._verifying:
            self.verified = (0, 0)
            return await self._pool.run(check)

    async def compact(self) -> tuple[int, int]:
        """Move the live records of sparse segments together; return (bytes moved, segments emptied)."""
        return await self._care.compact()

    async def gc(self) -> int:
        """Give every dead byte back, also those that a crash or a failed punch left; return their number."""
        return await self._care.gc()

    async def export_archive(self, snapshot_id: bytes, take: Callable[[Iterator[Buffer]], T]) -> T:
        """Give the pieces of a snapshot's archive to `take`, which runs in the reader pool. Raises CorruptError."""

        def export() -> T:
            with self._index.read() as txn:
                row = txn.snapshot(snapshot_id)
                if row is None:
                    raise SnapshotGoneError(f"there is no snapshot {snapshot_id.hex()}")
                fingerprint = self._models[row.model]
                model = self._model(txn, fingerprint)
                places = plan(txn, self._segments.folder, snapshot_id)
            facts = (model.name, fingerprint, model.family, model.layout, row.n_tokens, row.reason, row.created_ms)
            return take(export_archive(self._files, Archive(*facts, len(places)), places))

        return await self._read(snapshot_id, export)

    async def import_state(
        self, state: IncomingState, *, key: tuple[int, bytes], make_entry: Callable[[bytes], Entry], created_ms: int
    ) -> CommittedSnapshot:
        """Store a checked state under a key; its model must be registered. Durable when it returns."""

        def is_stored(page_id: bytes) -> bool:
            with self._index.read() as txn:
                return txn.get(Table.PAGES, page_id) is not None

        async with self._importing:
            while True:
                reservation = await self.reserve(IMPORTER, state.n_bytes)
                write = partial(write_state, reason=Reason.IMPORT, created_ms=created_ms)
                try:
                    new = await self._pool.run(partial(write, self._files, state, reservation, is_stored))
                except OSError as error:
                    raise as_kvdb_error(error, "import") from error
                try:
                    return await self.commit_snapshot(new, key=key, entry=make_entry(new.id))
                except StalePagesError:
                    continue  # a page that it shares was freed between the look and the commit

    async def backup(self, target: Path) -> BackupReport:
        """Copy the whole store, as of now, into a directory that can be served; only what it lacks is copied."""
        return await self._care.backup(target)
