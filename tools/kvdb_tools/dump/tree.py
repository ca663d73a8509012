"""kvdb-dump tree DIR: the lineage of all snapshots."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import click
import msgpack

from kvdb.store.index import Table, Txn
from kvdb.store.rows import Reason, SnapshotRow
from kvdb.store.snapshots import usage
from kvdb_tools.dump.source import DIRECTORY, Json, json_option, opened, print_json, size, text, when


@click.command()
@click.argument("directory", metavar="DIR", type=DIRECTORY)
@json_option
def tree(directory: Path, as_json: bool) -> None:
    """Draw which snapshot of the data directory DIR was continued from which.

    A snapshot whose parent was deleted is drawn as a root. Example: kvdb-dump tree ~/kvdb
    """
    with opened(directory) as txn:
        snapshots = {key: SnapshotRow.decode(value) for key, value in txn.scan(Table.SNAPSHOTS)}
        facts = {key: _facts(txn, key, row) for key, row in snapshots.items()}
    children: dict[bytes, list[bytes]] = defaultdict(list)
    for key, row in sorted(snapshots.items(), key=lambda item: (item[1].created_ms, item[1].n_tokens)):
        children[row.parent if row.parent in snapshots else b""].append(key)
    if as_json:
        print_json([{**facts[key], "parent": row.parent.hex() or None} for key, row in snapshots.items()])
        return
    # An explicit stack: a timeline of ten thousand steps is a path of that depth.
    stack = [(key, "", key == children[b""][-1]) for key in reversed(children[b""])]
    while stack:
        key, indent, is_last = stack.pop()
        click.echo(indent + ("└─ " if is_last else "├─ ") + _line(facts[key]))
        below = children[key]
        # A single continuation stays in its column, so long timelines are read downwards.
        deeper = indent + ("   " if is_last else "│  ") if len(below) > 1 or not is_last else indent
        stack += [(child, deeper, child == below[-1]) for child in reversed(below)]


def _facts(txn: Txn, snapshot_id: bytes, row: SnapshotRow) -> Json:
    names = [msgpack.unpackb(value) for _, value in txn.scan(Table.NAMES, prefix=snapshot_id)]
    used = usage(txn, snapshot_id)
    return {
        "id": snapshot_id.hex(),
        "tokens": row.n_tokens,
        "keys": [text(key) for _, key in names],
        "reason": Reason(row.reason).name.lower(),
        "created_ms": row.created_ms,
        "own": used.own_bytes,
        "shared": used.shared_bytes,
    }


def _line(facts: Json) -> str:
    keys = " ".join(facts["keys"]) or "(cached)"
    sizes = f"own {size(facts['own'])}, shared {size(facts['shared'])}"
    return (
        f"{keys}  {facts['tokens']} tokens  {facts['id'][:12]}  {facts['reason']} {when(facts['created_ms'])}  {sizes}"
    )
