"""Changes of key entries inside the committing transaction, with all that follows from them.

Writing an entry moves the references of snapshots, the expiry row, the count of keys, and drops the journal of a
session that no entry names any more. Nothing else writes tables KEYS, EXPIRES and NAMES.
"""

from __future__ import annotations

import logging

import msgpack
from blake3 import blake3

from kvdb.errors import CorruptError, SnapshotGoneError
from kvdb.store.entries import (
    Entry,
    SessionValue,
    StringRef,
    decode_entry,
    decode_key,
    encode_entry,
    name_key,
    referenced_snapshot,
)
from kvdb.store.index import Table, Txn, from_u64, place_key, u16, u64
from kvdb.store.rows import pack_string_place, string_names
from kvdb.store.snapshots import ref_snapshot, unref_snapshot
from kvdb.store.work import Extent, Work
from kvdb_protocol.record import record_bytes

log = logging.getLogger("kvdb.store")


def names_key(snapshot_id: bytes, name: bytes) -> bytes:
    """Key of table NAMES."""
    return snapshot_id + blake3(name).digest(16)


def write_entry(txn: Txn, work: Work, db: int, key: bytes, entry: Entry | None) -> None:
    """Set or (None) delete one key."""
    name = name_key(db, key)
    data = txn.get(Table.KEYS, name)
    old = None if data is None else decode_entry(data)
    existed = data is not None or txn.has(Table.KEYS, name)  # its row may be damaged
    if entry is None:
        if not existed:
            return
        txn.delete(Table.KEYS, name)
    else:
        txn.put(Table.KEYS, name, encode_entry(key, entry))
    _move_string(txn, work, name, old, entry)
    if existed != (entry is not None):
        work.count_key(db, -1 if existed else 1)
    old_ms, new_ms = old.expire_ms if old else 0, entry.expire_ms if entry else 0
    if old_ms != new_ms:
        if old_ms:
            txn.delete(Table.EXPIRES, u64(old_ms) + name)
        if new_ms:
            txn.put(Table.EXPIRES, u64(new_ms) + name, b"")
    _move_reference(txn, work, db, key, name, referenced_snapshot(old), referenced_snapshot(entry))
    if old is not None and isinstance(old.value, SessionValue):
        work.uids.setdefault(old.value.uid, False)
    if entry is not None and isinstance(entry.value, SessionValue):
        work.uids[entry.value.uid] = True
        txn.put(Table.SESSIONS, entry.value.uid, msgpack.packb([db, key]))


def rebase_session(txn: Txn, work: Work, base: SessionValue) -> None:
    """Give a session another base, under the key that it has by now. Raises SnapshotGoneError if it has none."""
    uid = base.uid
    where = txn.get(Table.SESSIONS, uid)
    db, key = (0, b"") if where is None else msgpack.unpackb(where)
    data = None if where is None else txn.get(Table.KEYS, name_key(db, key))
    entry = None if data is None else decode_entry(data)
    if entry is None or not isinstance(entry.value, SessionValue) or entry.value.uid != uid:
        raise SnapshotGoneError("the session was deleted while it was stored")
    write_entry(txn, work, db, key, entry._replace(value=base))


def _move_string(txn: Txn, work: Work, name: bytes, old: Entry | None, new: Entry | None) -> None:
    """A large string's record lives as long as an entry names it. PLACES lists those by their name keys."""
    before = old.value if old is not None else None
    after = new.value if new is not None else None
    if before == after:
        return
    if isinstance(before, StringRef):
        _name_string(txn, work, before, name, is_named=False)
    if isinstance(after, StringRef):
        _name_string(txn, work, after, name, is_named=True)


def _name_string(txn: Txn, work: Work, ref: StringRef, name: bytes, *, is_named: bool) -> None:
    place = place_key(ref.segment, ref.offset)
    extent = Extent(ref.segment, ref.offset, record_bytes(ref.n_bytes))
    try:
        row = txn.get(Table.PLACES, place)
    except CorruptError as error:
        # Nobody knows which other entries share the record: nothing is freed, and the row is left to the repair.
        log.error("a string in segment %d at %d keeps its space: %s", ref.segment, ref.offset, error)
        return
    names = set(string_names(row) if row is not None else ())
    if is_named:
        names.add(name)
    else:
        names.discard(name)
    if not names:
        txn.delete(Table.PLACES, place)
        work.free(extent)
        return
    txn.put(Table.PLACES, place, pack_string_place(names, ref.n_bytes))
    if row is None:
        work.use(extent)


def _move_reference(
    txn: Txn, work: Work, db: int, key: bytes, name: bytes, old: bytes | None, new: bytes | None
) -> None:
    if old == new:
        return
    if new is not None:
        if ref_snapshot(txn, new):
            txn.put(Table.NAMES, names_key(new, name), msgpack.packb([db, key]))
        else:
            # Holds make this unreachable. Should it happen, the key answers that its snapshot is gone, and the
            # rest of the round is still committed.
            log.error("key %r of database %d names a snapshot that does not exist: %s", key, db, new.hex())
    # A name that never got its reference (see above) must not take one away.
    if old is not None and txn.delete(Table.NAMES, names_key(old, name)):
        unref_snapshot(txn, work, old)


def clear_database(txn: Txn, work: Work, db: int) -> None:
    """Delete every key of a database."""
    keys = [decode_key(name, data) for name, data in txn.scan(Table.KEYS, prefix=u16(db))]
    for key in keys:
        write_entry(txn, work, db, key, None)


def write_journal(txn: Txn, uid: bytes, first: int, ids: bytes) -> None:
    """The session's tokens from position `first` on are now exactly `ids` (u32 little-endian)."""
    cut_journal(txn, uid, first)
    if ids:
        txn.put(Table.JOURNAL, uid + u64(first), ids)


def cut_journal(txn: Txn, uid: bytes, n_tokens: int) -> None:
    """Forget the session's tokens at positions `n_tokens` and later; looks at no row before the last that stays."""
    at = uid + u64(n_tokens)
    for key, _ in list(txn.scan(Table.JOURNAL, at, uid)):
        txn.delete(Table.JOURNAL, key)
    before = txn.before(Table.JOURNAL, at)
    if before is not None and before[0].startswith(uid):
        key, ids = before
        n_kept = n_tokens - from_u64(key[len(uid) :])
        if len(ids) // 4 > n_kept:
            txn.put(Table.JOURNAL, key, ids[: 4 * n_kept])


def drop_journal(txn: Txn, uid: bytes, n_tokens: int) -> None:
    """Forget the session's tokens before position `n_tokens`: its base holds them."""
    for key, ids in list(txn.scan(Table.JOURNAL, prefix=uid)):
        first = from_u64(key[len(uid) :])
        if first >= n_tokens:
            return
        txn.delete(Table.JOURNAL, key)
        if first + len(ids) // 4 > n_tokens:
            txn.put(Table.JOURNAL, uid + u64(n_tokens), ids[4 * (n_tokens - first) :])


def read_journal(txn: Txn, uid: bytes) -> list[tuple[int, bytes]]:
    """(first position, ids) of the session's rows, in order."""
    return [(from_u64(key[len(uid) :]), ids) for key, ids in txn.scan(Table.JOURNAL, prefix=uid)]
