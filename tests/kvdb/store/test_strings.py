"""Large strings are records: kept, replaced, deleted, damaged, backed up like everything else."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from kvdb.errors import CorruptError, KvdbError, NoSpaceError
from kvdb.store.entries import LARGE_STRING_BYTES, StringRef
from kvdb.store.files import OsFiles
from kvdb.store.index import Index, Table, Txn, place_key
from kvdb.store.logged import Logged
from kvdb.store.repair import repair
from kvdb.store.store import Store
from kvdb.store.verify import verify
from kvdb.store.work import Work
from tests.kvdb.store.faults import FailingFiles
from tests.kvdb.store.states import MODEL, PAGE, put_snapshot, read_entry, string, tokens

BIG = os.urandom(LARGE_STRING_BYTES + 5)
BIGGER = os.urandom(3 * LARGE_STRING_BYTES)


async def open_store(folder: Path, files: FailingFiles | None = None) -> Store:
    store = Store.open(folder, loop=asyncio.get_running_loop(), files=files)
    await store.register_model(MODEL)
    return store


def findings(folder: Path) -> list[object]:
    index = Index(folder / "index")
    found = list(verify(index, folder / "segments", OsFiles(), deep=True))
    index.close()
    return list(found)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    store = await open_store(tmp_path)
    yield store
    await store.close()
    assert findings(tmp_path) == []


async def test_kept_over_a_restart(tmp_path: Path) -> None:
    store = await open_store(tmp_path)
    index_bytes = store._index.file_bytes
    for number in range(20):
        store.keyspace.put(0, b"k%d" % number, string(BIG + b"%d" % number, expire_ms=1 << 42))
    small = string(BIG[: LARGE_STRING_BYTES - 1])
    store.keyspace.put(0, b"small", small)
    await store.keyspace.flush()
    assert store._index.file_bytes - index_bytes < 8 * LARGE_STRING_BYTES
    assert read_entry(store, b"k7") == string(BIG + b"7", expire_ms=1 << 42)
    await store.close()
    assert findings(tmp_path) == []
    store = await open_store(tmp_path)
    assert read_entry(store, b"k7") == string(BIG + b"7", expire_ms=1 << 42)
    assert read_entry(store, b"small") == small
    stats = await store.stats()
    assert stats.strings == 20 * (LARGE_STRING_BYTES + 4096)
    await store.close()


async def test_replaced_and_deleted(store: Store) -> None:
    keys = store.keyspace
    for value in (BIG, BIGGER, b"small", BIG):
        keys.put(0, b"k", string(value))
        await keys.flush()
        assert read_entry(store, b"k") == string(value)
    keys.expire_at(0, b"k", 1 << 42)
    keys.rename(0, b"k", b"l")
    await keys.flush()
    assert read_entry(store, b"l") == string(BIG, expire_ms=1 << 42)
    assert (await store.stats()).strings == LARGE_STRING_BYTES + 4096
    keys.delete(0, b"l")
    await keys.flush()
    await store.gc()
    await store.gc()
    stats = await store.stats()
    assert (stats.strings, stats.live) == (0, 0)
    assert stats.segments_disk < LARGE_STRING_BYTES


async def test_a_snapshot_may_take_its_key(store: Store) -> None:
    store.keyspace.put(0, b"k", string(BIG))
    await store.keyspace.flush()
    await put_snapshot(store, b"k", tokens(PAGE))
    assert (await store.stats()).strings == 0


async def test_a_snapshot_may_take_its_key_in_the_very_round_that_writes_it(store: Store) -> None:
    # The string's segment is made and emptied in one round; its writer still appends to it afterwards.
    store.keyspace.put(0, b"k", string(BIG))
    await put_snapshot(store, b"k", tokens(PAGE))
    store.keyspace.put(0, b"l", string(BIGGER))
    await store.keyspace.flush()
    assert read_entry(store, b"l") == string(BIGGER)


async def test_damage_is_named_and_only_that_key_is_lost(tmp_path: Path) -> None:
    store = await open_store(tmp_path)
    for key in (b"bad", b"good"):
        store.keyspace.put(3, key, string(BIG + key))
    await store.close()
    (path,) = (tmp_path / "segments").iterdir()
    data = bytearray(path.read_bytes())
    data[data.index(BIG) + 7] ^= 1
    path.write_bytes(data)
    (finding,) = findings(tmp_path)
    assert finding.keys == ((3, b"bad"),)  # type: ignore[attr-defined]
    store = await open_store(tmp_path)
    with pytest.raises(CorruptError, match=f"string .* in {path.name} at 4096"):
        read_entry(store, b"bad", 3)
    assert read_entry(store, b"good", 3) == string(BIG + b"good")
    assert sorted(store.keyspace.scan(3, 0, 10)[1]) == [b"bad", b"good"]
    await store.close()
    index = Index(tmp_path / "index")
    assert repair(index, {finding.id}, Logged())  # type: ignore[attr-defined]
    index.close()
    assert findings(tmp_path) == []
    store = await open_store(tmp_path)
    assert store.keyspace.scan(3, 0, 10)[1] == [b"good"]
    await store.close()


async def test_a_damaged_string_can_be_deleted(tmp_path: Path) -> None:
    store = await open_store(tmp_path)
    store.keyspace.put(0, b"k", string(BIG))
    await store.keyspace.flush()
    (path,) = (tmp_path / "segments").iterdir()
    path.write_bytes(path.read_bytes()[:5000])
    assert store.keyspace.delete(0, b"k")
    await store.keyspace.flush()
    assert store.keyspace.get(0, b"k") is None
    await store.close()


@pytest.mark.parametrize("change", ["delete", "overwrite", "expire", "rename"])
async def test_a_damaged_row_of_its_place_does_not_block_commits(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, change: str
) -> None:
    store = await open_store(tmp_path)
    for key in (b"k", b"other"):
        store.keyspace.put(0, key, string(BIG + key))
    await store.keyspace.flush()
    entry = store.keyspace.get(0, b"k")
    assert entry is not None and isinstance(entry.value, StringRef)
    place = place_key(entry.value.segment, entry.value.offset)

    def flip(txn: Txn, _work: Work) -> None:
        stored = bytearray(txn.raw.get(place, None, txn._tables[Table.PLACES]))
        stored[-1] ^= 1
        txn.put(Table.PLACES, place, b"")  # tells the transaction that it changes something
        txn.raw.put(place, bytes(stored), db=txn._tables[Table.PLACES])

    await store._committer.submit(flip)
    if change == "delete":
        store.keyspace.delete(0, b"k")
    elif change == "overwrite":
        store.keyspace.put(0, b"k", string(b"small"))
    elif change == "expire":
        store.keyspace.expire_at(0, b"k", 1)
        assert store.keyspace.get(0, b"k") is None
    else:
        store.keyspace.rename(0, b"k", b"l")
    store.keyspace.put(0, b"new", string(BIGGER))
    await store.keyspace.flush()
    assert store.write_error is None
    assert "a string in segment 1 at 4096 keeps its space" in caplog.text
    await store.close()
    index = Index(tmp_path / "index")
    found = list(verify(index, tmp_path / "segments", OsFiles(), deep=True))
    assert found
    repair(index, {finding.id for finding in found if finding.id}, Logged())
    index.close()
    assert findings(tmp_path) == []
    store = await open_store(tmp_path)
    assert read_entry(store, b"other") == string(BIG + b"other")
    assert read_entry(store, b"new") == string(BIGGER)
    assert read_entry(store, b"k") == (string(b"small") if change == "overwrite" else None)
    if change == "rename":
        assert read_entry(store, b"l") == string(BIG + b"k")
    await store.close()


@pytest.mark.parametrize("call", ["write", "datasync", "commit", "create"])
async def test_a_failed_round_keeps_the_value(tmp_path: Path, call: str) -> None:
    files = FailingFiles()
    store = await open_store(tmp_path, files)
    store.keyspace.put(0, b"old", string(BIG))
    if call == "create":
        files.fail("create", times=1, code=errno.ENOSPC)
        files.fail("allocate", times=1)
    else:
        await store.keyspace.flush()
        files.fail(call, times=1)
    store.keyspace.put(0, b"k", string(BIGGER))
    try:
        await store.keyspace.flush()
    except KvdbError:
        assert read_entry(store, b"k") == string(BIGGER)
    files.heal()
    await store.keyspace.flush()
    assert read_entry(store, b"k") == string(BIGGER)
    assert read_entry(store, b"old") == string(BIG)
    await store.close()
    assert findings(tmp_path) == []


async def test_a_backup_has_them(store: Store, tmp_path: Path) -> None:
    store.keyspace.put(0, b"k", string(BIGGER))
    report = await store.backup(tmp_path / "transfer" / "copy")
    assert report.bytes_copied >= len(BIGGER)
    other = Store.open(tmp_path / "transfer" / "copy", loop=asyncio.get_running_loop())
    assert read_entry(other, b"k") == string(BIGGER)
    await other.close()


async def test_a_full_disk_says_so(tmp_path: Path) -> None:
    files = FailingFiles()
    store = await open_store(tmp_path, files)
    store.keyspace.put(0, b"k", string(BIG))
    files.fail("write", code=errno.ENOSPC)
    with pytest.raises(NoSpaceError):
        await store.keyspace.flush()
    files.heal()
    await store.close()
    assert findings(tmp_path) == []
