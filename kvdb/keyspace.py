"""The keyspace: what every key holds, read and changed on the event-loop thread without waiting for a disk.

Changes go to an in-memory layer, the *active* one. A round takes it whole (`freeze`); while that round is under way the
frozen layer lies between the active layer and what is below. A round that commits drops it; one that only wrote it to
the change log adds it to the *logged* layer, which lies on the index until the next commit takes it along. A round that
fails gives its layer back: the changes are merged under the newer ones and go with the next round. So a reader always
sees every change in order, and a layer, hence a command or a transaction, is on disk as a whole or not at all.

Small entries that were read or made durable lately are kept decoded in `_clean`: it only ever repeats what the index
and the logged layer say.
"""

from __future__ import annotations

import asyncio
import heapq
import random
import time
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Mapping
from itertools import islice

import msgpack

from kvdb.errors import CorruptError, KvdbError, WrongTypeError
from kvdb.store.committer import Committer, Frozen, Place
from kvdb.store.entries import (
    DATABASES,
    Entry,
    EntryType,
    HeldString,
    SessionValue,
    SnapshotValue,
    StringRef,
    decode_entry,
    decode_key,
    is_whole,
    key_hash,
    name_db,
    name_hash,
    name_key,
)
from kvdb.store.entry_writes import read_journal
from kvdb.store.index import Index, Table, from_u64, u16, u64
from kvdb.store.layer import MISSING, JournalChange, Layer
from kvdb.store.work import size_name

Type = EntryType  # callers say keyspace.Type.SESSION
_SESSION = EntryType.SESSION
_CLEAN_ENTRIES = 32768  # by database; a few MB
_CLEAN_BYTES = 1024  # larger strings are read from the index each time
_HASHES = 1 << 64


def _clock_ms() -> int:
    return time.time_ns() // 1_000_000


class _Handed:
    """What a round is given (committer.Frozen)."""

    def __init__(self, logged: Layer | None, newest: Layer) -> None:
        self.newest = newest
        self._logged = logged

    def whole(self, lost: Collection[Place]) -> Layer:
        """All that the index lacks (committer.Frozen). In the commit thread, while neither layer changes."""
        if self._logged is None and not lost:
            return self.newest
        layer = Layer()
        if self._logged is not None:
            layer.take(self._logged)
        layer.take(self.newest, lost)
        return layer


class Keyspace:
    """Keys of all databases. One thread only; see the module's first lines."""

    def __init__(
        self,
        index: Index,
        committer: Committer,
        hold: Callable[[StringRef], HeldString],
        clock: Callable[[], int] = _clock_ms,
    ) -> None:
        """hold: keeps a large string's record from being freed while the object lives."""
        self._index = index
        self._committer = committer
        self._hold = hold
        self._clock = clock
        self._reader = index.begin()
        self._active = Layer()
        self.round = 0  # how many layers were handed over: see kvdb.containers
        self._maps = self._active.maps
        self._frozen: Layer | None = None
        self._logged: Layer | None = None
        self._clean: list[dict[bytes, Entry | None]] = [{} for _ in range(DATABASES)]
        self.on_expired: Callable[[int, bytes], None] = lambda db, key: None  # told at once, as readers see it
        # Session uid -> where its entry was put last. An entry that was overwritten leaves a stale item behind, so
        # every use looks at the entry itself.
        self._sessions: dict[bytes, tuple[int, bytes]] = {
            uid: tuple(msgpack.unpackb(value)) for uid, value in self._reader.scan(Table.SESSIONS, damaged=b"") if value
        }

    # Reading

    def get(self, db: int, key: bytes) -> Entry | None:
        """What a key holds, or None. A key whose time has come is deleted on the way.

        A large string is not read: its value says where it lies, which is so until the caller awaits; see `held`.
        """
        entry: Entry | None = self._maps[db].get(key, MISSING)
        if entry is MISSING:
            entry = self._fetch(db, key)
        if entry is None:
            return None
        if entry[1] and entry[1] <= self._clock():
            self._expire(db, key)
            return None
        return entry

    def held(self, entry: Entry) -> Entry:
        """The same entry, good for longer: a large string's record is not freed while the entry lives."""
        # What a round frees is punched only after this thread has seen that round: so the record is still there.
        return entry._replace(value=self._hold(entry.value)) if type(entry.value) is StringRef else entry

    def in_memory(self, db: int) -> tuple[Mapping[bytes, Entry | None], Mapping[bytes, Entry | None]]:
        """What is known without reading the index: the newest changes, and what is so unless they say otherwise.

        Good until the caller changes a key or awaits. Entries may have expired; large strings may be references.
        """
        is_newest = self._frozen is None and db not in self._active.cleared
        return self._maps[db], self._clean[db] if is_newest else {}

    def _newest(self, db: int, key: bytes) -> Entry | None:
        entry: Entry | None = self._maps[db].get(key, MISSING)
        return self._fetch(db, key) if entry is MISSING else entry

    def exists(self, db: int, key: bytes) -> bool:
        """Whether a key holds something."""
        try:
            entry = self._newest(db, key)
        except CorruptError:
            return True  # its row in the index is damaged: it can be deleted and set again
        if entry is not None and entry[1] and entry[1] <= self._clock():
            self._expire(db, key)
            return False
        return entry is not None

    def typed(self, db: int, key: bytes, kind: EntryType) -> Entry | None:
        """Like `get`; raises WrongTypeError when the key holds another type."""
        entry = self.get(db, key)
        if entry is not None and entry.type is not kind:
            raise WrongTypeError
        return entry

    def _fetch(self, db: int, key: bytes) -> Entry | None:
        """What the layers below the active one say."""
        if db in self._active.cleared:
            return None
        entry: Entry | None = MISSING if self._frozen is None else self._frozen.find(db, key)
        if entry is not MISSING:
            return entry
        entry = self._clean[db].get(key, MISSING)
        if entry is MISSING:
            entry = self._read(db, key)
            self._keep_clean(db, key, entry)
        return entry

    def _read(self, db: int, key: bytes) -> Entry | None:
        """What the logged layer and the index say."""
        entry: Entry | None = MISSING if self._logged is None else self._logged.find(db, key)
        if entry is not MISSING:
            return entry
        data = self._reader.get(Table.KEYS, name_key(db, key))
        return None if data is None else decode_entry(data)

    def _keep_clean(self, db: int, key: bytes, entry: Entry | None) -> None:
        clean = self._clean[db]
        # A reference to a large string is never kept: it must be as new as the index.
        if entry is not None and (
            type(entry.value) in (StringRef, HeldString)
            or (type(entry.value) is bytes and len(entry.value) > _CLEAN_BYTES)
        ):
            clean.pop(key, None)
            return
        if len(clean) >= _CLEAN_ENTRIES:
            clean.clear()
        clean[key] = entry

    def _is_stored_below(self, layer: Layer, db: int, key: bytes) -> bool:
        """Whether a key, expired or not, exists in the layers below `layer`."""
        if db in layer.cleared:
            return False
        layers = self._layers()
        for below in reversed(layers[: layers.index(layer)]):
            entry = below.find(db, key)
            if entry is not MISSING:
                return entry is not None
        return self._reader.get(Table.KEYS, name_key(db, key)) is not None

    def _layers(self) -> list[Layer]:
        """All layers, the oldest first."""
        return [layer for layer in (self._logged, self._frozen, self._active) if layer is not None]

    def size(self, db: int) -> int:
        """Number of keys, also of those that have expired and were not deleted yet (as in Redis)."""
        total = self._reader.meta(size_name(db))
        for layer in self._layers():
            if db in layer.cleared:
                total = 0
            entries = layer.maps[db]
            for key in islice(entries, layer.seen[db], None):
                layer.below[db] += self._is_stored_below(layer, db, key)
            layer.seen[db] = len(entries)
            deleted = list(entries.values()).count(None)
            total += len(entries) - deleted - layer.below[db]
        return total

    # Changing

    def put(self, db: int, key: bytes, entry: Entry) -> None:
        """Set a key. An entry with a large string comes from `held`, or with a string that was just received."""
        self._maps[db][key] = entry
        if entry[1]:
            heapq.heappush(self._active.due, (entry[1], db, key))
        if entry[0] is _SESSION:
            self._sessions[entry[2].uid] = (db, key)  # type: ignore[union-attr]

    def delete(self, db: int, key: bytes) -> bool:
        """Delete a key; False if it held nothing."""
        if not self.exists(db, key):
            return False
        self._maps[db][key] = None
        return True

    def expire_at(self, db: int, key: bytes, ms: int | None) -> bool:
        """Set or (None) remove the time at which a key is deleted, in Unix ms. False if there is no such key."""
        entry = self.get(db, key)
        if entry is None:
            return False
        self.put(db, key, self.held(entry)._replace(expire_ms=ms or 0))
        return True

    def rename(self, db: int, source: bytes, target: bytes) -> bool:
        """Move an entry to another key, replacing what that held. False if there is no such source."""
        entry = self.get(db, source)
        if entry is None:
            return False
        if source != target:
            entry = self.held(entry)
            self._maps[db][source] = None
            self.put(db, target, entry)
        return True

    def clear(self, db: int) -> None:
        """Delete every key of a database."""
        self._active.clear(db)
        self._clean[db].clear()

    def _expire(self, db: int, key: bytes) -> None:
        self._maps[db][key] = None
        self.on_expired(db, key)

    # Walking

    def scan(self, db: int, cursor: int, count: int) -> tuple[int, list[bytes]]:
        """About `count` keys from `cursor` (0 to begin) and the next cursor (0: done).

        A key that is there from the first call to the last is returned at least once, since the cursor is a bound on
        the hash of keys: nothing that happens to other keys moves a key.
        """
        names = self._stored_names(db, cursor, count)
        for layer in self._layers():
            names += self._ordered_from(layer, db, cursor, count)
        names = sorted(set(names))
        stop = _HASHES
        if len(names) > count:
            # Keys with equal hashes go together, or the cursor could not tell them apart.
            stop = names[count - 1][0] + 1
        keys = [key for number, key in names if number < stop and self.exists(db, key)]
        return (stop if stop < _HASHES else 0), keys

    def _stored_names(self, db: int, cursor: int, count: int) -> list[tuple[int, bytes]]:
        """At least `count` + 1 (hash, key) of the index if there are that many, whole groups of equal hashes."""
        if any(db in layer.cleared for layer in self._layers()):
            return []
        names: list[tuple[int, bytes]] = []
        for name, data in self._reader.scan(Table.KEYS, u16(db) + u64(cursor), u16(db), damaged=b""):
            number = name_hash(name)
            if len(names) > count and number != names[-1][0]:
                break
            if data or is_whole(name):  # a damaged row is listed too: its key answers CORRUPT
                names.append((number, decode_key(name, data)))
        return names

    def _ordered_from(self, layer: Layer, db: int, cursor: int, count: int) -> list[tuple[int, bytes]]:
        """The same of a layer. Hashes each key of a layer once."""
        ordered, entries = layer.ordered[db], layer.maps[db]
        if len(ordered) < len(entries):
            new = islice(entries, len(ordered), None)
            ordered += [(int.from_bytes(key_hash(key), "big"), key) for key in new]
            ordered.sort()
        start = bisect_left(ordered, (cursor, b""))
        stop = min(start + count + 1, len(ordered))
        while 0 < stop < len(ordered) and ordered[stop][0] == ordered[stop - 1][0]:
            stop += 1
        return ordered[start:stop]

    def random(self, db: int) -> bytes | None:
        """Some key, or None in an empty database."""
        for start in (random.randrange(_HASHES), 0):
            cursor = start
            while True:
                cursor, keys = self.scan(db, cursor, 8)
                if keys:
                    return random.choice(keys)
                if not cursor:
                    break
        return None

    def expire_cycle(self, now_ms: int, limit: int = 1000) -> list[tuple[int, bytes]]:
        """Delete keys whose time has come, at most `limit`, and return them."""
        expired: list[tuple[int, bytes]] = []
        for layer in self._layers():
            while layer.due and layer.due[0][0] <= now_ms and len(expired) < limit:
                ms, db, key = heapq.heappop(layer.due)
                entry = self._newest(db, key)
                if entry is not None and entry[1] == ms:
                    self._expire(db, key)
                    expired.append((db, key))
        for name, _ in self._reader.scan(Table.EXPIRES, damaged=b""):
            ms = from_u64(name[:8])
            if ms > now_ms or len(expired) >= limit:
                break
            db = name_db(name[8:])
            try:
                data = self._reader.get(Table.KEYS, name[8:])
            except CorruptError:
                continue  # the key answers CORRUPT until it is set, deleted or repaired
            if data is None:
                continue
            key = decode_key(name[8:], data)
            is_newer = key in self._maps[db] or db in self._active.cleared
            if not is_newer and (entry := self._fetch(db, key)) is not None and entry[1] == ms:
                self._expire(db, key)
                expired.append((db, key))
        return expired

    # The token journal of sessions

    def journal_append(self, uid: bytes, first: int, ids: bytes) -> None:
        """The session's tokens from position `first` on are now `ids` (u32 little-endian): also replaces."""
        changes = self._active.journal.setdefault(uid, [])
        if changes and (last := changes[-1]).ids is not None and last.position + len(last.ids) // 4 == first:
            last.ids += ids
        else:
            changes.append(JournalChange(first, bytearray(ids)))

    def journal_cut(self, uid: bytes, n_tokens: int) -> None:
        """Forget the session's tokens at positions `n_tokens` and later (REWIND)."""
        self._active.journal.setdefault(uid, []).append(JournalChange(n_tokens, None))

    def journal_drop(self, uid: bytes, n_tokens: int) -> None:
        """Forget the session's tokens before `n_tokens`: a snapshot holds them now."""
        self._active.journal.setdefault(uid, []).append(JournalChange(n_tokens, None, drop=True))

    def journal_read(self, uid: bytes) -> tuple[int, bytes]:
        """(first position, u32 little-endian ids) of the session's journal; (0, b"") if it is empty.

        Raises KvdbError if there is a gap: some token is known to be missing.
        """
        start, ids = 0, bytearray()
        changes = [JournalChange(row_first, bytearray(row)) for row_first, row in read_journal(self._reader, uid)]
        for layer in self._layers():
            changes += layer.journal.get(uid, [])
        for change in changes:
            at = 4 * (change.position - start)
            if change.drop:
                start, ids = (change.position, ids[at:]) if at > 0 else (start, ids)
            elif change.ids is None:
                del ids[max(at, 0) :]
            elif not ids:
                start, ids = change.position, bytearray(change.ids)
            elif at > len(ids) or at < 0:
                raise KvdbError(f"the journal of session {uid.hex()} has a gap before position {change.position}")
            else:
                ids[at:] = change.ids
        return (start, bytes(ids)) if ids else (0, b"")

    # Sessions

    def session_place(self, uid: bytes) -> tuple[int, bytes, Entry] | None:
        """(database, key, entry) of the key that names a session now, whatever it was renamed to; None if none does."""
        where = self._sessions.get(uid)
        entry = None if where is None else self._session_at(uid, *where)
        if where is None or entry is None:
            self._sessions.pop(uid, None)
            return None
        return (*where, entry)

    def session_uids(self) -> set[bytes]:
        """Uids of all sessions that some key names."""
        for uid in [uid for uid, where in self._sessions.items() if self._session_at(uid, *where) is None]:
            del self._sessions[uid]
        return set(self._sessions)

    def _session_at(self, uid: bytes, db: int, key: bytes) -> Entry | None:
        entry = self.get(db, key)
        if entry is None or not isinstance(entry.value, SessionValue) or entry.value.uid != uid:
            return None
        return entry

    def rebase(self, uid: bytes, fingerprint: bytes, snapshot_id: bytes, n_tokens: int) -> bool:
        """A session's first `n_tokens` tokens are in a snapshot now: name it as the base, drop them from the journal.

        Both changes are of one layer, so a crash sees both or neither. False if no key names the session any more.
        """
        found = self.session_place(uid)
        if found is None:
            return False
        db, key, entry = found
        value = SessionValue(uid, fingerprint, snapshot_id, n_tokens, snapshot_id)
        self.put(db, key, entry._replace(value=value))
        self.journal_drop(uid, n_tokens)
        return True

    # Rounds

    @property
    def is_dirty(self) -> bool:
        """Whether something waits for a commit."""
        return bool(self._active) or self._frozen is not None

    def make_durable(self) -> asyncio.Future[None]:
        """Everything changed so far becomes durable, in the change log or the index; raises what that failed with."""
        return self._committer.make_durable()

    def flush(self) -> asyncio.Future[None]:
        """Everything changed so far comes into the index; raises what the commit failed with."""
        return self._committer.flush()

    @property
    def owes_commit(self) -> bool:
        """Whether the index lacks something, or a commit would give space back."""
        return self.is_dirty or self._logged is not None or self._committer.owes_space

    def flush_soon(self) -> None:
        """Begin to make changes durable and to give back what is not needed. The owner calls this every second."""
        if self.owes_commit:
            self._committer.kick()

    def freeze(self) -> Frozen | None:
        """Hand the active layer over to a round (committer.Overlay)."""
        if not self._active and self._logged is None:
            return None
        layer = self._frozen = self._active
        self.round += 1
        self._active = Layer()
        self._maps = self._active.maps
        return _Handed(self._logged, layer)

    def thawed(self, error: KvdbError | None, *, is_logged: bool) -> None:
        """The frozen layer is in the index, or in the log; or (error) it goes back under the active one
        (committer.Overlay)."""
        layer, self._frozen = self._frozen, None
        if layer is None:
            return
        if error is not None:
            layer.take(self._active)
            layer.take_due(self._active)
            self._active = layer
            layer.forget_counts()
            self._maps = layer.maps
            return
        for db, entries in enumerate(layer.maps):
            if db in layer.cleared:
                self._clean[db].clear()
            for key, entry in entries.items():
                self._keep_clean(db, key, entry)
        if not is_logged:
            self._logged = None
        elif self._logged is None:
            self._logged = layer
        else:
            self._logged.take(layer)
            self._logged.take_due(layer)

    def load(self, layers: Iterable[Layer]) -> None:
        """Make changes again that the change log held at start-up. Large strings are held."""
        logged = Layer()
        for layer in layers:
            logged.take(layer)
        for db, entries in enumerate(logged.maps):
            for key, entry in entries.items():
                if entry is not None and entry.expire_ms:
                    heapq.heappush(logged.due, (entry.expire_ms, db, key))
                if entry is not None and isinstance(entry.value, SessionValue):
                    self._sessions[entry.value.uid] = (db, key)
        self._logged = logged

    def committed_elsewhere(self, db: int, key: bytes) -> None:
        """Another item of a round wrote this key's entry (a snapshot and its key are one item)."""
        self._clean[db].pop(key, None)

    def refresh(self) -> None:
        """A round is over: read from the newest commit from now on. Raises KvdbError, see Index.renew."""
        self._reader = self._index.renew(self._reader)

    def close(self) -> None:
        """End the read transaction."""
        self._reader.raw.abort()


__all__ = ["Entry", "Keyspace", "SessionValue", "SnapshotValue", "Type"]
