"""Repair: drop what is damaged, keep the rest, say what was dropped.

Damaged records take with them the snapshots that need them, and the keys that name those. Then every table that
follows from others is rebuilt from what is left. All of it is one transaction: an interrupted repair changes nothing.
Runs without a daemon, on the locked directory.
"""

from __future__ import annotations

from collections.abc import Collection

import msgpack

from kvdb.errors import KvdbError
from kvdb.store.entries import DATABASES, Entry, decode_entry, decode_key, name_db, referenced_snapshot
from kvdb.store.holds import Holds, sweep
from kvdb.store.index import Index, Table, Txn, from_place_key, from_u64, u64
from kvdb.store.logged import Logged
from kvdb.store.rows import PlaceRow, SegmentRow
from kvdb.store.segments import segment_name
from kvdb.store.verify import Contents, KeyRows, count_refs, derived_rows, key_rows, live_bytes, load
from kvdb.store.work import Work, settle, size_name
from kvdb_protocol.errors import FormatError
from kvdb_protocol.ids import NO_PAGE
from kvdb_protocol.record import record_bytes


def repair(index: Index, damaged: Collection[bytes], logged: Logged) -> list[str]:
    """Drop damaged pages and snapshots (by id) and all that needs them; return what was done, in words.

    logged: what the change log has; it is void afterwards.
    """
    txn = index.begin_write()
    try:
        said = _drop_damaged_rows(txn)
        said += _apply_logged(index, txn, logged)
        said += _repair(txn, set(damaged))
    except BaseException:
        txn.raw.abort()
        raise
    txn.commit()
    return said


def take_logged(index: Index, logged: Logged) -> bool:
    """Commit what the change log has; False if the index is too damaged for it."""
    txn = index.begin_write()
    try:
        is_taken = not _apply_logged(index, txn, logged)
    except BaseException:
        txn.raw.abort()
        raise
    if is_taken:
        txn.commit()
    else:
        txn.raw.abort()
    return is_taken


def _apply_logged(index: Index, txn: Txn, logged: Logged) -> list[str]:
    said = []
    txn.touch()  # the log is void then, whatever the changes come to
    for number, layer in enumerate(logged.layers):
        child = index.begin_write(txn)
        work = Work()
        try:
            layer.apply(child, work, {})
            for segment, end in logged.ends[number].items():
                work.commit_up_to(segment, *end)
            sweep(child, work, Holds())
            settle(child, work, ())
            child.raw.commit()
        except (KvdbError, ValueError, TypeError) as error:
            child.raw.abort()
            said.append(f"dropped {len(logged.layers) - number} changes of the change log: {error}")
            break
    return said


def _repair(txn: Txn, damaged: set[bytes]) -> list[str]:
    contents = load(txn)
    damaged |= {page_id for page_id, row in contents.pages.items() if row.model not in contents.models}
    damaged |= {key for key, row in contents.snapshots.items() if row.model not in contents.models}
    damaged |= _outside(contents)
    lost = contents.hurt_by(damaged)
    said = _drop_keys(txn, lost | damaged, contents)
    for snapshot_id in sorted(lost):
        row = contents.snapshots.pop(snapshot_id)
        txn.delete(Table.SNAPSHOTS, snapshot_id)
        said.append(f"dropped snapshot {snapshot_id[:8].hex()} of {row.n_tokens} tokens")
    # The keys were dropped in this transaction: count again who names what.
    left = load(txn)
    contents.named_by, contents.strings = left.named_by, left.strings
    _rebuild(txn, contents, said)
    return said


def _drop_damaged_rows(txn: Txn) -> list[str]:
    """Rows that fail their checksum. What they said follows from others, or is lost."""
    rows: list[tuple[Table, bytes]] = []
    txn.damaged, txn.strict = rows, frozenset()
    for table in Table:
        for _ in txn.scan(table):
            pass
    found = set(rows)
    txn.damaged = None
    for table, key in found:
        txn.delete(table, key)
    said = [f"dropped a row of table {table.name.lower()} that failed its checksum" for table, _ in sorted(found)]
    if any(table is Table.SEGMENTS for table, _ in found):
        _restore_segments(txn)
    if any(table is Table.META for table, _ in found):
        txn.put_meta(b"next_model", 1 + max((row.number for row in txn.models().values()), default=0))
        txn.put_meta(b"next_segment", 1 + max(txn.segments(), default=0))
    return said


def _restore_segments(txn: Txn) -> None:
    """Rows of segments that live records lie in: they end where the last of these does."""
    ends: dict[int, tuple[int, int]] = {}
    for key, value in txn.scan(Table.PLACES):
        segment_id, offset = from_place_key(key)
        n_bytes = PlaceRow.decode(value).record_bytes
        _, live = ends.get(segment_id, (0, 0))
        ends[segment_id] = (offset + n_bytes, live + n_bytes)
    for segment_id, (end, live) in ends.items():
        if txn.segment(segment_id) is None:
            txn.put_segment(segment_id, SegmentRow(0, end, live, untidy=True))


def _outside(contents: Contents) -> set[bytes]:
    """Records in segments that do not exist or past their committed length."""

    def is_outside(segment: int, end: int) -> bool:
        return segment not in contents.segments or end > contents.segments[segment].committed

    return {
        record_id
        for rows in (contents.pages, contents.snapshots)
        for record_id, row in rows.items()
        if is_outside(row.segment, row.offset + row.record_bytes)
    } | {
        name
        for name, (_, ref) in contents.strings.items()
        if is_outside(ref.segment, ref.offset + record_bytes(ref.n_bytes))
    }


def _drop_keys(txn: Txn, lost: Collection[bytes], contents: Contents) -> list[str]:
    said = []
    for name, data in list(txn.scan(Table.KEYS)):
        why = _why_dropped(name, data, lost, contents)
        if why:
            txn.delete(Table.KEYS, name)
            said.append(why)
    return said


def _why_dropped(name: bytes, data: bytes, lost: Collection[bytes], contents: Contents) -> str:
    db = name_db(name)
    try:
        entry: Entry = decode_entry(data)
        key = decode_key(name, data)
    except (FormatError, ValueError, TypeError, IndexError) as error:
        return f"dropped an entry of database {db} that cannot be decoded: {error}"
    if name in lost:
        return f"dropped key {key!r} of database {db}: its record is damaged"
    snapshot_id = referenced_snapshot(entry)
    if snapshot_id is not None and (snapshot_id in lost or snapshot_id not in contents.snapshots):
        return f"dropped key {key!r} of database {db}: its snapshot {snapshot_id[:8].hex()} is lost"
    return ""


def _rebuild(txn: Txn, contents: Contents, said: list[str]) -> None:
    _keep_reached(txn, contents, said)
    page_refs, snapshot_refs = count_refs(contents)
    chain: dict[bytes, int] = {NO_PAGE: 0}
    for page_id, page in sorted(contents.pages.items(), key=lambda item: item[1].first):
        chain[page_id] = chain[page.parent] + page.record_bytes
        right = page._replace(refs=page_refs[page_id], chain_bytes=chain[page_id])
        if right != page:
            contents.pages[page_id] = right
            txn.put_page(page_id, right)
            said.append(f"recounted page {page_id[:8].hex()}")
    for snapshot_id, row in contents.snapshots.items():
        if row.refs != snapshot_refs[snapshot_id]:
            txn.put_snapshot(snapshot_id, row._replace(refs=snapshot_refs[snapshot_id]))
            said.append(f"recounted snapshot {snapshot_id[:8].hex()}")
    tables = derived_rows(contents)
    keys = key_rows(txn, contents)
    tables |= {Table.EXPIRES: keys.expires, Table.NAMES: keys.names, Table.SESSIONS: keys.sessions, Table.PENDING: {}}
    tables[Table.USES] = {key: value for key, value in txn.scan(Table.USES) if key in contents.snapshots}
    for table, rows in tables.items():
        _replace(txn, table, rows, said)
    for db in range(DATABASES):
        if txn.meta(size_name(db)) != keys.sizes[db]:
            txn.put_meta(size_name(db), keys.sizes[db])
            said.append(f"recounted the keys of database {db}")
    _cut_journals(txn, keys, said)
    live = live_bytes(tables[Table.PLACES])
    for segment_id, segment in contents.segments.items():
        if live[segment_id]:
            if segment.live != live[segment_id]:
                # Untidy: the next start gives the blocks of what was dropped back.
                txn.put_segment(segment_id, segment._replace(live=live[segment_id], untidy=True))
                said.append(f"recounted segment {segment_name(segment_id)}")
        else:
            # The next start removes its file, as of any segment that the index does not know.
            txn.delete(Table.SEGMENTS, u64(segment_id))
            said.append(f"dropped segment {segment_name(segment_id)}: nothing in it is left")


def _cut_journals(txn: Txn, keys: KeyRows, said: list[str]) -> None:
    """A journal ends where a row is missing; one that no key names goes."""
    reached, cut = dict(keys.bases), set()
    for row, ids in list(txn.scan(Table.JOURNAL)):
        uid, first = row[:-8], from_u64(row[-8:])
        if uid not in reached:
            txn.delete(Table.JOURNAL, row)
            said.append(f"dropped the journal of session {uid.hex()} at {first}: no key names it")
        elif first > reached[uid]:
            txn.delete(Table.JOURNAL, row)
            cut.add(uid)
        else:
            reached[uid] = max(reached[uid], first + len(ids) // 4)
    for uid in sorted(cut):
        db, key = msgpack.unpackb(keys.sessions[uid])
        said.append(f"cut session {key!r} of database {db} to {reached[uid]} tokens: what its journal had next is lost")


def _keep_reached(txn: Txn, contents: Contents, said: list[str]) -> None:
    """Drop snapshots nobody names and pages no snapshot reaches."""
    for snapshot_id, row in list(contents.snapshots.items()):
        if not row.cached and not contents.named_by.get(snapshot_id):
            del contents.snapshots[snapshot_id]
            txn.delete(Table.SNAPSHOTS, snapshot_id)
            said.append(f"dropped snapshot {snapshot_id[:8].hex()}: no key names it")
    reached: set[bytes] = {NO_PAGE}
    for row in contents.snapshots.values():
        page_id = row.leaf
        while page_id not in reached:
            reached.add(page_id)
            page_id = contents.pages[page_id].parent
    for page_id in list(contents.pages):
        if page_id not in reached:
            del contents.pages[page_id]
            txn.delete(Table.PAGES, page_id)
            said.append(f"dropped page {page_id[:8].hex()}: no snapshot needs it")


def _replace(txn: Txn, table: Table, rows: dict[bytes, bytes], said: list[str]) -> None:
    found = dict(txn.scan(table))
    if found == rows:
        return
    for key in found.keys() - rows.keys():
        txn.delete(table, key)
    for key, value in rows.items():
        if found.get(key) != value:
            txn.put(table, key, value)
    said.append(f"rebuilt table {table.name.lower()}")
