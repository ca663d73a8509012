"""Strings received straight into segments: kept, shared, given back, and what happens when the disk fails them."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgpack
import pytest

from kvdb.errors import KvdbError, MisconfError, NoSpaceError
from kvdb.store.entries import PIECE_BYTES, Entry, EntryType, HeldString, StringRef, decode_entry, encode_entry
from kvdb.store.files import OsFiles
from kvdb.store.index import Index, Table
from kvdb.store.pins import Pins
from kvdb.store.receive import IDLE_WRITERS
from kvdb.store.store import Store
from kvdb.store.verify import verify
from kvdb.store.work import Extent
from kvdb_protocol.record import record_bytes
from tests.kvdb.store.faults import FailingFiles
from tests.kvdb.store.states import MODEL, PAGE, put_snapshot, read_entry, receive, string, tokens

BIG = os.urandom(3 * PIECE_BYTES + 77)
OTHER = os.urandom(2 * PIECE_BYTES)


async def open_store(folder: Path, files: FailingFiles | None = None) -> Store:
    store = Store.open(folder, loop=asyncio.get_running_loop(), files=files)
    await store.register_model(MODEL)
    return store


def findings(folder: Path) -> list[object]:
    index = Index(folder / "index")
    found = list(verify(index, folder / "segments", OsFiles(), deep=True))
    index.close()
    return list(found)


async def put(store: Store, key: bytes, value: bytes, *, is_urgent: bool = False) -> None:
    store.keyspace.put(0, key, Entry(EntryType.STRING, 0, await receive(store, value, is_urgent=is_urgent)))


sooner_or_later = pytest.mark.parametrize("is_urgent", [False, True])


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    store = await open_store(tmp_path)
    yield store
    await store.close()
    assert findings(tmp_path) == []


@pytest.mark.parametrize("n_bytes", [1, PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1, 5 * PIECE_BYTES])
@pytest.mark.parametrize("piece_bytes", [65_537, PIECE_BYTES, 3 * PIECE_BYTES])
async def test_any_length_in_any_pieces(store: Store, n_bytes: int, piece_bytes: int) -> None:
    value = (BIG * 2)[:n_bytes]
    held = await receive(store, value, piece_bytes)
    assert store.strings.read(held) == value
    store.keyspace.put(0, b"k", Entry(EntryType.STRING, 0, held))
    del held
    await store.keyspace.flush()
    entry = store.keyspace.get(0, b"k")
    assert entry is not None and isinstance(entry.value, StringRef)
    assert len(entry.value.crcs) == (0 if n_bytes <= PIECE_BYTES else 4 * -(-n_bytes // PIECE_BYTES))
    assert store.strings.read(entry.value) == value
    for start, stop in (
        (0, 1),
        (n_bytes // 2, n_bytes),
        (n_bytes - 1, n_bytes + 5),
        (PIECE_BYTES - 1, PIECE_BYTES + 2),
    ):
        assert store.strings.read(entry.value, start, stop) == value[start:stop]


async def test_expire_rename_copy_move_no_bytes(tmp_path: Path) -> None:
    files = FailingFiles()
    store = await open_store(tmp_path, files)
    await put(store, b"k", BIG)
    await store.keyspace.flush()
    files.calls.clear()
    store.keyspace.expire_at(0, b"k", 1 << 42)
    await store.keyspace.flush()
    store.keyspace.rename(0, b"k", b"l")
    await store.keyspace.flush()
    for number in range(3):
        entry = store.keyspace.get(0, b"l")
        assert entry is not None
        store.keyspace.put(number, b"copy", store.keyspace.held(entry))
        await store.keyspace.flush()
    assert "write" not in files.calls and "read" not in files.calls
    assert (await store.stats()).strings == record_bytes(len(BIG))
    store.keyspace.delete(0, b"l")
    store.keyspace.clear(0)
    await store.keyspace.flush()
    await store.gc()
    for db in (1, 2):
        assert read_entry(store, b"copy", db) == string(BIG, expire_ms=1 << 42)
    await store.close()
    assert findings(tmp_path) == []
    store = await open_store(tmp_path)
    assert read_entry(store, b"copy", 1) == string(BIG, expire_ms=1 << 42)
    store.keyspace.delete(1, b"copy")
    store.keyspace.delete(2, b"copy")
    await store.keyspace.flush()
    assert (await store.stats()).strings == 0
    await store.close()
    assert findings(tmp_path) == []


async def test_what_nobody_wants_is_given_back(store: Store) -> None:
    await put(store, b"k", BIG)
    for _ in range(5):
        await receive(store, OTHER)  # complete, and dropped
        incoming = await store.receiver.begin(len(OTHER))
        await incoming.write([OTHER[:100_000]])
        await incoming.abandon()
        store.keyspace.put(0, b"n", string(b"x"))
        await store.keyspace.flush()
        await store.gc()
    await store.gc()
    assert read_entry(store, b"k") == string(BIG)
    assert (await store.stats()).segments_disk < record_bytes(len(BIG)) + 64_000


async def test_one_that_waits_for_its_commit_is_no_garbage(store: Store) -> None:
    waits = await receive(store, BIG)
    await put(store, b"later", OTHER)  # behind it in the same segment
    await store.keyspace.flush()
    await store.gc()
    await store.gc()
    assert store.strings.read(waits) == BIG
    store.keyspace.put(0, b"k", Entry(EntryType.STRING, 0, waits))
    del waits
    await store.keyspace.flush()
    await store.gc()
    assert read_entry(store, b"k") == string(BIG)


async def test_many_at_a_time_leave_few_open_segments(store: Store) -> None:
    values = [os.urandom(100_000) for _ in range(3 * IDLE_WRITERS)]
    await asyncio.gather(*(put(store, b"%d" % number, value) for number, value in enumerate(values)))
    await store.keyspace.flush()
    assert [read_entry(store, b"%d" % number) for number in range(len(values))] == [string(value) for value in values]
    gc.collect()
    await store.keyspace.flush()
    assert len(store._segments._active) <= IDLE_WRITERS + 1


async def test_many_that_are_broken_off_leave_no_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = FailingFiles()
    store = await open_store(tmp_path, files)
    await put(store, b"k", BIG)
    await store.keyspace.flush()
    uploads = [await store.receiver.begin(len(OTHER)) for _ in range(3 * IDLE_WRITERS)]
    for number, incoming in enumerate(uploads):
        if number % 2:
            await incoming.write([OTHER[:100_000]])
    for incoming in uploads:
        await incoming.abandon()
    await store.keyspace.flush()
    await store.gc()
    await store._committer.idle()
    store._segments.tidy()
    assert len(list((tmp_path / "segments").iterdir())) == store._segments._n_files == IDLE_WRITERS
    store._segments.tidy([], [99])  # it is gone already
    assert store._segments._n_files == IDLE_WRITERS and "could not give back" not in caplog.text
    await put(store, b"l", OTHER)
    await store.close()
    assert findings(tmp_path) == []
    store = await open_store(tmp_path)
    assert read_entry(store, b"k") == string(BIG) and read_entry(store, b"l") == string(OTHER)
    await store.close()


async def test_a_snapshot_takes_the_key_of_one_that_is_renamed_meanwhile(store: Store) -> None:
    await put(store, b"k", BIG)
    await store.keyspace.flush()
    taken = asyncio.create_task(put_snapshot(store, b"k", tokens(PAGE)))
    while store._committer._running is None:
        await asyncio.sleep(0)
    await asyncio.sleep(0)
    store.keyspace.rename(0, b"k", b"l")
    await taken
    await store.keyspace.flush()
    await store.gc()
    assert read_entry(store, b"l") == string(BIG)


@pytest.mark.parametrize("call", ["open", "write", "create"])
async def test_a_full_disk_refuses_the_string_only(tmp_path: Path, call: str) -> None:
    files = FailingFiles()
    store = await open_store(tmp_path, files)
    await put(store, b"old", OTHER) if call != "create" else None
    await store.keyspace.flush()
    files.fail(call, code=errno.ENOSPC)
    with pytest.raises(NoSpaceError):
        await receive(store, BIG)
    files.heal()
    await put(store, b"k", BIG)
    await store.keyspace.flush()
    assert read_entry(store, b"k") == string(BIG)
    await store.close()
    assert findings(tmp_path) == []


@sooner_or_later
async def test_a_failed_sync_is_reported_and_the_string_is_saved_elsewhere(tmp_path: Path, is_urgent: bool) -> None:
    files = FailingFiles()
    store = await open_store(tmp_path, files)
    await put(store, b"k", OTHER)
    await store.keyspace.flush()
    files.fail("datasync", times=1)
    await put(store, b"k", BIG, is_urgent=is_urgent)
    await store.keyspace.flush()  # the bytes were still there: written again, elsewhere, and synced
    assert sorted(store._segments._abandoned) == [1]
    entry = store.keyspace.get(0, b"k")
    assert entry is not None and isinstance(entry.value, StringRef) and entry.value.segment == 2
    assert read_entry(store, b"k") == string(BIG)
    await put(store, b"l", OTHER)
    await store.close()
    assert findings(tmp_path) == []
    store = await open_store(tmp_path)
    assert read_entry(store, b"k") == string(BIG) and read_entry(store, b"l") == string(OTHER)
    await store.close()


class DroppingFiles(FailingFiles):
    """After a failed sync the bytes that were to be synced are gone, as a kernel may have it."""

    def datasync(self, fd: int) -> None:
        try:
            super().datasync(fd)
        except OSError:
            os.pwrite(fd, bytes(1000), os.fstat(fd).st_size - 200_000)
            raise


@sooner_or_later
async def test_a_string_that_a_failed_sync_lost_leaves_the_old_value(tmp_path: Path, is_urgent: bool) -> None:
    files = DroppingFiles()
    store = await open_store(tmp_path, files)
    await put(store, b"k", OTHER)
    await store.keyspace.flush()
    files.fail("datasync", times=1)
    await put(store, b"k", BIG, is_urgent=is_urgent)
    store.keyspace.put(0, b"small", string(b"x"))
    with pytest.raises(MisconfError, match="lost by a failed sync"):
        await store.keyspace.flush()
    assert read_entry(store, b"k") == string(OTHER)
    assert read_entry(store, b"small") == string(b"x")
    await store.keyspace.flush()
    await store.close()
    assert findings(tmp_path) == []


class SlowFiles(FailingFiles):
    """A sync takes until it is allowed to end."""

    def __init__(self) -> None:
        super().__init__()
        self.may_end = threading.Event()
        self.may_end.set()

    def datasync(self, fd: int) -> None:
        super().datasync(fd)
        assert self.may_end.wait(10)


async def test_an_urgent_string_is_synced_once_and_before_its_commit(tmp_path: Path) -> None:
    files = SlowFiles()
    store = await open_store(tmp_path, files)
    await put(store, b"first", OTHER)
    await store.keyspace.flush()
    files.calls.clear()
    files.may_end.clear()
    await put(store, b"k", BIG, is_urgent=True)
    durable = asyncio.ensure_future(store.keyspace.flush())
    await asyncio.sleep(0.1)
    assert "commit" not in files.calls and not durable.done()
    files.may_end.set()
    await durable
    assert [call for call in files.calls if call in ("datasync", "commit")] == ["datasync", "commit"]
    assert read_entry(store, b"k") == string(BIG)
    await store.close()
    assert findings(tmp_path) == []


class GatedFiles(FailingFiles):
    """The next sync waits until it is let go, and then does what it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.entered, self.may_end = threading.Event(), threading.Event()
        self.then: Callable[[], None] | None = None

    def datasync(self, fd: int) -> None:
        then, self.then = self.then, None
        if then is not None:
            self.entered.set()
            assert self.may_end.wait(10)
            then()
        super().datasync(fd)

    async def reached(self) -> None:
        while not self.entered.is_set():
            await asyncio.sleep(0.001)


def fail_late() -> None:
    raise OSError(errno.EIO, "late")


async def test_a_sync_that_fails_while_the_round_waits_for_it(tmp_path: Path) -> None:
    files = GatedFiles()
    store = await open_store(tmp_path, files)
    await put(store, b"k", OTHER)
    await store.keyspace.flush()
    files.then = fail_late
    held = await receive(store, BIG, is_urgent=True)
    for db in (0, 1):  # as COPY shares it
        store.keyspace.put(db, b"k", Entry(EntryType.STRING, 0, held))
    await files.reached()
    durable = asyncio.ensure_future(store.keyspace.flush())
    await asyncio.sleep(0.1)
    store.keyspace.put(2, b"k", Entry(EntryType.STRING, 0, held))
    del held
    files.may_end.set()
    await durable
    await store.keyspace.flush()
    assert [read_entry(store, b"k", db) for db in range(3)] == 3 * [string(BIG)]
    assert store._segments._abandoned
    await store.close()
    assert findings(tmp_path) == []


async def test_the_error_of_one_string_told_to_the_sync_of_another_loses_neither(tmp_path: Path) -> None:
    """Linux tells an error of writing back once a descriptor: the second sync of a segment may get the first one's."""
    files = GatedFiles()
    store = await open_store(tmp_path, files)
    await put(store, b"old", OTHER)
    await store.keyspace.flush()
    first = await receive(store, BIG)
    assert first.ref is not None
    path, at = store._segments.path(first.ref.segment), first.ref.offset + 4096

    def lose_first() -> None:
        fd = os.open(path, os.O_WRONLY)
        os.pwrite(fd, bytes(4096), at)
        os.close(fd)
        fail_late()

    files.then = lose_first
    second = await receive(store, OTHER, is_urgent=True)  # behind it in the same segment
    assert second.ref is not None and second.ref.segment == first.ref.segment
    await files.reached()
    store.keyspace.put(0, b"first", Entry(EntryType.STRING, 0, first))
    del first
    durable = asyncio.ensure_future(store.keyspace.flush())
    await asyncio.sleep(0.1)
    assert not durable.done()  # nor has it asked the kernel, which would say that all is well by now
    files.may_end.set()
    with pytest.raises(MisconfError, match="lost by a failed sync"):
        await durable
    assert store.keyspace.get(0, b"first") is None
    store.keyspace.put(0, b"second", Entry(EntryType.STRING, 0, second))
    del second
    await store.keyspace.flush()
    assert read_entry(store, b"second") == string(OTHER)
    await store.close()
    assert findings(tmp_path) == []


async def test_a_failed_sync_leaves_nothing_behind(tmp_path: Path) -> None:
    """Without the collector: an exception that is kept would keep the string, its range and its segment's file."""
    files = FailingFiles()
    store = await open_store(tmp_path, files)
    await put(store, b"k", OTHER)
    await store.keyspace.flush()
    gc.collect()
    gc.disable()
    try:
        files.fail("datasync", times=1)
        await put(store, b"k", BIG, is_urgent=True)
        await store.keyspace.flush()
        store.keyspace.delete(0, b"k")
        await store.keyspace.flush()
        await store.keyspace.flush()
        assert not store._segments._due
    finally:
        gc.enable()
    await store.close()
    assert findings(tmp_path) == []


async def test_a_sync_without_memory_is_a_failed_sync(tmp_path: Path) -> None:
    files = GatedFiles()
    store = await open_store(tmp_path, files)
    await put(store, b"k", OTHER)
    await store.keyspace.flush()

    def no_memory() -> None:
        raise MemoryError

    files.then = no_memory
    files.may_end.set()
    await put(store, b"k", BIG, is_urgent=True)
    await files.reached()
    await asyncio.wait_for(store.keyspace.flush(), 10)
    assert store._segments._abandoned and read_entry(store, b"k") == string(BIG)
    await store.close()
    assert findings(tmp_path) == []


async def test_strings_that_wait_for_one_sync_share_the_next(tmp_path: Path) -> None:
    files = GatedFiles()
    store = await open_store(tmp_path, files)
    await put(store, b"a", OTHER)
    await store.keyspace.flush()
    files.then = lambda: None
    await put(store, b"a", BIG, is_urgent=True)
    await files.reached()
    files.calls.clear()
    for key in (b"b", b"c", b"d"):  # behind it in the same segment, each in a thread of its own
        await put(store, key, OTHER, is_urgent=True)
    await asyncio.sleep(0.05)
    files.may_end.set()
    await store.keyspace.flush()
    before_commit = files.calls[: files.calls.index("commit")]
    assert before_commit.count("datasync") == 2, "the first one, and one for the three that came meanwhile"
    assert all(read_entry(store, key) == string(OTHER) for key in (b"b", b"c", b"d"))
    await store.close()
    assert findings(tmp_path) == []


async def test_a_sync_that_fails_while_it_comes_in_refuses_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvdb.store.receive.SYNC_BYTES", 200_000)
    files = FailingFiles()
    store = await open_store(tmp_path, files)
    await put(store, b"k", OTHER)
    files.fail("datasync", times=1)
    with pytest.raises(KvdbError, match="receiving a string"):
        await receive(store, BIG)
    await store.keyspace.flush()
    assert read_entry(store, b"k") == string(OTHER)
    await put(store, b"l", BIG)
    await store.close()
    assert findings(tmp_path) == []


async def test_entries_of_older_versions_are_read(store: Store) -> None:
    await put(store, b"k", BIG)
    await store.keyspace.flush()
    entry = store.keyspace.get(0, b"k")
    assert entry is not None and isinstance(entry.value, StringRef)
    old = entry._replace(value=entry.value._replace(crcs=b""))
    row = msgpack.packb([1, 0, list(entry.value[:4])])
    assert decode_entry(row) == old and decode_entry(encode_entry(b"k", entry)) == entry
    assert store.strings.read(old.value) == BIG  # type: ignore[arg-type]
    assert store.strings.read(old.value, 5, PIECE_BYTES + 5) == BIG[5 : PIECE_BYTES + 5]  # type: ignore[arg-type]
    reader = await store.strings.open(old.value)  # type: ignore[arg-type]
    found = bytearray(len(BIG) + 2 * PIECE_BYTES)
    at = 0
    while at < len(BIG):  # by whole pieces, as many as fit
        room = memoryview(found)[at : at + 2 * PIECE_BYTES + 5]
        at += reader.read_cached(at, room) or await store.strings.read_into(reader, at, room)
    reader.close()
    assert found[: len(BIG)] == BIG
    with store._index.read() as txn:
        assert txn.count(Table.PLACES) == 1


def test_pins() -> None:
    pins = Pins()
    one, two = Extent(1, 4096, 4096), Extent(1, 8192, 4096)
    first, second = pins.hold(one), pins.hold(one)
    assert pins.sort([one, two, Extent(1, 0, 8192)], [1, 2]) == ([two], [2])
    first.release()
    first.release()
    assert not pins.are_late
    del second
    assert pins.are_late
    assert pins.sort([], []) == ([one, Extent(1, 0, 8192)], [1])
    pin = pins.hold(two)
    assert pins.sort([two], [1]) == ([], [])
    pins.reclaim(two)
    pin.release()
    assert not pins.are_late and pins.sort([], []) == ([], [])


def test_a_held_string_is_let_go_once() -> None:
    found: list[bool] = []
    held = HeldString(10)
    held.complete(StringRef(1, 4096, 10, b""), 0, False, found.append)
    assert len(held) == 10 and held[:5] == b""
    held.is_committed = True
    del held
    assert found == [True]
