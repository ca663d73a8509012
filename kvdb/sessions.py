"""Sessions: named live timelines, and how they come to be, grow, are stored and go back.

A session is a keyspace entry (SessionValue) plus, while it is in use, a `Session` here. Its timeline is its base snapshot
and the tokens since (the journal). Its live state may be resident in the engine worker; it is rebuilt from base and
journal when it is not. So the worker may die, be reaped or drop the state at any time without losing anything.

Invariant: `ids` holds exactly the tokens the journal and the base name, and a resident state is at exactly these tokens
whenever the session's lock is free.

Everything here runs on the event loop; one lock a session keeps its operations in order.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from array import array
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvdb_engine.catalog import ModelInfo
from kvdb_engine.sampling import Sampling

from kvdb.engine_client import EngineClient
from kvdb.errors import BusyKeyError, EngineDownError, KvdbError, NoEngineError, TooLongError, WrongModelError
from kvdb.keyspace import Entry, Keyspace, SessionValue, SnapshotValue, Type
from kvdb.store.errors import StalePagesError
from kvdb.store.records import NewSnapshot, WrittenRecord
from kvdb.store.store import Store
from kvdb_protocol.frames import Message
from kvdb_protocol.ids import extend_prefix, root_prefix

log = logging.getLogger("kvdb.sessions")

Progress = Callable[[int, int], None]
OnToken = Callable[[int], None]
Reply = dict[str, Any]


class Model:
    """A model the daemon serves: what it is, and the worker that runs it."""

    def __init__(self, info: ModelInfo) -> None:
        self.info = info
        self.client = EngineClient(info.spec, info.name)
        self.write_lock = asyncio.Lock()  # one writer to the worker's segment at a time


@dataclass(slots=True, eq=False)
class Session:
    """A timeline in use. `generation` is the worker generation in which its state is resident, -1 for none."""

    uid: int
    model: Model
    base: bytes | None
    base_tokens: int
    ids: array[int]
    generation: int = -1
    used: float = 0.0
    shares_ids: bool = False
    prefixes: list[bytes] = field(default_factory=list)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def n_tokens(self) -> int:
        """Tokens of the timeline."""
        return len(self.ids)

    @property
    def is_clean(self) -> bool:
        """Whether the timeline is exactly its base snapshot."""
        return self.base is not None and self.base_tokens == len(self.ids)

    @property
    def is_resident(self) -> bool:
        """Whether the worker that runs now holds the state."""
        return self.model.client.running and self.generation == self.model.client.generation

    def prefix_hashes(self, n_pages: int) -> list[bytes]:
        """Prefix hashes after each of the first `n_pages` pages; computed once."""
        page_tokens = self.model.info.layout.page_tokens
        data = memoryview(self.ids).cast("B")
        while len(self.prefixes) < n_pages:
            at = len(self.prefixes) * page_tokens * 4
            parent = self.prefixes[-1] if self.prefixes else root_prefix(self.model.info.family)
            self.prefixes.append(extend_prefix(parent, data[at : at + page_tokens * 4]))
        return self.prefixes[:n_pages]

    def become(self, base: bytes | None, base_tokens: int, ids: array[int]) -> None:
        """Stand on another timeline; the live state, if any, is no longer this one."""
        self.base, self.base_tokens, self.ids = base, base_tokens, ids
        self.shares_ids = False
        self.generation = -1
        self.prefixes = []


@dataclass(frozen=True, slots=True)
class _Reuse:
    """Where a prompt's first `n_tokens` come from: this session, another live one, a stored snapshot, or nowhere."""

    source: str
    n_tokens: int
    live: Session | None = None
    snapshot: bytes | None = None


def ids_array(data: bytes | memoryview) -> array[int]:
    """Token ids from u32 little-endian bytes (kvdb runs on little-endian machines only)."""
    ids = array("I")
    ids.frombytes(bytes(data))
    return ids


class Sessions:
    """All sessions of the daemon."""

    def __init__(self, store: Store, keyspace: Keyspace, models: dict[str, Model], *, cross_quant: bool = True) -> None:
        self.store = store
        self.keyspace = keyspace
        self.models = models
        self.cross_quant = cross_quant
        self.cache_bytes = 4 << 30
        self._open: dict[int, Session] = {}
        self._async: dict[tuple[int, bytes], asyncio.Task[Reply | None]] = {}

    # -- finding and naming -------------------------------------------------------------------------------------------

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
        family = self.store.family_of(fingerprint)
        for model in self.models.values():
            if self.cross_quant and family is not None and model.info.family == family:
                return model
        raise WrongModelError(
            f"the state belongs to model {fingerprint.hex()[:12]}, which is not served here; start kvdb-server with it"
        )

    def entry(self, db: int, name: bytes) -> SessionValue | None:
        """The session value under a key, or None. Raises WrongTypeError for a key of another type."""
        found = self.keyspace.typed(db, name, Type.SESSION)
        return found.value if found is not None else None

    async def get(self, db: int, name: bytes) -> Session:
        """The session under a key. Raises KvdbError when there is none."""
        value = self.entry(db, name)
        if value is None:
            raise KvdbError(f"no such session '{name.decode(errors='replace')}'; PREFILL or RESTORE makes one")
        session = self._open.get(value.uid)
        if session is None:
            session = Session(value.uid, self.model_of(value.fingerprint), value.base, value.base_tokens, array("I"))
            ids = ids_array(await self.store.token_ids(value.base)) if value.base else array("I")
            ids.extend(ids_array(self.keyspace.journal_read(value.uid, value.base_tokens)))
            session.ids = ids
            session = self._open.setdefault(value.uid, session)
        session.used = time.monotonic()
        return session

    def create(
        self, db: int, name: bytes, model: Model, base: bytes | None, ids: array[int], base_tokens: int
    ) -> Session:
        """Put a new session under a key, replacing whatever session is there."""
        session = Session(secrets.randbits(63), model, base, base_tokens, ids, used=time.monotonic())
        self._open[session.uid] = session
        self.keyspace.put(db, name, Entry(Type.SESSION, 0, self._value(session)))
        self._journal(session, base_tokens)
        return session

    def _value(self, session: Session) -> SessionValue:
        return SessionValue(session.uid, session.model.info.fingerprint, session.base, session.base_tokens)

    def _save(self, db: int, name: bytes, session: Session) -> None:
        """Write the session's entry again after its base moved; the key's expiry stays."""
        found = self.keyspace.get(db, name)
        if found is not None and found.type is Type.SESSION and found.value.uid == session.uid:
            self.keyspace.put(db, name, Entry(Type.SESSION, found.expire_ms, self._value(session)))

    def _journal(self, session: Session, first: int) -> None:
        """Journal the tokens from position `first` on."""
        if first < session.n_tokens:
            data = memoryview(session.ids).cast("B")[4 * first :]
            self.keyspace.journal_append(session.uid, first, bytes(data))

    def _append(self, session: Session, ids: Sequence[int] | array[int]) -> None:
        if session.shares_ids:
            session.ids, session.shares_ids = session.ids[:], False
        first = session.n_tokens
        session.ids.extend(ids)
        self._journal(session, first)

    def n_resident(self, model: Model) -> int:
        """Sessions of a model whose live state its worker holds."""
        return sum(session.model is model and session.is_resident for session in self._open.values())

    # -- residency ----------------------------------------------------------------------------------------------------

    async def make_resident(self, session: Session) -> int:
        """Load or rebuild the live state; returns how many tokens had to be computed again."""
        client = session.model.client
        await client.start()
        if session.is_resident:
            return 0
        places = None
        if session.base is not None:
            with self.store.hold(session.base):
                places = [(str(p.path), p.offset, p.record_bytes) for p in self.store.plan(session.base)]
                await client.call("open", sid=session.uid, source=None, places=places)
        else:
            await client.call("open", sid=session.uid, source=None, places=None)
        generation = client.generation
        missing = session.ids[session.base_tokens :]
        if missing:
            await client.call("extend", sid=session.uid, ids=missing.tobytes())
        # Only now: a call that fails above leaves a half-built state, which the next `open` replaces.
        session.generation = generation
        await self._trim(session.model, keep=session)
        return len(missing)

    async def _trim(self, model: Model, keep: Session) -> None:
        """Drop the least recently used states while the worker holds more than `cache_bytes`; store dirty ones first."""
        while model.client.resident_bytes > self.cache_bytes:
            idle = [s for s in self._open.values() if s.is_resident and s is not keep and not s.lock.locked()]
            idle = [s for s in idle if s.model is model]
            if not idle:
                return
            oldest = min(idle, key=lambda s: s.used)
            async with oldest.lock:
                if not oldest.is_clean and oldest.n_tokens:
                    await self._store(oldest, "evict")
                oldest.generation = -1
                await model.client.call("close", sid=oldest.uid)

    async def sweep(self) -> None:
        """Forget sessions whose key is gone, with their live states and journals. Called now and then."""
        alive = self.keyspace.session_uids()
        for uid, session in list(self._open.items()):
            if uid not in alive and not session.lock.locked():
                del self._open[uid]
                if session.is_resident:
                    await session.model.client.call("close", sid=uid)

    async def park(self, model: Model, reason: str) -> None:
        """Store every dirty live state of a model, so that its worker can end without loss."""
        for session in list(self._open.values()):
            if session.model is model and session.is_resident and not session.is_clean and session.n_tokens:
                async with session.lock:
                    try:
                        await self._store(session, reason)
                    except KvdbError as error:
                        # Base and journal still name every token; only recomputation is lost.
                        log.warning("session %x was not stored (%s): %s", session.uid, reason, error)

    async def reap_idle(self, timeout_s: float) -> None:
        """Put workers to rest that had nothing to do for `timeout_s`."""
        for model in self.models.values():
            client = model.client
            if client.running and not client.pending and time.monotonic() - client.last_used > timeout_s:
                await self.park(model, "evict")
                if not client.pending:
                    await client.stop()

    async def close(self) -> None:
        """Graceful end: store what is live, then end the workers."""
        for model in self.models.values():
            if model.client.running:
                await self.park(model, "shutdown")
                await model.client.stop()

    # -- growing ------------------------------------------------------------------------------------------------------

    def check_ids(self, model: Model, ids: Sequence[int] | array[int], before: int = 0) -> None:
        """Refuse tokens out of the vocabulary and timelines over the context."""
        config = model.info.config
        if ids and max(ids) >= config.vocab:
            raise KvdbError(f"token id {max(ids)} is out of range: {model.info.name} has {config.vocab} tokens")
        if before + len(ids) > config.context:
            raise TooLongError(
                f"{before + len(ids)} tokens are over the context of {config.context} of {model.info.name}"
            )

    async def prefill(
        self, db: int, name: bytes, model: Model, ids: array[int], reuse: str, on_progress: Progress | None
    ) -> Reply:
        """Make the session's timeline exactly `ids`, computing as little as possible.

        reuse: "YES" takes the longest live or stored prefix, "NO" computes all, "ONLY" computes nothing: the timeline
        becomes the longest prefix found.
        """
        began = time.perf_counter()
        value = self.entry(db, name)
        self.check_ids(model, ids)
        if not ids:
            raise KvdbError("the prompt is empty: give at least one token")
        if value is not None and self.model_of(value.fingerprint) is model:
            session = await self.get(db, name)
        else:
            session = self.create(db, name, model, None, array("I"), 0)
        async with session.lock:
            found = await self._find_reuse(session, ids, reuse)
            if reuse == "ONLY" and not found.n_tokens:
                raise KvdbError("no live or stored prefix of this prompt; PREFILL without REUSE ONLY computes it")
            await self._take(session, found, ids)
            self._save(db, name, session)
            recomputed = 0
            if reuse != "ONLY" and found.n_tokens < len(ids):
                recomputed = await self.make_resident(session)
                await self._extend(session, ids[found.n_tokens :], on_progress)
        return {
            "tokens": session.n_tokens,
            "reused": found.n_tokens,
            "computed": session.n_tokens - found.n_tokens + recomputed,
            "source": found.source,
            "ms": _ms(began),
        }

    async def _find_reuse(self, session: Session, ids: array[int], reuse: str) -> _Reuse:
        """The longest prefix at hand; what is live wins a tie, because it costs nothing."""
        best = _Reuse("none", 0)
        if reuse == "NO":
            return best
        if 0 < session.n_tokens <= len(ids) and ids[: session.n_tokens] == session.ids:
            best = _Reuse("live", session.n_tokens, session)
        for other in self._open.values():
            n = other.n_tokens
            if n > best.n_tokens and n <= len(ids) and other.model is session.model and other.is_resident:
                if not other.lock.locked() and ids[:n] == other.ids:
                    best = _Reuse("live", n, other)
        match = self.store.longest_prefix(
            session.model.info.family, session.model.info.fingerprint, ids.tobytes(), cross_quant=self.cross_quant
        )
        if match is not None and match.n_tokens > best.n_tokens:
            best = _Reuse("stored", match.n_tokens, snapshot=match.snapshot_id)
        return best

    async def _take(self, session: Session, found: _Reuse, ids: array[int]) -> None:
        """Put the session on the reused prefix."""
        if found.live is session:
            return
        if found.live is not None:
            await self._clone(found.live, session)
            return
        session.become(found.snapshot, found.n_tokens, ids[: found.n_tokens])
        self.keyspace.journal_cut(session.uid, 0)

    async def _clone(self, origin: Session, session: Session) -> None:
        """Give `session` the timeline and, where there is one, the live state of `origin`."""
        session.become(origin.base, origin.base_tokens, origin.ids)
        # A million ids are 4 MB: whoever grows first makes the copy, so that a fork costs the same at any length.
        session.shares_ids = origin.shares_ids = True
        self.keyspace.journal_cut(session.uid, 0)
        self._journal(session, session.base_tokens)
        if origin.is_resident:
            generation = origin.generation
            try:
                await origin.model.client.call("open", sid=session.uid, source=origin.uid, places=None)
                session.generation = generation
            except EngineDownError:
                log.info("the engine went away during a fork; the new session is rebuilt on first use")

    async def _extend(self, session: Session, ids: array[int], on_progress: Progress | None) -> None:
        done_before = 0

        def on_event(event: Message) -> None:
            nonlocal done_before
            self._append(session, ids[done_before : event["done"]])
            done_before = event["done"]
            if on_progress is not None:
                on_progress(event["done"], event["total"])

        await session.model.client.call("extend", on_event, sid=session.uid, ids=ids.tobytes())

    async def extend(self, db: int, name: bytes, ids: array[int], on_progress: Progress | None) -> Reply:
        """Append tokens to a session."""
        began = time.perf_counter()
        session = await self.get(db, name)
        async with session.lock:
            self.check_ids(session.model, ids, session.n_tokens)
            before = session.n_tokens
            recomputed = await self.make_resident(session)
            await self._extend(session, ids, on_progress)
        return {
            "tokens": session.n_tokens,
            "reused": before - recomputed,
            "computed": len(ids) + recomputed,
            "source": "live",
            "ms": _ms(began),
        }

    async def generate(
        self,
        db: int,
        name: bytes,
        max_tokens: int,
        sampling: Sampling,
        stops: list[bytes],
        on_token: OnToken | None,
    ) -> Reply:
        """Decode up to `max_tokens` tokens. The end-of-sentence token and stop strings stay in the timeline."""
        began = time.perf_counter()
        session = await self.get(db, name)
        async with session.lock:
            if session.n_tokens == 0:
                raise KvdbError("the session is empty: PREFILL it first")
            await self.make_resident(session)
            before = session.n_tokens

            def on_event(event: Message) -> None:
                self._append(session, [event["token"]])
                if on_token is not None:
                    on_token(event["token"])

            info = session.model.info
            done = await session.model.client.call(
                "generate",
                on_event,
                sid=session.uid,
                max_tokens=max_tokens,
                sampling=sampling_fields(sampling),
                stop=stops,
                stop_ids=[info.tokenizer.eos_id],
            )
            new = session.ids[before:].tolist()
        return {
            "text": info.tokenizer.decode_bytes(new),
            "ids": new,
            "tokens": before + len(new),
            "finish": done["finish"],
            "ms": _ms(began),
        }

    # -- storing ------------------------------------------------------------------------------------------------------

    async def snapshot(
        self, db: int, name: bytes, key: bytes, value: Callable[[bytes], Entry], guard: Callable[[], bool]
    ) -> Reply | None:
        """Store the session's state under `key`; durable when this returns.

        value: makes the key's entry from the snapshot id. guard: checked before the work and again right before the
        commit (NX, XX); None is returned when it says no.
        """
        began = time.perf_counter()
        session = await self.get(db, name)
        async with session.lock:
            if session.n_tokens == 0:
                raise KvdbError("the session is empty: there is no state to store")
            if not guard():
                return None
            if session.is_clean:
                assert session.base is not None
                self.keyspace.put(db, key, value(session.base))
                await self.keyspace.flush()
                places = self.store.plan(session.base)
                stored = (0, 0, sum(place.record_bytes for place in places))
            else:
                stored = await self._store(session, "manual", (db, key), value)
                self._save(db, name, session)
        assert session.base is not None
        return {
            "id": session.base.hex(),
            "tokens": session.base_tokens,
            "pages_new": stored[0],
            "bytes_new": stored[1],
            "bytes_shared": stored[2],
            "ms": _ms(began),
        }

    def run_async(self, key: tuple[int, bytes], work: Coroutine[Any, Any, Reply | None]) -> None:
        """Carry a snapshot out in the background; `wait_async` tells how it went."""
        self._async[key] = asyncio.create_task(work)

    async def wait_async(self, key: tuple[int, bytes]) -> Reply | None:
        """The reply of the last background snapshot under this key, once; None when there is none."""
        task = self._async.get(key)
        if task is None:
            return None
        try:
            return await asyncio.shield(task)
        finally:
            if task.done():
                self._async.pop(key, None)

    async def _store(
        self,
        session: Session,
        reason: str,
        key: tuple[int, bytes] | None = None,
        value: Callable[[bytes], Entry] | None = None,
    ) -> tuple[int, int, int]:
        """Write and commit the session's state; returns (new pages, new bytes, shared bytes). The lock is held."""
        await self.make_resident(session)
        for attempt in (1, 2):
            try:
                return await self._store_once(session, reason, key, value)
            except StalePagesError:
                # A page this write counted on was freed by a delete that came first. The second try writes it.
                if attempt == 2:
                    raise
        raise AssertionError("unreachable")

    async def _store_once(
        self,
        session: Session,
        reason: str,
        key: tuple[int, bytes] | None,
        value: Callable[[bytes], Entry] | None,
    ) -> tuple[int, int, int]:
        info, client = session.model.info, session.model.client
        layout = info.layout
        n_pages = layout.n_pages(session.n_tokens)
        have = layout.n_pages(session.base_tokens) if session.base is not None else 0
        prefixes = session.prefix_hashes(n_pages)
        async with session.model.write_lock:
            reservation = self.store.reserve(f"engine-{info.name}")
            done = await client.call(
                "write",
                sid=session.uid,
                path=str(reservation.path),
                offset=reservation.offset,
                have=have,
                known=self.store.known_pages(info.fingerprint, prefixes[have:]),
            )
            number_of = {page_id: number for number, page_id in enumerate(done["pages"])}
            written = [
                WrittenRecord(
                    type=kind,
                    id=record_id,
                    offset=offset,
                    payload_bytes=size,
                    parent=parent,
                    prefix=prefixes[number_of[record_id]] if kind == 1 else b"",
                    first=(number_of[record_id] if kind == 1 else n_pages) * layout.page_tokens,
                    n_tokens=layout.page_tokens if kind == 1 else session.n_tokens - n_pages * layout.page_tokens,
                )
                for kind, record_id, offset, size, parent in done["written"]
            ]
            snapshot_id: bytes = done["snapshot"]
            committed = await self.store.commit_snapshot(
                NewSnapshot(
                    id=snapshot_id,
                    fingerprint=info.fingerprint,
                    leaf=done["leaf"],
                    n_tokens=session.n_tokens,
                    parent=session.base,
                    reason=reason,
                    created_ms=int(time.time() * 1e3),
                    page_ids=done["pages"],
                    written=written,
                    reservation=reservation,
                    tail_ids=session.ids[n_pages * layout.page_tokens :].tobytes(),
                    leaf_prefix=prefixes[-1] if prefixes else root_prefix(info.family),
                ),
                key=key,
                entry=value(snapshot_id) if value is not None else None,
                session_uid=session.uid,
            )
        session.base, session.base_tokens = snapshot_id, session.n_tokens
        return committed.pages_new, committed.bytes_new, committed.bytes_shared

    # -- going back and branching -------------------------------------------------------------------------------------

    def snapshot_value(self, db: int, key: bytes) -> SnapshotValue:
        """The snapshot under a key. Raises KvdbError when there is none, WrongTypeError for another type."""
        found = self.keyspace.typed(db, key, Type.SNAPSHOT)
        if found is None:
            raise KvdbError(f"no such snapshot '{key.decode(errors='replace')}'; SNAPSHOT makes one, SCAN lists them")
        value: SnapshotValue = found.value
        return value

    async def restore(self, db: int, key: bytes, name: bytes, *, replace: bool) -> Reply:
        """Put a session on a snapshot's state, checked byte by byte; loaded into the engine where there is one."""
        began = time.perf_counter()
        snapshot_id = self.snapshot_value(db, key).id
        if not replace and self.keyspace.get(db, name) is not None:
            raise BusyKeyError(f"session '{name.decode(errors='replace')}' exists: add REPLACE to overwrite it")
        if replace:
            self.entry(db, name)  # a key of another type is not a session to replace
        with self.store.hold(snapshot_id):
            record = self.store.snapshot(snapshot_id)
            model = self.model_of(record.fingerprint)
            places = self.store.plan(snapshot_id)
            ids = ids_array(await self.store.token_ids(snapshot_id))
            session = Session(secrets.randbits(63), model, snapshot_id, len(ids), ids, used=time.monotonic())
            try:
                await self.make_resident(session)
            except NoEngineError:
                await self.store.check_places(places)
            self._open[session.uid] = session
            self.keyspace.put(db, name, Entry(Type.SESSION, 0, self._value(session)))
        return {
            "tokens": session.n_tokens,
            "bytes_read": sum(place.record_bytes for place in places),
            "recomputed": 0,
            "ms": _ms(began),
        }

    async def fork(self, db: int, source: bytes, dests: Sequence[bytes]) -> int:
        """Name the state of a session or snapshot again, as sessions. No page is copied; durable when this returns."""
        found = self.keyspace.get(db, source)
        if found is None:
            raise KvdbError(f"no such session or snapshot '{source.decode(errors='replace')}'")
        if len(set(dests)) < len(dests):
            raise KvdbError("the same destination is named twice")
        for dest in dests:
            if self.keyspace.get(db, dest) is not None:
                raise BusyKeyError(f"key '{dest.decode(errors='replace')}' exists: FORK does not overwrite")
        if found.type is Type.SNAPSHOT:
            self._fork_snapshot(db, found.value, dests)
        else:
            origin = await self.get(db, source)
            async with origin.lock:
                for dest in dests:
                    if self.keyspace.get(db, dest) is not None:
                        raise BusyKeyError(f"key '{dest.decode(errors='replace')}' exists: FORK does not overwrite")
                for dest in dests:
                    session = self.create(db, dest, origin.model, None, array("I"), 0)
                    await self._clone(origin, session)
                    self._save(db, dest, session)
        await self.keyspace.flush()
        return len(dests)

    def _fork_snapshot(self, db: int, value: SnapshotValue, dests: Sequence[bytes]) -> None:
        """One small record a branch: token ids are read when a branch is first used, not here."""
        record = self.store.snapshot(value.id)
        self.model_of(record.fingerprint)
        for dest in dests:
            uid = secrets.randbits(63)
            entry = SessionValue(uid, record.fingerprint, value.id, record.n_tokens)
            self.keyspace.put(db, dest, Entry(Type.SESSION, 0, entry))

    async def rewind_to(self, db: int, name: bytes, key: bytes) -> Reply:
        """Back to a snapshot whose tokens the session's timeline begins with."""
        began = time.perf_counter()
        session = await self.get(db, name)
        snapshot_id = self.snapshot_value(db, key).id
        async with session.lock:
            with self.store.hold(snapshot_id):
                ids = ids_array(await self.store.token_ids(snapshot_id))
                if session.ids[: len(ids)] != ids:
                    raise KvdbError(
                        f"snapshot '{key.decode(errors='replace')}' is not an ancestor of the session; RESTORE takes any"
                    )
                await self._stand_on(db, name, session, snapshot_id, ids)
        return {"tokens": session.n_tokens, "recomputed": 0, "ms": _ms(began)}

    async def rewind_tokens(self, db: int, name: bytes, n_tokens: int) -> Reply:
        """Back to the first `n_tokens` tokens: the nearest stored prefix, and the rest computed again."""
        began = time.perf_counter()
        session = await self.get(db, name)
        async with session.lock:
            if not 0 < n_tokens <= session.n_tokens:
                raise KvdbError(f"cannot rewind to {n_tokens} tokens: the session has {session.n_tokens}")
            recomputed = 0
            if n_tokens < session.n_tokens:
                ids = session.ids[:n_tokens]
                info = session.model.info
                match = self.store.longest_prefix(
                    info.family, info.fingerprint, ids.tobytes(), cross_quant=self.cross_quant
                )
                n = match.n_tokens if match is not None else 0
                await self._stand_on(db, name, session, match.snapshot_id if match else None, ids[:n])
                recomputed = n_tokens - n
                if recomputed:
                    await self.make_resident(session)
                    await self._extend(session, ids[n:], None)
        return {"tokens": session.n_tokens, "recomputed": recomputed, "ms": _ms(began)}

    async def rewind_steps(self, db: int, name: bytes, steps: int) -> Reply:
        """Back `steps` snapshots: one step from tokens after the base leads to the base, from the base to its parent."""
        began = time.perf_counter()
        session = await self.get(db, name)
        async with session.lock:
            target = session.base
            left = steps - (0 if session.is_clean else 1)
            while left > 0 and target is not None:
                target = self.store.snapshot(target).parent
                left -= 1
            if target is None or not self.store.has_snapshot(target):
                raise KvdbError(f"the session has fewer than {steps} stored snapshots behind it")
            with self.store.hold(target):
                ids = ids_array(await self.store.token_ids(target))
                await self._stand_on(db, name, session, target, ids)
        return {"tokens": session.n_tokens, "recomputed": 0, "ms": _ms(began)}

    async def _stand_on(self, db: int, name: bytes, session: Session, base: bytes | None, ids: array[int]) -> None:
        session.become(base, len(ids), ids)
        self.keyspace.journal_cut(session.uid, 0)
        self._save(db, name, session)

    # -- looking ------------------------------------------------------------------------------------------------------

    async def logits(self, db: int, key: bytes) -> tuple[ModelInfo | None, int, bytes]:
        """(model, position, f32 logits) of a snapshot or session; stored logits are used wherever they are right."""
        found = self.keyspace.get(db, key)
        if found is not None and found.type is Type.SNAPSHOT:
            return await self._stored_logits(found.value.id)
        session = await self.get(db, key)
        async with session.lock:
            if session.is_clean:
                assert session.base is not None
                return await self._stored_logits(session.base)
            if session.n_tokens == 0:
                raise KvdbError("the session is empty: it has no logits")
            await self.make_resident(session)
            done = await session.model.client.call("logits", sid=session.uid)
            return session.model.info, session.n_tokens, done["logits"]

    async def _stored_logits(self, snapshot_id: bytes) -> tuple[ModelInfo | None, int, bytes]:
        record = self.store.snapshot(snapshot_id)
        tail = await self.store.read_tail(snapshot_id)
        try:
            info: ModelInfo | None = self.model_of(record.fingerprint).info
        except WrongModelError:
            info = None  # logits can be shown for a model that is not served; only their text cannot
        return info, record.n_tokens, bytes(tail.logits)


def sampling_fields(sampling: Sampling) -> dict[str, Any]:
    """The fields of a Sampling, for a worker frame."""
    return {
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "seed": sampling.seed,
    }


def _ms(began: float) -> float:
    return round((time.perf_counter() - began) * 1e3, 3)
