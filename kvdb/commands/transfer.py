"""STORE COMPACT, BACKUP, EXPORT, IMPORT. Files lie in the transfer folder and nowhere else."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from kvdb import ds4_exchange
from kvdb.commands.arguments import Arguments, unknown_option
from kvdb.commands.registry import handler
from kvdb.errors import KvdbError
from kvdb.store.entries import Entry, EntryType, SnapshotValue
from kvdb.store.errors import as_kvdb_error
from kvdb.store.exchange import plain_name, read_archive, read_archive_file, read_file, write_file
from kvdb.store.records import ModelRecord
from kvdb_protocol.kvc import encode_kvc
from kvdb_protocol.replies import Reply

if TYPE_CHECKING:
    from kvdb.net.client import Client


def transfer_folder(client: Client) -> Path:
    """Where files of EXPORT, IMPORT and BACKUP lie."""
    named = client.server.config.text("transfer-dir")
    return Path(named).expanduser() if named else client.server.directory / "transfer"


def _ms(began: float) -> float:
    return round((time.perf_counter() - began) * 1e3, 3)


@handler("STORE COMPACT")
async def compact(client: Client, raw: list[bytes]) -> Reply:
    """STORE COMPACT: live records of sparse segments are moved together."""
    began = time.perf_counter()
    moved, emptied = await client.server.store.compact()
    return {"bytes_moved": moved, "segments_emptied": emptied, "ms": _ms(began)}


@handler("STORE BACKUP")
async def backup(client: Client, raw: list[bytes]) -> Reply:
    """STORE BACKUP name: a copy of the whole store in the transfer folder; made again, only what is new."""
    report = await client.server.store.backup(transfer_folder(client) / plain_name(raw[0]))
    return {
        "segments": report.segments,
        "bytes_live": report.bytes_live,
        "bytes_copied": report.bytes_copied,
        "ms": round(report.ms, 3),
    }


@handler("STORE EXPORT")
async def export(client: Client, raw: list[bytes]) -> Reply:
    """STORE EXPORT key FILE name | DATA [FORMAT KV | ARCHIVE]."""
    began = time.perf_counter()
    args = Arguments(raw)
    key, target, name, is_kv = args.next(), args.word(), "", False
    if target == b"FILE":
        name = plain_name(args.next())
    elif target != b"DATA":
        raise unknown_option(target)
    if args:
        if (word := args.word()) != b"FORMAT":
            raise unknown_option(word)
        if (kind := args.word()) not in (b"KV", b"ARCHIVE"):
            raise unknown_option(kind)
        is_kv = kind == b"KV"
    if args:
        raise KvdbError("syntax error")
    store = client.server.store
    value = client.server.sessions.snapshot_value(client.db, key)

    if is_kv:
        record = store.snapshot(value.id)
        info = client.server.sessions.model_of(record.fingerprint).info if record else None
        if record is None or info is None or info.fingerprint != record.fingerprint:
            raise KvdbError("a .kv file needs the snapshot's own model served here; FORMAT ARCHIVE does not")
        file = await store.read_places(value.id, partial(ds4_exchange.write_kv, info, meta=value.meta))
        pieces = encode_kvc(file)
        if not name:
            return b"".join(memoryview(piece).cast("B") for piece in pieces)
        write = partial(write_file, store.files, transfer_folder(client) / name, pieces)
        n_bytes = await store.in_pool(write, f"export to {name}")
        return {"tokens": file.n_tokens, "bytes": n_bytes, "ds4_name": file.name, "ms": _ms(began)}
    if not name:
        return await store.export_archive(value.id, lambda pieces: b"".join(bytes(piece) for piece in pieces))
    path = transfer_folder(client) / name
    try:
        n_bytes = await store.export_archive(value.id, lambda pieces: write_file(store.files, path, pieces))
    except OSError as error:
        raise as_kvdb_error(error, f"export to {name}") from error
    found = store.snapshot(value.id)
    return {"tokens": found.n_tokens if found else 0, "bytes": n_bytes, "ms": _ms(began)}


@handler("STORE IMPORT")
async def import_(client: Client, raw: list[bytes]) -> Reply:
    """STORE IMPORT key FILE name | DATA bytes: a ds4 .kv file or an archive; durable when it is answered."""
    began = time.perf_counter()
    args = Arguments(raw)
    key, source, given = args.next(), args.word(), args.next()
    if source not in (b"FILE", b"DATA"):
        raise unknown_option(source)
    server = client.server
    store = server.store
    data, path, doing = memoryview(given), Path(), "import"
    if source == b"FILE":
        name = plain_name(given)
        path, doing = transfer_folder(client) / name, f"import of {name}"
        data = await store.in_pool(partial(read_file, store.files, path, 8), doing)
    created_ms = int(time.time() * 1e3)
    meta: dict[bytes, bytes] = {}
    if ds4_exchange.is_kv(data):
        if source == b"FILE":
            data = await store.in_pool(partial(read_file, store.files, path), doing)
        models = [model.info for model in server.models.values()]
        read = partial(ds4_exchange.read_kv, models, data, cross_quant=server.sessions.cross_quant)
        state, meta = await store.in_pool(read, "import")
        created_ms = 1000 * int(meta[ds4_exchange.CREATED]) or created_ms
    else:
        read_it = partial(read_archive_file, store.files, path) if source == b"FILE" else partial(read_archive, data)
        archive, state = await store.in_pool(read_it, doing)
        await store.register_model(ModelRecord(archive.model, archive.fingerprint, archive.family, archive.layout))
        created_ms = archive.created_ms

    def make_entry(snapshot_id: bytes) -> Entry:
        return Entry(EntryType.SNAPSHOT, 0, SnapshotValue(snapshot_id, meta, False, int(time.time() * 1e3)))

    done = await store.import_state(state, key=(client.db, key), make_entry=make_entry, created_ms=created_ms)
    server.changed(client.db, key, "import", "g")
    return {
        "id": done.id.hex(),
        "tokens": state.n_tokens,
        "pages_new": done.pages_new,
        "bytes_new": done.bytes_new,
        "bytes_shared": done.bytes_shared,
        "ms": _ms(began),
    }
