"""The only writer of the index: rounds of group commit.

One round is in flight at a time. It takes the keyspace overlay and every item submitted so far, and does

    1. datasync of the segments that items wrote to      a failure fails the items of that segment
    2. large strings of the overlay become records, or   a failure fails the round, as one of step 4; the next try
       are records already, and are synced. A sync that  writes them elsewhere
       began when the last byte came goes on until 4
    3. one transaction that runs every item              an item that raises is undone alone (child transaction)
    4. commit, synced                                    a failure fails every item; the overlay stays in memory.
                                                         On a full disk: once more with the ballast's space, and
                                                         without the items that wrote records
    5. on the event loop: readers see the commit, futures are resolved. If LMDB gave the index up it is opened again
    6. freed ranges are punched, empty segments unlinked: after some rounds at a time

A round that nobody asks more of than that changes of keys are durable writes these to the change log (change_log.py),
behind the strings that they name, instead of 3 and 4; if the log cannot take them it goes on with 3. Rounds are tried
in the index only while the last one has failed.

Steps 1 to 4 and 6 run in the commit thread. What arrives meanwhile waits for the next round, so a busy store makes many
commands durable with each sync, and an idle one each at once.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, Protocol, TypeVar

from kvdb.errors import KvdbError, MisconfError, NoSpaceError
from kvdb.store.ballast import Ballast
from kvdb.store.change_log import ChangeLog
from kvdb.store.entries import HeldString, place_of
from kvdb.store.errors import as_kvdb_error
from kvdb.store.files import Files
from kvdb.store.holds import Holds, sweep
from kvdb.store.index import Index, Txn
from kvdb.store.pins import Pin
from kvdb.store.segments import Segments
from kvdb.store.strings import WRITER as STRINGS
from kvdb.store.strings import LargeString, Refs, Stored, store_strings
from kvdb.store.threads import Threads
from kvdb.store.work import Extent, Work, settle

log = logging.getLogger("kvdb.store")

DISK_FULL = "the disk is full: free space or delete keys, then retry"

RETRY_S = 1.0
TIDY_S = 0.5
MAX_LOGGED_BYTES = 16 << 20

T = TypeVar("T")
Place = tuple[int, bytes]  # database, key
ItemFunction = Callable[[Txn, Work], T]


class Changes(Protocol):
    """Changes of the keyspace."""

    def __bool__(self) -> bool:
        """Whether there is any."""

    @property
    def large(self) -> Sequence[LargeString]:
        """Strings that become records, or are records that no commit knows yet."""

    def apply(self, txn: Txn, work: Work, refs: Refs) -> None:
        """Make the changes; refs: where the large strings lie."""

    def pack(self, refs: Refs, ends: Mapping[int, tuple[int, int]]) -> bytes:
        """As the change log keeps them; refs: as above, ends: (length, creation time) of the segments they lie in."""


class Frozen(Protocol):
    """What the keyspace hands to one round."""

    @property
    def newest(self) -> Changes:
        """What neither the index nor the change log has."""

    def whole(self, lost: Collection[Place]) -> Changes:
        """What the index lacks, but for the newest values of keys that are `lost`. In the commit thread."""


class Overlay(Protocol):
    """What the keyspace gives to a round and is told about it."""

    def freeze(self) -> Frozen | None:
        """Hand over all changes so far, or None if there are none."""

    def thawed(self, error: KvdbError | None, *, is_logged: bool) -> None:
        """The round that took the frozen changes is over: all are committed, or the newest are in the change log
        (is_logged), or (error) these are to be tried again."""


@dataclass(slots=True)
class _Item(Generic[T]):
    """One command's part of a round. extent: what it wrote into a segment, to be synced first, freed if it fails."""

    function: ItemFunction[T]
    future: asyncio.Future[T]
    extent: Extent | None
    result: T | None = None
    error: BaseException | None = None


@dataclass(slots=True)
class _Round:
    items: list[_Item[object]]
    overlay: Frozen | None
    busy: frozenset[int]
    retired: frozenset[int]
    dropped: list[Extent]  # received, and never committed
    is_for_log: bool
    is_logged: bool = False
    work: Work = field(default_factory=Work)
    error: KvdbError | None = None
    lost: KvdbError | None = None  # what a failed sync took: whoever waits for durability hears of it
    is_committed: bool = False
    # LMDB failed so late that the disk may hold the commit, or it cannot be read yet: what it frees stays for now.
    is_in_doubt: bool = False
    full: NoSpaceError | None = None  # committed, but the ballast is gone: refuse new writes


class Committer:
    """Collects items on the event loop and commits them in rounds."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        index: Index,
        files: Files,
        segments: Segments,
        holds: Holds,
        ballast: Ballast,
        change_log: ChangeLog,
        refresh: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._index = index
        self._files = files
        self._segments = segments
        self._holds = holds
        self._ballast = ballast
        self._change_log = change_log
        self._refresh = refresh
        self._overlay: Overlay | None = None
        self._waiting: list[_Item[object]] = []
        self._wanted = False
        self._running: asyncio.Future[None] | None = None
        self._thread = Threads(loop, 1, "kvdb-commit")
        self._is_closed = False
        self._tidying: asyncio.TimerHandle | None = None
        self.logged_bytes = 0  # of large strings that the log names and the index does not
        self._doubtful: list[Pin] = []  # kept until a commit succeeds
        self._in_doubt = False
        with index.read() as txn:
            rows = txn.segments().values()
        self.live_bytes = sum(row.live for row in rows)
        self.error: KvdbError | None = None  # of the last round, for MISCONF; None once a round succeeds

    def attach(self, overlay: Overlay) -> None:
        """Name the keyspace whose changes each round takes."""
        self._overlay = overlay

    def submit(self, function: ItemFunction[T], extent: Extent | None = None) -> asyncio.Future[T]:
        """Run `function` in the next round's transaction; the future resolves once that is durable."""
        future: asyncio.Future[T] = self._loop.create_future()
        item: _Item[object] = _Item(function, future, extent)  # type: ignore[arg-type]
        self._waiting.append(item)
        if extent is not None:
            self._segments.submitted(extent.segment)
        self.kick()
        return future

    def flush(self) -> asyncio.Future[None]:
        """Everything done so far comes into the index; raises what the commit failed with."""
        return self.submit(_nothing)

    def make_durable(self) -> asyncio.Future[None]:
        """The keyspace's changes so far become durable, in the index or in the change log; raises what failed."""
        future: asyncio.Future[None] = self._loop.create_future()
        self._waiting.append(_Item(_nothing, future, None))  # type: ignore[arg-type]
        self._run_soon()
        return future

    @property
    def owes_space(self) -> bool:
        """Whether a round would give bytes back: of strings that nobody took, or that someone has read to the end."""
        return self._segments.has_dropped or self._segments.pins.are_late

    def kick(self) -> None:
        """Start a round that commits as soon as none is running. Does nothing once closed."""
        self._wanted = True
        self._run_soon()

    def _run_soon(self) -> None:
        if self._running is None and not self._is_closed:
            self._running = self._loop.create_future()
            self._loop.call_soon(self._start)

    async def idle(self) -> None:
        """Wait until no round is running or due."""
        while self._running is not None:
            await asyncio.shield(self._running)

    def tidy_soon(self) -> None:
        """Give back in a moment what may be by then: punching makes the next sync slower, so batches are better."""
        if not self._is_closed and self._tidying is None and self._segments.pins.are_late:
            self._tidying = self._loop.call_later(TIDY_S, self._tidy)

    def _tidy(self) -> None:
        if self._tidying is not None:
            self._tidying.cancel()
            self._tidying = None
        if self._segments.pins.are_late:
            self.in_thread(self._segments.tidy)

    def in_thread(self, function: Callable[[], None]) -> None:
        """Run something between two rounds, in the commit thread."""
        self._thread.start(function, _log_failure)

    def close(self) -> None:
        """Stop the commit thread; `idle` must have returned."""
        self._is_closed = True
        self._tidy()
        self._thread.close()
        self._change_log.close()

    def _start(self) -> None:
        items, self._waiting = self._waiting, []
        is_for_log = not self._wanted and self.error is None
        overlay = self._overlay.freeze() if self._overlay else None
        busy = self._segments.busy()
        if is_for_log:
            this = _Round(items, overlay, busy, frozenset(), [], True)
        else:
            dropped = self._segments.take_dropped()
            this = _Round(items, overlay, busy, self._segments.take_retired(), dropped, False)
        self._wanted = False
        self._thread.start(partial(self._run, this), partial(self._finish, this))

    def _finish(self, this: _Round, _: None, bug: BaseException | None) -> None:
        try:
            self._conclude(this, bug)
        finally:
            if self._waiting or self._wanted:
                self._loop.call_soon(self._start)
            else:
                assert self._running is not None
                self._running.set_result(None)
                self._running = None

    def _conclude(self, this: _Round, bug: BaseException | None) -> None:
        if bug is not None:
            this.error = as_kvdb_error(bug, "commit")
        if not this.is_logged:
            self._refresh_view(this)
        self.error = this.error or this.full
        if self.error is not None:
            # Refused writes start no round: without this the store would not notice that there is space again.
            self._loop.call_later(RETRY_S, self.kick)
        self.live_bytes += sum(this.work.live_delta.values())
        self._holds.end_round()
        if this.overlay is not None and self._overlay is not None:
            self._overlay.thawed(this.error, is_logged=this.is_logged)
        for item in this.items:
            error = this.error or item.error or (this.lost if item.function is _nothing else None)
            if item.extent is not None:
                self._segments.resolved(item.extent.segment)
                if error is not None and not (this.is_committed and item.error is None):
                    this.work.freed.append(item.extent)
            if item.future.done():
                continue  # its command was cancelled; what it asked for is done all the same
            if error is not None:
                item.future.set_exception(error)
            else:
                item.future.set_result(item.result)
        if this.error is not None and not this.is_committed:
            this.work.freed += this.dropped
        self._keep_doubtful(this)
        self._segments.pins.free(this.work.freed, this.work.unlinked)
        if this.overlay is not None:
            self.tidy_soon()
        else:
            self._tidy()

    def _refresh_view(self, this: _Round) -> None:
        try:
            self._refresh()
        except Exception as problem:
            this.error = this.error or as_kvdb_error(problem, "commit")
            this.is_in_doubt = True

    def _keep_doubtful(self, this: _Round) -> None:
        """What a round in doubt frees, and those that fail behind it, is given back after the next commit.

        Only then no power loss brings back the commit that still names it.
        """
        pins = self._segments.pins
        self._in_doubt = this.is_in_doubt or (self._in_doubt and this.error is not None)
        if self._in_doubt:
            self._doubtful += [pins.hold(extent) for extent in this.work.freed]
            self._doubtful += [pins.hold(Extent(segment, 0, 0)) for segment in this.work.unlinked]
        elif this.error is None:
            self._doubtful.clear()

    # In the commit thread from here on.

    def _run(self, this: _Round) -> None:
        if this.is_for_log and self._log(this):
            return
        self._sync(this.items)
        try:
            self._commit(this)
        except Exception as error:
            this.error = as_kvdb_error(error, "commit")
            # A write that is cut short by a full disk reaches us as MisconfError (errors.py).
            is_full = isinstance(this.error, NoSpaceError | MisconfError) and not self._index.is_given_up()
            if is_full and self._ballast.drop():
                self._commit_without_records(this, this.error)
        if not self._ballast.fill() and this.error is None:
            this.full = NoSpaceError(DISK_FULL)

    def _log(self, this: _Round) -> bool:
        """Make the newest changes durable in the change log; False if they must be committed."""
        changes = this.overlay.newest if this.overlay is not None else None
        if changes:
            strings = changes.large
            if not all(self._may_log(value) for _, _, value in strings):
                return False
            try:
                stored = store_strings(self._segments, self._files, strings)
                if stored.reservation is not None:
                    return False  # a segment was given up in this moment
                packed = changes.pack(stored.refs, stored.ends)
                if not self._change_log.append(packed):
                    return False
                try:
                    stored.wait()  # both syncs at once: a start looks whether the last record's strings are whole
                except OSError:
                    self._change_log.retract(packed)
                    raise
            except Exception as error:
                this.error = as_kvdb_error(error, "commit")
                return True
            for string in stored.fresh:
                string.is_synced = True
            self.logged_bytes += sum(string.n_bytes for string in stored.fresh)
        this.is_logged = True
        return True

    def _may_log(self, value: bytes | HeldString) -> bool:
        """Whether a large string needs no more than a sync. Not too many of them: a commit gives their space back."""
        if isinstance(value, bytes) or self.logged_bytes >= MAX_LOGGED_BYTES:
            return False
        return value.is_committed or value.is_synced or not self._segments.is_abandoned(place_of(value).segment)

    def _commit_without_records(self, this: _Round, error: KvdbError) -> None:
        """Use the ballast's space for everything but new records: deletions free more than that."""
        for item in this.items:
            if item.extent is not None:
                item.error = item.error or error
        try:
            self._commit(this)
        except Exception as again:
            this.error = as_kvdb_error(again, "commit")
        else:
            this.error = None

    def _commit(self, this: _Round) -> None:
        this.work = Work(freed=this.dropped.copy())
        changes, stored = self._store(this.overlay)
        txn = self._index.begin_write()
        try:
            if changes is not None:
                changes.apply(txn, this.work, stored.refs)
                for segment, end in stored.ends.items():
                    this.work.commit_up_to(segment, *end)
            for item in this.items:
                if item.error is None and item.function is not _nothing:
                    self._run_item(txn, this.work, item)
            for segment in this.retired:
                this.work.add_live(segment, 0)
            sweep(txn, this.work, self._holds)
            # Large strings of this very round may lie in a segment that was reserved after `busy` was taken.
            settle(txn, this.work, this.busy | self._segments.busy())
            stored.wait()
            if self._change_log.is_used:
                txn.touch()  # what it says would come back at the next start, were this no transaction of its own
            stamp = txn.commit(self._files.commit)
        except BaseException:
            txn.raw.abort()
            this.work = Work()
            this.is_in_doubt = self._index.is_given_up()
            self._holds.end_round()
            raise
        this.is_committed = True
        if stamp is not None:
            self._change_log.begin(stamp)
            self.logged_bytes = 0
        for string in stored.fresh:
            string.is_committed = True
        if stored.is_lossy:
            this.lost = MisconfError("a large string was lost by a failed sync: its key keeps the value it had")
        if stored.reservation is not None:
            self._segments.advance(STRINGS, stored.reservation, stored.end)

    def _store(self, overlay: Frozen | None) -> tuple[Changes | None, Stored]:
        """The changes of a round, their large strings stored. A key whose value is lost keeps the one before."""
        if overlay is None:
            return None, Stored()
        lost: set[Place] = set()
        while True:
            changes = overlay.whole(lost)
            stored = store_strings(self._segments, self._files, changes.large)
            found = {place for place, ref in stored.refs.items() if ref is None}
            if not found:
                stored.is_lossy = bool(lost)
                return changes, stored
            for db, key in found:
                log.error("key %r of database %d keeps its old value: the new one could not be synced", key, db)
            lost |= found

    def _keep_written(self, work: Work, extent: Extent) -> None:
        """What is committed next was no garbage, even if a collection, in this round or before, took it for some.

        A record may be written long before it is committed (it waits for an eviction), while later ones of the same
        segment are. What the item itself frees comes after this: a record that is stored already is garbage.
        """
        self._segments.pins.reclaim(extent)
        work.freed = [rest for one in work.freed for rest in one.without(extent)]

    def _sync(self, items: Sequence[_Item[object]]) -> None:
        by_segment: dict[int, list[_Item[object]]] = {}
        for item in items:
            if item.extent is not None:
                by_segment.setdefault(item.extent.segment, []).append(item)
        for segment, writers in by_segment.items():
            try:
                self._segments.datasync(segment)
            except OSError as error:
                for item in writers:
                    item.error = as_kvdb_error(error, "sync of a segment")

    def _run_item(self, parent: Txn, work: Work, item: _Item[object]) -> None:
        if item.extent is not None:
            self._keep_written(work, item.extent)
        child = self._index.begin_write(parent)
        own = Work()
        try:
            item.result = item.function(child, own)
            child.raw.commit()
        except Exception as error:
            child.raw.abort()
            item.error = as_kvdb_error(error, "commit")
        else:
            work.merge(own)


def _log_failure(_: object, error: BaseException | None) -> None:
    if error is not None:
        log.error("work between two rounds failed", exc_info=error)


def _nothing(_txn: Txn, _work: Work) -> None:
    """The item of a bare flush."""
