"""Commits and frees snapshots and pages inside the committing transaction.

References: a snapshot counts the key entries that name it (and itself, if it is cached); a page counts its child
pages and the snapshots whose leaf it is. So the existence of a page implies that of its ancestors, and a commit has to
look only at the pages between the new leaf and the first one that exists.
"""

from __future__ import annotations

from kvdb.errors import KvdbError, SnapshotGoneError, StalePagesError, WrongModelError
from kvdb.store.index import Table, Txn, end_key, place_key
from kvdb.store.records import CommittedSnapshot, NewSnapshot, Usage, WrittenRecord
from kvdb.store.rows import ModelRow, PageRow, PlaceRow, RecordType, SnapshotRow, pack
from kvdb.store.work import Extent, Work
from kvdb_protocol.ids import ID_BYTES, NO_PAGE, extend_prefix, root_prefix
from kvdb_protocol.record import ALIGN, record_bytes


def check_written(new: NewSnapshot) -> int:
    """Refuse records outside their reservation; return the offset after the last one."""
    end = new.reservation.offset
    for record in sorted(new.written, key=lambda record: record.offset):
        if record.offset < end or record.offset % ALIGN or len(record.id) != ID_BYTES:
            raise KvdbError(f"record at {record.offset} of {new.reservation.path.name} overlaps or is not aligned")
        end = record.end
    return end


def commit_snapshot(txn: Txn, work: Work, new: NewSnapshot) -> CommittedSnapshot:
    """Make the snapshot and its pages exist. Records that turn out to be stored already are freed again.

    Raises StalePagesError when a page it needs is neither stored nor among the written, WrongModelError for a
    fingerprint that was never registered.
    """
    model = txn.model(new.fingerprint)
    if model is None:
        raise WrongModelError("the snapshot's model is not registered")
    segment = new.reservation.segment_id
    work.commit_up_to(segment, check_written(new), new.reservation.created_ms)
    pages = {record.id: record for record in new.written if record.type == RecordType.PAGE}
    row = txn.snapshot(new.id)
    if row is not None:
        work.freed += [Extent(segment, record.offset, record.end - record.offset) for record in new.written]
        if new.is_cached and not row.cached:
            txn.put_snapshot(new.id, row._replace(cached=True, refs=row.refs + 1))
        return CommittedSnapshot(new.id, 0, row.record_bytes + _chain_bytes(txn, row.leaf), 0, True)
    tail = next((record for record in new.written if record.type == RecordType.TAIL and record.id == new.id), None)
    if tail is None:
        raise KvdbError("the snapshot's tail is not among the written records")
    added = _add_pages(txn, work, new, pages, model)
    leaf = txn.page(new.leaf)
    prefix = leaf.prefix if leaf else root_prefix(model.family)
    first = leaf.first + leaf.n_tokens if leaf else 0
    if prefix != new.prefix or first + len(new.tail_ids) // 4 != new.n_tokens:
        raise KvdbError("the snapshot's prefix hash or token count does not fit its leaf page")
    parent = new.parent or b""
    tail_hash = extend_prefix(prefix, new.tail_ids)
    txn.put_snapshot(
        new.id,
        SnapshotRow(
            *(model.number, new.leaf, new.n_tokens, first, parent, int(new.reason), new.created_ms),
            *(segment, tail.offset, tail.payload_bytes, prefix, tail_hash, int(new.is_cached), new.is_cached),
        ),
    )
    txn.put(Table.ENDS, end_key(prefix, new.n_tokens - first, tail_hash, new.id), pack((model.number,)))
    if parent:
        txn.put(Table.CHILDREN, parent + new.id, b"")
    _put_record(txn, work, segment, tail)
    if not new.is_cached:
        # An entry of the same item will name it. Should that not happen, the sweep frees it.
        work.unreferenced.add(new.id)
    for record in new.written:
        if record is not tail and record.id not in added:
            work.freed.append(Extent(segment, record.offset, record.end - record.offset))
    bytes_new = record_bytes(tail.payload_bytes) + sum(record_bytes(pages[page].payload_bytes) for page in added)
    bytes_all = record_bytes(tail.payload_bytes) + (leaf.chain_bytes if leaf else 0)
    return CommittedSnapshot(new.id, bytes_new, bytes_all - bytes_new, len(added), False)


def _add_pages(
    txn: Txn, work: Work, new: NewSnapshot, pages: dict[bytes, WrittenRecord], model: ModelRow
) -> frozenset[bytes]:
    """Insert the missing pages of the chain that ends in new.leaf and ref its top; return the ids inserted."""
    missing: list[WrittenRecord] = []
    page_id = new.leaf
    base: PageRow | None = None
    while page_id != NO_PAGE and (base := txn.page(page_id)) is None:
        record = pages.get(page_id)
        if record is None:
            raise StalePagesError("a page that was stored has been freed meanwhile: write the snapshot again")
        missing.append(record)
        page_id = record.parent
    if base is not None:
        if base.model != model.number:
            raise WrongModelError("the snapshot's pages belong to another model")
        txn.put_page(page_id, base._replace(refs=base.refs + 1))
    prefix = base.prefix if base else root_prefix(model.family)
    position = base.first + base.n_tokens if base else 0
    chain_bytes = base.chain_bytes if base else 0
    for record in reversed(missing):
        if record.first != position or not record.n_tokens:
            raise KvdbError(f"page at {record.first} does not follow position {position}")
        position += record.n_tokens
        chain_bytes += record_bytes(record.payload_bytes)
        prefix = record.prefix
        place = (new.reservation.segment_id, record.offset, record.payload_bytes)
        span = (prefix, record.first, record.n_tokens)
        txn.put_page(record.id, PageRow(0, model.number, record.parent, *span, *place, 1, chain_bytes))
        txn.put(Table.PREFIXES, prefix + record.id, pack((model.number,)))
        _put_record(txn, work, new.reservation.segment_id, record)
    return frozenset(record.id for record in missing)


def usage(txn: Txn, snapshot_id: bytes) -> Usage:
    """A snapshot's own and shared bytes. Raises SnapshotGoneError."""
    row = txn.snapshot(snapshot_id)
    if row is None:
        raise SnapshotGoneError(f"there is no snapshot {snapshot_id.hex()}")
    leaf = page = txn.page(row.leaf)
    own = row.record_bytes
    # A page that something else refs, and so every ancestor of it, is shared: the walk ends at the first one.
    while page is not None and page.refs == 1:
        own += page.record_bytes
        page = txn.page(page.parent)
    total = row.record_bytes + (leaf.chain_bytes if leaf else 0)
    return Usage(row.first // leaf.n_tokens if leaf else 0, own, total - own)


def _put_record(txn: Txn, work: Work, segment: int, record: WrittenRecord) -> None:
    row = PlaceRow(int(record.type), record.id, record.payload_bytes)
    txn.put(Table.PLACES, place_key(segment, record.offset), pack(row))
    work.add_live(segment, row.record_bytes)


def _chain_bytes(txn: Txn, leaf: bytes) -> int:
    page = txn.page(leaf)
    return page.chain_bytes if page else 0


def ref_snapshot(txn: Txn, snapshot_id: bytes) -> bool:
    """Count one more reference; False if there is no such snapshot."""
    row = txn.snapshot(snapshot_id)
    if row is None:
        return False
    txn.put_snapshot(snapshot_id, row._replace(refs=row.refs + 1))
    return True


def unref_snapshot(txn: Txn, work: Work, snapshot_id: bytes) -> None:
    """Count one reference less. The sweep at the end of the round frees what nobody references then."""
    row = txn.snapshot(snapshot_id)
    if row is None:
        return
    txn.put_snapshot(snapshot_id, row._replace(refs=row.refs - 1))
    if row.refs <= 1:
        work.unreferenced.add(snapshot_id)


def uncache_snapshot(txn: Txn, work: Work, snapshot_id: bytes) -> bool:
    """Drop the reference that a cached snapshot holds to itself; False if it has none."""
    row = txn.snapshot(snapshot_id)
    if row is None or not row.cached:
        return False
    txn.put_snapshot(snapshot_id, row._replace(cached=False))
    unref_snapshot(txn, work, snapshot_id)
    return True


def free_snapshot(txn: Txn, work: Work, snapshot_id: bytes, row: SnapshotRow) -> None:
    """Remove a snapshot, and the pages that only it reached. What continued it now continues its parent."""
    txn.delete(Table.SNAPSHOTS, snapshot_id)
    txn.delete(Table.USES, snapshot_id)
    txn.delete(Table.ENDS, end_key(row.prefix, row.n_tokens - row.first, row.tail_hash, snapshot_id))
    if row.parent:
        txn.delete(Table.CHILDREN, row.parent + snapshot_id)
    for key, _ in list(txn.scan(Table.CHILDREN, prefix=snapshot_id)):
        txn.delete(Table.CHILDREN, key)
        child_id = key[len(snapshot_id) :]
        child = txn.snapshot(child_id)
        if child is not None:
            txn.put_snapshot(child_id, child._replace(parent=row.parent))
            if row.parent:
                txn.put(Table.CHILDREN, row.parent + child_id, b"")
    _drop_record(txn, work, row.segment, row.offset, row.record_bytes)
    page_id = row.leaf
    while page_id != NO_PAGE:
        page = txn.page(page_id)
        if page is None:
            return  # damage that kvdb-check reports; freeing the rest of this chain must not fail for it
        if page.refs > 1:
            txn.put_page(page_id, page._replace(refs=page.refs - 1))
            return
        txn.delete(Table.PAGES, page_id)
        txn.delete(Table.PREFIXES, page.prefix + page_id)
        _drop_record(txn, work, page.segment, page.offset, page.record_bytes)
        page_id = page.parent


def _drop_record(txn: Txn, work: Work, segment: int, offset: int, n_bytes: int) -> None:
    txn.delete(Table.PLACES, place_key(segment, offset))
    work.free(Extent(segment, offset, n_bytes))
