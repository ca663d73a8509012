"""Damage of the index file is found before it is used: rows by checksums, pages by a walk, meta pages at start."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import lmdb
import msgpack
import pytest

from kvdb.commands.info import _index_status
from kvdb.errors import CorruptError, KvdbError
from kvdb.store import index_damage
from kvdb.store.entries import Entry, EntryType, SessionValue
from kvdb.store.entry_writes import write_entry
from kvdb.store.files import OsFiles
from kvdb.store.index import CRC_BYTES, STAMP, Index, Table, Txn, seal, unseal
from kvdb.store.index_pages import Walk, read_metas
from kvdb.store.logged import Logged
from kvdb.store.repair import repair
from kvdb.store.store import Store
from kvdb.store.verify import verify
from kvdb_protocol.errors import FormatError
from kvdb_tools.check import check
from tests.kvdb.store.states import MODEL, PAGE, pack_ids, put_snapshot, string, tokens


@pytest.fixture
async def folder(tmp_path: Path) -> Path:
    """A store whose index has branch pages, large rows and free pages."""
    store = Store.open(tmp_path, loop=asyncio.get_running_loop())
    await store.register_model(MODEL)
    for n in range(300):
        store.keyspace.put(0, b"key%d" % n, string(b"value %d." % n * 9))
    store.keyspace.put(0, b"large", string(b"a large row " * 2000))
    await put_snapshot(store, b"snapshot", tokens(2 * PAGE + 5))
    for n in range(0, 300, 2):
        store.keyspace.delete(0, b"key%d" % n)
    await store.close()
    return tmp_path


def change(folder: Path, at: int, mask: int = 1) -> None:
    path = folder / "index" / "data.mdb"
    data = bytearray(path.read_bytes())
    data[at] ^= mask
    path.write_bytes(data)


def findings(folder: Path) -> list[str]:
    index = Index(folder / "index", read_only=True)
    try:
        return [finding.message for finding in verify(index, folder / "segments", OsFiles(), deep=True)]
    finally:
        index.close()


def reader(folder: Path):  # type: ignore[no-untyped-def]
    data = (folder / "index" / "data.mdb").read_bytes()
    return lambda offset, n_bytes: data[offset : offset + n_bytes]


def test_a_value_is_sealed_with_its_key_and_table() -> None:
    stored = seal(Table.KEYS, b"key", b"value")
    assert stored == b"value" + bytes.fromhex("2585f32b")
    assert unseal(Table.KEYS, b"key", stored) == b"value"
    for table, key, data in (
        (Table.KEYS, b"kez", stored), (Table.NAMES, b"key", stored), (Table.KEYS, b"key", b"v" + stored),
        (Table.KEYS, b"key", stored[:-1]), (Table.KEYS, b"key", b""),
    ):  # fmt: skip
        with pytest.raises(CorruptError, match="fails its checksum"):
            unseal(table, key, data)


def change_all(folder: Path, what: bytes) -> None:
    """Change every copy in place, under LMDB's map: older versions of a page may still lie in the file."""
    path = folder / "index" / "data.mdb"
    data, at = path.read_bytes(), -1
    with path.open("r+b") as file:
        while (at := data.find(what, at + 1)) >= 0:
            file.seek(at)
            file.write(bytes([what[0] ^ 1]))


async def test_a_row_that_is_damaged_in_use_hurts_its_key_only(folder: Path) -> None:
    store = Store.open(folder, loop=asyncio.get_running_loop())
    change_all(folder, b"value 7.")
    with pytest.raises(CorruptError, match="a row of table keys of the index fails its checksum"):
        store.keyspace.get(0, b"key7")
    assert store.keyspace.get(0, b"key9") == string(b"value 9." * 9)
    assert b"key7" in store.keyspace.scan(0, 0, 1000)[1]
    assert [finding.message[:42] for finding in await store.verify(deep=True)] == [
        "a row of table keys fails its checksum: 00"[:42], "database 0: 152 keys counted, 151 found"
    ][::-1]  # fmt: skip
    assert store.keyspace.delete(0, b"key7")
    await store.keyspace.flush()
    assert store.keyspace.get(0, b"key7") is None
    assert store.keyspace.size(0) == 151
    await store.close()
    assert findings(folder) == []


async def add_session(folder: Path) -> bytes:
    """A session with a journal. Returns its uid."""
    store = Store.open(folder, loop=asyncio.get_running_loop())
    value = SessionValue(b"session's uid 16", MODEL.fingerprint, None, 0, None)
    store.keyspace.put(0, b"session", Entry(EntryType.SESSION, 0, value))
    store.keyspace.journal_append(value.uid, 0, pack_ids(range(50)))
    await store.keyspace.flush()
    await store.close()
    return value.uid


@pytest.mark.parametrize("what", [b"key153", b"value 7.", b"session's uid 16" + bytes(8)])
async def test_an_index_with_a_damaged_row_is_not_served(folder: Path, what: bytes) -> None:
    """Of a row whose key was hit no read can know: the key would be missing, the session shorter."""
    await add_session(folder)
    change_all(folder, what)
    with pytest.raises(CorruptError, match=r"1 rows fail their checksum, in (keys|journal); kvdb-check --repair"):
        Store.open(folder, loop=asyncio.get_running_loop())
    report = check(folder, deep=True, mend=True)
    assert any("that failed its checksum" in line for line in report.done)
    assert report.left == []
    store = Store.open(folder, loop=asyncio.get_running_loop())
    assert store.keyspace.get(0, b"key9") == string(b"value 9." * 9)
    await store.close()


async def test_repair_cuts_a_journal_where_a_row_is_lost(folder: Path) -> None:
    uid = await add_session(folder)
    for first in (50, 100, 150):
        store = Store.open(folder, loop=asyncio.get_running_loop())
        store.keyspace.journal_append(uid, first, pack_ids(range(50)))
        await store.close()
    change_all(folder, bytes([100]) + pack_ids(range(50)))  # the position says 101: still in order
    report = check(folder, deep=True, mend=True)
    assert "cut session b'session' of database 0 to 100 tokens: what its journal had next is lost" in report.done
    assert report.left == []
    store = Store.open(folder, loop=asyncio.get_running_loop())
    assert store.keyspace.journal_read(uid) == (0, pack_ids(range(50)) * 2)
    await store.close()


async def test_an_index_with_a_damaged_page_is_neither_served_nor_repaired(folder: Path) -> None:
    _, meta = read_metas(reader(folder))
    change(folder, Walk(reader(folder), meta).tables()[b"keys"].root * 4096 + 12, 0x40)
    before = (folder / "index" / "data.mdb").read_bytes()
    with pytest.raises(CorruptError, match="go back to a backup"):
        Store.open(folder, loop=asyncio.get_running_loop())
    report = check(folder, deep=True, mend=True)
    assert len(report.left) == 1
    assert "go back to a backup" in report.left[0].message
    assert (folder / "index" / "data.mdb").read_bytes() == before


async def test_a_row_that_shrank_in_one_transaction_is_sound(folder: Path) -> None:
    """A string, then a snapshot under the same key, in one round: LMDB keeps the string's run of pages."""
    store = Store.open(folder, loop=asyncio.get_running_loop())
    store.keyspace.put(0, b"twice", string(b"long" * 5000))
    key = (0, b"twice")
    await store._committer.submit(lambda txn, work: write_entry(txn, work, *key, string(b"short")))
    await store.close()
    assert findings(folder) == []
    store = Store.open(folder, loop=asyncio.get_running_loop())
    assert store.keyspace.get(*key) == string(b"short")
    await store.close()


async def test_a_large_index_is_checked_while_it_is_served(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_damage, "CHECKED_FIRST_BYTES", 1000)
    monkeypatch.setattr(index_damage, "_LEAVES_AT_A_TIME", 1)
    for is_damaged in (False, True):
        if is_damaged:
            change_all(folder, b"key153")
        store = Store.open(folder, loop=asyncio.get_running_loop())
        assert store.checking is not None
        problem = await store.checking
        assert problem.startswith("1 rows fail their checksum, in keys; kvdb-check --repair") == is_damaged
        assert _index_status(store.checking) == (problem if is_damaged else "ok")
        await store.close()


def test_repair_drops_damaged_rows(folder: Path) -> None:
    index = Index(folder / "index")
    txn = index.begin_write()
    for table in (Table.KEYS, Table.PAGES, Table.SEGMENTS, Table.PLACES, Table.META, Table.NAMES):
        key, value = next(row for row in txn.scan(table) if row[0] != b"format")
        txn.raw.put(key, value + b"bad!", db=txn._tables[table])
    txn.commit()
    found = list(verify(index, folder / "segments", OsFiles(), deep=True))
    said = repair(index, {finding.id for finding in found if finding.id}, Logged())
    assert said.count("dropped a row of table keys that failed its checksum") == 1
    left = [finding.message for finding in verify(index, folder / "segments", OsFiles(), deep=True)]
    index.close()
    assert left == []


def test_every_changed_bit_of_the_meta_pages_is_found_or_has_no_effect(folder: Path) -> None:
    older, newer = read_metas(reader(folder))
    assert newer.txn == older.txn + 1
    irrelevant = set(range(8, 10)) | set(range(12, 16)) | set(range(24, 40)) | set(range(88, 92))
    for page in (0, 1):
        for at in range(152):
            change(folder, 4096 * page + at)
            try:
                problems = findings(folder)
                index = Index(folder / "index")
                index.close()
            except (KvdbError, FormatError):
                problems = ["refused"]
            if not problems:
                _, found_newer = read_metas(reader(folder))
                assert (found_newer.main, found_newer.txn) == (newer.main, newer.txn) or at in irrelevant
            change(folder, 4096 * page + at)
    assert findings(folder) == []


def test_a_changed_page_number_is_found(folder: Path) -> None:
    _, meta = read_metas(reader(folder))
    keys = Walk(reader(folder), meta).tables()[b"keys"]
    assert keys.depth > 1
    for at in (0, 10, 12, 14, 16):
        change(folder, keys.root * 4096 + at, 0x40)
        assert len(findings(folder)) == 1, at
        change(folder, keys.root * 4096 + at, 0x40)


def test_an_older_state_cannot_pass_for_the_newest(folder: Path) -> None:
    _, newer = read_metas(reader(folder))
    at = (newer.txn % 2) * 4096 + 144
    # Two less is what LMDB itself puts there when the write of a meta page fails: that commit was never acknowledged.
    change(folder, at, newer.txn % 256 ^ (newer.txn - 4) % 256)
    with pytest.raises(CorruptError, match="go back to a backup"):
        Index(folder / "index")


def test_a_table_that_lost_its_name_is_not_made_anew(folder: Path) -> None:
    write(folder, lambda env, txn: env.open_db(b"keyz", txn=txn))
    with pytest.raises(CorruptError, match="has a table b'keyz'"):
        Index(folder / "index")


def test_an_index_without_a_format_is_refused(folder: Path) -> None:
    write(folder, lambda env, txn: txn.delete(b"format", db=env.open_db(b"meta", txn=txn)))
    with pytest.raises(CorruptError, match="does not say its format"):
        Index(folder / "index")


def write(folder: Path, do) -> None:  # type: ignore[no-untyped-def]
    """Change the index behind its back, with the stamp that a commit leaves."""
    with lmdb.open(str(folder / "index"), max_dbs=20, map_size=1 << 30) as env, env.begin(write=True) as txn:
        do(env, txn)
        stamp = seal(Table.META, STAMP, msgpack.packb(txn.id()))
        txn.put(STAMP, stamp, db=env.open_db(b"meta", txn=txn))


def make_format_1(folder: Path) -> None:
    """Take the checksums away, as the first version wrote an index."""
    env = lmdb.open(str(folder / "index"), max_dbs=20, map_size=1 << 30)
    with env.begin(write=True) as txn:
        for table in Table:
            db = env.open_db(table.name.lower().encode(), txn=txn)
            for key, value in list(txn.cursor(db)):
                txn.put(key, value[:-CRC_BYTES], db=db)
        meta = env.open_db(b"meta", txn=txn)
        txn.put(b"format", msgpack.packb(1), db=meta)
        txn.delete(STAMP, db=meta)
    env.close()


async def test_an_index_of_format_1_is_read_and_made_current(folder: Path) -> None:
    make_format_1(folder)
    assert findings(folder) == []
    store = Store.open(folder, loop=asyncio.get_running_loop())
    assert store.keyspace.get(0, b"key7") == string(b"value 7." * 9)
    await store.close()
    assert findings(folder) == []
    index = Index(folder / "index")
    with index.read() as txn:
        assert isinstance(txn, Txn)
        assert txn.meta(b"format") == 3
        assert 0 < txn.meta(STAMP) <= txn.raw.id()
    index.close()


@pytest.mark.parametrize("overtaken", [1, 100])
def test_commits_that_overtake_a_check_are_no_damage(
    folder: Path, monkeypatch: pytest.MonkeyPatch, overtaken: int
) -> None:
    """Two commits write both meta pages anew; a store that is that fast all the time cannot be checked."""
    index = Index(folder / "index")
    real, calls = index_damage.check_pages, 0

    def check_pages(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        for number in range(2 if calls <= overtaken else 0):
            txn = index.begin_write()
            txn.put_meta(b"test", number)
            txn.commit()
        real(*arguments)

    monkeypatch.setattr(index_damage, "check_pages", check_pages)
    found = [finding.message for finding in verify(index, folder / "segments", OsFiles(), deep=True)]
    if overtaken == 1:
        assert found == [] and calls == 2
    else:
        assert len(found) == 1 and "no meta page is of transaction" in found[0] and calls == index_damage._TRIES
    index.close()
