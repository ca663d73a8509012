"""LMDB gives an environment up when the write of a meta page fails: the store opens it again by itself.

The failure is a real one: the descriptor that LMDB writes meta pages through is replaced by one that cannot be written.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from pathlib import Path

import pytest

from kvdb.errors import CorruptError, KvdbError, MisconfError
from kvdb.store import index as index_module
from kvdb.store.index import Index, Table
from kvdb.store.index_pages import read_metas
from kvdb.store.store import Store
from kvdb.store.verify import verify
from tests.kvdb.store.states import MODEL, PAGE, pack_ids, put_snapshot, string, tokens

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="finds the descriptor in /proc")


def break_meta_writes(path: Path) -> None:
    """Let the next commit of the index in `path` fail while it writes its meta page."""
    n_replaced = 0
    for fd in Path("/proc/self/fd").iterdir():
        try:
            target = fd.readlink()
            facts = Path(f"/proc/self/fdinfo/{fd.name}").read_text()
        except FileNotFoundError:
            continue
        flags = int(facts.split("flags:")[1].split()[0], 8)
        if target == path / "data.mdb" and flags & os.O_DSYNC:
            unwritable = os.open(path / "data.mdb", os.O_RDONLY)
            os.dup2(unwritable, int(fd.name))
            os.close(unwritable)
            n_replaced += 1
    assert n_replaced == 1


async def open_store(folder: Path) -> Store:
    store = Store.open(folder, loop=asyncio.get_running_loop())
    await store.register_model(MODEL)
    store.keyspace.put(0, b"old", string(b"x" * 2000))  # too large to be kept in memory
    await store.keyspace.flush()
    return store


async def check_whole(store: Store, folder: Path, *, keys: dict[bytes, bytes | None]) -> None:
    """Close the store and open it: these keys hold these values, and nothing is wrong."""
    await store.close()
    store = Store.open(folder, loop=asyncio.get_running_loop())
    assert store.problems == []
    for key, value in keys.items():
        assert store.keyspace.get(0, key) == (None if value is None else string(value)), key
    assert list(verify(store._index, folder / "segments", store._files, deep=True)) == []
    await store.close()


async def test_a_failed_meta_page_refuses_one_round_and_no_more(tmp_path: Path) -> None:
    store = await open_store(tmp_path)
    keep = await put_snapshot(store, b"keep", tokens(PAGE))
    for number in range(3):
        break_meta_writes(tmp_path / "index")
        store.keyspace.put(0, b"refused", string(b"%d" % number))
        with pytest.raises(MisconfError, match="hey are tried again"):
            await store.keyspace.flush()
        assert isinstance(store.write_error, MisconfError)
        assert store.keyspace.get(0, b"old") == string(b"x" * 2000)
        assert await store.token_ids(keep.id) == pack_ids(tokens(PAGE))
        await store.keyspace.flush()  # the round that failed is in this one
        assert store.write_error is None
    after = await put_snapshot(store, b"after", tokens(2 * PAGE, seed=5))
    assert await store.token_ids(after.id) == pack_ids(tokens(2 * PAGE, seed=5))
    await check_whole(store, tmp_path, keys={b"refused": b"2", b"old": b"x" * 2000})


async def test_a_refused_snapshot_is_not_there_and_its_bytes_wait(tmp_path: Path) -> None:
    store = await open_store(tmp_path)
    break_meta_writes(tmp_path / "index")
    with pytest.raises(MisconfError):
        await put_snapshot(store, b"refused", tokens(2 * PAGE))
    assert store.keyspace.get(0, b"refused") is None
    # Should the disk hold that commit after all, a power loss before the next one would bring the snapshot back.
    assert not store._segments.pins.are_late
    assert store._segments.pins._late
    store.keyspace.put(0, b"new", string(b"y"))
    await store.keyspace.flush()
    await store._committer.idle()
    assert store._committer._doubtful == []
    await check_whole(store, tmp_path, keys={b"refused": None, b"new": b"y"})


async def test_while_it_cannot_be_opened_everything_answers_and_it_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await open_store(tmp_path)
    store.keyspace.put(0, b"cached", string(b"c"))
    await store.keyspace.flush()

    def fail(*_: object) -> None:
        raise KvdbError("no such luck")

    with monkeypatch.context() as patch:
        patch.setattr(index_module, "_open_env", fail)
        patch.setattr(index_module, "REOPEN_WAIT_S", 0.01)
        break_meta_writes(tmp_path / "index")
        for _ in range(3):
            store.keyspace.put(0, b"refused", string(b"r"))
            with pytest.raises(MisconfError):
                await store.keyspace.flush()
        assert store.keyspace.get(0, b"refused") == string(b"r")  # as after any failed commit: it is tried again
        assert store.keyspace.get(0, b"cached") == string(b"c")
        with pytest.raises(MisconfError, match="cannot be opened again after a failed write: no such luck"):
            store.keyspace.get(0, b"old")
        with pytest.raises(MisconfError, match="cannot be opened again"):
            store.models()
        with pytest.raises(MisconfError, match="opened again"):
            await asyncio.to_thread(read_models, store._index)
    with pytest.raises(MisconfError):
        await store.keyspace.flush()  # this round still finds it shut, and opens it
    await store.keyspace.flush()
    assert store.write_error is None
    assert len(store.models()) == 1
    await check_whole(store, tmp_path, keys={b"refused": b"r", b"cached": b"c", b"old": b"x" * 2000})


def read_models(index: Index) -> int:
    with index.read() as txn:
        return txn.count(Table.MODELS)


async def test_readers_finish_before_it_is_opened_again_and_later_ones_wait(tmp_path: Path) -> None:
    store = await open_store(tmp_path)
    began, go_on = threading.Event(), threading.Event()

    def read_slowly() -> int:
        with store._index.read() as txn:
            began.set()
            go_on.wait(10)
            return txn.count(Table.MODELS)

    slow = asyncio.create_task(asyncio.to_thread(read_slowly))
    await asyncio.to_thread(began.wait, 10)
    break_meta_writes(tmp_path / "index")
    for _ in range(2):
        store.keyspace.put(0, b"refused", string(b"r"))
        with pytest.raises(MisconfError):
            await store.keyspace.flush()
    late = asyncio.create_task(asyncio.to_thread(read_models, store._index))
    assert len(store.models()) == 1  # this thread reads on
    assert store.keyspace.get(0, b"old") == string(b"x" * 2000)
    with pytest.raises(MisconfError):
        store._index.give_way()
    go_on.set()
    assert await slow == 1
    with pytest.raises(MisconfError):
        await store.keyspace.flush()
    assert await late == 1
    await store.keyspace.flush()
    await check_whole(store, tmp_path, keys={b"refused": b"r"})


async def test_a_commit_that_could_not_be_taken_back_is_not_served(tmp_path: Path) -> None:
    store = await open_store(tmp_path)
    break_meta_writes(tmp_path / "index")
    store._index._newest -= 1  # as if the file's newest commit were the one that is refused now
    store.keyspace.put(0, b"a", string(b"a"))
    with pytest.raises(MisconfError):
        await store.keyspace.flush()
    with pytest.raises(MisconfError, match="restart the daemon"):
        store.keyspace.get(0, b"old")
    with pytest.raises(MisconfError):
        await store.close()
    await check_whole(Store.open(tmp_path, loop=asyncio.get_running_loop()), tmp_path, keys={b"old": b"x" * 2000})


async def test_a_round_ends_whatever_its_refresh_raises(tmp_path: Path) -> None:
    store = await open_store(tmp_path)
    refresh = store._committer._refresh

    def fail() -> None:
        raise RuntimeError("refresh")

    store._committer._refresh = fail
    store.keyspace.put(0, b"a", string(b"a"))
    with pytest.raises(KvdbError, match="refresh"):
        await store.keyspace.flush()
    with pytest.raises(KvdbError, match="refresh"):
        await put_snapshot(store, b"snapshot", tokens(PAGE))
    assert store.keyspace.get(0, b"a") == string(b"a")
    assert store.write_error is not None
    store._committer._refresh = refresh
    store.keyspace.put(0, b"b", string(b"b"))
    await store.keyspace.flush()
    assert store.write_error is None
    await check_whole(store, tmp_path, keys={b"a": b"a", b"b": b"b"})


async def test_the_meta_page_that_lmdb_took_back_is_accepted_and_no_other(tmp_path: Path) -> None:
    store = await open_store(tmp_path)
    path = tmp_path / "index" / "data.mdb"

    def read(offset: int, n_bytes: int) -> bytes:
        return path.read_bytes()[offset : offset + n_bytes]

    _, before = read_metas(read)
    break_meta_writes(tmp_path / "index")
    for number in range(200):
        store.keyspace.put(0, b"refused%d" % number, string(b"r" * 500))  # the file grows
    with pytest.raises(MisconfError):
        await store.keyspace.flush()
    older, newer = read_metas(read)
    assert newer == before
    taken_back = path.read_bytes()
    await store.close()
    assert read_metas(read)[1].txn > newer.txn
    slot, size = older.txn % 2, newer.page_bytes
    meta = taken_back[slot * size :][:152]
    other = taken_back[(1 - slot) * size :][:152]
    assert older.txn == newer.txn - 1 and older.free.root > older.last_page

    def opens(at: int, data: bytes) -> bool:
        changed = bytearray(taken_back)
        changed[at : at + len(data)] = data
        path.write_bytes(changed)
        try:
            Index(tmp_path / "index").close()
        except CorruptError:
            return False
        return True

    def numbered(meta: bytes, number: int) -> bytes:
        return meta[:144] + number.to_bytes(8, "little")

    assert opens(slot * size, meta)
    assert opens(older.main.root * size, os.urandom(size))  # the next commit began to use the pages, and died
    for number in (older.txn - 2, older.txn + 4):
        assert not opens(slot * size, numbered(meta, number))
    # The roots of the newest state under the number of an older one, or the other way round.
    assert not opens(slot * size, meta[:24] + other[24:144] + meta[144:])
    assert not opens((1 - slot) * size, other[:24] + meta[24:144] + other[144:])
