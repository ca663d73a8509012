"""Making a session's state a snapshot: the worker writes the records, the store commits them.

A crash before the commit leaves bytes that nothing names, which recovery cuts. So an error on the way changes nothing:
not the store, not the session.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

from kvdb.errors import KvdbError, SnapshotGoneError, StalePagesError, WrongTypeError
from kvdb.session import Session
from kvdb.sessions import Sessions
from kvdb.store.entries import Entry, SessionValue, SnapshotValue
from kvdb.store.records import CommittedSnapshot, NewSnapshot, WrittenRecord
from kvdb.store.rows import Reason
from kvdb_protocol.frames import Message
from kvdb_protocol.ids import root_prefix
from kvdb_protocol.record import RecordType

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
    session = await sessions.get(db, name)
    async with session.lock:
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
    sessions: Sessions, session: Session, reason: Reason, key: tuple[int, bytes], make_entry: MakeEntry
) -> CommittedSnapshot:
    """Name the session's state by `key`; only what is not stored yet is written."""
    if not session.is_clean:
        return await _store(sessions, session, reason, key, make_entry)
    assert session.base is not None
    with sessions.store.hold(session.base) as record:
        sessions.keyspace.put(*key, make_entry(session.base))
        await sessions.keyspace.flush()
    return CommittedSnapshot(session.base, 0, record.tail_bytes + record.chain_bytes, 0, True)


async def store_state(sessions: Sessions, session: Session, reason: Reason) -> None:
    """Make a dirty session's state its base, without a key of its own: the session's entry names it. Lock held."""

    def make_entry(snapshot_id: bytes) -> Entry:
        found = sessions.named_entry(session)
        if found is None:
            raise SnapshotGoneError("the session's key is gone")
        fingerprint = session.model.info.fingerprint
        return found._replace(
            value=SessionValue(session.uid, fingerprint, snapshot_id, session.n_tokens, lineage=snapshot_id)
        )

    await _store(sessions, session, reason, session.place, make_entry)


async def _store(
    sessions: Sessions, session: Session, reason: Reason, key: tuple[int, bytes], make_entry: MakeEntry
) -> CommittedSnapshot:
    """Write and commit; the lock is held. A client that goes away meanwhile does not stop it half-way."""
    await sessions.make_resident(session)
    try:
        return await _store_once(sessions, session, reason, key, make_entry)
    except StalePagesError:
        # A page this write counted on was freed by a delete that came first. The second try writes it.
        return await _store_once(sessions, session, reason, key, make_entry)


async def _store_once(
    sessions: Sessions, session: Session, reason: Reason, key: tuple[int, bytes], make_entry: MakeEntry
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
            written=_written(session, written, prefixes),
            reservation=reservation,
            parent=session.base,
        )
        # The commit moves the segment's position past these records before it first waits, so the next writer may
        # begin while this one is being synced: that is what makes a group commit of snapshots.
        commit = asyncio.ensure_future(
            store.commit_snapshot(new, key=key, entry=make_entry(new.id), session_uid=session.uid)
        )
        await asyncio.sleep(0)
    done = await asyncio.shield(commit)
    session.base, session.base_tokens = new.id, session.n_tokens
    return done


def _written(session: Session, done: Message, prefixes: list[bytes]) -> list[WrittenRecord]:
    """The worker's list of records, with what the index wants to know of each."""
    page_tokens = session.model.info.layout.page_tokens
    number_of = {page_id: number for number, page_id in enumerate(done["pages"])}
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
    """Snapshots that were asked for with ASYNC, by database and key, until WAITSNAP or the next one collects them."""

    def __init__(self) -> None:
        self._tasks: dict[tuple[int, bytes], asyncio.Task[Reply | None]] = {}

    def start(self, key: tuple[int, bytes], work: Coroutine[Any, Any, Reply | None]) -> None:
        """Carry a snapshot out in the background."""
        self._tasks[key] = asyncio.create_task(work)

    async def wait(self, key: tuple[int, bytes]) -> Reply | None:
        """The reply of the last background snapshot under this key, or its error; None when there is none."""
        task = self._tasks.get(key)
        if task is None:
            return None
        try:
            return await asyncio.shield(task)
        finally:
            if task.done():
                self._tasks.pop(key, None)
