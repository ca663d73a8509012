"""The models whose states are stored: rows of table MODELS."""

from __future__ import annotations

from kvdb.errors import WrongModelError
from kvdb.store.index import Table, Txn
from kvdb.store.records import ModelRecord
from kvdb.store.rows import ModelRow, pack


def put_model(txn: Txn, model: ModelRecord) -> None:
    """Make a model known, or change its name. Raises WrongModelError if its fingerprint is that of another one."""
    row = txn.model(model.fingerprint)
    if row is None:
        number = txn.meta(b"next_model", 1)
        txn.put_meta(b"next_model", number + 1)
        row = ModelRow(number, model.name, model.family, model.layout_bytes)
    elif (row.family, row.layout) != (model.family, model.layout_bytes):
        raise WrongModelError(f"model {model.name} has the fingerprint of {row.name} and another layout or family")
    txn.put(Table.MODELS, model.fingerprint, pack(row._replace(name=model.name)))
