"""Every file call may fail: the command says so, nothing is half done, reads go on, the store recovers by itself."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path

import pytest

from kvdb.errors import KvdbError, NoSpaceError
from kvdb.store.ballast import BALLAST_BYTES
from kvdb.store.store import Store
from kvdb.store.verify import verify
from tests.kvdb.store.faults import FailingFiles
from tests.kvdb.store.states import (
    MODEL,
    PAGE,
    pack_ids,
    put_snapshot,
    snapshot_entry,
    string,
    tokens,
    write_snapshot,
)


async def open_store(folder: Path, files: FailingFiles) -> Store:
    store = Store.open(folder, loop=asyncio.get_running_loop(), files=files)
    await store.register_model(MODEL)
    return store


async def scenario(store: Store, done: list[str], keep: bytes) -> None:
    """A snapshot, its read, a deletion, a string, a collection. `done` gets the names of the steps that succeeded."""
    await put_snapshot(store, b"new", tokens(2 * PAGE + 3, seed=1))
    done.append("snapshot")
    await put_snapshot(store, b"more", tokens(4 * PAGE + 3, seed=1), writer="another")
    done.append("more")
    await store.token_ids(keep)
    store.keyspace.delete(0, b"more")
    await store.keyspace.flush()
    done.append("delete")
    store.keyspace.put(0, b"text", string(b"x"))
    await store.keyspace.flush()
    done.append("text")
    await store.gc()
    await store.stats()


async def count_calls(folder: Path) -> list[str]:
    files = FailingFiles()
    store = await open_store(folder, files)
    keep = await put_snapshot(store, b"keep", tokens(PAGE))
    files.calls.clear()
    await scenario(store, [], keep.id)
    await store._committer.idle()
    await store._committer._thread.run(lambda: None)  # freed ranges have been punched
    calls = list(files.calls)
    await store.close()
    return calls


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EMFILE])
async def test_each_call_failing_once(tmp_path: Path, code: int) -> None:
    calls = await count_calls(tmp_path / "count")
    assert {"write", "datasync", "commit", "create", "sync_dir", "open", "read", "punch"} <= set(calls)
    for number in range(len(calls)):
        files = FailingFiles()
        folder = tmp_path / str(number)
        store = await open_store(folder, files)
        keep = await put_snapshot(store, b"keep", tokens(PAGE))
        files.fail(after=number, times=1, code=code)
        done: list[str] = []
        try:
            await scenario(store, done, keep.id)
        except KvdbError as error:
            assert isinstance(error, NoSpaceError) == (code == errno.ENOSPC)
        except OSError:
            pass  # the writer's own call, which in the daemon is the worker's
        files.heal()
        await recovered(store, folder, keep.id, done)


async def recovered(store: Store, folder: Path, keep: bytes, done: list[str]) -> None:
    """What was acknowledged is there, the store takes new writes, and a restart finds nothing wrong."""

    async def look() -> None:
        assert await store.token_ids(keep) == pack_ids(tokens(PAGE))
        entry = store.keyspace.get(0, b"new")
        if "snapshot" in done:
            assert entry is not None
        if entry is not None:
            assert await store.token_ids(entry.value.id) == pack_ids(tokens(2 * PAGE + 3, seed=1))  # type: ignore[union-attr]
        if "delete" in done:
            assert store.keyspace.get(0, b"more") is None
        if "text" in done:
            assert store.keyspace.get(0, b"text") == string(b"x")

    await look()
    after = await put_snapshot(store, b"after", tokens(3 * PAGE, seed=7))
    assert await store.token_ids(after.id) == pack_ids(tokens(3 * PAGE, seed=7))
    assert store.write_error is None
    await store.close()
    store = Store.open(folder, loop=asyncio.get_running_loop())
    assert store.problems == []
    await look()
    assert list(verify(store._index, folder / "segments", store._files, deep=True)) == []
    await store.close()


async def test_a_full_disk_refuses_writes_and_serves_reads(tmp_path: Path) -> None:
    files = FailingFiles()
    store = await open_store(tmp_path, files)
    keep = await put_snapshot(store, b"keep", tokens(PAGE))
    files.fail("write", "create", "commit", code=errno.ENOSPC)
    for _ in range(3):
        with pytest.raises((NoSpaceError, OSError)):
            await put_snapshot(store, b"new", tokens(2 * PAGE, seed=1))
        store.keyspace.put(0, b"text", string(b"x"))
        with pytest.raises(NoSpaceError, match="No space left on device; free space or delete keys"):
            await store.keyspace.flush()
        assert await store.token_ids(keep.id) == pack_ids(tokens(PAGE))
        assert store.keyspace.get(0, b"new") is None
    assert isinstance(store.write_error, NoSpaceError)
    files.heal()
    await recovered(store, tmp_path, keep.id, ["text"])


async def test_no_ok_after_a_failed_sync(tmp_path: Path) -> None:
    """The segment whose sync failed is never trusted again: the next try goes to another one."""
    files = FailingFiles()
    store = await open_store(tmp_path, files)
    keep = await put_snapshot(store, b"keep", tokens(PAGE))
    new = await write_snapshot(store, tokens(2 * PAGE, seed=1))
    files.fail("datasync", times=1)
    with pytest.raises(KvdbError, match="sync of a segment"):
        await store.commit_snapshot(new, key=(0, b"new"), entry=snapshot_entry(new.id))
    assert store.keyspace.get(0, b"new") is None
    again = await write_snapshot(store, tokens(2 * PAGE, seed=1))
    assert again.reservation.segment_id != new.reservation.segment_id
    with pytest.raises(KvdbError, match="given up after a failed sync"):
        await store.commit_snapshot(new, key=(0, b"new"), entry=snapshot_entry(new.id))
    await recovered(store, tmp_path, keep.id, [])


async def test_a_worker_that_writes_nonsense_is_refused(tmp_path: Path) -> None:
    from dataclasses import replace

    files = FailingFiles()
    store = await open_store(tmp_path, files)
    keep = await put_snapshot(store, b"keep", tokens(PAGE))
    new = await write_snapshot(store, tokens(2 * PAGE, seed=1))
    overlapping = replace(new, written=[new.written[0], replace(new.written[1], offset=new.written[0].offset)])
    unaligned = replace(new, written=[replace(record, offset=record.offset + 1) for record in new.written])
    without_tail = replace(new, written=new.written[:-1])
    wrong_prefix = replace(new, prefix=b"?" * 16)
    wrong_count = replace(new, n_tokens=new.n_tokens + 1)
    gap = replace(new, written=[new.written[0], replace(new.written[1], first=5), *new.written[2:]])
    for bad in (overlapping, unaligned, without_tail, wrong_prefix, wrong_count, gap):
        with pytest.raises(KvdbError):
            await store.commit_snapshot(bad)
    assert (await store.stats()).snapshots == 1
    await recovered(store, tmp_path, keep.id, [])


async def test_the_ballast_lets_deletions_through(tmp_path: Path) -> None:
    """On a full disk the pending deletions are committed with the ballast's space; new records are refused."""
    files = FailingFiles()
    store = await open_store(tmp_path, files)
    ballast = tmp_path / "ballast"
    assert ballast.stat().st_blocks * 512 == BALLAST_BYTES
    keep = await put_snapshot(store, b"keep", tokens(PAGE))
    gone = await put_snapshot(store, b"gone", tokens(2 * PAGE, seed=1))
    new = await write_snapshot(store, tokens(3 * PAGE, seed=2))
    files.fail("commit", times=1, code=errno.ENOSPC)
    files.fail("allocate", code=errno.ENOSPC)
    store.keyspace.delete(0, b"gone")
    with pytest.raises(NoSpaceError):
        await store.commit_snapshot(new, key=(0, b"new"), entry=snapshot_entry(new.id))
    assert ballast.stat().st_size == 0
    assert store.snapshot(gone.id) is None
    assert store.snapshot(new.id) is None
    assert isinstance(store.write_error, NoSpaceError)
    with pytest.raises(NoSpaceError):
        await store.reserve("worker")
    files.heal()
    await recovered(store, tmp_path, keep.id, [])
    assert ballast.stat().st_size == BALLAST_BYTES


async def test_a_store_opens_on_a_full_disk(tmp_path: Path) -> None:
    files = FailingFiles()
    store = await open_store(tmp_path, files)
    keep = await put_snapshot(store, b"keep", tokens(PAGE))
    await put_snapshot(store, b"gone", tokens(PAGE, seed=1))
    store.keyspace.delete(0, b"gone")
    await store.close()
    (tmp_path / "ballast").unlink()
    files.fail("create", "write", "allocate", "commit", code=errno.ENOSPC)
    store = await open_store(tmp_path, files)
    assert await store.token_ids(keep.id) == pack_ids(tokens(PAGE))
    with pytest.raises(NoSpaceError):
        await put_snapshot(store, b"new", tokens(PAGE, seed=3))
    files.heal()
    await recovered(store, tmp_path, keep.id, [])
