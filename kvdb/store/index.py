"""The index: an LMDB environment, the only truth about what exists.

This file knows the tables and their keys; rows.py knows the values. Keys are sortable bytes: numbers are big-endian.
One thread writes (committer.py). LMDB commits are copy-on-write and synced, so the index is always at the state of
some whole commit.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from typing import Any

import lmdb
import msgpack

from kvdb.errors import KvdbError
from kvdb.store.errors import as_kvdb_error
from kvdb.store.rows import ModelRow, PageRow, SegmentRow, SnapshotRow, pack

FORMAT_VERSION = 1
# The file is sparse and grows with its content; the map only reserves addresses. Growing a map while readers are open
# is not allowed by LMDB, so it is taken large once.
MAP_BYTES = 1 << 40


class Table(IntEnum):
    """The named tables. Names in LMDB are these names in lower case."""

    META = 0  # name -> msgpack value
    KEYS = 1  # name key (entries.py) -> entry
    EXPIRES = 2  # u64 Unix ms, name key -> nothing
    NAMES = 3  # snapshot id, 16-byte hash of the name key -> [db, key]
    SNAPSHOTS = 4  # snapshot id -> SnapshotRow
    CHILDREN = 5  # parent snapshot id, snapshot id -> nothing
    PAGES = 6  # page id -> PageRow
    PREFIXES = 7  # prefix hash, page id -> model number
    ENDS = 8  # prefix hash of the leaf, u32 tail tokens, tail hash, snapshot id -> model number
    SEGMENTS = 9  # u64 segment id -> SegmentRow
    PLACES = 10  # u64 segment id, u64 offset -> PlaceRow
    MODELS = 11  # fingerprint -> ModelRow
    JOURNAL = 12  # session uid, u64 first position -> u32 little-endian token ids
    PENDING = 13  # id of an unreferenced snapshot that was being read -> nothing
    SESSIONS = 14  # session uid -> [db, key]
    USES = 15  # snapshot id -> [decayed hits, Unix ms of the last use]


_U16 = struct.Struct(">H")
_U64 = struct.Struct(">Q")
_PLACE = struct.Struct(">QQ")
_END = struct.Struct(">16sI16s32s")


def u16(number: int) -> bytes:
    """Big-endian u16."""
    return _U16.pack(number)


def u64(number: int) -> bytes:
    """Big-endian u64."""
    return _U64.pack(number)


def from_u64(data: bytes) -> int:
    """Inverse of u64."""
    return int.from_bytes(data, "big")


def place_key(segment: int, offset: int) -> bytes:
    """Key of table PLACES."""
    return _PLACE.pack(segment, offset)


def from_place_key(data: bytes) -> tuple[int, int]:
    """(segment id, offset) of a key of table PLACES."""
    segment, offset = _PLACE.unpack(data)
    return segment, offset


def end_key(prefix: bytes, n_tail: int, tail_hash: bytes, snapshot_id: bytes) -> bytes:
    """Key of table ENDS."""
    return _END.pack(prefix, n_tail, tail_hash, snapshot_id)


def from_end_key(data: bytes) -> tuple[bytes, int, bytes, bytes]:
    """(prefix, tail tokens, tail hash, snapshot id) of a key of table ENDS."""
    prefix, n_tail, tail_hash, snapshot_id = _END.unpack(data)
    return prefix, n_tail, tail_hash, snapshot_id


class Txn:
    """A transaction with the tables at hand. Values returned are copies and outlive it."""

    def __init__(self, txn: lmdb.Transaction, tables: Sequence[Any]) -> None:
        # Any: py-lmdb types keys and values as bytes or memoryview, and without `buffers` they are bytes.
        self.raw: Any = txn
        self._tables = tables

    def get(self, table: Table, key: bytes) -> bytes | None:
        """The value of a key, or None."""
        value: bytes | None = self.raw.get(key, None, self._tables[table])
        return value

    def put(self, table: Table, key: bytes, value: bytes) -> None:
        """Set a key."""
        self.raw.put(key, value, db=self._tables[table])

    def delete(self, table: Table, key: bytes) -> bool:
        """Remove a key; False if it was not there."""
        return bool(self.raw.delete(key, db=self._tables[table]))

    def count(self, table: Table) -> int:
        """Number of keys in a table."""
        return int(self.raw.stat(self._tables[table])["entries"])

    def table_bytes(self, table: Table) -> int:
        """Bytes of the LMDB pages that a table occupies."""
        stat = self.raw.stat(self._tables[table])
        return int((stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"]) * stat["psize"])

    def first(self, table: Table, start: bytes) -> tuple[bytes, bytes] | None:
        """The first (key, value) at or after `start`."""
        with self.raw.cursor(self._tables[table]) as cursor:
            return cursor.item() if cursor.set_range(start) else None

    def last(self, table: Table) -> tuple[bytes, bytes] | None:
        """The last (key, value) of a table."""
        with self.raw.cursor(self._tables[table]) as cursor:
            return cursor.item() if cursor.last() else None

    def scan(self, table: Table, start: bytes = b"", prefix: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        """(key, value) in order, from `start` (or the prefix), while keys begin with `prefix`.

        The table must not be changed while the iterator is used.
        """
        with self.raw.cursor(self._tables[table]) as cursor:
            if not cursor.set_range(start or prefix):
                return
            for key, value in cursor:
                if not key.startswith(prefix):
                    return
                yield key, value

    def cursor(self, table: Table) -> Any:
        """A bare cursor, for loops that seek."""
        return self.raw.cursor(self._tables[table])

    # Typed access to the tables that most code uses.

    def meta(self, name: bytes, default: int = 0) -> int:
        """A counter in META."""
        value = self.get(Table.META, name)
        return default if value is None else int(msgpack.unpackb(value))

    def put_meta(self, name: bytes, value: int) -> None:
        """Set a counter in META."""
        self.put(Table.META, name, msgpack.packb(value))

    def page(self, page_id: bytes) -> PageRow | None:
        """A page's row."""
        value = self.get(Table.PAGES, page_id)
        return None if value is None else PageRow.decode(value)

    def put_page(self, page_id: bytes, row: PageRow) -> None:
        """Set a page's row."""
        self.put(Table.PAGES, page_id, pack(row))

    def snapshot(self, snapshot_id: bytes) -> SnapshotRow | None:
        """A snapshot's row."""
        value = self.get(Table.SNAPSHOTS, snapshot_id)
        return None if value is None else SnapshotRow.decode(value)

    def put_snapshot(self, snapshot_id: bytes, row: SnapshotRow) -> None:
        """Set a snapshot's row."""
        self.put(Table.SNAPSHOTS, snapshot_id, pack(row))

    def segment(self, segment_id: int) -> SegmentRow | None:
        """A segment's row."""
        value = self.get(Table.SEGMENTS, u64(segment_id))
        return None if value is None else SegmentRow.decode(value)

    def put_segment(self, segment_id: int, row: SegmentRow) -> None:
        """Set a segment's row."""
        self.put(Table.SEGMENTS, u64(segment_id), pack(row))

    def segments(self) -> dict[int, SegmentRow]:
        """Every segment's row."""
        return {from_u64(key): SegmentRow.decode(value) for key, value in self.scan(Table.SEGMENTS)}

    def model(self, fingerprint: bytes) -> ModelRow | None:
        """A model's row."""
        value = self.get(Table.MODELS, fingerprint)
        return None if value is None else ModelRow.decode(value)

    def models(self) -> dict[bytes, ModelRow]:
        """Every model's row by fingerprint."""
        return {key: ModelRow.decode(value) for key, value in self.scan(Table.MODELS)}


class Index:
    """The open LMDB environment."""

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        if read_only and not (path / "data.mdb").exists():
            raise KvdbError(f"{path} holds no index: not a kvdb data directory")
        path.mkdir(parents=True, exist_ok=True)
        self._env = _open_env(path, read_only)
        self.path = path
        try:
            self._tables = self._open_tables(read_only)
        except BaseException:
            self._env.close()
            raise

    def _open_tables(self, read_only: bool) -> list[Any]:
        names = [table.name.lower().encode() for table in Table]
        if not read_only:
            self._env.reader_check()  # slots of readers that were killed would keep old pages alive
            # Also on an old index: a table that a newer version of this program added is created empty. One
            # transaction for all: each commit waits for the disk twice.
            with self._env.begin(write=True) as txn:
                tables = [self._env.open_db(name, txn=txn) for name in names]
                if txn.get(b"format", db=tables[Table.META]) is None:
                    txn.put(b"format", msgpack.packb(FORMAT_VERSION), db=tables[Table.META])
        else:
            try:
                tables = [self._env.open_db(name, create=False) for name in names]
            except lmdb.NotFoundError as error:
                raise KvdbError(f"{self.path} is not a kvdb index: {error}") from error
        with self._env.begin(db=tables[Table.META]) as txn:
            found = msgpack.unpackb(txn.get(b"format") or b"\xc0")
        if found != FORMAT_VERSION:
            raise KvdbError(f"{self.path} has format {found}; this program reads format {FORMAT_VERSION}")
        return tables

    def begin(self) -> Txn:
        """A read transaction that the caller ends with `txn.raw.abort()`."""
        return Txn(self._env.begin(), self._tables)

    @contextmanager
    def read(self) -> Iterator[Txn]:
        """A short read transaction: a consistent view of the last commit."""
        with self._env.begin() as txn:
            yield Txn(txn, self._tables)

    def begin_write(self, parent: Txn | None = None) -> Txn:
        """A write transaction, or a child of one, that the caller commits or aborts through `txn.raw`."""
        return Txn(self._env.begin(write=True, parent=parent.raw if parent else None), self._tables)

    def copy(self, folder: Path) -> None:
        """Write the index as of the last commit to `folder`/data.mdb, without its free pages."""
        try:
            self._env.copy(str(folder), compact=True)
        except lmdb.Error as error:
            raise as_kvdb_error(error, "copy of the index") from error

    @property
    def file_bytes(self) -> int:
        """Length of the index file."""
        return (self.path / "data.mdb").stat().st_size

    def close(self) -> None:
        """Close the environment; no transaction may be open."""
        self._env.close()


def _open_env(path: Path, read_only: bool) -> lmdb.Environment:
    map_bytes = MAP_BYTES
    while True:
        try:
            return lmdb.open(
                str(path),
                map_size=map_bytes,
                max_dbs=len(Table) + 8,
                max_readers=512,
                readonly=read_only,
                create=not read_only,
                meminit=False,
                max_spare_txns=8,
            )
        except lmdb.MemoryError:
            # A machine with an address-space limit: a smaller map still holds a large index.
            if map_bytes < 1 << 30:
                raise
            map_bytes //= 4
        except lmdb.Error as error:
            raise KvdbError(f"cannot open the index {path}: {error}") from error
