"""kvdb-dump ls DIR: every key, its type and size."""

from __future__ import annotations

from pathlib import Path

import click

from kvdb.containers import Fields, Members
from kvdb.store.entries import Entry, SessionValue, SnapshotValue, StringRef, decode_entry, decode_key, name_db
from kvdb.store.index import Table, Txn
from kvdb.store.snapshots import usage
from kvdb_protocol.record import record_bytes
from kvdb_tools.dump.source import DIRECTORY, Json, json_option, opened, print_json, print_table, size, text, when


@click.command()
@click.argument("directory", metavar="DIR", type=DIRECTORY)
@click.option("--db", type=int, help="Only this database.")
@json_option
def ls(directory: Path, db: int | None, as_json: bool) -> None:
    """List the keys of the data directory DIR: type, tokens, bytes, expiry.

    Example: kvdb-dump ls ~/kvdb
    """
    with opened(directory) as txn:
        rows = sorted(
            (
                _row(txn, name_db(name), decode_key(name, data), decode_entry(data))
                for name, data in txn.scan(Table.KEYS)
                if db is None or name_db(name) == db
            ),
            key=lambda row: (row["db"], row["key"]),
        )
    if as_json:
        print_json(rows)
        return
    columns = ("db", "type", "key", "tokens", "own", "shared", "expires", "")
    cells = [
        (
            *(row["db"], row["type"], row["key"], row["tokens"]),
            *(size(row["own"]), size(row["shared"]), when(row["expire_ms"]), row["note"]),
        )
        for row in rows
    ]
    print_table(columns, cells)


def _row(txn: Txn, db: int, key: bytes, entry: Entry) -> Json:
    value = entry.value
    row: Json = {"db": db, "type": entry.type.name.lower(), "key": text(key), "tokens": "", "own": 0, "shared": 0}
    row |= {"expire_ms": entry.expire_ms, "note": ""}
    if isinstance(value, SnapshotValue):
        row |= {"id": value.id.hex(), "note": value.id[:6].hex() + (" pinned" if value.pinned else "")}
        snapshot = txn.snapshot(value.id)
        if snapshot is None:
            row["note"] += " its snapshot does not exist"
        else:
            used = usage(txn, value.id)
            row |= {"tokens": snapshot.n_tokens, "own": used.own_bytes, "shared": used.shared_bytes}
    elif isinstance(value, SessionValue):
        journal = sum(len(ids) // 4 for _, ids in txn.scan(Table.JOURNAL, prefix=value.uid))
        row |= {"tokens": value.base_tokens + journal, "own": 4 * journal}
        row["note"] = f"on {value.base[:6].hex()}" if value.base else "without a snapshot"
    elif isinstance(value, Fields | Members):
        row["note"] = f"{len(value)} items"
    elif isinstance(value, StringRef):
        row["own"] = record_bytes(value.n_bytes)
        row["note"] = f"{value.n_bytes} bytes in a segment"
    else:
        row["own"] = len(value)
    return row
