"""States without a model: records with valid framing whose rows are a function of the tokens before them."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from blake3 import blake3

from kvdb.store.entries import Entry, EntryType, HeldString, SnapshotValue, StringRef
from kvdb.store.records import CommittedSnapshot, ModelRecord, NewSnapshot, WrittenRecord
from kvdb.store.rows import Reason
from kvdb.store.store import Store
from kvdb_protocol.ids import NO_PAGE, Buffer, content_id, extend_prefix, root_prefix
from kvdb_protocol.layout import Layout, Section, make_layout
from kvdb_protocol.page import Page, encode_page
from kvdb_protocol.record import RecordType, padding, record_bytes
from kvdb_protocol.sections import PackedSection
from kvdb_protocol.tail import Tail, encode_tail, state_header, tail_header

LAYOUT = make_layout(
    vocab=64,
    context=1 << 20,
    window=128,
    head_dim=96,
    rope_dim=32,
    index_dim=32,
    ratios=(0, 4, 128),
    page_tokens=128,
)
FAMILY = blake3(b"family").digest()
FINGERPRINT = blake3(b"model").digest()
MODEL = ModelRecord("tiny", FINGERPRINT, FAMILY, LAYOUT.to_bytes())
PAGE = LAYOUT.page_tokens


@dataclass(frozen=True)
class Record:
    type: RecordType
    id: bytes
    payload: bytes
    parent: bytes = NO_PAGE
    prefix: bytes = b""
    first: int = 0
    n_tokens: int = 0

    @property
    def data(self) -> bytes:
        return state_header(self.type, self.id, [self.payload]) + self.payload + padding(len(self.payload))


def pack_ids(ids: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(ids)}I", *ids)


def rows(layout: Layout, sections: Sequence[Section], counts: Sequence[int], seed: bytes) -> list[PackedSection]:
    return [
        PackedSection(
            section.codec,
            blake3(seed + bytes([number])).digest(layout.section_bytes(section, section.codec, count))
            if count
            else b"",
        )
        for number, (section, count) in enumerate(zip(sections, counts, strict=True))
    ]


def join(pieces: Sequence[Buffer]) -> bytes:
    return b"".join(bytes(piece) for piece in pieces)


def make_state(ids: Sequence[int], model: ModelRecord = MODEL, salt: bytes = b"") -> list[Record]:
    """Page records in order, then the tail. Equal arguments give equal bytes; `salt` changes only the tail."""
    layout = Layout.from_bytes(model.layout_bytes)
    data = pack_ids(ids)
    page_tokens = layout.page_tokens
    prefix, parent = root_prefix(model.family), NO_PAGE
    records = []
    for number in range(len(ids) // page_tokens):
        span = data[4 * number * page_tokens : 4 * (number + 1) * page_tokens]
        prefix = extend_prefix(prefix, span)
        sections = rows(
            layout, layout.streams, [layout.page_rows(s) for s in layout.streams], model.fingerprint + prefix
        )
        text = b"page %d " % number
        payload = join(encode_page(Page(model.fingerprint, parent, number * page_tokens, span, text, sections)))
        page_id = content_id([payload])
        records.append(Record(RecordType.PAGE, page_id, payload, parent, prefix, number * page_tokens, page_tokens))
        parent = page_id
    first = len(ids) // page_tokens * page_tokens
    rest = data[4 * first :]
    seed = model.fingerprint + extend_prefix(prefix, rest) + salt
    counts = [layout.tail_rows(section, len(ids)) for section in layout.tail_sections]
    sections = rows(layout, layout.tail_sections, counts, seed)
    logits = blake3(seed + b"logits").digest(4 * layout.vocab)
    tail = Tail(tail_header(layout, len(ids)), model.fingerprint, parent, first, rest, b"tail", logits, sections)
    payload = join(encode_tail(tail))
    return [*records, Record(RecordType.TAIL, content_id([payload]), payload, parent, prefix, first, len(ids) - first)]


async def write_snapshot(
    store: Store,
    ids: Sequence[int],
    *,
    model: ModelRecord = MODEL,
    writer: str = "worker",
    parent: bytes | None = None,
    salt: bytes = b"",
    reason: Reason = Reason.MANUAL,
    known: Sequence[Sequence[bytes]] | None = None,
) -> NewSnapshot:
    """What a worker does: reserve, skip the pages that are known, write the rest and the tail."""
    *pages, tail = make_state(ids, model, salt)
    if known is None:
        known = store.known_pages(model.fingerprint, [page.prefix for page in pages])
    missing = [page for page, ids_there in zip(pages, known, strict=True) if page.id not in ids_there]
    to_write = [*missing, tail]
    reservation = await store.reserve(writer, sum(record_bytes(len(record.payload)) for record in to_write))
    files = store._files  # the worker has its own calls; here they go through the seam so that faults reach them
    fd = files.open(reservation.path, write=True)
    written, offset = [], reservation.offset
    try:
        for record in to_write:
            files.write(fd, record.data, offset)
            written.append(
                WrittenRecord(
                    record.type,
                    record.id,
                    offset,
                    len(record.payload),
                    record.parent,
                    record.prefix,
                    record.first,
                    record.n_tokens,
                )
            )
            offset += len(record.data)
    finally:
        files.close(fd)
    return NewSnapshot(
        id=tail.id,
        fingerprint=model.fingerprint,
        leaf=tail.parent,
        n_tokens=len(ids),
        prefix=tail.prefix,
        tail_ids=pack_ids(ids[tail.first :]),
        reason=reason,
        created_ms=1_700_000_000_000,
        written=written,
        reservation=reservation,
        parent=parent,
    )


def snapshot_entry(snapshot_id: bytes, expire_ms: int = 0) -> Entry:
    return Entry(EntryType.SNAPSHOT, expire_ms, SnapshotValue(snapshot_id, {b"f": b"v"}, False, 7))


async def put_snapshot(store: Store, key: bytes, ids: Sequence[int], **arguments: object) -> CommittedSnapshot:
    """Write and commit a snapshot under a key of database 0."""
    new = await write_snapshot(store, ids, **arguments)  # type: ignore[arg-type]
    return await store.commit_snapshot(new, key=(0, key), entry=snapshot_entry(new.id))


def string(value: bytes, expire_ms: int = 0) -> Entry:
    return Entry(EntryType.STRING, expire_ms, value)


def tokens(n: int, seed: int = 0) -> list[int]:
    """`n` token ids below the vocabulary; those of one seed are prefixes of each other."""
    data = blake3(b"tokens%d" % seed).digest(n)
    return [byte % LAYOUT.vocab for byte in data]


def read_entry(store: Store, key: bytes, db: int = 0) -> Entry | None:
    """What a key holds, a large string as its bytes."""
    entry = store.keyspace.get(db, key)
    if entry is not None and isinstance(entry.value, StringRef | HeldString):
        return entry._replace(value=store.strings.read(entry.value))
    return entry


async def receive(store: Store, value: bytes, piece_bytes: int = 70_000, *, is_urgent: bool = False) -> HeldString:
    """Bring a string into a segment as a client's upload does; it is not committed yet."""
    held = HeldString(len(value))
    incoming = await store.receiver.begin(len(value))
    try:
        for at in range(0, len(value), piece_bytes):
            await incoming.write([value[at : at + piece_bytes]])
        await incoming.finish([], held, is_urgent=is_urgent)
    except BaseException:
        await incoming.abandon()
        raise
    return held
