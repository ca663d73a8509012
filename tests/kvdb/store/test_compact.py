"""Compaction moves live records, loses none, and waits for those who read the old places."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from kvdb.store import compact, segments
from kvdb.store.store import Store
from kvdb.store.verify import verify
from tests.kvdb.store.states import MODEL, PAGE, pack_ids, put_snapshot, snapshot_entry, tokens, write_snapshot


@pytest.fixture(autouse=True)
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "SEGMENT_BYTES", 400_000)
    monkeypatch.setattr(compact, "BATCH_BYTES", 100_000)


async def sparse_store(folder: Path) -> tuple[Store, dict[bytes, list[int]]]:
    """Some segments, most of which hold one snapshot of five that were there."""
    store = Store.open(folder, loop=asyncio.get_running_loop())
    await store.register_model(MODEL)
    kept = {}
    for number in range(20):
        ids = tokens(2 * PAGE + 3, seed=number)
        await put_snapshot(store, b"k%d" % number, ids)
        if number % 5:
            store.keyspace.delete(0, b"k%d" % number)
        else:
            kept[b"k%d" % number] = ids
    await store.keyspace.flush()
    return store, kept


async def check(store: Store, kept: dict[bytes, list[int]]) -> None:
    for key, ids in kept.items():
        entry = store.keyspace.get(0, key)
        assert entry is not None
        assert await store.token_ids(entry.value.id) == pack_ids(ids)  # type: ignore[union-attr]
        await store.check(store.plan(entry.value.id))  # type: ignore[union-attr]
    assert list(verify(store._index, store._segments.folder, store._files, deep=True)) == []


def files_of(folder: Path) -> set[str]:
    return {path.name for path in (folder / "segments").iterdir()}


async def test_compaction(tmp_path: Path) -> None:
    store, kept = await sparse_store(tmp_path)
    before = await store.stats()
    moved, removed = await store.compact()
    await store.gc()
    await store.gc()  # runs after the files of the round before are gone
    after = await store.stats()
    assert removed >= 2
    assert moved > 0
    assert after.live == before.live
    assert after.segments < before.segments
    assert after.dead < before.dead
    await check(store, kept)
    await store.close()
    store = Store.open(tmp_path, loop=asyncio.get_running_loop())
    assert store.problems == []
    await check(store, kept)
    assert await store.compact() == (0, 0)
    await store.close()


async def test_old_places_stay_readable_while_they_are_held(tmp_path: Path) -> None:
    store, kept = await sparse_store(tmp_path)
    entry = store.keyspace.get(0, b"k5")
    assert entry is not None
    snapshot_id = entry.value.id  # type: ignore[union-attr]
    files = files_of(tmp_path)
    with store.hold(snapshot_id):
        old = store.plan(snapshot_id)
        await store.compact()
        await store.gc()
        await store.gc()
        assert store.plan(snapshot_id) != old
        await store.check(old)
        assert files_of(tmp_path) >= files
    await store.gc()
    await store.gc()
    assert old[0].path.name not in files_of(tmp_path)
    await check(store, kept)
    await store.close()


async def test_a_crash_before_the_old_files_are_removed(tmp_path: Path) -> None:
    store, kept = await sparse_store(tmp_path)
    entry = store.keyspace.get(0, b"k5")
    assert entry is not None
    store._holds.hold(entry.value.id)  # type: ignore[union-attr]
    await store.compact()
    await store._committer.idle()
    store._release()
    n_files = len(files_of(tmp_path))
    store = Store.open(tmp_path, loop=asyncio.get_running_loop())
    await check(store, kept)
    await store.gc()
    await store.gc()
    assert len(files_of(tmp_path)) < n_files
    await check(store, kept)
    await store.close()


async def test_deleting_while_records_move(tmp_path: Path) -> None:
    store, kept = await sparse_store(tmp_path)
    moving = asyncio.ensure_future(store.compact())
    await asyncio.sleep(0)
    store.keyspace.delete(0, b"k5")
    del kept[b"k5"]
    await moving
    await store.keyspace.flush()
    await check(store, kept)
    await store.close()


async def test_a_damaged_segment_is_left_alone(tmp_path: Path) -> None:
    store, kept = await sparse_store(tmp_path)
    entry = store.keyspace.get(0, b"k5")
    assert entry is not None
    place = store.plan(entry.value.id)[0]  # type: ignore[union-attr]
    with place.path.open("r+b") as file:
        file.seek(place.offset + 300)
        file.write(b"\xff\x00\xff")
    await store.compact()
    assert store.plan(entry.value.id)[0] == place  # type: ignore[union-attr]
    del kept[b"k5"]
    (finding,) = verify(store._index, store._segments.folder, store._files, deep=True)
    assert finding.keys == ((0, b"k5"),)
    await store.close()


async def test_records_that_are_stored_already_are_given_back_at_once(tmp_path: Path) -> None:
    store = Store.open(tmp_path, loop=asyncio.get_running_loop())
    await store.register_model(MODEL)
    await put_snapshot(store, b"a", tokens(4 * PAGE + 5))
    before = (await store.stats()).segments_disk
    for number in range(3):  # by a writer that knows of none of the pages; the last time with another tail
        again = await put_snapshot(
            store, b"b%d" % number, tokens(4 * PAGE + 5), known=[[]] * 4, salt=b"x" * (number // 2)
        )
        assert again.existed == (number < 2) and again.pages_new == 0
    await store._committer.flush()  # in the same thread, behind what gives their bytes back
    await store._committer.idle()
    store._segments.tidy()
    assert (await store.stats()).segments_disk - before <= again.bytes_new
    await store.close()


async def test_a_snapshot_that_waits_for_room_is_not_collected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.open(tmp_path, loop=asyncio.get_running_loop())
    await store.register_model(MODEL)
    there_is_room = asyncio.Event()

    async def make_room(_n_bytes: int) -> None:
        await there_is_room.wait()

    kept = {b"slow": tokens(2 * PAGE + 3, seed=1), b"quick": tokens(PAGE + 5, seed=2)}
    new = await write_snapshot(store, kept[b"slow"])
    with monkeypatch.context() as patch:
        patch.setattr(store.budget, "excess", lambda _n_bytes: 1)
        patch.setattr(store.budget, "make_room", make_room)
        slow = asyncio.ensure_future(store.commit_snapshot(new, key=(0, b"slow"), entry=snapshot_entry(new.id)))
        await asyncio.sleep(0)
    await put_snapshot(store, b"quick", kept[b"quick"])  # the same writer: behind the record that waits
    await store.gc()
    await store.gc()
    there_is_room.set()
    await asyncio.sleep(0)
    await asyncio.gather(slow, store.gc())  # a collection in the round that commits it, too
    await store.gc()
    await check(store, kept)
    await store.close()
    store = Store.open(tmp_path, loop=asyncio.get_running_loop())
    await check(store, kept)
    await store.close()
