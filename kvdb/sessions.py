"""All sessions of the daemon: finding and naming them, and keeping their live states in the engine or out of it.

A session is a keyspace entry (SessionValue) plus, while it is in use, a `Session` object here. The engine worker may
die, be reaped or drop a state at any time: base and journal name every token.

Everything here runs on the event loop; one lock a session keeps its operations in order. What is done with sessions is
in timelines.py (prefill, extend, generate), storing.py (snapshot) and branches.py (restore, fork, rewind).
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from array import array
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any

import numpy as np

from kvdb.errors import EngineDownError, KvdbError, NoEngineError, TooLongError, WrongModelError, WrongTypeError
from kvdb.session import Model, Session, ids_array
from kvdb.store.entries import Entry, EntryType, SessionValue, SnapshotValue
from kvdb.store.rows import Reason
from kvdb.store.store import Store

log = logging.getLogger("kvdb.sessions")

# A session's ids are 4 bytes a token in the daemon: those that nobody uses give them back.
FORGET_AFTER_S = 60.0
# So many sessions are looked at before other clients have their turn: some tenths of a millisecond.
SWEEP_BATCH = 64

StoreState = Callable[["Sessions", Session, Reason], Awaitable[None]]


class Sessions:
    """The sessions of one daemon. store_state: how a dirty state is made durable before it is dropped."""

    def __init__(
        self,
        store: Store,
        models: dict[str, Model],
        store_state: StoreState,
        *,
        cross_quant: bool = True,
        cache_bytes: int = 4 << 30,
    ) -> None:
        self.store = store
        self.keyspace = store.keyspace
        self.models = models
        self.cross_quant = cross_quant
        self.cache_bytes = cache_bytes
        self.open: dict[bytes, Session] = {}
        self.being_stored: Counter[tuple[int, bytes]] = Counter()  # keys that snapshots are on the way to
        self._store_state = store_state
        self._background: set[asyncio.Task[None]] = set()

    # -- models -------------------------------------------------------------------------------------------------------

    def model(self, name: str | None = None) -> Model:
        """A served model; the first one when no name is given."""
        if not self.models:
            raise NoEngineError("no model is configured: start kvdb-server with --model")
        if name is None:
            return next(iter(self.models.values()))
        if name not in self.models:
            raise NoEngineError(f"model '{name}' is not served here; ENGINE MODELS lists those that are")
        return self.models[name]

    def model_for(self, db: int, name: bytes, model_name: str | None) -> Model:
        """The model for a prompt: the one named, else the session's own, else the first one served."""
        value = self.entry(db, name)
        return self.model(model_name) if model_name or value is None else self.model_of(value.fingerprint)

    def model_of(self, fingerprint: bytes) -> Model:
        """The served model with this fingerprint, else one of the same family under `cross-quant allow`."""
        for model in self.models.values():
            if model.info.fingerprint == fingerprint:
                return model
        for model in self.models.values():
            if self.may_use(model, fingerprint):
                return model
        raise WrongModelError(
            f"the state belongs to model {fingerprint.hex()[:12]}, which is not served here; start kvdb-server with it"
        )

    def may_use(self, model: Model, fingerprint: bytes) -> bool:
        """Whether a model may go on from a state with this fingerprint: its own, or its family's under `allow`."""
        info = model.info
        return info.fingerprint == fingerprint or (
            self.cross_quant and self.store.family_of(fingerprint) == info.family
        )

    def check_ids(self, model: Model, ids: Sequence[int] | array[int], before: int = 0) -> None:
        """Refuse tokens out of the vocabulary and timelines over the context."""
        config, name = model.info.config, model.info.name
        # numpy: a million ids in a millisecond, while Python's max would hold up the other clients for twenty.
        largest = int(np.asarray(ids).max()) if ids else 0
        if largest >= config.vocab:
            raise KvdbError(f"token id {largest} is out of range: {name} has {config.vocab} tokens")
        if before + len(ids) > config.context:
            raise TooLongError(f"{before + len(ids)} tokens are over the context of {config.context} of {name}")

    # -- finding and naming -------------------------------------------------------------------------------------------

    def entry(self, db: int, name: bytes) -> SessionValue | None:
        """The session value under a key, or None. Raises WrongTypeError for a key of another type."""
        found = self.keyspace.get(db, name)
        if found is None:
            return None
        if not isinstance(found.value, SessionValue):
            raise WrongTypeError
        return found.value

    def snapshot_value(self, db: int, key: bytes) -> SnapshotValue:
        """The snapshot under a key. Raises KvdbError when there is none, WrongTypeError for another type."""
        found = self.keyspace.get(db, key)
        if found is None:
            raise KvdbError(f"no such snapshot '{key.decode(errors='replace')}'; SNAPSHOT makes one, SCAN lists them")
        if not isinstance(found.value, SnapshotValue):
            raise WrongTypeError
        return found.value

    async def get(self, db: int, name: bytes) -> Session:
        """The session under a key. Raises KvdbError when there is none."""
        value = self.entry(db, name)
        if value is None:
            raise KvdbError(f"no such session '{name.decode(errors='replace')}'; PREFILL or RESTORE makes one")
        session = self.open.get(value.uid)
        if session is None:
            ids = ids_array(await self.store.token_ids(value.base)) if value.base is not None else array("I")
            del ids[value.base_tokens :]
            first, journal = self.keyspace.journal_read(value.uid)
            if journal and first <= len(ids):
                ids.extend(ids_array(journal)[len(ids) - first :])
            model = self.model_of(value.fingerprint)
            fresh = Session(value.uid, model, value.base, value.base_tokens, ids)
            session = self.open.setdefault(value.uid, fresh)
        session.used = time.monotonic()
        return session

    @asynccontextmanager
    async def use(self, db: int, name: bytes) -> AsyncIterator[Session]:
        """The session under a key, with its lock held. Raises KvdbError when there is none."""
        while True:
            session = await self.get(db, name)
            async with session.lock:
                # Whoever had the lock before may have deleted, renamed or replaced the session, or it was forgotten.
                value = self.entry(db, name)
                if value is not None and value.uid == session.uid and self.open.get(session.uid) is session:
                    try:
                        yield session
                    except EngineDownError:
                        # Also a worker that is up says so, of a state that it has not: the retry loads it.
                        session.generation = -1
                        raise
                    return

    def create(self, db: int, name: bytes, model: Model) -> Session:
        """Put a new, empty session under a key, replacing whatever is there."""
        session = Session(secrets.token_bytes(16), model, None, 0, array("I"), used=time.monotonic())
        self.adopt(db, name, session)
        return session

    def adopt(self, db: int, name: bytes, session: Session) -> None:
        """Name a session by a key, replacing whatever is there."""
        self.open[session.uid] = session
        self.keyspace.put(db, name, Entry(EntryType.SESSION, 0, self.value_of(session)))

    def value_of(self, session: Session) -> SessionValue:
        """What the keyspace keeps of a session."""
        fingerprint = session.model.info.fingerprint
        return SessionValue(session.uid, fingerprint, session.base, session.base_tokens, lineage=session.base)

    def is_named(self, session: Session) -> bool:
        """Whether some key still means this session."""
        return self.keyspace.session_place(session.uid) is not None

    def save(self, session: Session) -> None:
        """Write the session's entry again after its base moved; the key's expiry stays."""
        found = self.keyspace.session_place(session.uid)
        if found is not None:
            db, key, entry = found
            self.keyspace.put(db, key, entry._replace(value=self.value_of(session)))

    def stand_on(self, session: Session, base: bytes | None, base_tokens: int, ids: array[int]) -> None:
        """Give the session another timeline: `ids`, of which the first `base_tokens` are the snapshot `base`."""
        session.become(base, base_tokens, ids)
        self.keyspace.journal_cut(session.uid, 0)
        self._journal(session, base_tokens)
        self.save(session)

    def append(self, session: Session, ids: Sequence[int] | array[int]) -> None:
        """Add tokens that the engine has taken to the timeline and the journal."""
        if session.shares_ids:
            session.ids, session.shares_ids = session.ids[:], False
        first = session.n_tokens
        session.ids.extend(ids)
        self._journal(session, first)

    def _journal(self, session: Session, first: int) -> None:
        if first < session.n_tokens:
            data = memoryview(session.ids).cast("B")[4 * first :]
            self.keyspace.journal_append(session.uid, first, bytes(data))

    # -- residency ----------------------------------------------------------------------------------------------------

    def n_resident(self, model: Model) -> int:
        """Sessions of a model whose live state its worker holds."""
        return sum(session.model is model and session.is_resident for session in self.open.values())

    async def make_resident(self, session: Session) -> int:
        """Load or rebuild the live state; returns how many tokens had to be computed again. The lock is held."""
        n_computed = await self.load(session)
        await self.trim(session.model, keep=session)
        return n_computed

    async def load(self, session: Session) -> int:
        """As `make_resident`, without making room: the caller calls `trim` when it has given up what it replaces."""
        await session.model.client.start()
        return 0 if session.is_resident else await self._load(session)

    async def _load(self, session: Session) -> int:
        client = session.model.client
        if session.base is None:
            await client.call("open", sid=session.uid, source=None, places=None)
        else:
            with self.store.hold(session.base):
                places = self.store.plan(session.base)
                wire = [(str(place.path), place.offset, place.record_bytes, place.id) for place in places]
                opened = await client.call("open", sid=session.uid, source=None, places=wire)
                if not session.ids:
                    # RESTORE leaves them to the worker, which has read and checked every page anyway.
                    session.ids = ids_array(opened["ids"])
        generation = client.generation
        missing = session.ids[session.base_tokens :]
        if missing:
            await client.call("extend", sid=session.uid, ids=missing.tobytes())
        # Only now: a call that fails above leaves a half-built state, which the next `open` replaces.
        session.generation = generation
        return len(missing)

    async def trim(self, model: Model, keep: Session) -> None:
        """Drop least recently used states while the worker holds more than `cache_bytes`; dirty ones are stored."""
        while model.client.resident_bytes > self.cache_bytes:
            idle = [
                session
                for session in self.open.values()
                if session.model is model and session.is_resident and session is not keep and not session.lock.locked()
            ]
            if not idle:
                return
            # What has no name any more goes first: nobody comes back to it, and it need not be stored.
            oldest = min(idle, key=lambda session: (self.is_named(session), session.used))
            async with oldest.lock:
                await self._store_dirty(oldest, Reason.EVICT)
                oldest.generation = -1
                await model.client.forget(oldest.uid)

    async def _store_dirty(self, session: Session, reason: Reason) -> None:
        """Store a live state that is about to be dropped, unless it is stored already. The lock is held."""
        if not session.is_resident or session.is_clean or not session.n_tokens or not self.is_named(session):
            return
        try:
            await self._store_state(self, session, reason)
        except KvdbError as error:
            # Base and journal still name every token; only recomputation is lost.
            log.warning("session %s was not stored (%s): %s", session.uid.hex(), reason.name.lower(), error)

    async def sweep(self, forget_after_s: float = FORGET_AFTER_S) -> None:
        """Forget sessions whose key is gone, with their live states, and those at rest. Called now and then.

        At rest: not live and unused for `forget_after_s`. It comes back from base and journal on its next use.
        """
        for number, (uid, session) in enumerate(list(self.open.items())):
            if number % SWEEP_BATCH == SWEEP_BATCH - 1:
                await asyncio.sleep(0)
            if session.lock.locked() or self.open.get(uid) is not session:
                continue
            is_at_rest = not session.is_resident and time.monotonic() - session.used > forget_after_s
            if is_at_rest or not self.is_named(session):
                del self.open[uid]
                # Also of one that is not resident: its loading may have been cancelled half-way.
                await session.model.client.forget(uid)

    async def park(self, model: Model, reason: Reason) -> None:
        """Store every dirty live state of a model, so that its worker can end without loss."""
        for session in list(self.open.values()):
            if session.model is model and session.is_resident:
                async with session.lock:
                    await self._store_dirty(session, reason)

    async def reap_idle(self, timeout_s: float) -> None:
        """Put workers to rest that had nothing to do for `timeout_s`."""
        for model in self.models.values():
            client = model.client
            if client.running and not client.pending and time.monotonic() - client.last_used > timeout_s:
                await self.park(model, Reason.EVICT)
                if not client.pending:
                    await client.stop()

    def in_background(self, work: Coroutine[Any, Any, None]) -> None:
        """Begin what no command waits for; it must end by itself when the worker does."""
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def stop_work(self) -> None:
        """The daemon is about to end: stop prefills and generations at their next border, and begin no new ones."""
        for model in self.models.values():
            model.client.is_closing = True
            model.client.cancel()

    async def close(self) -> None:
        """Graceful end: store what is live, then end the workers."""
        self.stop_work()
        for model in self.models.values():
            await self.park(model, Reason.SHUTDOWN)
            await model.client.stop()
        if self._background:
            await asyncio.wait(self._background)
