"""A backup is a data directory as of one moment; made again, it copies only what is new."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from kvdb.errors import KvdbError, NoSpaceError
from kvdb.store.entries import Entry, EntryType
from kvdb.store.store import Store
from kvdb.store.verify import verify
from tests.kvdb.store.faults import FailingFiles
from tests.kvdb.store.states import MODEL, PAGE, pack_ids, put_snapshot, read_entry, receive, string, tokens


async def open_store(folder: Path, files: FailingFiles | None = None) -> Store:
    store = Store.open(folder, loop=asyncio.get_running_loop(), files=files)
    await store.register_model(MODEL)
    return store


async def contents(folder: Path) -> dict[bytes, bytes]:
    """Keys and values of a data directory that nobody serves, after a deep check."""
    store = Store.open(folder, loop=asyncio.get_running_loop())
    assert store.problems == []
    assert list(verify(store._index, folder / "segments", store._files, deep=True)) == []
    found = {}
    for key in store.keyspace.scan(0, 0, 1000)[1]:
        entry = store.keyspace.get(0, key)
        assert entry is not None
        value = entry.value
        found[key] = value if isinstance(value, bytes) else await store.token_ids(value.id)  # type: ignore[union-attr]
    await store.close()
    return found


async def test_backup_and_again(tmp_path: Path) -> None:
    store = await open_store(tmp_path / "live")
    target = tmp_path / "copy"
    await put_snapshot(store, b"a", tokens(5 * PAGE))
    await put_snapshot(store, b"b", tokens(3 * PAGE, seed=1))
    store.keyspace.put(0, b"text", string(b"x"))
    first = await store.backup(target)
    assert first.bytes_copied == first.bytes_live > 0
    await put_snapshot(store, b"c", tokens(6 * PAGE))
    store.keyspace.delete(0, b"b")
    second = await store.backup(target)
    assert 0 < second.bytes_copied < first.bytes_copied
    assert (await store.backup(target)).bytes_copied == 0
    await store.close()
    expected = {b"a": pack_ids(tokens(5 * PAGE)), b"c": pack_ids(tokens(6 * PAGE)), b"text": b"x"}
    assert await contents(target) == expected
    assert await contents(tmp_path / "live") == expected


async def test_a_backup_of_a_busy_store_is_consistent(tmp_path: Path) -> None:
    """Snapshots come and go, and compaction runs, while backups are made."""
    store = await open_store(tmp_path / "live")
    for number in range(6):
        await put_snapshot(store, b"k%d" % number, tokens(2 * PAGE, seed=number))
    is_done = False

    async def load() -> None:
        number = 6
        while not is_done:
            await put_snapshot(store, b"k%d" % number, tokens(2 * PAGE, seed=number))
            store.keyspace.delete(0, b"k%d" % (number - 4))
            await store.compact()
            await store.gc()
            number += 1

    running = asyncio.ensure_future(load())
    for _ in range(4):
        await store.backup(tmp_path / "copy")
    is_done = True
    await running
    await store.close()
    found = await contents(tmp_path / "copy")
    assert len(found) >= 4
    for key, value in found.items():
        assert value == pack_ids(tokens(2 * PAGE, seed=int(key[1:])))


async def test_a_segment_that_grew_by_dead_records_only(tmp_path: Path) -> None:
    """The copy must be as long as the new index says, or a daemon on it would find it short."""
    store = await open_store(tmp_path / "live")
    await put_snapshot(store, b"a", tokens(2 * PAGE))
    await store.backup(tmp_path / "copy")
    await put_snapshot(store, b"b", tokens(3 * PAGE, seed=1))
    store.keyspace.delete(0, b"b")
    await store.keyspace.flush()
    assert (await store.backup(tmp_path / "copy")).bytes_copied == 0
    await store.close()
    assert await contents(tmp_path / "copy") == {b"a": pack_ids(tokens(2 * PAGE))}


@pytest.mark.parametrize("grows", [False, True])
async def test_a_string_that_is_committed_after_one_behind_it(tmp_path: Path, grows: bool) -> None:
    """A string waits for its commit (in MULTI) while the next one in its segment is committed and backed up."""
    store = await open_store(tmp_path / "live")
    values = {key: os.urandom(100_000) for key in (b"waits", b"behind", b"new")}
    waits = await receive(store, values[b"waits"])
    behind = await receive(store, values[b"behind"])
    assert waits.ref is not None and behind.ref is not None
    assert waits.ref.segment == behind.ref.segment and waits.ref.offset < behind.ref.offset
    store.keyspace.put(0, b"behind", Entry(EntryType.STRING, 0, behind))
    await store.backup(tmp_path / "copy")
    store.keyspace.put(0, b"waits", Entry(EntryType.STRING, 0, waits))
    if grows:
        store.keyspace.put(0, b"new", Entry(EntryType.STRING, 0, await receive(store, values[b"new"])))
    report = await store.backup(tmp_path / "copy")
    assert 0 < report.bytes_copied < report.bytes_live
    assert (await store.backup(tmp_path / "copy")).bytes_copied == 0
    del waits, behind
    await store.close()
    copy = Store.open(tmp_path / "copy", loop=asyncio.get_running_loop())
    assert list(verify(copy._index, copy._segments.folder, copy.files, deep=True)) == []
    for key in values:
        if key != b"new" or grows:
            assert read_entry(copy, key) == string(values[key])
    await copy.close()


async def test_freed_bytes_are_given_back_after_a_backup(tmp_path: Path) -> None:
    store = await open_store(tmp_path / "live")
    await put_snapshot(store, b"a", tokens(20 * PAGE))
    before = (await store.stats()).segments_disk
    store._segments.pause_tidying()
    store.keyspace.delete(0, b"a")
    await store.keyspace.flush()
    assert (await store.stats()).segments_disk > before // 2
    store._segments.resume_tidying(store._committer.in_thread)
    await store.keyspace.flush()
    assert (await store.stats()).segments_disk < before // 2
    await store.close()


async def test_bad_targets(tmp_path: Path) -> None:
    store = await open_store(tmp_path / "live")
    await put_snapshot(store, b"a", tokens(PAGE))
    other = tmp_path / "other"
    other.mkdir()
    (other / "file").write_text("mine")
    with pytest.raises(KvdbError, match="not a kvdb backup"):
        await store.backup(other)
    assert (other / "file").read_text() == "mine"
    with pytest.raises(KvdbError, match="in use by process"):
        await store.backup(tmp_path / "live")
    await store.close()


async def test_a_failed_backup_leaves_the_old_one(tmp_path: Path) -> None:
    files = FailingFiles()
    store = await open_store(tmp_path / "live", files)
    await put_snapshot(store, b"a", tokens(2 * PAGE))
    await store.backup(tmp_path / "copy")
    await put_snapshot(store, b"b", tokens(9 * PAGE, seed=1))
    files.fail("write", code=28)
    with pytest.raises(NoSpaceError):
        await store.backup(tmp_path / "copy")
    files.heal()
    assert await contents(tmp_path / "copy") == {b"a": pack_ids(tokens(2 * PAGE))}
    await store.backup(tmp_path / "copy")
    await store.close()
    assert set(await contents(tmp_path / "copy")) == {b"a", b"b"}
