"""Large strings that the change log names and the index does not: durable, shared, lost, given back."""

from __future__ import annotations

import asyncio
import errno
import threading
from pathlib import Path

import pytest

from kvdb.errors import KvdbError, MisconfError, NoSpaceError
from kvdb.store import committer
from kvdb.store.budget import INDEX_MARGIN
from kvdb.store.entries import Entry, EntryType, HeldString
from kvdb.store.files import OsFiles, Readable
from kvdb.store.store import Store
from kvdb_tools.check import check
from tests.kvdb.store.crashes import BIG, after_a_crash, commits, reopened, value_of, values_after_a_crash
from tests.kvdb.store.faults import FailingFiles
from tests.kvdb.store.states import put_snapshot, receive, string, tokens


async def test_a_received_string_is_durable_by_log_and_sync(store: Store, files: FailingFiles) -> None:
    await store.keyspace.flush()
    before = commits(files)
    for number, key in enumerate((b"a", b"b", b"a")):
        received = await receive(store, BIG + b"%d" % number, is_urgent=number != 1)
        store.keyspace.put(0, key, Entry(EntryType.STRING, 0, received))
        del received
        await store.keyspace.make_durable()
    store.keyspace.put(0, b"shared", store.keyspace.held(store.keyspace.get(0, b"b")))  # type: ignore[arg-type]
    store.keyspace.rename(0, b"b", b"moved")
    await store.keyspace.make_durable()
    assert commits(files) == before
    copy = after_a_crash(store)
    syncs = files.calls.count("datasync")
    await store.keyspace.flush()
    assert files.calls.count("datasync") == syncs  # they are on the disk
    assert check(copy, deep=True, mend=False).findings == []
    again = await reopened(copy)
    for key, value in ((b"a", BIG + b"2"), (b"b", None), (b"moved", BIG + b"1"), (b"shared", BIG + b"1")):
        assert await value_of(again, key) == value
    await again.keyspace.flush()
    again.keyspace.delete(0, b"shared")
    await again.keyspace.flush()
    await put_snapshot(again, b"k", tokens(300))
    assert await value_of(again, b"moved") == BIG + b"1"
    await again.close()
    assert check(copy, deep=True, mend=False).findings == []
    last = await reopened(copy)
    stats = await last.stats()
    assert stats.strings == 2 * (stats.strings // 2) > 2 * len(BIG)  # each once, the overwritten one not at all
    assert stats.segments_disk - stats.headers - stats.live <= 4096 * stats.segments + stats.dead
    await last.close()


async def test_a_string_that_is_overwritten_before_its_commit_gives_its_space_back(store: Store) -> None:
    for number in range(6):
        store.keyspace.put(0, b"a", Entry(EntryType.STRING, 0, await receive(store, BIG + b"%d" % number)))
        await store.keyspace.make_durable()
    copy = after_a_crash(store)
    again = await reopened(copy)
    for _ in range(100):  # the round before still holds what it committed for a moment
        await again.keyspace.flush()
        if not +again._segments._due:
            break
    assert not again._segments._due
    stats = await again.stats()
    assert stats.strings < 2 * len(BIG)
    assert await value_of(again, b"a") == BIG + b"5"
    await again.close()
    assert check(copy, deep=True, mend=False).findings == []


async def test_renamed_and_copied_strings_that_are_in_the_index_stay(store: Store) -> None:
    store.keyspace.put(0, b"a", Entry(EntryType.STRING, 0, await receive(store, BIG)))
    await store.keyspace.flush()
    store.keyspace.put(0, b"copy", store.keyspace.held(store.keyspace.get(0, b"a")))  # type: ignore[arg-type]
    await store.keyspace.make_durable()
    copy = after_a_crash(store)
    again = Store.open(copy, loop=asyncio.get_running_loop())
    again.keyspace.delete(0, b"copy")  # before anything was committed
    await again.keyspace.flush()
    await again.gc()
    assert await value_of(again, b"a") == BIG
    await again.close()
    assert check(copy, deep=True, mend=False).findings == []


@pytest.mark.parametrize("is_alone", [False, True])
async def test_the_last_record_counts_only_with_its_strings(store: Store, is_alone: bool) -> None:
    """Both are synced at once: power may have gone between them."""
    for value in (BIG + b"old", BIG + b"new"):
        received = await receive(store, value)
        store.keyspace.put(0, b"a", Entry(EntryType.STRING, 0, received))
        await (store.keyspace.flush() if is_alone and value.endswith(b"old") else store.keyspace.make_durable())
    assert isinstance(received, HeldString)
    assert received.ref is not None
    copy = after_a_crash(store)
    segment = copy / "segments" / f"{received.ref.segment:08d}.seg"
    with segment.open("r+b") as file:
        file.seek(received.ref.offset + 100_000)
        file.write(bytes(4096))
    again = await reopened(copy)
    assert await value_of(again, b"a") == BIG + b"old"
    await again._committer.idle()
    with segment.open("r+b") as file:  # whole again: the record stays void
        file.seek(received.ref.offset)
        file.write(store._files.read(store._files.open(store.folder / "segments" / segment.name, write=False), 1 << 20,
                                     received.ref.offset))  # fmt: skip
    assert await values_after_a_crash(again, b"a", name="third") == [BIG + b"old"]
    await again.close()
    assert check(copy, deep=True, mend=False).findings == []


@pytest.mark.parametrize("fails", ["", "string", "log"])
async def test_a_start_syncs_the_last_record_and_its_strings(store: Store, fails: str) -> None:
    """They are whole in the page cache; whether they are on the disk, a daemon that was killed cannot say."""
    for key in (b"a", b"b"):
        store.keyspace.put(0, key, Entry(EntryType.STRING, 0, await receive(store, BIG + key)))
        await store.keyspace.make_durable()
    copy = after_a_crash(store)
    failing = FailingFiles()
    if fails:
        failing.fail("datasync", after=1 if fails == "string" else 2, times=1)
    if fails == "log":
        with pytest.raises(KvdbError, match="recovery of"):
            Store.open(copy, loop=asyncio.get_running_loop(), files=failing)
        failing.calls.clear()
    again = Store.open(copy, loop=asyncio.get_running_loop(), files=failing)
    assert failing.calls.count("datasync") == 3  # the index, the segment, the log
    assert again._committer.logged_bytes >= len(BIG)  # they count against maxstore
    # One that cannot be synced now was not before: it was not answered.
    assert [await value_of(again, key) for key in (b"a", b"b")] == [
        BIG + b"a",
        None if fails == "string" else BIG + b"b",
    ]
    await again._committer.idle()
    await again.close()
    assert check(copy, deep=True, mend=False).findings == []


async def test_a_string_without_its_padding_is_not_whole(store: Store) -> None:
    store.keyspace.put(0, b"a", string(b"old"))
    await store.keyspace.flush()
    received = await receive(store, BIG[:-1])
    assert received.ref is not None
    store.keyspace.put(0, b"a", Entry(EntryType.STRING, 0, received))
    await store.keyspace.make_durable()
    copy = after_a_crash(store)
    segment = copy / "segments" / f"{received.ref.segment:08d}.seg"
    with segment.open("r+b") as file:
        file.truncate(segment.stat().st_size - 5)
    again = await reopened(copy)
    assert again.problems == []
    assert await value_of(again, b"a") == b"old"
    await again.close()


async def test_a_string_that_cannot_be_read_stops_nothing_else(store: Store) -> None:
    for key in (b"a", b"b"):
        store.keyspace.put(0, key, Entry(EntryType.STRING, 0, await receive(store, BIG + key)))
        await store.keyspace.make_durable()
    failing = FailingFiles()
    failing.fail("read", after=1)  # the log is read whole, then the last string
    again = Store.open(after_a_crash(store), loop=asyncio.get_running_loop(), files=failing)
    again.keyspace.put(0, b"c", string(b"1"))
    await again.keyspace.flush()
    with pytest.raises(KvdbError, match="Input/output error"):
        await value_of(again, b"b")
    failing.heal()
    assert await value_of(again, b"b") == BIG + b"b"
    await again.close()


async def test_repair_syncs_what_it_takes_from_the_log(store: Store) -> None:
    store.keyspace.put(0, b"a", Entry(EntryType.STRING, 0, await receive(store, BIG)))
    await store.keyspace.make_durable()
    synced: list[int] = []
    real = OsFiles.datasync
    with pytest.MonkeyPatch.context() as patch:

        def datasync(self: OsFiles, fd: int) -> None:
            synced.append(fd)
            real(self, fd)

        patch.setattr(OsFiles, "datasync", datasync)
        copy = after_a_crash(store)
        report = check(copy, deep=True, mend=True)
    assert report.findings == []
    assert len(synced) == 2  # the segment, the log
    again = await reopened(copy)
    assert await value_of(again, b"a") == BIG
    await again.close()


async def test_shared_strings_that_must_be_copied_stay_shared(store: Store, files: FailingFiles) -> None:
    received = await receive(store, BIG)
    for number in range(4):
        store.keyspace.put(0, b"%d" % number, Entry(EntryType.STRING, 0, received))
    files.fail("datasync", times=1)
    await store.keyspace.flush()  # tried once more at once, as on a full disk
    assert (await store.stats()).strings < 2 * len(BIG)
    assert [await value_of(store, b"%d" % number) for number in range(4)] == [BIG] * 4


@pytest.mark.parametrize("is_deleted", [False, True])
async def test_a_lost_string_leaves_what_was_logged_before(store: Store, files: FailingFiles, is_deleted: bool) -> None:
    store.keyspace.put(0, b"a", string(b"in the index"))
    await store.keyspace.flush()
    if is_deleted:
        store.keyspace.delete(0, b"a")
    else:
        store.keyspace.put(0, b"a", Entry(EntryType.STRING, 0, await receive(store, BIG + b"logged")))
    await store.keyspace.make_durable()
    received = await receive(store, BIG)
    assert received.ref is not None
    files.fail("datasync", times=1)
    with (store.folder / "segments" / f"{received.ref.segment:08d}.seg").open("r+b") as file:
        file.seek(received.ref.offset + 100_000)
        file.write(bytes(4096))  # what the kernel dropped
    store.keyspace.put(0, b"a", Entry(EntryType.STRING, 0, received))
    with pytest.raises(MisconfError, match="durable"):
        await store.keyspace.make_durable()
    with pytest.raises(MisconfError, match="lost by a failed sync"):
        await store.keyspace.make_durable()
    expected = None if is_deleted else BIG + b"logged"
    assert await value_of(store, b"a") == expected
    assert await values_after_a_crash(store, b"a") == [expected]


async def test_logged_strings_count_against_maxstore(store: Store) -> None:
    await store.keyspace.flush()
    store.budget.configure(store.used_bytes + INDEX_MARGIN + 2 * len(BIG), "noeviction")
    store.keyspace.put(0, b"a", Entry(EntryType.STRING, 0, await receive(store, BIG)))
    await store.keyspace.make_durable()
    with pytest.raises(NoSpaceError):
        await receive(store, BIG)
    assert store.keyspace.delete(0, b"a")
    await store.keyspace.make_durable()
    await receive(store, BIG)  # what was taken back counts no more


class LateSyncs(FailingFiles):
    """While it is armed, a string's sync ahead of its round fails just after the log was written."""

    def __init__(self) -> None:
        super().__init__()
        self.is_armed = False
        self.has_begun = threading.Event()
        self._is_logged = threading.Event()

    def write(self, fd: int, data: Readable, offset: int) -> None:
        super().write(fd, data, offset)
        if threading.current_thread().name.startswith("kvdb-commit"):
            self._is_logged.set()

    def datasync(self, fd: int) -> None:
        if self.is_armed and threading.current_thread().name.startswith("kvdb-strings"):
            self.has_begun.set()
            assert self._is_logged.wait(10)
            raise OSError(errno.EIO, "injected")
        super().datasync(fd)


async def test_a_string_that_is_logged_before_its_sync_fails_is_not_answered(tmp_path: Path) -> None:
    files = LateSyncs()
    store = Store.open(tmp_path / "store", loop=asyncio.get_running_loop(), files=files)
    store.keyspace.put(0, b"a", string(b"before"))
    await store.keyspace.make_durable()
    files.is_armed, files._is_logged = True, threading.Event()
    store.keyspace.put(0, b"a", Entry(EntryType.STRING, 0, await receive(store, BIG, is_urgent=True)))
    await asyncio.to_thread(files.has_begun.wait, 10)
    with pytest.raises(KvdbError, match="durable"):
        await store.keyspace.make_durable()
    assert await values_after_a_crash(store, b"a") == [b"before"]  # the record was taken back
    files.is_armed = False
    await store.keyspace.make_durable()  # copied, checked
    assert await values_after_a_crash(store, b"a", name="again") == [BIG]
    await store.close()


async def test_a_string_whose_sync_failed_is_not_answered(store: Store, files: FailingFiles) -> None:
    store.keyspace.put(0, b"a", string(b"before"))
    await store.keyspace.make_durable()
    received = await receive(store, BIG)
    files.fail("datasync", times=1)
    store.keyspace.put(0, b"a", Entry(EntryType.STRING, 0, received))
    with pytest.raises(KvdbError, match="durable"):
        await store.keyspace.make_durable()
    await store.keyspace.make_durable()  # copied, checked
    assert await values_after_a_crash(store, b"a") == [BIG]


async def test_many_logged_strings_are_committed(
    store: Store, files: FailingFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their space is given back, and counts, only from a commit on."""
    monkeypatch.setattr(committer, "MAX_LOGGED_BYTES", 3 * len(BIG))
    before = commits(files)
    for number in range(4):
        store.keyspace.put(0, b"%d" % number, Entry(EntryType.STRING, 0, await receive(store, BIG)))
        await store.keyspace.make_durable()
        assert commits(files) == before + (number == 3)
