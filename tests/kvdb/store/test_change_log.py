"""The change log: what was answered comes back, whatever was committed, cut or damaged since; nothing else does."""

from __future__ import annotations

import asyncio
import errno
import random
import shutil
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from kvdb.errors import CorruptError, KvdbError, MisconfError
from kvdb.store import change_log as change_log_module
from kvdb.store import committer
from kvdb.store.change_log import ALIGN, LOG_BYTES, LOG_NAME, MAX_RECORD_BYTES, ChangeLog, decode_record, encode_record
from kvdb.store.entries import Entry, EntryType, HeldString, SessionValue
from kvdb.store.files import OsFiles, Readable
from kvdb.store.store import Store
from kvdb_tools.check import check
from tests.kvdb.store.faults import FailingFiles
from tests.kvdb.store.states import FINGERPRINT, MODEL, pack_ids, put_snapshot, receive, string, tokens

INDEX = 0x1122334455667788
BIG = bytes(range(256)) * 1200


@pytest.fixture
def files() -> FailingFiles:
    return FailingFiles()


@pytest.fixture
async def store(tmp_path: Path, files: FailingFiles) -> AsyncIterator[Store]:
    store = Store.open(tmp_path / "store", loop=asyncio.get_running_loop(), files=files)
    await store.register_model(MODEL)
    await store._committer.idle()
    yield store
    files.heal()
    await store.close()


def after_a_crash(store: Store, name: str = "copy") -> Path:
    """The directory as a daemon that was killed now leaves it."""
    folder = store.folder.with_name(name)
    shutil.copytree(store.folder, folder)
    return folder


async def reopened(folder: Path) -> Store:
    return Store.open(folder, loop=asyncio.get_running_loop())


async def value_of(store: Store, key: bytes) -> bytes | None:
    entry = store.keyspace.get(0, key)
    if entry is None:
        return None
    return entry.value if isinstance(entry.value, bytes) else store.strings.read(entry.value)  # type: ignore[arg-type]


async def values_after_a_crash(store: Store, *keys: bytes, name: str = "copy") -> list[bytes | None]:
    again = await reopened(after_a_crash(store, name))
    values = [await value_of(again, key) for key in keys]
    await again.close()
    return values


def commits(files: FailingFiles) -> int:
    return files.calls.count("commit")


# The file


def test_a_record_is_found_only_where_it_belongs() -> None:
    record = encode_record(INDEX, 7, 3, b"changes")
    assert decode_record(record + b"behind", INDEX, 7, 3) == b"changes"
    for other in ((INDEX + 1, 7, 3), (INDEX, 8, 3), (INDEX, 7, 2)):
        assert decode_record(record, *other) is None
    for at in range(len(record)):
        changed = bytearray(record)
        changed[at] ^= 4
        assert decode_record(bytes(changed), INDEX, 7, 3) is None
        assert decode_record(record[:at], INDEX, 7, 3) is None


def test_records_are_read_until_the_first_that_is_void(tmp_path: Path) -> None:
    log = ChangeLog(tmp_path, OsFiles(), INDEX)
    assert log.read(1) == ([], "")
    assert not log.append(b"before any commit")
    log.begin(1)
    large = bytes(range(256)) * 100
    for changes in (b"a", b"", large):
        assert log.append(changes)
    assert log.read(1) == ([b"a", b"", large], "")
    log.begin(2)
    assert log.read(2) == ([], "")
    assert log.append(b"b")
    assert log.read(2) == ([b"b"], "")
    assert ChangeLog(tmp_path, OsFiles(), INDEX + 1).read(2) == ([], "")
    log.close()
    assert (tmp_path / LOG_NAME).stat().st_size == LOG_BYTES


def test_what_does_not_fit_is_left_to_the_index(tmp_path: Path) -> None:
    log = ChangeLog(tmp_path, OsFiles(), INDEX)
    log.begin(1)
    assert not log.append(bytes(MAX_RECORD_BYTES))
    number = 0
    while log.append(bytes(100_000)):
        number += 1
    assert number == LOG_BYTES // (25 * ALIGN)
    assert len(log.read(1)[0]) == number
    log.begin(2)
    assert log.append(b"room again")
    log.close()


@pytest.mark.parametrize("number", [0, 1, 2])
def test_damage_is_told_from_a_record_that_was_cut(tmp_path: Path, number: int) -> None:
    log = ChangeLog(tmp_path, OsFiles(), INDEX)
    log.begin(1)
    for changes in (b"first", b"second", b"third"):
        log.append(changes)
    log.close()
    path = tmp_path / LOG_NAME
    data = bytearray(path.read_bytes())
    data[number * ALIGN + 34] ^= 1
    path.write_bytes(data)
    found, problem = log.read(1)
    assert found == [b"first", b"second", b"third"][:number]
    # Of the last one nobody can know: power may have gone while it was written.
    assert problem == ("" if number == 2 else f"record {number} of {LOG_NAME} is damaged: record {number + 1} "
                       "behind it is whole")  # fmt: skip


@pytest.mark.parametrize("call", ["create", "open", "allocate", "write", "datasync", "sync_dir"])
async def test_a_log_that_cannot_be_written_costs_nothing_but_time(
    store: Store, files: FailingFiles, call: str
) -> None:
    """The same round commits to the index; the next commit lets the log try again."""
    keys = store.keyspace
    if call != "create":
        keys.put(0, b"a", string(b"0"))
        await keys.make_durable()
        store._change_log.close()
        if call in ("allocate", "sync_dir"):
            (store.folder / LOG_NAME).unlink()
    files.fail(call, times=1)
    before = commits(files)
    keys.put(0, b"a", string(b"1"))
    await keys.make_durable()
    assert commits(files) == before + 1
    assert await values_after_a_crash(store, b"a") == [b"1"]
    keys.put(0, b"a", string(b"2"))
    await keys.make_durable()
    assert commits(files) == before + 1
    assert await values_after_a_crash(store, b"a", name="again") == [b"2"]


async def test_the_file_keeps_its_name_whoever_made_it(store: Store, files: FailingFiles) -> None:
    """A daemon that was killed while it made the file may not have come to this."""
    (store.folder / LOG_NAME).write_bytes(bytes(LOG_BYTES))
    before = files.calls.count("sync_dir")
    store.keyspace.put(0, b"a", string(b"1"))
    await store.keyspace.make_durable()
    assert files.calls.count("sync_dir") == before + 1


async def test_a_file_of_another_length_is_made_anew(store: Store) -> None:
    (store.folder / LOG_NAME).write_bytes(b"short")
    store.keyspace.put(0, b"a", string(b"1"))
    await store.keyspace.make_durable()
    assert (store.folder / LOG_NAME).stat().st_size == LOG_BYTES
    assert await values_after_a_crash(store, b"a") == [b"1"]


# Rounds


async def test_changes_of_keys_are_durable_without_a_commit(store: Store, files: FailingFiles) -> None:
    before = commits(files)
    for number in range(20):
        store.keyspace.put(0, b"k%d" % number, string(b"%d" % number))
        await store.keyspace.make_durable()
    store.keyspace.put(0, b"unanswered", string(b"x"))
    assert commits(files) == before
    assert store.keyspace.size(0) == 21
    copy = after_a_crash(store)
    assert check(copy, deep=True, mend=False).n_logged == 20
    again = await reopened(copy)
    assert [await value_of(again, b"k%d" % number) for number in range(20)] == [b"%d" % number for number in range(20)]
    assert again.keyspace.size(0) == 20
    await again._committer.idle()
    await again.close()
    report = check(copy, deep=True, mend=False)
    assert (report.findings, report.n_logged) == ([], 0)


async def test_the_second_takes_what_was_logged_into_the_index(store: Store, files: FailingFiles) -> None:
    store.keyspace.put(0, b"a", string(b"1"))
    await store.keyspace.make_durable()
    before = commits(files)
    store.keyspace.flush_soon()
    await asyncio.sleep(0)
    await store._committer.idle()
    assert commits(files) == before + 1
    assert store.keyspace._logged is None
    store.keyspace.flush_soon()
    await store._committer.idle()
    assert commits(files) == before + 1
    copy = after_a_crash(store)
    (copy / LOG_NAME).unlink()
    again = await reopened(copy)
    assert await value_of(again, b"a") == b"1"
    await again.close()


async def test_a_snapshot_commits_what_was_logged_before_it(store: Store) -> None:
    store.keyspace.put(0, b"a", string(b"1"))
    await store.keyspace.make_durable()
    await put_snapshot(store, b"k", tokens(300))
    copy = after_a_crash(store)
    assert check(copy, deep=True, mend=False).n_logged == 0
    again = await reopened(copy)
    assert await value_of(again, b"a") == b"1"
    assert again.keyspace.get(0, b"k") is not None
    await again.close()


async def test_forks_are_branches_after_a_crash(store: Store) -> None:
    done = await put_snapshot(store, b"k", tokens(300))
    uid = b"u" * 16
    store.keyspace.put(0, b"s", Entry(EntryType.SESSION, 0, SessionValue(uid, FINGERPRINT, done.id, 300, done.id)))
    store.keyspace.journal_append(uid, 300, pack_ids([1, 2, 3]))
    await store.keyspace.make_durable()
    store.keyspace.journal_cut(uid, 302)
    store.keyspace.delete(0, b"k")
    await store.keyspace.make_durable()
    copy = after_a_crash(store)
    again = await reopened(copy)
    assert again.keyspace.session_uids() == {uid}
    assert again.keyspace.journal_read(uid) == (300, pack_ids([1, 2]))
    assert again.keyspace.get(0, b"k") is None
    assert await again.token_ids(done.id) == pack_ids(tokens(300))
    await again.close()
    assert check(copy, deep=True, mend=False).findings == []


async def test_what_is_too_much_for_the_log_is_committed(
    store: Store, files: FailingFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(change_log_module, "LOG_BYTES", 3 * ALIGN)
    keys, before = store.keyspace, commits(files)
    for number in range(8):
        keys.put(0, b"k%d" % number, string(b"%d" % number))
        await keys.make_durable()
    assert commits(files) == before + 2  # three, a commit, three, a commit
    for number in range(9):
        keys.put(0, b"%d" % number, string(b"x" * 50_000))
    await keys.make_durable()
    assert commits(files) == before + 3
    again = await reopened(after_a_crash(store))
    assert again.keyspace.size(0) == 17
    await again.close()


async def test_a_failed_commit_leaves_what_was_logged(store: Store, files: FailingFiles) -> None:
    keys = store.keyspace
    keys.put(0, b"a", string(b"1"))
    await keys.make_durable()
    files.fail("commit")
    keys.put(0, b"b", string(b"2"))
    with pytest.raises(MisconfError):
        await keys.flush()
    keys.put(0, b"c", string(b"3"))
    with pytest.raises(MisconfError):
        await keys.make_durable()  # tried in the index alone until that works again
    assert [await value_of(store, key) for key in (b"a", b"b", b"c")] == [b"1", b"2", b"3"]
    assert await values_after_a_crash(store, b"a", b"b", b"c") == [b"1", None, None]
    files.heal()
    await keys.make_durable()
    assert keys.size(0) == 3


async def test_a_start_that_cannot_commit_keeps_the_log(store: Store) -> None:
    store.keyspace.put(0, b"a", string(b"1"))
    await store.keyspace.make_durable()
    copy = after_a_crash(store)
    for _ in range(2):
        failing = FailingFiles()
        failing.fail("commit")
        again = Store.open(copy, loop=asyncio.get_running_loop(), files=failing)
        again.keyspace.put(0, b"b", string(b"2"))
        with pytest.raises(MisconfError):
            await again.keyspace.make_durable()
        assert await value_of(again, b"a") == b"1"
        with pytest.raises(MisconfError):
            await again.close()
    last = await reopened(copy)
    assert (await value_of(last, b"a"), await value_of(last, b"b")) == (b"1", None)
    await last.close()


async def test_a_start_commits_nothing_before_what_was_logged(store: Store) -> None:
    for name in (b"k", b"l"):
        await put_snapshot(store, name, tokens(300, seed=name[0]))
    store.keyspace.delete(0, b"k")
    await store.keyspace.flush()  # its segment has dead ranges, which a start gives back and notes
    store.keyspace.put(0, b"a", string(b"1"))
    await store.keyspace.make_durable()
    copy = after_a_crash(store)
    failing = FailingFiles()
    failing.fail("commit", after=1)
    again = Store.open(copy, loop=asyncio.get_running_loop(), files=failing)
    await again._committer.idle()
    failing.heal()
    again._release()
    last = await reopened(copy)
    assert await value_of(last, b"a") == b"1"
    await last.close()


async def test_an_expiry_that_was_logged_is_due_at_once(store: Store) -> None:
    store.keyspace.put(0, b"a", string(b"1", expire_ms=5))
    store.keyspace.put(0, b"b", string(b"1", expire_ms=5))
    store.keyspace.put(0, b"c", string(b"1", expire_ms=1 << 50))
    await store.keyspace.make_durable()
    store.keyspace.put(0, b"b", string(b"2"))
    await store.keyspace.make_durable()
    assert store.keyspace.expire_cycle(6) == [(0, b"a")]
    assert store.keyspace.size(0) == 2


@pytest.mark.parametrize("number", [0, 2])
async def test_a_damaged_log_is_not_served_and_can_be_repaired(store: Store, number: int) -> None:
    for one in range(4):
        store.keyspace.put(0, b"k%d" % one, string(b"%d" % one))
        await store.keyspace.make_durable()
    copy = after_a_crash(store)
    with (copy / LOG_NAME).open("r+b") as file:
        file.seek(number * ALIGN + 50)
        file.write(b"!")
    for _ in range(2):
        with pytest.raises(CorruptError, match=rf"record {number} of changes.log is damaged.*kvdb-check --repair"):
            await reopened(copy)
    assert [finding.kind for finding in check(copy, deep=True, mend=False).findings] == ["log"]
    report = check(copy, deep=True, mend=True)
    assert report.left == []
    again = await reopened(copy)
    left = [b"0", b"1", b"2", b"3"][:number]
    assert [await value_of(again, b"k%d" % one) for one in range(number)] == left
    assert again.keyspace.size(0) == number
    await again.close()
    assert check(copy, deep=True, mend=False).findings == []


async def test_a_copied_index_takes_no_other_ones_log(store: Store, tmp_path: Path) -> None:
    store.keyspace.put(0, b"a", string(b"1"))
    await store.keyspace.flush()
    await store.backup(tmp_path / "backup")
    with store._index.read() as txn:
        store_id = txn.meta(b"id")
    backup = await reopened(tmp_path / "backup")
    assert 0 != backup._index.id != store_id == store._index.id
    await backup.close()


# Large strings


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


async def test_the_last_record_counts_only_with_its_strings(store: Store) -> None:
    """Both are synced at once: power may have gone between them."""
    for value in (BIG + b"old", BIG + b"new"):
        received = await receive(store, value)
        store.keyspace.put(0, b"a", Entry(EntryType.STRING, 0, received))
        await store.keyspace.make_durable()
    assert isinstance(received, HeldString)
    assert received.ref is not None
    copy = after_a_crash(store)
    segment = copy / "segments" / f"{received.ref.segment:08d}.seg"
    with segment.open("r+b") as file:
        file.seek(received.ref.offset + 100_000)
        file.write(bytes(4096))
    again = await reopened(copy)
    assert await value_of(again, b"a") == BIG + b"old"
    await again.close()
    assert check(copy, deep=True, mend=False).findings == []


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
        if self.is_armed and threading.current_thread().name.startswith("kvdb-sync"):
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
    assert await values_after_a_crash(store, b"a") in ([b"before"], [BIG])
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


# Everything at once


async def test_random_changes_and_crashes_match_a_dict(tmp_path: Path) -> None:
    rng = random.Random(11)
    folder = tmp_path / "0"
    store = Store.open(folder, loop=asyncio.get_running_loop())
    model: dict[bytes, bytes] = {}
    durable: dict[bytes, bytes] = {}
    crashes = replayed = 0
    for number in range(2500):
        keys = store.keyspace
        key, other = b"%d" % rng.randrange(30), b"%d" % rng.randrange(30)
        match rng.choice(
            ("put", "put", "receive", "delete", "rename", "expire", "log", "log", "log", "flush", "crash")
        ):
            case "put":
                value = b"%d" % number * rng.choice((1, 10, 2000))
                keys.put(0, key, string(value))
                model[key] = value
            case "receive" if rng.random() < 0.3:
                keys.put(0, key, Entry(EntryType.STRING, 0, await receive(store, BIG + key, is_urgent=True)))
                model[key] = BIG + key
            case "delete":
                assert keys.delete(0, key) == (model.pop(key, None) is not None)
            case "rename":
                assert keys.rename(0, key, other) == (key in model)
                if key in model:
                    model[other] = model.pop(key)
            case "expire":
                assert keys.expire_at(0, key, 1) == (key in model)
                keys.expire_cycle(2)
                model.pop(key, None)
            case "log":
                await keys.make_durable()
                durable = model.copy()
            case "flush" if rng.random() < 0.2:
                if rng.random() < 0.1:
                    keys.clear(0)
                    model.clear()
                await keys.flush()
                durable = model.copy()
            case "crash" if rng.random() < 0.15:
                crashes += 1
                await store._committer.idle()
                next_folder = tmp_path / str(crashes)
                shutil.copytree(folder, next_folder)
                store._release()
                shutil.rmtree(folder)
                folder = next_folder
                report = check(folder, deep=True, mend=False)
                assert report.findings == []
                replayed += report.n_logged
                store = Store.open(folder, loop=asyncio.get_running_loop())
                model = durable.copy()
                assert store.keyspace.size(0) == len(model)
        assert await value_of(store, key) == model.get(key)
        if number % 20 == 0:
            assert store.keyspace.size(0) == len(model)
            assert sorted(store.keyspace.scan(0, 0, 1000)[1]) == sorted(model)
    assert crashes > 10
    assert replayed > 20
    await store.close()
    assert check(folder, deep=True, mend=False).findings == []
