"""The change log: what was answered comes back, whatever was committed, cut or damaged since; nothing else does."""

from __future__ import annotations

import asyncio
import random
import shutil
from pathlib import Path

import pytest

from kvdb.errors import CorruptError, KvdbError, MisconfError
from kvdb.store import change_log as change_log_module
from kvdb.store.change_log import ALIGN, LOG_BYTES, LOG_NAME, MAX_RECORD_BYTES, ChangeLog, decode_record, encode_record
from kvdb.store.entries import Entry, EntryType, HeldString, SessionValue
from kvdb.store.files import OsFiles
from kvdb.store.index import Table, from_place_key, u64
from kvdb.store.store import Store
from kvdb.store.work import size_name
from kvdb_tools.check import check
from tests.kvdb.store.crashes import BIG, after_a_crash, commits, reopened, value_of, values_after_a_crash
from tests.kvdb.store.faults import FailingFiles
from tests.kvdb.store.states import FINGERPRINT, pack_ids, put_snapshot, receive, string, tokens

INDEX = 0x1122334455667788


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


@pytest.mark.parametrize("is_cleared", [False, True])
@pytest.mark.parametrize("is_large", [False, True])
async def test_what_was_logged_and_taken_back_does_not_return(store: Store, is_cleared: bool, is_large: bool) -> None:
    """The index never had it, so the commit changes nothing, and makes the log void all the same."""
    value: HeldString | bytes = await receive(store, BIG) if is_large else b"1"
    store.keyspace.put(0, b"a", Entry(EntryType.STRING, 0, value))
    del value
    await store.keyspace.make_durable()
    if is_cleared:
        store.keyspace.clear(0)
    else:
        store.keyspace.delete(0, b"a")
    await store.keyspace.flush()
    assert await values_after_a_crash(store, b"a") == [None]


async def test_a_start_syncs_the_index_that_records_build_on(store: Store) -> None:
    """A daemon that was killed in a commit may have left it in memory only. So nothing is cut before."""
    await put_snapshot(store, b"k", tokens(300))
    store.keyspace.delete(0, b"k")
    await store.keyspace.flush()
    await receive(store, BIG)  # no key takes it: a segment that is unlinked
    copy = after_a_crash(store)
    for is_synced in (False, True):
        failing = FailingFiles()
        if not is_synced:
            failing.fail("datasync")
            with pytest.raises(KvdbError, match="recovery of"):
                Store.open(copy, loop=asyncio.get_running_loop(), files=failing)
            assert failing.calls == ["open", "datasync"]
        else:
            again = Store.open(copy, loop=asyncio.get_running_loop(), files=failing)
            assert failing.calls.index("datasync") < failing.calls.index("unlink")
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


async def test_nothing_is_logged_on_a_commit_of_a_start_that_failed(store: Store) -> None:
    for name in (b"k", b"l"):
        await put_snapshot(store, name, tokens(300, seed=name[0]))
    store.keyspace.delete(0, b"k")
    await store.keyspace.flush()
    failing = FailingFiles()
    failing.fail("commit", times=1)
    again = Store.open(after_a_crash(store), loop=asyncio.get_running_loop(), files=failing)
    assert commits(failing) == 1
    again.keyspace.put(0, b"a", string(b"1"))
    await again.keyspace.make_durable()
    assert commits(failing) == 2
    await again.close()


async def test_a_start_that_cannot_commit_keeps_strings_that_were_logged(store: Store) -> None:
    store.keyspace.put(0, b"a", string(b"old"))
    await store.keyspace.flush()
    store.keyspace.put(0, b"a", Entry(EntryType.STRING, 0, await receive(store, BIG)))
    store.keyspace.put(0, b"b", string(b"1"))
    await store.keyspace.make_durable()
    copy = after_a_crash(store)
    failing = FailingFiles()
    failing.fail("commit")
    again = Store.open(copy, loop=asyncio.get_running_loop(), files=failing)
    assert again.keyspace.delete(0, b"a")
    for _ in range(3):
        with pytest.raises(MisconfError):
            await again.keyspace.make_durable()
    with pytest.raises(MisconfError):
        await again.close()
    last = await reopened(copy)
    assert [await value_of(last, key) for key in (b"a", b"b")] == [BIG, b"1"]
    await last.close()


async def test_an_expiry_that_was_logged_is_due_at_once(store: Store) -> None:
    store.keyspace.put(0, b"a", string(b"1", expire_ms=5))
    store.keyspace.put(0, b"b", string(b"1", expire_ms=5))
    store.keyspace.put(0, b"c", string(b"1", expire_ms=1 << 50))
    await store.keyspace.make_durable()
    store.keyspace.put(0, b"b", string(b"2"))
    await store.keyspace.make_durable()
    again = await reopened(after_a_crash(store))
    for keys in (store.keyspace, again.keyspace):
        assert keys.expire_cycle(6) == [(0, b"a")]
        assert keys.size(0) == 2
    await again.close()


async def test_repair_takes_a_sound_log_as_a_start_does(store: Store) -> None:
    """A deleted snapshot is freed, so nothing is found afterwards."""
    for key in (b"k", b"l"):
        await put_snapshot(store, key, tokens(300, seed=key[0]))
    before = (await store.stats()).live
    store.keyspace.delete(0, b"k")
    store.keyspace.put(0, b"a", string(b"1"))
    await store.keyspace.make_durable()
    copy = after_a_crash(store)
    report = check(copy, deep=True, mend=True)
    assert (report.findings, report.done, report.n_logged) == ([], [], 0)
    again = await reopened(copy)
    assert [await value_of(again, b"a"), again.keyspace.get(0, b"k")] == [b"1", None]
    assert (await again.stats()).live == before / 2
    await again.close()
    assert check(copy, deep=True, mend=False).findings == []


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


async def test_repair_does_not_drop_a_key_for_the_value_it_had(store: Store) -> None:
    for value in (BIG + b"old", BIG + b"new"):
        received = await receive(store, value)
        store.keyspace.put(0, b"a", Entry(EntryType.STRING, 0, received))
        await (store.keyspace.make_durable() if value.endswith(b"new") else store.keyspace.flush())
    copy = after_a_crash(store)
    with store._index.read() as txn:
        segment, offset = from_place_key(next(iter(txn.scan(Table.PLACES)))[0])
    with (copy / "segments" / f"{segment:08d}.seg").open("r+b") as file:
        file.seek(offset + 1000)
        file.write(b"damage")
    assert check(copy, deep=True, mend=False).findings
    check(copy, deep=True, mend=True)
    again = await reopened(copy)
    assert await value_of(again, b"a") == BIG + b"new"
    await again.close()


@pytest.mark.parametrize("table", [Table.META, Table.SEGMENTS])
async def test_repair_keeps_what_was_logged_beside_a_damaged_counter(store: Store, table: Table) -> None:
    store.keyspace.put(0, b"old", Entry(EntryType.STRING, 0, await receive(store, BIG)))
    await store.keyspace.flush()
    store.keyspace.delete(0, b"old")
    store.keyspace.put(0, b"a", string(b"1"))
    await store.keyspace.make_durable()
    copy = after_a_crash(store)
    path = copy / "index" / "data.mdb"
    with store._index.read() as txn:
        key = size_name(0) if table is Table.META else u64(1)
        row = txn.raw.get(key, db=txn._tables[table])
    data = path.read_bytes()
    changed = data.replace(key + row, key + row[:-1] + bytes([row[-1] ^ 1]))
    assert changed != data
    path.write_bytes(changed)
    report = check(copy, deep=True, mend=True)
    assert f"dropped a row of table {table.name.lower()} that failed its checksum" in report.done
    assert report.left == []
    again = await reopened(copy)
    assert [await value_of(again, key) for key in (b"old", b"a")] == [None, b"1"]
    await again.close()


async def test_a_copied_index_takes_no_other_ones_log(store: Store, tmp_path: Path) -> None:
    store.keyspace.put(0, b"a", string(b"1"))
    await store.keyspace.flush()
    await store.backup(tmp_path / "backup")
    with store._index.read() as txn:
        store_id = txn.meta(b"id")
    backup = await reopened(tmp_path / "backup")
    assert 0 != backup._index.id != store_id == store._index.id
    await backup.close()


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
