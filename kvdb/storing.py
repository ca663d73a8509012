"""Making a session's state a snapshot: the worker writes the records, the store commits them.

A crash before the commit leaves bytes that nothing names, which recovery cuts. So an error on the way changes nothing:
not the store, not the session.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any

from kvdb.engine_client import finish
from kvdb.errors import KvdbError, StalePagesError, WrongTypeError
from kvdb.session import Session
from kvdb.sessions import Sessions
from kvdb.store.entries import Entry, SnapshotValue
from kvdb.store.records import CommittedSnapshot, NewSnapshot, WrittenRecord
from kvdb.store.rows import Reason
from kvdb_protocol.frames import Message
from kvdb_protocol.ids import root_prefix
from kvdb_protocol.record import RecordType

log = logging.getLogger("kvdb.sessions")

Place = tuple[int, bytes]  # database and key
MakeEntry = Callable[[bytes], Entry]
Reply = dict[str, Any]


async def snapshot(
    sessions: Sessions,
    db: int,
    name: bytes,
    key: bytes,
    make_entry: MakeEntry,
    guard: Callable[[], bool],
    reason: Reason = Reason.MANUAL,
) -> Reply | None:
    """Store the session's state under `key`; durable when this returns.

    make_entry: the key's entry for a snapshot id. guard: NX and XX; None is returned when it says no.
    """
    began = time.perf_counter()
    async with sessions.use(db, name) as session:
        if session.n_tokens == 0:
            raise KvdbError("the session is empty: there is no state to store")
        found = sessions.keyspace.get(db, key)
        if found is not None and not isinstance(found.value, SnapshotValue):
            raise WrongTypeError
        if not guard():
            return None
        place = (db, key)
        sessions.being_stored[place] += 1
        try:
            done = await _store_under(sessions, session, reason, place, make_entry)
        finally:
            sessions.being_stored[place] -= 1
            if not sessions.being_stored[place]:
                del sessions.being_stored[place]
        tokens = session.n_tokens
    return {
        "id": done.id.hex(),
        "tokens": tokens,
        "pages_new": done.pages_new,
        "bytes_new": done.bytes_new,
        "bytes_shared": done.bytes_shared,
        "ms": round((time.perf_counter() - began) * 1e3, 3),
    }


async def _store_under(
    sessions: Sessions, session: Session, reason: Reason, key: Place, make_entry: MakeEntry
) -> CommittedSnapshot:
    """Name the session's state by `key`; only what is not stored yet is written."""
    if not session.is_clean:
        return await _store(sessions, session, reason, key, make_entry)
    assert session.base is not None
    with sessions.store.hold(session.base) as record:
        before, entry = sessions.keyspace.get(*key), make_entry(session.base)
        sessions.keyspace.put(*key, entry)
        try:
            await finish(sessions.keyspace.flush())
        except KvdbError:
            if sessions.keyspace.get(*key) is entry:
                if before is not None:
                    sessions.keyspace.put(*key, before)
                else:
                    sessions.keyspace.delete(*key)
            raise
    return CommittedSnapshot(session.base, 0, record.tail_bytes + record.chain_bytes, 0, True)


async def store_state(sessions: Sessions, session: Session, reason: Reason) -> None:
    """Make a dirty session's state its base, without a key of its own: the session's entry names it. Lock held."""
    await _store(sessions, session, reason, None, None)


async def _store(
    sessions: Sessions, session: Session, reason: Reason, key: Place | None, make_entry: MakeEntry | None
) -> CommittedSnapshot:
    """Write and commit; the lock is held.

    A client that goes away meanwhile does not stop it half-way: the commit moves the session's base, and who has the
    lock next must find the session there.
    """
    await sessions.make_resident(session)
    try:
        return await finish(_store_once(sessions, session, reason, key, make_entry))
    except StalePagesError:
        # A page this write counted on was freed by a delete that came first. The second try writes it.
        return await finish(_store_once(sessions, session, reason, key, make_entry))


async def _store_once(
    sessions: Sessions, session: Session, reason: Reason, key: Place | None, make_entry: MakeEntry | None
) -> CommittedSnapshot:
    store, info = sessions.store, session.model.info
    layout = info.layout
    n_pages = layout.n_pages(session.n_tokens)
    # Pages of another quantisation's base are packed anew under this model's name.
    base = store.snapshot(session.base) if session.base is not None else None
    have = layout.n_pages(session.base_tokens) if base and base.fingerprint == info.fingerprint else 0
    prefixes = session.prefix_hashes(n_pages)
    async with session.model.write_lock:
        reservation = await store.reserve(f"engine-{info.name}")
        written = await session.model.client.call(
            "write",
            sid=session.uid,
            path=str(reservation.path),
            offset=reservation.offset,
            have=have,
            known=store.known_pages(info.fingerprint, prefixes[have:]),
        )
        new = NewSnapshot(
            id=written["snapshot"],
            fingerprint=info.fingerprint,
            leaf=written["leaf"],
            n_tokens=session.n_tokens,
            prefix=prefixes[-1] if prefixes else root_prefix(info.family),
            tail_ids=session.ids[n_pages * layout.page_tokens :].tobytes(),
            reason=reason,
            created_ms=int(time.time() * 1e3),
            written=_written(session, written, prefixes, have),
            reservation=reservation,
            parent=session.base,
        )
        # The commit moves the segment's position past these records before it first waits, so the next writer may
        # begin while this one is being synced: that is what makes a group commit of snapshots.
        entry = make_entry(new.id) if make_entry is not None else None
        commit = asyncio.ensure_future(store.commit_snapshot(new, key=key, entry=entry, session_uid=session.uid))
        await asyncio.sleep(0)
    done = await commit
    session.base, session.base_tokens = new.id, session.n_tokens
    return done


def _written(session: Session, done: Message, prefixes: list[bytes], have: int) -> list[WrittenRecord]:
    """The worker's list of records, with what the index wants to know of each."""
    page_tokens = session.model.info.layout.page_tokens
    number_of = {page_id: number for number, page_id in enumerate(done["pages"], have)}
    written = []
    for kind, record_id, offset, size, parent in done["written"]:
        if kind == RecordType.PAGE:
            number = number_of[record_id]
            span = (prefixes[number], number * page_tokens, page_tokens)
            written.append(WrittenRecord(RecordType.PAGE, record_id, offset, size, parent, *span))
        else:
            written.append(WrittenRecord(RecordType.TAIL, record_id, offset, size))
    return written


class Background:
    """Snapshots that were asked for with ASYNC, by database and key, until WAITSNAP or the next one collects them.

    keep: how many results wait at most for someone who asks; the oldest are forgotten, as most clients never ask.
    """

    def __init__(self, keep: int = 1024) -> None:
        self._keep = keep
        self._running: set[asyncio.Task[Reply | None]] = set()
        self._latest: dict[Place, asyncio.Task[Reply | None]] = {}

    def start(self, key: Place, work: Coroutine[Any, Any, Reply | None]) -> None:
        """Carry a snapshot out in the background."""
        task = asyncio.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._done)
        self._latest.pop(key, None)
        self._latest[key] = task
        for old in list(self._latest)[: len(self._latest) - self._keep]:
            del self._latest[old]

    def _done(self, task: asyncio.Task[Reply | None]) -> None:
        self._running.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.warning("a snapshot in the background failed: %s", error)

    async def wait(self, key: Place) -> Reply | None:
        """The reply of the last background snapshot under this key, or its error; None when there is none."""
        task = self._latest.get(key)
        if task is None:
            return None
        try:
            return await asyncio.shield(task)
        finally:
            if task.done() and self._latest.get(key) is task:
                del self._latest[key]

    async def idle(self) -> None:
        """Wait until nothing is under way."""
        while self._running:
            await asyncio.wait(self._running)
