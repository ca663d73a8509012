"""Damage of the index at rest: every page and row of its file is accounted for, without LMDB.

LMDB checks nothing that it maps, and a row whose key was hit is missing where it belongs. What is missing is an answer
too: there is no such key, the session has no more tokens, these bytes of a segment are free. So an index is walked
before it is served, and one too large to wait for while it is served.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fastcrc.crc32 import iscsi as crc32c

from kvdb.errors import CorruptError, KvdbError
from kvdb.store.index import CRC_BYTES, FORMAT_NAME, TABLE_CRC, Index, Table, Txn
from kvdb.store.index_pages import MetaPagesError, Row, check_pages
from kvdb_protocol.errors import FormatError

log = logging.getLogger("kvdb.store")

# Up to here an index is checked before it is served (0.1 s); a larger one while it is.
CHECKED_FIRST_BYTES = 16 << 20
_LEAVES_AT_A_TIME = 32
_TRIES = 20


class _MetaPagesError(CorruptError):
    """The walk did not begin: see index_pages.MetaPagesError."""


def damaged_rows(
    path: Path, *, txn: int | None = None, pause: Callable[[], None] | None = None
) -> list[tuple[Table, bytes]]:
    """Walk every page and row of the index in `path`, without LMDB; return the rows that fail their checksum.

    txn: the transaction to look at, which must stay readable; None for the newest, while nobody writes. pause: called
    after each leaf page. Raises CorruptError where the pages are damaged: LMDB would follow that anywhere.
    """
    tables = {table.name.lower().encode(): table for table in Table}
    damaged: list[tuple[Table, bytes]] = []
    is_sealed = True

    def look(name: bytes, rows: list[Row]) -> None:
        nonlocal is_sealed
        table = tables[name]
        crc = TABLE_CRC[table]
        for key, stored, _ in rows:
            # One call for key and value: this loop is most of what a start costs.
            if crc32c(key + stored[:-CRC_BYTES], crc) != int.from_bytes(stored[-CRC_BYTES:], "little"):
                damaged.append((table, key))
                if table is Table.META and key == FORMAT_NAME and len(stored) <= CRC_BYTES:
                    is_sealed = False
        if pause is not None:
            pause()

    try:
        fd = os.open(path / "data.mdb", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return []
    try:
        if os.fstat(fd).st_size:  # LMDB makes the file before it fills it
            check_pages(lambda offset, n_bytes: os.pread(fd, n_bytes, offset), txn, tables.keys(), look)
    except FormatError as error:
        kind = _MetaPagesError if isinstance(error, MetaPagesError) else CorruptError
        raise kind(f"the pages of the index: {error}; go back to a backup") from error
    finally:
        os.close(fd)
    return damaged if is_sealed else []


@contextmanager
def read_checked(index: Index, pause: Callable[[], None]) -> Iterator[tuple[Txn, list[tuple[Table, bytes]]]]:
    """A read transaction of an index that is in use, and which of its rows are damaged. Raises as `damaged_rows`.

    Between the begin of a transaction and the look at the meta pages others may commit twice: then with a newer one.
    """
    for tries_left in reversed(range(_TRIES)):
        with index.read() as txn:
            try:
                damaged = damaged_rows(index.path, txn=txn.raw.id(), pause=pause)
            except _MetaPagesError:
                if tries_left:
                    continue
                raise
            yield txn, damaged
            return


def refuse_damaged(path: Path) -> bool:
    """Raise CorruptError if anything in the index in `path` is damaged. False: it is too large to be checked first."""
    try:
        if (path / "data.mdb").stat().st_size > CHECKED_FIRST_BYTES:
            return False
    except FileNotFoundError:
        return True
    if rows := damaged_rows(path):
        raise CorruptError(f"the index {path} is damaged: {_words(rows)}")
    return True


def check_while_serving(index: Index, is_closed: Callable[[], bool]) -> str:
    """The same for a large index that is in use, in a thread: logs what is wrong and returns it in words, or "".

    Gives way when the index has to be opened again; then that is what it returns.
    """
    n_leaves, began = 0, time.monotonic()

    def pause() -> None:
        nonlocal n_leaves
        n_leaves += 1
        if n_leaves % _LEAVES_AT_A_TIME == 0:
            if is_closed():
                raise KvdbError("the store was closed")
            index.give_way()
            time.sleep(0.001)  # the event loop needs the interpreter, too

    try:
        with read_checked(index, pause) as (_, rows):
            problem = _words(rows) if rows else ""
    except CorruptError as error:
        problem = str(error)
    except KvdbError as error:
        log.warning("the check of the index did not end: %s", error)
        return f"not checked: {error}"
    if problem:
        log.critical("the index is damaged, stop the daemon: %s", problem)
    else:
        log.info("the index is sound; checked in %.1f s", time.monotonic() - began)
    return problem


def _words(rows: list[tuple[Table, bytes]]) -> str:
    tables = ", ".join(sorted({table.name.lower() for table, _ in rows}))
    return (
        f"{len(rows)} rows fail their checksum, in {tables}; kvdb-check --repair drops them, keeps the rest and says "
        "what was lost"
    )
