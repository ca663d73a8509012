"""The index: an LMDB environment, the only truth about what exists.

This file knows the tables and their keys; rows.py knows the values. Keys are sortable bytes: numbers are big-endian.
One thread writes (committer.py). LMDB commits are copy-on-write and synced, so the index is always at the state of
some whole commit.

Every value is followed by a crc32c (u32 little-endian) of the table's number, the key and the value; a row that fails
it is never used. A row whose key was hit is not found at all, and LMDB takes its own pages on trust: index_damage.py
accounts for every page and row before an index is served, and again in VERIFY. META "txn" names the last transaction
that changed anything; it must be the one of LMDB's meta page, whoever opens the index.
An index of format 1, which had neither, is rewritten when it is opened to be served and can be read without. Format 2
had no number of its own and no change log (change_log.py), which names that number: a copy has another.
"""

from __future__ import annotations

import logging
import os
import secrets
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from typing import Any

import lmdb
import msgpack
from fastcrc.crc32 import iscsi as crc32c

from kvdb.errors import CorruptError, KvdbError, MisconfError
from kvdb.store.errors import as_kvdb_error
from kvdb.store.gate import GIVEN_UP, Ended, Gate
from kvdb.store.index_pages import check_stamps
from kvdb.store.rows import ModelRow, PageRow, SegmentRow, SnapshotRow, pack
from kvdb_protocol.errors import FormatError

log = logging.getLogger("kvdb.store")

FORMAT_VERSION = 3
_WITHOUT_CHECKSUMS = 1
_WITHOUT_LOG = 2
# The file is sparse and grows with its content; the map only reserves addresses. Growing a map while readers are open
# is not allowed by LMDB, so it is taken large once.
MAP_BYTES = 1 << 40
STAMP = b"txn"
ID = b"id"
FORMAT_NAME = b"format"
_TRIES = 20
REOPEN_WAIT_S = 5.0  # how long a thread waits for an index that is opened again


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


CRC_BYTES = 4
TABLE_CRC = [crc32c(bytes([table])) for table in Table]


def seal(table: Table, key: bytes, value: bytes) -> bytes:
    """A value as it is stored."""
    crc = crc32c(value, crc32c(key, TABLE_CRC[table]))
    return value + crc.to_bytes(CRC_BYTES, "little")


def unseal(table: Table, key: bytes, stored: bytes) -> bytes:
    """Inverse of seal. Raises CorruptError."""
    value = stored[:-CRC_BYTES]
    if crc32c(value, crc32c(key, TABLE_CRC[table])) != int.from_bytes(stored[-CRC_BYTES:], "little"):
        raise CorruptError(f"a row of table {table.name.lower()} of the index fails its checksum: run kvdb-check")
    return value


class Txn:
    """A transaction with the tables at hand. Values returned are copies and outlive it.

    Reading a damaged row raises CorruptError; when `damaged` is a list, the row is added there and taken as missing,
    but for tables in `strict`: whoever changes a counter must know it.
    """

    def __init__(self, txn: lmdb.Transaction, tables: Sequence[Any], is_sealed: bool = True) -> None:
        # Any: py-lmdb types keys and values as bytes or memoryview, and without `buffers` they are bytes.
        self.raw: Any = txn
        self._tables = tables
        self._is_sealed = is_sealed
        self._changed = [False]  # shared with child transactions
        self.damaged: list[tuple[Table, bytes]] | None = None
        self.strict: frozenset[Table] = frozenset()
        self.check: Callable[[], None] | None = None  # called for each row of a scan: a long walk gives way

    def child(self, txn: lmdb.Transaction) -> Txn:
        """A transaction within this one."""
        made = Txn(txn, self._tables, self._is_sealed)
        made._changed, made.damaged, made.strict = self._changed, self.damaged, self.strict
        return made

    def get(self, table: Table, key: bytes) -> bytes | None:
        """The value of a key, or None."""
        stored: bytes | None = self.raw.get(key, None, self._tables[table])
        return None if stored is None else self.opened(table, key, stored)

    def opened(self, table: Table, key: bytes, stored: bytes) -> bytes | None:
        """A stored value, checked: for users of a bare cursor."""
        if not self._is_sealed:
            return stored
        try:
            return unseal(table, key, stored)
        except CorruptError:
            if self.damaged is None or table in self.strict:
                raise
            self.damaged.append((table, key))
            return None

    def has(self, table: Table, key: bytes) -> bool:
        """Whether there is such a row, damaged or not."""
        return self.raw.get(key, None, self._tables[table]) is not None

    def put(self, table: Table, key: bytes, value: bytes) -> None:
        """Set a key."""
        self._changed[0] = True
        self.raw.put(key, seal(table, key, value), db=self._tables[table])

    def delete(self, table: Table, key: bytes) -> bool:
        """Remove a key; False if it was not there."""
        self._changed[0] = True
        return bool(self.raw.delete(key, db=self._tables[table]))

    def touch(self) -> None:
        """Make this a transaction of its own, whatever it changes."""
        self._changed[0] = True

    def commit(self, through: Callable[[Callable[[], None]], None] | None = None) -> int | None:
        """Commit a write transaction; return its number, None if it changed nothing.

        through: what runs LMDB's commit (Files.commit).
        """
        stamp = int(self.raw.id()) if self._changed[0] else None
        if stamp is not None:
            self.put_meta(STAMP, stamp)
        if through is None:
            self.raw.commit()
        else:
            through(self.raw.commit)
        return stamp

    def count(self, table: Table) -> int:
        """Number of keys in a table."""
        return int(self.raw.stat(self._tables[table])["entries"])

    def table_bytes(self, table: Table) -> int:
        """Bytes of the LMDB pages that a table occupies."""
        stat = self.raw.stat(self._tables[table])
        return int((stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"]) * stat["psize"])

    def first(self, table: Table, start: bytes) -> tuple[bytes, bytes] | None:
        """The first (key, value) at or after `start`."""
        return next(self.scan(table, start), None)

    def before(self, table: Table, key: bytes) -> tuple[bytes, bytes] | None:
        """The last (key, value) before `key`."""
        with self.raw.cursor(self._tables[table]) as cursor:
            if not (cursor.prev() if cursor.set_range(key) else cursor.last()):
                return None
            value = self.opened(table, cursor.key(), cursor.value())
            return None if value is None else (cursor.key(), value)

    def last(self, table: Table) -> tuple[bytes, bytes] | None:
        """The last (key, value) of a table."""
        with self.raw.cursor(self._tables[table]) as cursor:
            if not cursor.last():
                return None
            value = self.opened(table, cursor.key(), cursor.value())
            return None if value is None else (cursor.key(), value)

    def scan(
        self, table: Table, start: bytes = b"", prefix: bytes = b"", *, damaged: bytes | None = None
    ) -> Iterator[tuple[bytes, bytes]]:
        """(key, value) in order, from `start` (or the prefix), while keys begin with `prefix`.

        The table must not be changed while the iterator is used. damaged: what to give for the value of a row that
        fails its checksum, instead of raising CorruptError.
        """
        with self.raw.cursor(self._tables[table]) as cursor:
            if not cursor.set_range(start or prefix):
                return
            for key, stored in cursor:
                if not key.startswith(prefix):
                    return
                if self.check is not None:
                    self.check()
                try:
                    value = self.opened(table, key, stored)
                except CorruptError:
                    if damaged is None:
                        raise
                    value = damaged
                if value is not None:
                    yield key, value

    def cursor(self, table: Table) -> Any:
        """A bare cursor, for loops that seek. Its values go through `opened`."""
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
    """The open LMDB environment.

    LMDB gives an environment up when writing a meta page fails. Then nothing begins any more until `renew` has opened
    it again; the view, which began before, still reads.
    """

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        if read_only and not (path / "data.mdb").exists():
            raise KvdbError(f"{path} holds no index: not a kvdb data directory")
        path.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._gate = Gate()
        self._view: Txn | None = None
        self._view_thread = 0
        self._newest = 0  # transaction that the view sees
        self._must_sync = False
        self._open(read_only)

    def _open(self, read_only: bool) -> None:
        self._check_metas(_TRIES if read_only else 1)
        self._env = _open_env(self.path, read_only)
        try:
            self._tables = self._open_tables(read_only)
        except BaseException:
            self._env.close()
            raise

    def _check_metas(self, tries: int) -> None:
        """Refuse an index whose meta pages are damaged: LMDB would serve an older state, or crash.

        Several tries where a daemon may write meanwhile.
        """
        try:
            fd = os.open(self.file, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        try:
            while os.fstat(fd).st_size:  # LMDB makes the file before it fills it
                try:
                    return check_stamps(lambda offset, n_bytes: os.pread(fd, n_bytes, offset), _stamp)
                except FormatError as error:
                    tries -= 1
                    if not tries:
                        message = f"the index {self.path} is damaged: {error}; go back to a backup"
                        raise CorruptError(message) from error
                time.sleep(0.01)
        finally:
            os.close(fd)

    def _open_tables(self, read_only: bool) -> list[Any]:
        names = [table.name.lower().encode() for table in Table]
        if not read_only:
            self._env.reader_check()  # slots of readers that were killed would keep old pages alive
            self._refuse_unknown(names)
            # Also on an old index: a table that a newer version of this program added is created empty. One
            # transaction for all: each commit waits for the disk twice.
            with self._env.begin(write=True) as raw:
                tables = [self._env.open_db(name, txn=raw) for name in names]
                found = _format(raw, tables)
                if found is None and any(raw.stat(table)["entries"] for table in tables):
                    raise CorruptError(f"the index {self.path} does not say its format: it is damaged")
                if found in (None, _WITHOUT_CHECKSUMS):
                    _add_checksums(raw, tables)
                if found in (None, _WITHOUT_CHECKSUMS, _WITHOUT_LOG):
                    _make_current(raw, tables)
        else:
            try:
                tables = [self._env.open_db(name, create=False) for name in names]
            except lmdb.NotFoundError as error:
                raise KvdbError(f"{self.path} is not a kvdb index: {error}") from error
        with self._env.begin() as raw:
            found = _format(raw, tables)
            self.id = Txn(raw, tables).meta(ID) if found == FORMAT_VERSION else 0
        if found not in (FORMAT_VERSION, _WITHOUT_LOG, _WITHOUT_CHECKSUMS):
            raise KvdbError(f"{self.path} has format {found}; this program reads formats up to {FORMAT_VERSION}")
        self._is_sealed = found != _WITHOUT_CHECKSUMS
        return tables

    def _refuse_unknown(self, names: Sequence[bytes]) -> None:
        with self._env.begin() as raw, raw.cursor() as cursor:
            unknown = [name for name in cursor.iternext(values=False) if name not in names]
        if unknown:
            raise CorruptError(
                f"the index {self.path} has a table {unknown[0]!r} that this program does not know: it is damaged, or "
                "of a newer version"
            )

    def begin(self) -> Txn:
        """The view: a read transaction that this thread keeps, and renews after each commit or ends by `raw.abort`."""
        view = Txn(self._env.begin(), self._tables, self._is_sealed)
        self._view, self._view_thread, self._newest = view, threading.get_ident(), view.raw.id()
        return view

    def renew(self, view: Txn) -> Txn:
        """A view of the newest commit in place of `view`. Between two rounds, in the thread of the view.

        An index that LMDB gave up is opened again. While some thread still reads it, `view` itself is returned: the
        next call tries again. Raises KvdbError if it cannot be opened; then `view` answers MISCONF to everything.
        """
        if not self.is_given_up():
            fresh = self.begin()
            view.raw.abort()
            return fresh
        if not self._gate.is_empty:
            return view
        view.raw.abort()
        self._env.close()
        try:
            self._open(read_only=False)
            if self._env.info()["last_txnid"] > self._newest:
                self._env.close()
                raise KvdbError("it holds a commit that was refused, and could not be taken back: restart the daemon")
        except (KvdbError, OSError, lmdb.Error) as error:
            message = f"the index cannot be opened again after a failed write: {as_kvdb_error(error, 'opening')}"
            view.raw = Ended(message)
            raise MisconfError(message) from error
        log.warning("the index was opened again after a failed write")
        self._must_sync = True
        fresh = self.begin()
        self._gate.open()
        return fresh

    def is_given_up(self) -> bool:
        """Whether LMDB gave the environment up and `renew` has not opened it again yet."""
        if not self._gate.is_shut:
            try:
                self._env.begin().abort()
            except lmdb.PanicError:
                self._gate.shut()
        return self._gate.is_shut

    def give_way(self) -> None:
        """For long walks, which a new environment would wait for: raises MisconfError once the index is given up."""
        self._gate.check()

    @contextmanager
    def read(self) -> Iterator[Txn]:
        """A short read transaction: a consistent view of the last commit. Raises MisconfError.

        While the index is given up, the thread of the view gets that, and others wait for some seconds.
        """
        raw = self._enter()
        if raw is None:
            assert self._view is not None
            yield Txn(self._view.raw, self._tables, self._is_sealed)
            return
        try:
            with raw:
                yield Txn(raw, self._tables, self._is_sealed)
        finally:
            self._gate.leave()

    def _enter(self) -> lmdb.Transaction | None:
        """A counted read transaction, or None where the view must do."""
        while True:
            has_view = self._view is not None and threading.get_ident() == self._view_thread
            if not self._gate.enter(0 if has_view else REOPEN_WAIT_S):
                if has_view:
                    return None
                raise MisconfError(GIVEN_UP)
            try:
                return self._env.begin()
            except lmdb.PanicError:
                self._gate.shut()
                self._gate.leave()
            except BaseException:
                self._gate.leave()
                raise

    def begin_write(self, parent: Txn | None = None) -> Txn:
        """A write transaction, ended by `commit` or `raw.abort`; or a child of one, ended through `raw`.

        It takes damaged rows as missing, so that one of them does not stop every later write. Nothing is freed for
        that: what such a row referred to stays until a repair. Raises MisconfError while the index is given up.
        """
        if parent is not None:
            return parent.child(self._env.begin(write=True, parent=parent.raw))
        self._gate.check()
        if self._must_sync:
            # LMDB took the failed commit's meta page back in the page cache only. Were it on the disk when this
            # transaction reuses that commit's pages, a power loss would leave a meta page that leads to other data.
            self._env.sync(True)
            self._must_sync = False
        txn = Txn(self._env.begin(write=True), self._tables)
        txn.damaged, txn.strict = [], frozenset({Table.META, Table.SEGMENTS, Table.PLACES})
        return txn

    def copy(self, folder: Path) -> None:
        """Write the index as of the last commit to `folder`/data.mdb, without its free pages."""
        try:
            with self.read():
                self._env.copy(str(folder), compact=True)
            # The copy counts transactions anew; what its two meta pages lead to must name these.
            with lmdb.open(str(folder), map_size=MAP_BYTES, max_dbs=1, lock=False) as env:
                meta = env.open_db(b"meta")
                for _ in range(2):
                    with env.begin(write=True) as raw:
                        for name, value in ((STAMP, raw.id()), (ID, new_id())):
                            raw.put(name, seal(Table.META, name, msgpack.packb(value)), db=meta)
        except lmdb.Error as error:
            raise as_kvdb_error(error, "copy of the index") from error

    @property
    def file(self) -> Path:
        """The file that holds it all."""
        return self.path / "data.mdb"

    @property
    def file_bytes(self) -> int:
        """Length of the index file."""
        return self.file.stat().st_size

    def close(self) -> None:
        """Close the environment; no transaction may be open."""
        self._env.close()


def _add_checksums(raw: lmdb.Transaction, tables: Sequence[Any]) -> None:
    """Give every row of an old index its checksum."""
    txn = Txn(raw, tables, is_sealed=False)
    for table in Table:
        for key, value in list(txn.scan(table)):
            txn.put(table, key, value)


def _make_current(raw: lmdb.Transaction, tables: Sequence[Any]) -> None:
    """Make a new index, or one of an older format whose rows have checksums, one of this format."""
    txn = Txn(raw, tables)
    txn.put_meta(ID, new_id())
    txn.put_meta(STAMP, raw.id())
    txn.put_meta(FORMAT_NAME, FORMAT_VERSION)


def new_id() -> int:
    """A number that no other index has."""
    return secrets.randbits(63) + 1


def _format(raw: lmdb.Transaction, tables: Sequence[Any]) -> int | None:
    """The index's format; None if it is new. Raises CorruptError."""
    stored = raw.get(FORMAT_NAME, db=tables[Table.META])
    if stored is None:
        return None
    value = (
        stored if len(stored) <= CRC_BYTES else unseal(Table.META, FORMAT_NAME, bytes(stored))
    )  # format 1 has no checksum
    return int(msgpack.unpackb(value))


def _stamp(key: bytes, stored: bytes) -> int | None:
    """The transaction that a row of META names (index_pages.check_stamps)."""
    if key != STAMP:
        return None
    try:
        return int(msgpack.unpackb(unseal(Table.META, key, stored)))
    except CorruptError as error:
        raise FormatError(str(error)) from error


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
        except lmdb.MemoryError as error:
            # A machine with an address-space limit: a smaller map still holds a large index.
            if map_bytes < 1 << 30:
                raise KvdbError(f"cannot map the index {path}: {error}") from error
            map_bytes //= 4
        except lmdb.Error as error:
            raise KvdbError(f"cannot open the index {path}: {error}") from error
