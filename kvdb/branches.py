"""Going back and branching: RESTORE, FORK, REWIND; and the logits a state ends in."""

from __future__ import annotations

import secrets
import time
from array import array
from collections.abc import Sequence
from typing import Any

from kvdb.errors import BusyKeyError, KvdbError, NoEngineError, WrongModelError
from kvdb.session import Session, ids_array
from kvdb.sessions import Sessions
from kvdb.store.entries import Entry, EntryType, SessionValue, SnapshotValue
from kvdb.timelines import share_soon, stand_beside
from kvdb_engine.catalog import ModelInfo

Reply = dict[str, Any]


async def restore(sessions: Sessions, db: int, key: bytes, name: bytes, *, replace: bool) -> Reply:
    """Put a session on a snapshot's state, checked byte by byte; loaded into the engine where there is one.

    A live session that stands there already is left as it is: nothing is read.
    """
    began = time.perf_counter()
    store = sessions.store
    snapshot_id = sessions.snapshot_value(db, key).id
    _check_target(sessions, db, name, replace)
    if (there := _live_at(sessions, db, name, snapshot_id)) is not None:
        sessions.adopt(db, name, there)  # as any RESTORE, it ends an expiry of the session's key
        return {"tokens": there.n_tokens, "bytes_read": 0, "recomputed": 0, "ms": _ms(began)}
    with store.hold(snapshot_id) as record:
        model = sessions.model_of(record.fingerprint)
        uid = secrets.token_bytes(16)
        session = Session(uid, model, snapshot_id, record.n_tokens, array("I"), used=time.monotonic())
        sessions.open[uid] = session  # so that a state which is loaded in vain is dropped by the next sweep

        async with session.lock:
            try:
                await sessions.load(session)  # the worker gives the token ids, which it has read anyway
            except NoEngineError:
                await store.check(store.plan(snapshot_id))
                session.ids = ids_array(await store.token_ids(snapshot_id))
            _check_target(sessions, db, name, replace)
            sessions.adopt(db, name, session)
        # Only now: the session that was replaced has no name any more and makes room without being stored.
        await sessions.trim(model, keep=session)
    return {
        "tokens": session.n_tokens,
        "bytes_read": record.tail_bytes + record.chain_bytes,
        "recomputed": 0,
        "ms": _ms(began),
    }


def _live_at(sessions: Sessions, db: int, name: bytes, snapshot_id: bytes) -> Session | None:
    """The session under a key, if it is live, exactly this snapshot's state, and nobody works in it."""
    value = sessions.entry(db, name)
    session = sessions.open.get(value.uid) if value is not None else None
    if session is None or session.lock.locked() or not session.is_resident:
        return None
    return session if session.is_clean and session.base == snapshot_id else None


def _check_target(sessions: Sessions, db: int, name: bytes, replace: bool) -> None:
    """A session to restore into: free, or a session that may be replaced."""
    if sessions.entry(db, name) is not None and not replace:
        raise BusyKeyError(f"session '{_show(name)}' exists: add REPLACE to overwrite it")


async def fork(sessions: Sessions, db: int, source: bytes, dests: Sequence[bytes]) -> int:
    """Name the state of a session or snapshot again, as sessions. No page is copied; durable when this returns."""
    found = sessions.keyspace.get(db, source)
    if found is None:
        raise KvdbError(f"no such session or snapshot '{_show(source)}'")
    if len(set(dests)) < len(dests):
        raise KvdbError("the same destination is named twice")
    _check_free(sessions, db, dests)
    if isinstance(found.value, SnapshotValue):
        made: list[bytes] = []
        with sessions.store.hold(found.value.id) as record:
            sessions.model_of(record.fingerprint)  # a branch that no model can continue is refused here
            # One small record a branch: token ids are read when a branch is first used, not here.
            for dest in dests:
                made.append(secrets.token_bytes(16))
                value = SessionValue(made[-1], record.fingerprint, record.id, record.n_tokens, lineage=record.id)
                sessions.keyspace.put(db, dest, Entry(EntryType.SESSION, 0, value))
        await _make_durable(sessions, made)
        return len(dests)
    async with sessions.use(db, source) as origin:
        _check_free(sessions, db, dests)
        new = [sessions.create(db, dest, origin.model) for dest in dests]
        locked: set[Session] = set()
        try:
            for session in new:
                stand_beside(sessions, origin, session)
                await session.lock.acquire()  # it is new: nobody has it, and uses it before it has its state
                locked.add(session)
            await _make_durable(sessions, [session.uid for session in new])
            for session in new:
                share_soon(sessions, origin, session)
                locked.discard(session)
        finally:
            for session in locked:
                session.lock.release()
    return len(dests)


async def _make_durable(sessions: Sessions, made: Sequence[bytes]) -> None:
    """Make new names of sessions durable; they are taken back if that fails."""
    try:
        await sessions.keyspace.make_durable()
    except KvdbError:
        for uid in made:
            if (place := sessions.keyspace.session_place(uid)) is not None:
                sessions.keyspace.delete(*place[:2])
        raise


def _check_free(sessions: Sessions, db: int, dests: Sequence[bytes]) -> None:
    for dest in dests:
        if sessions.keyspace.get(db, dest) is not None:
            raise BusyKeyError(f"key '{_show(dest)}' exists: FORK does not overwrite")


async def rewind_to(sessions: Sessions, db: int, name: bytes, key: bytes) -> Reply:
    """Back to a snapshot whose tokens the session's timeline begins with."""
    began = time.perf_counter()
    async with sessions.use(db, name) as session:
        snapshot_id = sessions.snapshot_value(db, key).id
        with sessions.store.hold(snapshot_id) as record:
            _check_model(sessions, session, record.fingerprint)
            ids = ids_array(await sessions.store.token_ids(snapshot_id))
            if session.ids[: len(ids)] != ids:
                raise KvdbError(f"snapshot '{_show(key)}' is not an ancestor of the session; RESTORE takes any")
            sessions.stand_on(session, snapshot_id, len(ids), ids)
    return {"tokens": len(ids), "recomputed": 0, "ms": _ms(began)}


def _check_model(sessions: Sessions, session: Session, fingerprint: bytes) -> None:
    if not sessions.may_use(session.model, fingerprint):
        raise WrongModelError(f"the snapshot belongs to another model than {session.model.info.name}")


async def rewind_tokens(sessions: Sessions, db: int, name: bytes, n_tokens: int) -> Reply:
    """Back to the first `n_tokens` tokens: the nearest stored prefix, and the rest computed again."""
    began = time.perf_counter()
    async with sessions.use(db, name) as session:
        if not 0 < n_tokens <= session.n_tokens:
            raise KvdbError(f"cannot rewind to {n_tokens} tokens: the session has {session.n_tokens}")
        recomputed = 0
        if n_tokens < session.n_tokens:
            ids = session.ids[:n_tokens]
            info, store = session.model.info, sessions.store
            match = await store.longest_prefix(
                info.family, info.fingerprint, ids.tobytes(), cross_quant=sessions.cross_quant
            )
            # The whole timeline at once: should the engine fail now, it is computed on its next use.
            if match is not None:
                with store.hold(match.snapshot_id):
                    sessions.stand_on(session, match.snapshot_id, match.n_tokens, ids)
            else:
                sessions.stand_on(session, None, 0, ids)
            if not session.is_clean:
                recomputed = await sessions.make_resident(session)
    return {"tokens": n_tokens, "recomputed": recomputed, "ms": _ms(began)}


async def rewind_steps(sessions: Sessions, db: int, name: bytes, steps: int) -> Reply:
    """Back `steps` snapshots: with tokens after the base the first step leads to the base, without to its parent."""
    began = time.perf_counter()
    async with sessions.use(db, name) as session:
        number = steps if session.is_clean else steps - 1
        lineage = sessions.store.lineage(session.base, number + 1) if session.base is not None else []
        if number >= len(lineage):
            raise KvdbError(f"the session has fewer than {steps} stored snapshots behind it")
        target = lineage[number].id
        with sessions.store.hold(target) as record:
            _check_model(sessions, session, record.fingerprint)
            ids = ids_array(await sessions.store.token_ids(target))
            sessions.stand_on(session, target, len(ids), ids)
    return {"tokens": len(ids), "recomputed": 0, "ms": _ms(began)}


async def logits(sessions: Sessions, db: int, key: bytes) -> tuple[ModelInfo | None, int, bytes]:
    """(model, position, f32 logits) of a snapshot or session; stored logits are used wherever they are right.

    The model is None when the snapshot's is not served here: its logits can be shown, only their text cannot.
    """
    found = sessions.keyspace.get(db, key)
    if found is not None and isinstance(found.value, SnapshotValue):
        return await _stored_logits(sessions, found.value.id)
    async with sessions.use(db, key) as session:
        if session.is_clean:
            assert session.base is not None
            return await _stored_logits(sessions, session.base)
        if session.n_tokens == 0:
            raise KvdbError("the session is empty: it has no logits")
        await sessions.make_resident(session)
        done = await session.model.client.call("logits", sid=session.uid)
        return session.model.info, session.n_tokens, done["logits"]


async def _stored_logits(sessions: Sessions, snapshot_id: bytes) -> tuple[ModelInfo | None, int, bytes]:
    with sessions.store.hold(snapshot_id) as record:
        tail = await sessions.store.read_tail(snapshot_id)
    try:
        info: ModelInfo | None = sessions.model_of(record.fingerprint).info
    except WrongModelError:
        info = None
    return info, record.n_tokens, bytes(tail.logits)


def _show(key: bytes) -> str:
    return key.decode(errors="replace")


def _ms(began: float) -> float:
    return round((time.perf_counter() - began) * 1e3, 3)
