"""The store end to end: what is committed survives, what is deleted is freed, what is damaged is named."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from kvdb.errors import CorruptError, KvdbError, SnapshotGoneError, StalePagesError, WrongModelError
from kvdb.store.entries import Entry, EntryType, SessionValue
from kvdb.store.lookup import Match, longest_prefix
from kvdb.store.read import RecordPlace
from kvdb.store.store import Store
from kvdb_protocol.record import HEADER_BYTES, SEGMENT_HEADER_BYTES, encode_header
from kvdb_protocol.tail import head_bytes
from tests.kvdb.store.states import (
    FAMILY,
    FINGERPRINT,
    MODEL,
    PAGE,
    make_state,
    pack_ids,
    put_snapshot,
    snapshot_entry,
    string,
    tokens,
    write_snapshot,
)


async def open_store(folder: Path) -> Store:
    store = Store.open(folder, loop=asyncio.get_running_loop())
    await store.register_model(MODEL)
    return store


async def kill(store: Store) -> None:
    """End a store as SIGKILL would: nothing that waits is flushed."""
    await store._committer.idle()
    store._release()


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    store = await open_store(tmp_path)
    yield store
    await store.close()


async def test_snapshot_reads_back(store: Store) -> None:
    ids = tokens(3 * PAGE + 5)
    done = await put_snapshot(store, b"k", ids)
    *pages, tail = make_state(ids)
    assert done.pages_new == 3
    assert not done.existed
    assert done.bytes_new == sum(len(record.data) for record in (*pages, tail))
    assert done.bytes_shared == 0
    assert [place.id for place in store.plan(done.id)] == [record.id for record in (*pages, tail)]
    assert await store.token_ids(done.id) == pack_ids(ids)
    read = await store.read_tail(done.id)
    assert read.n_tokens == len(ids)
    assert bytes(read.ids) == pack_ids(ids[3 * PAGE :])
    entry = store.keyspace.get(0, b"k")
    assert entry is not None
    assert entry.value.id == done.id  # type: ignore[union-attr]
    assert store.keys_of(done.id) == [(0, b"k")]


async def test_a_step_writes_only_what_is_new(store: Store) -> None:
    ids = tokens(10 * PAGE)
    first = await put_snapshot(store, b"a", ids[: 9 * PAGE + 3])
    second = await put_snapshot(store, b"b", ids, parent=first.id)
    assert second.pages_new == 1
    assert second.bytes_shared == sum(len(page.data) for page in make_state(ids)[:9])
    assert store.children(first.id) == [second.id]
    assert [record.id for record in store.lineage(second.id)] == [second.id, first.id]
    assert [record.id for record in store.lineage(second.id, 1)] == [second.id]


async def test_the_same_state_is_stored_once(store: Store) -> None:
    ids = tokens(PAGE + 1)
    first = await put_snapshot(store, b"a", ids)
    again = await put_snapshot(store, b"b", ids)
    assert again.existed
    assert again.bytes_new == 0
    assert again.id == first.id
    assert sorted(store.keys_of(first.id)) == [(0, b"a"), (0, b"b")]
    assert store.snapshot(first.id).refs == 2  # type: ignore[union-attr]


async def test_acknowledged_snapshots_survive_a_kill(tmp_path: Path) -> None:
    store = await open_store(tmp_path)
    done = await put_snapshot(store, b"k", tokens(PAGE + 9))
    await kill(store)
    store = await open_store(tmp_path)
    assert await store.token_ids(done.id) == pack_ids(tokens(PAGE + 9))
    await store.close()


async def test_bytes_past_the_committed_length_are_cut(tmp_path: Path) -> None:
    store = await open_store(tmp_path)
    done = await put_snapshot(store, b"k", tokens(PAGE))
    aborted = await write_snapshot(store, tokens(4 * PAGE, seed=1))
    path = aborted.reservation.path
    assert path.stat().st_size > aborted.reservation.offset
    await kill(store)
    store = await open_store(tmp_path)
    assert path.stat().st_size == aborted.reservation.offset
    assert store.plan(done.id)[-1].path == path
    await store.close()


async def test_segments_the_index_does_not_know_are_removed(tmp_path: Path) -> None:
    store = await open_store(tmp_path)
    reservation = await store.reserve("worker", 0)
    await kill(store)
    assert reservation.path.exists()
    store = await open_store(tmp_path)
    assert not reservation.path.exists()
    assert (await store.reserve("worker", 0)).segment_id > reservation.segment_id
    await store.close()


async def test_delete_frees_only_what_nobody_else_reaches(store: Store) -> None:
    ids = tokens(6 * PAGE)
    short = await put_snapshot(store, b"short", ids[: 2 * PAGE])
    long = await put_snapshot(store, b"long", ids)
    before = await store.stats()
    usage = store.usage(long.id)
    assert store.keyspace.delete(0, b"long")
    await store.keyspace.flush()
    after = await store.stats()
    assert before.live - after.live == usage.own_bytes
    assert after.pages == 2
    assert after.dead == before.dead + usage.own_bytes
    await store.gc()
    assert await store.token_ids(short.id) == pack_ids(ids[: 2 * PAGE])
    with pytest.raises(SnapshotGoneError):
        store.plan(long.id)


async def test_freed_bytes_are_punched(store: Store) -> None:
    await put_snapshot(store, b"keep", tokens(1))
    await put_snapshot(store, b"k", tokens(20 * PAGE, seed=3))
    before = await store.stats()
    store.keyspace.delete(0, b"k")
    await store.keyspace.flush()
    await store.gc()  # runs after the punching of the round before
    await store.gc()
    after = await store.stats()
    assert after.segments_disk <= before.segments_disk - (before.live - after.live)


async def test_an_empty_segment_is_unlinked_once_nobody_writes_to_it(tmp_path: Path) -> None:
    store = await open_store(tmp_path)
    await put_snapshot(store, b"k", tokens(PAGE))
    store.keyspace.delete(0, b"k")
    await store.close()
    assert len(list((tmp_path / "segments").iterdir())) == 1
    store = await open_store(tmp_path)
    store._segments._spare.clear()
    await store.gc()
    await store.close()
    assert list((tmp_path / "segments").iterdir()) == []


async def test_deleting_and_naming_again_in_one_round_keeps_the_snapshot(store: Store) -> None:
    done = await put_snapshot(store, b"k", tokens(PAGE))
    assert store.keyspace.rename(0, b"k", b"l")
    await store.keyspace.flush()
    assert store.snapshot(done.id).refs == 1  # type: ignore[union-attr]
    assert store.keys_of(done.id) == [(0, b"l")]


async def test_a_held_snapshot_is_freed_after_its_readers(store: Store) -> None:
    done = await put_snapshot(store, b"k", tokens(PAGE))
    with store.hold(done.id):
        store.keyspace.delete(0, b"k")
        await store.keyspace.flush()
        assert await store.token_ids(done.id) == pack_ids(tokens(PAGE))
    await store._committer.idle()
    assert store.snapshot(done.id) is None


async def test_a_snapshot_that_waited_for_its_reader_is_freed_after_a_crash(tmp_path: Path) -> None:
    store = await open_store(tmp_path)
    done = await put_snapshot(store, b"k", tokens(PAGE))
    store._holds.hold(done.id)
    store.keyspace.delete(0, b"k")
    await store.keyspace.flush()
    await kill(store)
    store = await open_store(tmp_path)
    await store._committer.idle()
    assert store.snapshot(done.id) is None
    await store.close()


async def test_skipped_pages_that_were_freed_meanwhile_are_stale(store: Store) -> None:
    ids = tokens(2 * PAGE + 1)
    await put_snapshot(store, b"k", ids[: 2 * PAGE])
    new = await write_snapshot(store, ids)
    store.keyspace.delete(0, b"k")
    await store.keyspace.flush()
    with pytest.raises(StalePagesError):
        await store.commit_snapshot(new, key=(0, b"l"), entry=snapshot_entry(new.id))
    assert store.keyspace.get(0, b"l") is None
    again = await put_snapshot(store, b"l", ids)
    assert again.pages_new == 2


async def test_one_bad_item_does_not_fail_its_round(store: Store) -> None:
    good = await write_snapshot(store, tokens(PAGE), writer="one")
    bad = await write_snapshot(store, tokens(PAGE, seed=2), writer="two", known=[[make_state(tokens(PAGE, 2))[0].id]])
    results = await asyncio.gather(
        store.commit_snapshot(bad, key=(0, b"bad"), entry=snapshot_entry(bad.id)),
        store.commit_snapshot(good, key=(0, b"good"), entry=snapshot_entry(good.id)),
        return_exceptions=True,
    )
    assert isinstance(results[0], StalePagesError)
    assert store.keyspace.get(0, b"bad") is None
    assert store.keyspace.get(0, b"good") is not None


async def test_unregistered_models_are_refused(store: Store) -> None:
    with pytest.raises(WrongModelError):
        store.known_pages(b"x" * 32, [])
    new = await write_snapshot(store, tokens(3))
    from dataclasses import replace

    with pytest.raises(WrongModelError):
        await store.commit_snapshot(replace(new, fingerprint=b"x" * 32))


async def test_a_cached_snapshot_stays_until_it_is_dropped(store: Store) -> None:
    new = await write_snapshot(store, tokens(PAGE))
    await store.commit_snapshot(new)
    assert store.snapshot(new.id).is_cached  # type: ignore[union-attr]
    assert await store.drop_cached(new.id)
    assert store.snapshot(new.id) is None
    assert not await store.drop_cached(new.id)


async def test_a_second_daemon_is_refused(store: Store, tmp_path: Path) -> None:
    with pytest.raises(KvdbError, match="in use by process"):
        Store.open(tmp_path, loop=asyncio.get_running_loop())


def flip(place: RecordPlace, at: int) -> None:
    with place.path.open("r+b") as file:
        file.seek(place.offset + at)
        byte = file.read(1)[0]
        file.seek(place.offset + at)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("has_head", [True, False])
async def test_a_tails_head_is_read_alone(store: Store, monkeypatch: pytest.MonkeyPatch, has_head: bool) -> None:
    if not has_head:  # as records were written before they had heads
        monkeypatch.setattr("tests.kvdb.store.states.state_header", encode_header)
    done = await put_snapshot(store, b"k", tokens(PAGE + 9))
    place = store.plan(done.id)[-1]
    before = await store.read_tail(done.id)
    assert before.ids == pack_ids(tokens(PAGE + 9)[PAGE:])
    flip(place, HEADER_BYTES + place.payload_bytes - 1)  # of the last row
    with pytest.raises(CorruptError):
        await store.check([place])
    if has_head:
        assert await store.read_tail(done.id) == before
        flip(place, HEADER_BYTES + head_bytes([make_state(tokens(PAGE + 9))[-1].payload]) - 1)  # of the last logit
    with pytest.raises(CorruptError, match=f"tail .* in {place.path.name} at {place.offset}.*checksum"):
        await store.read_tail(done.id)


@pytest.mark.parametrize("where", ["page", "tail"])
async def test_a_flipped_byte_is_named_and_other_keys_serve(store: Store, where: str) -> None:
    bad = await put_snapshot(store, b"bad", tokens(2 * PAGE + 3))
    good = await put_snapshot(store, b"good", tokens(2 * PAGE + 3, seed=1))
    place = store.plan(bad.id)[0 if where == "page" else -1]
    flip(place, 200)
    with pytest.raises(CorruptError, match=f"{where} .* in {place.path.name} at {place.offset}"):
        await store.check(store.plan(bad.id))
    with pytest.raises(CorruptError):
        await store.token_ids(bad.id)
    assert await store.token_ids(good.id) == pack_ids(tokens(2 * PAGE + 3, seed=1))


async def test_missing_and_short_segments_are_corrupt_not_fatal(tmp_path: Path) -> None:
    store = await open_store(tmp_path)
    gone = await put_snapshot(store, b"gone", tokens(PAGE), writer="one")
    short = await put_snapshot(store, b"short", tokens(PAGE, seed=1), writer="two")
    paths = [store.plan(done.id)[-1].path for done in (gone, short)]
    await store.close()
    paths[0].unlink()
    with paths[1].open("r+b") as file:
        file.truncate(SEGMENT_HEADER_BYTES + 100)
    store = await open_store(tmp_path)
    assert len(store.problems) == 2
    for done in (gone, short):
        with pytest.raises(CorruptError):
            await store.read_tail(done.id)
    assert await store.token_ids((await put_snapshot(store, b"new", tokens(7))).id) == pack_ids(tokens(7))
    await store.close()


async def test_a_session_moves_to_its_new_snapshot(store: Store) -> None:
    uid = b"u" * 16
    ids = tokens(PAGE + 4)
    store.keyspace.put(0, b"s", Entry(EntryType.SESSION, 0, SessionValue(uid, FINGERPRINT)))
    store.keyspace.journal_append(uid, 0, pack_ids(ids))
    new = await write_snapshot(store, ids)
    done = await store.commit_snapshot(new, session_uid=uid)
    entry = store.keyspace.typed(0, b"s", EntryType.SESSION)
    assert entry is not None
    assert entry.value == SessionValue(uid, FINGERPRINT, new.id, len(ids), new.id)
    assert store.keyspace.journal_read(uid) == (0, b"")
    await store.keyspace.flush()
    assert store.snapshot(new.id).refs == 1  # type: ignore[union-attr]
    store.keyspace.delete(0, b"s")
    await store.keyspace.flush()
    assert not store.has_snapshot(done.id), "its session was its only name"


async def test_a_session_that_is_gone_gets_no_snapshot(store: Store) -> None:
    new = await write_snapshot(store, tokens(PAGE + 4))
    with pytest.raises(SnapshotGoneError, match="deleted while it was stored"):
        await store.commit_snapshot(new, session_uid=b"u" * 16)
    assert not store.has_snapshot(new.id)


async def test_the_longest_prefix_wins(store: Store) -> None:
    ids = tokens(5 * PAGE)
    for n in (3, PAGE, PAGE + 7, 3 * PAGE + 1):
        await put_snapshot(store, b"k%d" % n, ids[:n])
    await put_snapshot(store, b"other", [*ids[: 3 * PAGE], 1, 2, 3, 4])

    async def longest(prompt: list[int]) -> int:
        match = await store.longest_prefix(FAMILY, FINGERPRINT, pack_ids(prompt), cross_quant=True)
        return match.n_tokens if match else 0

    assert await longest(ids) == 3 * PAGE + 1
    assert await longest(ids[: 3 * PAGE]) == PAGE + 7
    assert await longest(ids[: PAGE + 6]) == PAGE
    assert await longest(ids[:PAGE]) == PAGE
    assert await longest(ids[: PAGE - 1]) == 3
    assert await longest(ids[:2]) == 0
    assert await longest([*ids[:10], 63, *ids[11:]]) == 3
    assert await longest([]) == 0


class Stopping:
    """The search of the store stops when it has found something, until it may go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.has_found, self.may_go_on = threading.Event(), threading.Event()
        monkeypatch.setattr("kvdb.store.matches.longest_prefix", self.search)
        monkeypatch.setattr("kvdb.store.matches.IN_THREAD_BYTES", 0)

    def search(self, *args: object) -> Match | None:
        match = longest_prefix(*args)  # type: ignore[arg-type]
        self.has_found.set()
        assert self.may_go_on.wait(10)
        return match

    async def reached(self) -> None:
        while not self.has_found.is_set():
            await asyncio.sleep(0.001)


async def find(store: Store, ids: list[int]) -> int:
    match = await store.longest_prefix(FAMILY, FINGERPRINT, pack_ids(ids), cross_quant=True)
    return match.n_tokens if match else 0


async def test_nobody_waits_for_the_lookup_of_a_long_prompt(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = tokens(2 * PAGE)
    await put_snapshot(store, b"k", ids)
    stopping = Stopping(monkeypatch)
    task = asyncio.create_task(find(store, ids))
    await stopping.reached()
    await put_snapshot(store, b"l", ids[:PAGE])
    assert not task.done()
    stopping.may_go_on.set()
    assert await task == 2 * PAGE


async def test_a_lookup_that_ends_after_the_store_finds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store.open(tmp_path / "other", loop=asyncio.get_running_loop())
    await store.register_model(MODEL)
    ids = tokens(2 * PAGE)
    await put_snapshot(store, b"k", ids)
    stopping = Stopping(monkeypatch)
    task = asyncio.create_task(find(store, ids))
    await stopping.reached()
    threading.Timer(0.2, stopping.may_go_on.set).start()
    await store.close()
    assert await task == 0


async def test_what_is_freed_between_lookup_and_hold_is_not_found(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = tokens(2 * PAGE)
    await put_snapshot(store, b"long", ids)
    await put_snapshot(store, b"short", ids[: PAGE + 3])
    stopping = Stopping(monkeypatch)
    task = asyncio.create_task(find(store, ids))
    await stopping.reached()
    store.keyspace.delete(0, b"long")
    await store.keyspace.flush()
    stopping.may_go_on.set()
    assert await task == PAGE + 3
    assert len(store._holds.held()) == 1


async def test_expired_snapshots_are_freed(store: Store) -> None:
    new = await write_snapshot(store, tokens(PAGE))
    await store.commit_snapshot(new, key=(0, b"k"), entry=snapshot_entry(new.id, expire_ms=1))
    assert store.keyspace.get(0, b"k") is None
    await store.keyspace.flush()
    assert store.snapshot(new.id) is None


async def test_order_of_keys_and_snapshots_is_kept(store: Store) -> None:
    store.keyspace.put(0, b"k", string(b"old"))
    done = await put_snapshot(store, b"k", tokens(3))
    entry = store.keyspace.get(0, b"k")
    assert entry is not None
    assert entry.type is EntryType.SNAPSHOT
    store.keyspace.put(0, b"k", string(b"new"))
    await store.keyspace.flush()
    assert store.keyspace.get(0, b"k") == string(b"new")
    assert store.snapshot(done.id) is None
