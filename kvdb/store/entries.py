"""Entries of the keyspace: their types, and their bytes in tables KEYS, EXPIRES and NAMES.

    name key   u16 db, 8-byte hash of the key, then the key; a key over 400 bytes is cut there and followed by its
               32-byte blake3 hash, since LMDB keys are at most 511 bytes. The hash comes first so that SCAN's cursor
               can be a plain integer that stays valid whatever happens to other keys.
    entry      msgpack [type, expiry in Unix ms or 0, value]; a cut key follows as a fourth item
    string     bytes; one of 64 KiB or more is a record: [segment, offset, bytes, first 16 bytes of its id, crc32c of
               each 256 KiB piece]
    snapshot   [id, [field, value, ...], pinned, created ms]
    hash       map of field to value, in order of first setting
    zset       map of member to score (float64)
    session    [uid, fingerprint, base id or empty, tokens in base, lineage id or empty]

A snapshot's reference count follows its entries: `write_entry` is the only place that changes an entry, and it runs
inside the committing transaction.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

import msgpack
from blake3 import blake3

from kvdb.containers import Fields, Members
from kvdb_protocol.errors import FormatError

KEY_INLINE_BYTES = 400
_HASH_AT = 2
_KEY_AT = 10
DATABASES = 16


class EntryType(IntEnum):
    """What a key's value is. On disk as an integer."""

    STRING = 1
    HASH = 2
    ZSET = 3
    SNAPSHOT = 4
    SESSION = 5


_STRING = EntryType.STRING


@dataclass(frozen=True, slots=True)
class SnapshotValue:
    """A key that names a snapshot. `meta` is what the user attached to this name, not to the snapshot."""

    id: bytes
    meta: Mapping[bytes, bytes] = field(default_factory=dict)
    pinned: bool = False
    created_ms: int = 0


@dataclass(frozen=True, slots=True)
class SessionValue:
    """A live timeline: its base snapshot (or None), then the tokens in the journal under `uid` (16 bytes).

    base_tokens: tokens of the timeline that come from the base; fewer than the base holds after a rewind.
    lineage: the snapshot that the next snapshot of this session names as its parent.
    """

    uid: bytes
    fingerprint: bytes
    base: bytes | None = None
    base_tokens: int = 0
    lineage: bytes | None = None


class StringRef(NamedTuple):
    """Where a large string lies: a record of its own. id16: first 16 bytes of the blake3 hash of its bytes.

    crcs: crc32c of each piece of PIECE_BYTES, u32 little-endian, so that a part can be checked without the rest; empty
    if the string is one piece, and in entries of versions that did not write them.
    """

    segment: int
    offset: int
    n_bytes: int
    id16: bytes
    crcs: bytes = b""


# A sync in another thread: its result is None, or errno and words of what went wrong. An exception would hold the
# frames it came through, and they what must be let go.
Sync = Future[tuple[int, str] | None]


class HeldString:
    """A large string that something in memory needs: an entry that waits for its commit, a reply on its way.

    While this object lives the range on disk stays, whatever becomes of the entries that named it. One that was
    received from a client is not committed at first; `ref` is set when its last byte is written. `let_go` is called
    when nobody needs it any more, in any thread; it must take no lock. Sliced it shows how it begins. `sync` is its
    segment's sync, if one was begun ahead of the round that needs it. One that the change log names is_synced.
    """

    __slots__ = ("_let_go", "created_ms", "head", "is_committed", "is_synced", "n_bytes", "ref", "sync")

    def __init__(self, n_bytes: int, head: bytes = b"") -> None:
        self.n_bytes = n_bytes
        self.head = head  # for the slow log and MONITOR
        self.ref: StringRef | None = None
        self.created_ms = 0  # of its segment
        self.is_committed = False
        self.is_synced = False
        self.sync: Sync | None = None
        self._let_go: Callable[[bool], object] | None = None

    def complete(self, ref: StringRef, created_ms: int, is_committed: bool, let_go: Callable[[bool], object]) -> None:
        """All bytes are written. let_go: called with whether the string is committed."""
        self.ref, self.created_ms, self.is_committed, self._let_go = ref, created_ms, is_committed, let_go

    def __del__(self) -> None:
        if self._let_go is not None:
            self._let_go(self.is_committed)

    def __len__(self) -> int:
        return self.n_bytes

    def __getitem__(self, part: slice) -> bytes:
        return self.head[part]


# A string of this size is worth a record: LMDB needs a run of free pages for it and never shrinks; segments do.
LARGE_STRING_BYTES = 64 << 10
# What is checked at a time of a large string. Also what most clients that do not read cost in memory (send_buffers.py).
PIECE_BYTES = 256 << 10

LargeValue = StringRef | HeldString
Value = bytes | SnapshotValue | SessionValue | Fields | Members | LargeValue


def place_of(value: LargeValue) -> StringRef:
    """Where a large string lies."""
    if isinstance(value, StringRef):
        return value
    assert value.ref is not None, "a string is used before it is written"
    return value.ref


class Entry(NamedTuple):
    """What a key holds. expire_ms: Unix ms, 0 for never. A named tuple: SET makes one per command."""

    type: EntryType
    expire_ms: int
    value: Value


def key_hash(key: bytes) -> bytes:
    """The 8 bytes that order keys in a database."""
    return hashlib.blake2b(key, digest_size=8).digest()


def name_key(db: int, key: bytes) -> bytes:
    """Key of table KEYS."""
    head = db.to_bytes(2, "big") + key_hash(key)
    if len(key) <= KEY_INLINE_BYTES:
        return head + key
    return head + key[:KEY_INLINE_BYTES] + blake3(key).digest()


def name_db(name: bytes) -> int:
    """Database number of a name key."""
    return int.from_bytes(name[:_HASH_AT], "big")


def name_hash(name: bytes) -> int:
    """The hash part of a name key as a number: SCAN's cursor."""
    return int.from_bytes(name[_HASH_AT:_KEY_AT], "big")


def encode_entry(key: bytes, entry: Entry) -> bytes:
    """The entry's bytes in table KEYS."""
    value: object = entry.value
    if isinstance(value, SnapshotValue):
        flat = [part for pair in value.meta.items() for part in pair]
        value = [value.id, flat, value.pinned, value.created_ms]
    elif isinstance(value, SessionValue):
        value = [value.uid, value.fingerprint, value.base or b"", value.base_tokens, value.lineage or b""]
    elif isinstance(value, Members):
        value = value.scores
    row: list[object] = [int(entry.type), entry.expire_ms, value]
    if len(key) > KEY_INLINE_BYTES:
        row.append(key)
    data: bytes = msgpack.packb(row)
    return data


def decode_entry(data: bytes) -> Entry:
    """Inverse of encode_entry."""
    row = msgpack.unpackb(data)
    if row[0] == 1:  # the fast path: no enum look-up
        value = row[2]
        return Entry(_STRING, row[1], value if type(value) is bytes else StringRef(*value))
    kind, expire_ms, value = EntryType(row[0]), row[1], row[2]
    if kind is EntryType.SNAPSHOT:
        snapshot_id, flat, pinned, created_ms = value
        meta = dict(zip(flat[::2], flat[1::2], strict=True))
        return Entry(kind, expire_ms, SnapshotValue(snapshot_id, meta, pinned, created_ms))
    if kind is EntryType.SESSION:
        uid, fingerprint, base, base_tokens, lineage = value
        return Entry(kind, expire_ms, SessionValue(uid, fingerprint, base or None, base_tokens, lineage or None))
    if kind is EntryType.HASH:
        return Entry(kind, expire_ms, Fields(value))
    if kind is EntryType.ZSET:
        return Entry(kind, expire_ms, Members(value))
    raise FormatError(f"entries of type {kind.name} are not stored by this version")


def is_whole(name: bytes) -> bool:
    """Whether a row of table KEYS has all of the user's key in its own key."""
    return len(name) - _KEY_AT <= KEY_INLINE_BYTES


def decode_key(name: bytes, data: bytes) -> bytes:
    """The user's key of a row of table KEYS."""
    if is_whole(name):
        return name[_KEY_AT:]
    key: bytes = msgpack.unpackb(data)[3]
    return key


def referenced_snapshot(entry: Entry | None) -> bytes | None:
    """The snapshot that an entry keeps alive."""
    if entry is None:
        return None
    if isinstance(entry.value, SnapshotValue):
        return entry.value.id
    if isinstance(entry.value, SessionValue):
        return entry.value.base
    return None
