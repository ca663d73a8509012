"""kvdb-dump show DIR KEY: one key, down to its records."""

from __future__ import annotations

from pathlib import Path

import click

from kvdb.containers import Fields, Members
from kvdb.errors import KvdbError
from kvdb.store.entries import Entry, SessionValue, SnapshotValue, StringRef, decode_entry, name_key
from kvdb.store.files import OsFiles
from kvdb.store.index import Table, Txn
from kvdb.store.read import Reader, plan
from kvdb.store.rows import Reason
from kvdb.store.snapshots import usage
from kvdb.store.strings import string_place
from kvdb_protocol.record import RecordType
from kvdb_tools.dump.source import (
    DIRECTORY,
    Json,
    excerpt,
    json_option,
    opened,
    print_facts,
    print_json,
    print_table,
    size,
    text,
    when,
)


@click.command()
@click.argument("directory", metavar="DIR", type=DIRECTORY)
@click.argument("key", metavar="KEY")
@click.option("--db", type=int, default=0, show_default=True, help="Database of the key.")
@json_option
def show(directory: Path, key: str, db: int, as_json: bool) -> None:
    """Show KEY of the data directory DIR: its entry, and for a state every record with its place.

    Example: kvdb-dump show ~/kvdb step-7
    """
    with opened(directory) as txn:
        data = txn.get(Table.KEYS, name_key(db, key.encode()))
        if data is None:
            raise KvdbError(f"there is no key {key!r} in database {db} of {directory}")
        entry = decode_entry(data)
        facts: Json = {"key": key, "db": db, "type": entry.type.name.lower(), "expire_ms": entry.expire_ms}
        facts |= _entry(txn, directory / "segments", entry)
        snapshot_id = _snapshot_of(entry)
        state = _state(txn, directory / "segments", snapshot_id) if snapshot_id else {}
    if as_json:
        print_json(facts | state)
        return
    records = state.pop("records", [])
    print_facts([*(facts | {"expire_ms": when(entry.expire_ms)}).items(), *state.items()])
    if records:
        click.echo()
        print_table(("type", "first", "id", "segment", "offset", "bytes"), [list(row.values()) for row in records])


def _snapshot_of(entry: Entry) -> bytes | None:
    if isinstance(entry.value, SnapshotValue):
        return entry.value.id
    return entry.value.base if isinstance(entry.value, SessionValue) else None


def _entry(txn: Txn, folder: Path, entry: Entry) -> Json:
    value = entry.value
    if isinstance(value, SnapshotValue):
        meta = {text(name): text(field) for name, field in value.meta.items()}
        return {"snapshot": value.id.hex(), "pinned": value.pinned, "meta": meta, "named": when(value.created_ms)}
    if isinstance(value, SessionValue):
        rows = [
            (int.from_bytes(key[16:], "big"), len(ids) // 4) for key, ids in txn.scan(Table.JOURNAL, prefix=value.uid)
        ]
        return {
            "uid": value.uid.hex(),
            "fingerprint": value.fingerprint.hex(),
            "base": value.base.hex() if value.base else None,
            "base_tokens": value.base_tokens,
            "journal": [f"{n_tokens} tokens from {first}" for first, n_tokens in rows],
        }
    if isinstance(value, Fields):
        return {"fields": {text(name): text(field) for name, field in value.items()}}
    if isinstance(value, Members):
        return {"members": {text(member): score for member, score in value.scores.items()}}
    if isinstance(value, StringRef):
        place = string_place(folder, value)
        with Reader(OsFiles()) as reader:
            shown = excerpt(bytes(reader.payload(place)), 400)
        return {"bytes": value.n_bytes, "value": shown, "segment": place.path.name, "offset": value.offset}
    assert isinstance(value, bytes)  # a HeldString is in a daemon's memory only
    return {"bytes": len(value), "value": excerpt(value, 400)}


def _state(txn: Txn, segments: Path, snapshot_id: bytes) -> Json:
    row = txn.snapshot(snapshot_id)
    places = plan(txn, segments, snapshot_id)  # raises when the snapshot is gone, which ends the command
    assert row is not None
    used = usage(txn, snapshot_id)
    name = next((model.name for model in txn.models().values() if model.number == row.model), "not registered")
    with Reader(OsFiles()) as reader:
        tail = reader.tail(places[-1])
    return {
        "model": name,
        "tokens": row.n_tokens,
        "pages": used.n_pages,
        "reason": Reason(row.reason).name.lower(),
        "created": when(row.created_ms),
        "parent": row.parent.hex() or None,
        "references": row.refs,
        "own": size(used.own_bytes),
        "shared": size(used.shared_bytes),
        "tail_text": excerpt(tail.text, 200),
        "records": [
            {
                "type": RecordType(place.type).name.lower(),
                "first": place.first,
                "id": place.id[:8].hex(),
                "segment": place.path.name,
                "offset": place.offset,
                "bytes": place.record_bytes,
            }
            for place in places
        ],
    }
