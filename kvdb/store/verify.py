"""Verification, shared by STORE VERIFY and kvdb-check: what is damaged, and which keys that hurts.

The tables are compared with each other in one short transaction (`load` and `check_index`); then records are read,
without any transaction, in the order in which they lie. A record that was freed while it was being read is not damage,
so whatever fails is looked up again before it is reported.

Primary facts are the rows of PAGES, SNAPSHOTS, KEYS, MODELS, JOURNAL and the records; every other table follows from
them, and `repair.py` can rebuild it.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import msgpack

from kvdb.errors import CorruptError, KvdbError
from kvdb.store.entries import (
    DATABASES,
    Entry,
    SessionValue,
    StringRef,
    decode_entry,
    decode_key,
    name_db,
    referenced_snapshot,
)
from kvdb.store.entry_writes import names_key
from kvdb.store.files import Files
from kvdb.store.index import Index, Table, Txn, end_key, from_place_key, from_u64, place_key, u64
from kvdb.store.index_damage import read_checked
from kvdb.store.read import Reader, RecordPlace, page_place, tail_place
from kvdb.store.rows import ModelRow, PageRow, PlaceRow, RecordType, SegmentRow, SnapshotRow, pack_string_place
from kvdb.store.segments import segment_name
from kvdb.store.strings import check_string, string_place
from kvdb.store.work import size_name
from kvdb_protocol.errors import FormatError
from kvdb_protocol.ids import NO_PAGE, extend_prefix, root_prefix
from kvdb_protocol.layout import Layout
from kvdb_protocol.page import decode_page
from kvdb_protocol.record import SEGMENT_HEADER_BYTES, decode_segment_header
from kvdb_protocol.tail import decode_tail

Name = tuple[int, bytes]  # (database, key)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong. kind: record, segment or index. id: of the damaged page or snapshot, name key of the
    damaged large string, or empty.

    keys: (database, key) of the entries whose state can no longer be read because of it.
    """

    kind: str
    message: str
    id: bytes = b""
    keys: tuple[Name, ...] = ()


@dataclass(slots=True)
class Contents:
    """The rows that describe stored states, loaded at one moment."""

    models: dict[int, tuple[bytes, ModelRow]]
    segments: dict[int, SegmentRow]
    pages: dict[bytes, PageRow]
    snapshots: dict[bytes, SnapshotRow]
    named_by: dict[bytes, list[Name]] = field(default_factory=lambda: defaultdict(list))
    strings: dict[bytes, tuple[Name, StringRef]] = field(default_factory=dict)  # large ones, by name key

    def keys_hurt_by(self, damaged: bytes) -> tuple[Name, ...]:
        """The keys whose snapshots need a page or are this snapshot."""
        return tuple(sorted(name for snapshot in self.hurt_by({damaged}) for name in self.named_by.get(snapshot, ())))

    def hurt_by(self, damaged: set[bytes]) -> set[bytes]:
        """The snapshots that are damaged or stand on a damaged page."""
        is_bad: dict[bytes, bool] = {NO_PAGE: False}
        hurt = set()
        for snapshot_id, row in self.snapshots.items():
            path = []
            page_id = row.leaf
            while page_id not in is_bad:
                path.append(page_id)
                page = self.pages.get(page_id)
                if page is None or page_id in damaged:
                    is_bad[page_id] = True
                    break
                page_id = page.parent
            verdict = is_bad[page_id]
            is_bad.update(dict.fromkeys(path, verdict))
            if verdict or snapshot_id in damaged:
                hurt.add(snapshot_id)
        return hurt


def load(txn: Txn) -> Contents:
    """Read the rows of one transaction into memory."""
    contents = Contents(
        models={row.number: (fingerprint, row) for fingerprint, row in txn.models().items()},
        segments=txn.segments(),
        pages={key: PageRow.decode(value) for key, value in txn.scan(Table.PAGES)},
        snapshots={key: SnapshotRow.decode(value) for key, value in txn.scan(Table.SNAPSHOTS)},
    )
    for name, data in txn.scan(Table.KEYS):
        try:
            entry = decode_entry(data)
        except (FormatError, ValueError, TypeError):
            continue  # check_index reports it
        snapshot_id = referenced_snapshot(entry)
        if isinstance(entry.value, StringRef):
            contents.strings[name] = ((name_db(name), decode_key(name, data)), entry.value)
        if snapshot_id is not None:
            contents.named_by[snapshot_id].append((name_db(name), decode_key(name, data)))
    return contents


def verify(
    index: Index,
    folder: Path,
    files: Files,
    *,
    deep: bool,
    bytes_per_s: float = 0.0,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Finding]:
    """Everything that is wrong in a data directory.

    folder: of the segments. deep: also read every payload, compare checksums, ids, prefix hashes and sections.
    bytes_per_s: reading rate, 0 for as fast as possible. progress: called with (bytes done, bytes in all).
    """
    with ExitStack() as reading:
        try:
            txn, damaged = reading.enter_context(read_checked(index, index.give_way))
        except CorruptError as error:
            # LMDB would follow the damage anywhere, out of the file too: no row can be asked for.
            yield Finding("index", str(error))
            return
        txn.damaged = []  # rows that fail their checksum are taken as missing
        txn.check = index.give_way
        contents = load(txn)
        findings = list(check_index(txn, contents))
        findings += [
            Finding("index", f"a row of table {table.name.lower()} fails its checksum: {key.hex()}")
            for table, key in sorted(damaged)
        ]
    yield from findings
    for segment_id, row in contents.segments.items():
        problem = _check_segment(folder, files, segment_id, row)
        if problem and _still(index, partial(_has_segment, segment_id)):
            yield Finding("segment", problem)
    yield from _check_records(index, contents, folder, files, deep, bytes_per_s, progress)


def _still(index: Index, exists: Callable[[Txn], bool]) -> bool:
    with index.read() as txn:
        return exists(txn)


def _check_segment(folder: Path, files: Files, segment_id: int, row: SegmentRow) -> str:
    """What is wrong with a segment's file, or nothing."""
    name = segment_name(segment_id)
    try:
        fd = files.open(folder / name, write=False)
    except FileNotFoundError:
        return f"segment {name} is missing"
    except OSError as error:
        return f"segment {name} cannot be opened: {error.strerror}"
    try:
        head = bytearray(SEGMENT_HEADER_BYTES)
        got = files.read_into(fd, head, 0)
        if (size := files.size(fd)) < row.committed:
            return f"segment {name} has {size} of {row.committed} bytes"
        found_id, _ = decode_segment_header(memoryview(head)[:got])
        if found_id != segment_id:
            return f"segment {name} says it is segment {found_id}"
    except FormatError as error:
        return f"segment {name}: {error}"
    except OSError as error:
        return f"segment {name} cannot be read: {error.strerror}"
    finally:
        files.close(fd)
    return ""


def _check_records(
    index: Index,
    contents: Contents,
    folder: Path,
    files: Files,
    deep: bool,
    bytes_per_s: float,
    progress: Callable[[int, int], None] | None,
) -> Iterator[Finding]:
    places = [page_place(folder, page_id, row) for page_id, row in contents.pages.items()]
    places += [tail_place(folder, snapshot_id, row) for snapshot_id, row in contents.snapshots.items()]
    owners: defaultdict[RecordPlace, list[bytes]] = defaultdict(list)
    for name, (_, ref) in contents.strings.items():
        owners[string_place(folder, ref)].append(name)
    places += owners
    places.sort(key=lambda place: (place.segment_id, place.offset))
    total, done, began = sum(place.record_bytes for place in places), 0, time.monotonic()
    with Reader(files) as reader:
        for place in places:
            try:
                if not deep:
                    reader.header(place)
                elif place in owners:
                    check_string(reader, place)
                else:
                    _check_record(reader, contents, place)
            except KvdbError as error:
                if place in owners:
                    for name in owners[place]:
                        if _still(index, partial(_has_string, name, contents.strings[name][1])):
                            yield Finding("record", str(error), name, (contents.strings[name][0],))
                elif _still(index, partial(_is_there, place)):
                    yield Finding("record", str(error), place.id, contents.keys_hurt_by(place.id))
            done += place.record_bytes
            if progress is not None:
                progress(done, total)
            if bytes_per_s and deep and (ahead := done / bytes_per_s - (time.monotonic() - began)) > 0:
                time.sleep(ahead)


def _has_segment(segment_id: int, txn: Txn) -> bool:
    return txn.segment(segment_id) is not None


def _has_string(name: bytes, ref: StringRef, txn: Txn) -> bool:
    data = txn.get(Table.KEYS, name)
    return data is not None and decode_entry(data).value == ref


def _is_there(place: RecordPlace, txn: Txn) -> bool:
    row = txn.page(place.id) if place.type == RecordType.PAGE else txn.snapshot(place.id)
    return row is not None and (row.segment, row.offset) == (place.segment_id, place.offset)


def _check_record(reader: Reader, contents: Contents, place: RecordPlace) -> None:
    """Read a record whole and compare it with its row. Raises CorruptError."""
    payload = reader.verified_payload(place)
    row: PageRow | SnapshotRow
    row = contents.pages[place.id] if place.type == RecordType.PAGE else contents.snapshots[place.id]
    if row.model not in contents.models:
        return  # check_index reports it
    fingerprint, model = contents.models[row.model]
    layout = Layout.from_bytes(model.layout)
    try:
        if isinstance(row, PageRow):
            page = decode_page(layout, payload)
            parent = contents.pages.get(row.parent)
            before = parent.prefix if parent else root_prefix(model.family)
            facts = (page.fingerprint, page.parent, page.first, page.n_tokens, extend_prefix(before, page.ids))
            expected = (fingerprint, row.parent, row.first, row.n_tokens, row.prefix)
        else:
            tail = decode_tail(layout, payload)
            facts = (tail.fingerprint, tail.leaf, tail.first, tail.n_tokens, extend_prefix(row.prefix, tail.ids))
            expected = (fingerprint, row.leaf, row.first, row.n_tokens, row.tail_hash)
    except FormatError as error:
        raise CorruptError(f"{place.words}: {error}") from error
    if facts != expected:
        raise CorruptError(f"{place.words}: the record and its row in the index disagree")


# The tables against each other


def check_index(txn: Txn, contents: Contents) -> Iterator[Finding]:
    """What the tables say of each other that is not so."""
    yield from _check_pages(contents)
    yield from _check_snapshots(contents)
    yield from _check_refs(txn, contents)
    yield from _check_derived(txn, contents)
    yield from _check_keys(txn, contents)


def _index(message: str, contents: Contents | None = None, damaged: bytes = b"") -> Finding:
    return Finding("index", message, damaged, contents.keys_hurt_by(damaged) if contents and damaged else ())


def _check_pages(contents: Contents) -> Iterator[Finding]:
    for page_id, row in contents.pages.items():
        what = f"page {page_id[:8].hex()}"
        if row.model not in contents.models:
            yield _index(f"{what}: model number {row.model} is not registered", contents, page_id)
        parent = contents.pages.get(row.parent)
        if parent is None and row.parent != NO_PAGE:
            yield _index(f"{what}: its parent {row.parent[:8].hex()} does not exist", contents, page_id)
            continue
        first = parent.first + parent.n_tokens if parent else 0
        if row.first != first:
            yield _index(f"{what}: begins at {row.first}, its parent ends at {first}", contents, page_id)
        if row.chain_bytes != row.record_bytes + (parent.chain_bytes if parent else 0):
            yield _index(f"{what}: its sum of bytes is wrong")


def _check_snapshots(contents: Contents) -> Iterator[Finding]:
    for snapshot_id, row in contents.snapshots.items():
        what = f"snapshot {snapshot_id[:8].hex()}"
        if row.model not in contents.models:
            yield _index(f"{what}: model number {row.model} is not registered", contents, snapshot_id)
            continue
        leaf = contents.pages.get(row.leaf)
        if leaf is None and row.leaf != NO_PAGE:
            yield _index(f"{what}: its leaf page {row.leaf[:8].hex()} does not exist", contents, snapshot_id)
            continue
        prefix = leaf.prefix if leaf else root_prefix(contents.models[row.model][1].family)
        first = leaf.first + leaf.n_tokens if leaf else 0
        if (row.prefix, row.first) != (prefix, first) or row.n_tokens < first:
            yield _index(f"{what}: does not fit its leaf page", contents, snapshot_id)


def count_refs(contents: Contents) -> tuple[Counter[bytes], Counter[bytes]]:
    """References that pages and snapshots should have."""
    pages: Counter[bytes] = Counter(row.parent for row in contents.pages.values())
    pages.update(row.leaf for row in contents.snapshots.values())
    snapshots: Counter[bytes] = Counter({key: len(names) for key, names in contents.named_by.items()})
    snapshots.update(key for key, row in contents.snapshots.items() if row.cached)
    return pages, snapshots


def _check_refs(txn: Txn, contents: Contents) -> Iterator[Finding]:
    pages, snapshots = count_refs(contents)
    pending = {key for key, _ in txn.scan(Table.PENDING)}
    for page_id, row in contents.pages.items():
        if row.refs != pages[page_id] or not row.refs:
            yield _index(f"page {page_id[:8].hex()}: {row.refs} references counted, {pages[page_id]} found")
    for snapshot_id, snapshot in contents.snapshots.items():
        found = snapshots[snapshot_id]
        if snapshot.refs != found or (not found and snapshot_id not in pending):
            yield _index(f"snapshot {snapshot_id[:8].hex()}: {snapshot.refs} references counted, {found} found")


def derived_rows(contents: Contents) -> dict[Table, dict[bytes, bytes]]:
    """What tables PREFIXES, ENDS, CHILDREN and PLACES should hold."""
    prefixes, ends, children, places = {}, {}, {}, {}
    for page_id, row in contents.pages.items():
        prefixes[row.prefix + page_id] = msgpack.packb([row.model])
        places[place_key(row.segment, row.offset)] = msgpack.packb([int(RecordType.PAGE), page_id, row.payload_bytes])
    for snapshot_id, snapshot in contents.snapshots.items():
        n_tail = snapshot.n_tokens - snapshot.first
        ends[end_key(snapshot.prefix, n_tail, snapshot.tail_hash, snapshot_id)] = msgpack.packb([snapshot.model])
        if snapshot.parent:
            children[snapshot.parent + snapshot_id] = b""
        row_bytes = msgpack.packb([int(RecordType.TAIL), snapshot_id, snapshot.payload_bytes])
        places[place_key(snapshot.segment, snapshot.offset)] = row_bytes
    names: defaultdict[StringRef, list[bytes]] = defaultdict(list)
    for name, (_, ref) in contents.strings.items():
        names[ref].append(name)
    for ref, sharing in names.items():
        places[place_key(ref.segment, ref.offset)] = pack_string_place(sharing, ref.n_bytes)
    return {Table.PREFIXES: prefixes, Table.ENDS: ends, Table.CHILDREN: children, Table.PLACES: places}


def live_bytes(places: Mapping[bytes, bytes]) -> Counter[int]:
    """Live bytes by segment, from rows of PLACES."""
    live: Counter[int] = Counter()
    for key, value in places.items():
        live[from_place_key(key)[0]] += PlaceRow.decode(value).record_bytes
    return live


def _check_derived(txn: Txn, contents: Contents) -> Iterator[Finding]:
    expected = derived_rows(contents)
    for table, rows in expected.items():
        found = dict(txn.scan(table))
        if found != rows:
            wrong = len({*found.items()} ^ {*rows.items()})
            yield _index(f"table {table.name.lower()}: {wrong} rows are missing, left over or wrong")
    if stray := [key for key, _ in txn.scan(Table.USES) if key not in contents.snapshots]:
        yield _index(f"table uses: {len(stray)} rows are left over")
    live = live_bytes(expected[Table.PLACES])
    for segment_id, row in contents.segments.items():
        if row.live != live[segment_id]:
            name = segment_name(segment_id)
            yield _index(f"segment {name}: {row.live} live bytes counted, {live[segment_id]} found")
    for segment_id in live.keys() - contents.segments.keys():
        yield _index(f"records lie in segment {segment_name(segment_id)}, which the index does not know")
    end: tuple[int, int] = (0, 0)
    for key in sorted(expected[Table.PLACES]):
        segment_id, offset = from_place_key(key)
        if end[0] == segment_id and offset < end[1]:
            yield _index(f"records overlap in segment {segment_name(segment_id)} at {offset}")
        end = (segment_id, offset + PlaceRow.decode(expected[Table.PLACES][key]).record_bytes)
        if segment_id in contents.segments and end[1] > contents.segments[segment_id].committed:
            yield _index(f"a record in segment {segment_name(segment_id)} at {offset} ends past the committed length")


@dataclass(slots=True)
class KeyRows:
    """What follows from the rows of KEYS, and what is wrong with those rows."""

    expires: dict[bytes, bytes] = field(default_factory=dict)
    names: dict[bytes, bytes] = field(default_factory=dict)
    sessions: dict[bytes, bytes] = field(default_factory=dict)
    bases: dict[bytes, int] = field(default_factory=dict)  # session uid -> tokens that its base holds
    sizes: Counter[int] = field(default_factory=Counter)
    broken: dict[bytes, str] = field(default_factory=dict)  # name key -> what is wrong


def key_rows(txn: Txn, contents: Contents) -> KeyRows:
    """Walk KEYS."""
    found = KeyRows()
    for name, data in txn.scan(Table.KEYS):
        db = name_db(name)
        found.sizes[db] += 1
        try:
            entry, key = decode_entry(data), decode_key(name, data)
        except (FormatError, ValueError, TypeError, IndexError) as error:
            found.broken[name] = f"an entry of database {db} cannot be decoded: {error}"
            continue
        _follow(found, contents, name, db, key, entry)
    return found


def _follow(found: KeyRows, contents: Contents, name: bytes, db: int, key: bytes, entry: Entry) -> None:
    if entry.expire_ms:
        found.expires[u64(entry.expire_ms) + name] = b""
    snapshot_id = referenced_snapshot(entry)
    if snapshot_id is not None:
        if snapshot_id not in contents.snapshots:
            found.broken[name] = f"key {key!r} of database {db} names a snapshot that does not exist"
        else:
            found.names[names_key(snapshot_id, name)] = msgpack.packb([db, key])
    if isinstance(entry.value, SessionValue):
        found.sessions[entry.value.uid] = msgpack.packb([db, key])
        found.bases[entry.value.uid] = entry.value.base_tokens


def _check_keys(txn: Txn, contents: Contents) -> Iterator[Finding]:
    rows = key_rows(txn, contents)
    for message in rows.broken.values():
        yield _index(message)
    for table, expected in ((Table.EXPIRES, rows.expires), (Table.NAMES, rows.names), (Table.SESSIONS, rows.sessions)):
        found = dict(txn.scan(table))
        if found != expected:
            wrong = len({*found.items()} ^ {*expected.items()})
            yield _index(f"table {table.name.lower()}: {wrong} rows are missing, left over or wrong")
    for db in range(DATABASES):
        if txn.meta(size_name(db)) != rows.sizes[db]:
            yield _index(f"database {db}: {txn.meta(size_name(db))} keys counted, {rows.sizes[db]} found")
    end: tuple[bytes, int] = (b"", 0)
    for key, ids in txn.scan(Table.JOURNAL):
        uid, first = key[:-8], from_u64(key[-8:])
        if uid not in rows.sessions:
            yield _index(f"the journal of session {uid.hex()} belongs to no key")
        elif end[0] == uid and end[1] != first:
            yield _index(f"the journal of session {uid.hex()} has a gap at position {end[1]}")
        end = (uid, first + len(ids) // 4)
