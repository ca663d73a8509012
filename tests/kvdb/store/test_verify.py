"""Verification finds every kind of damage and names the keys; repair leaves a clean store with the rest."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from kvdb.errors import CorruptError
from kvdb.store.entries import Entry, EntryType, SessionValue
from kvdb.store.files import OsFiles
from kvdb.store.index import Index, Table, Txn, u64
from kvdb.store.logged import Logged
from kvdb.store.read import Reader, plan
from kvdb.store.repair import repair
from kvdb.store.store import Store
from kvdb.store.verify import Finding, verify
from tests.kvdb.store.states import FINGERPRINT, MODEL, PAGE, pack_ids, put_snapshot, string, tokens


@dataclass
class Filled:
    folder: Path
    ids: dict[bytes, bytes]  # snapshot ids by key


@pytest.fixture
async def filled(tmp_path: Path) -> Filled:
    """Two timelines, the second of three snapshots; a session; strings."""
    store = Store.open(tmp_path, loop=asyncio.get_running_loop())
    await store.register_model(MODEL)
    ids = {b"alone": (await put_snapshot(store, b"alone", tokens(PAGE + 3, seed=9))).id}
    for n in (1, 2, 3):
        done = await put_snapshot(store, b"step%d" % n, tokens(n * PAGE + 5), parent=ids.get(b"step%d" % (n - 1)))
        ids[b"step%d" % n] = done.id
    value = SessionValue(b"u" * 16, FINGERPRINT, ids[b"step3"], 3 * PAGE + 5)
    store.keyspace.put(0, b"session", Entry(EntryType.SESSION, 0, value))
    store.keyspace.journal_append(b"u" * 16, 3 * PAGE + 5, pack_ids([1, 2]))
    store.keyspace.put(5, b"text", string(b"x", expire_ms=1 << 45))
    await store.close()
    return Filled(tmp_path, ids)


@contextmanager
def index_of(folder: Path) -> Iterator[Index]:
    index = Index(folder / "index")
    yield index
    index.close()


def findings(folder: Path, deep: bool = True) -> list[Finding]:
    with index_of(folder) as index:
        return list(verify(index, folder / "segments", OsFiles(), deep=deep))


def repaired(folder: Path) -> list[str]:
    with index_of(folder) as index:
        found = list(verify(index, folder / "segments", OsFiles(), deep=True))
        return repair(index, {finding.id for finding in found if finding.id}, Logged())


def flip(path: Path, offset: int, mask: int = 1) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ mask]))


def segment(filled: Filled) -> Path:
    (path,) = (filled.folder / "segments").iterdir()
    return path


def page_offset(filled: Filled, n: int) -> int:
    """Offset of page `n` of the step timeline."""
    with index_of(filled.folder) as index, index.read() as txn:
        row = txn.snapshot(filled.ids[b"step3"])
        assert row is not None
        page = txn.page(row.leaf)
        while page is not None and page.first > n * PAGE:
            page = txn.page(page.parent)
        assert page is not None
        return page.offset


def test_a_sound_store_is_clean(filled: Filled) -> None:
    assert findings(filled.folder) == []
    assert findings(filled.folder, deep=False) == []
    assert repaired(filled.folder) == []


def test_progress_reaches_the_end(filled: Filled) -> None:
    calls: list[tuple[int, int]] = []
    with index_of(filled.folder) as index:
        files = OsFiles()
        list(verify(index, filled.folder / "segments", files, deep=True, progress=lambda *call: calls.append(call)))
    assert calls[-1][0] == calls[-1][1] > 0


def test_a_page_hurts_all_that_stand_on_it(filled: Filled) -> None:
    flip(segment(filled), page_offset(filled, 1) + 300)
    assert findings(filled.folder, deep=False) == []
    (finding,) = findings(filled.folder)
    assert finding.kind == "record"
    assert "page" in finding.message
    assert f"at {page_offset(filled, 1)}" in finding.message
    assert finding.keys == ((0, b"session"), (0, b"step2"), (0, b"step3"))


async def test_repair_keeps_the_rest(filled: Filled) -> None:
    flip(segment(filled), page_offset(filled, 1) + 300)
    said = "\n".join(repaired(filled.folder))
    for word in ("step2", "step3", "session", "journal"):
        assert word in said
    assert "step1" not in said
    assert findings(filled.folder) == []
    store = Store.open(filled.folder, loop=asyncio.get_running_loop())
    assert await store.token_ids(filled.ids[b"step1"]) == pack_ids(tokens(PAGE + 5))
    assert store.keyspace.size(0) == 2
    assert store.keyspace.get(0, b"step2") is None
    assert (await store.stats()).pages == 2
    await put_snapshot(store, b"step2", tokens(2 * PAGE + 5))
    await store.close()
    assert findings(filled.folder) == []


def test_a_header_is_checked_also_without_deep(filled: Filled) -> None:
    flip(segment(filled), page_offset(filled, 0) + 20)
    (finding,) = findings(filled.folder, deep=False)
    assert finding.keys == ((0, b"session"), (0, b"step1"), (0, b"step2"), (0, b"step3"))


def test_a_missing_and_a_short_segment_are_found(filled: Filled) -> None:
    path = segment(filled)
    with path.open("r+b") as file:
        file.truncate(page_offset(filled, 2))
    found = findings(filled.folder)
    assert {finding.kind for finding in found} == {"segment", "record"}
    path.unlink()
    found = findings(filled.folder, deep=False)
    assert any("is missing" in finding.message for finding in found)
    assert {key for finding in found for _, key in finding.keys} == {b"alone", b"session", b"step1", b"step2", b"step3"}
    repaired(filled.folder)
    assert findings(filled.folder) == []


def test_a_wrong_segment_header_is_found(filled: Filled) -> None:
    flip(segment(filled), 16)
    assert [finding.kind for finding in findings(filled.folder)] == ["segment"]


def break_refs(txn: Txn, filled: Filled) -> None:
    key, _ = next(txn.scan(Table.PAGES))
    row = txn.page(key)
    assert row is not None
    txn.put_page(key, row._replace(refs=row.refs + 1))


def break_prefix_hash(txn: Txn, filled: Filled) -> None:
    row = txn.snapshot(filled.ids[b"step1"])
    assert row is not None
    txn.put_snapshot(filled.ids[b"step1"], row._replace(tail_hash=b"?" * 16))


def drop_page_row(txn: Txn, filled: Filled) -> None:
    row = txn.snapshot(filled.ids[b"step1"])
    assert row is not None
    txn.delete(Table.PAGES, row.leaf)


def drop_snapshot_row(txn: Txn, filled: Filled) -> None:
    txn.delete(Table.SNAPSHOTS, filled.ids[b"alone"])


def break_entry(txn: Txn, filled: Filled) -> None:
    name, _ = next(txn.scan(Table.KEYS))
    txn.put(Table.KEYS, name, b"\x93\x63\x00\x00")


def break_live(txn: Txn, filled: Filled) -> None:
    ((number, row),) = txn.segments().items()
    txn.put_segment(number, row._replace(live=row.live + 4096))


def break_sizes(txn: Txn, filled: Filled) -> None:
    txn.put_meta(b"size\0\0", 77)


def strange_journal(txn: Txn, filled: Filled) -> None:
    txn.put(Table.JOURNAL, b"w" * 16 + u64(0), b"\0\0\0\0")


def journal_gap(txn: Txn, filled: Filled) -> None:
    txn.put(Table.JOURNAL, b"u" * 16 + u64(9999), b"\0\0\0\0")


def stray_use(txn: Txn, filled: Filled) -> None:
    txn.put(Table.USES, b"?" * 32, b"\x92\x01\x01")


def drop_table(table: Table):  # type: ignore[no-untyped-def]
    def drop(txn: Txn, filled: Filled) -> None:
        for key, _ in list(txn.scan(table)):
            txn.delete(table, key)

    drop.__name__ = f"drop_{table.name.lower()}"
    return drop


TABLES = (
    Table.PREFIXES, Table.ENDS, Table.PLACES, Table.CHILDREN, Table.NAMES, Table.EXPIRES, Table.SESSIONS, Table.MODELS,
    Table.SEGMENTS,
)  # fmt: skip
DAMAGE = [
    break_refs, break_prefix_hash, drop_page_row, drop_snapshot_row, break_entry, break_live, break_sizes,
    strange_journal, journal_gap, stray_use, *map(drop_table, TABLES),
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_damage_of_the_index_is_found_and_repaired(filled: Filled, damage) -> None:  # type: ignore[no-untyped-def]
    with index_of(filled.folder) as index:
        txn = index.begin_write()
        damage(txn, filled)
        txn.commit()
    assert findings(filled.folder)
    if damage is not journal_gap:  # a gap is a fact that no repair can fill: reading that session says so
        assert repaired(filled.folder)
        assert findings(filled.folder) == []


def read_all(index: Index, folder: Path) -> list[bytes | None]:
    """What reading every record gives: its payload, or None where it says CORRUPT."""
    with index.read() as txn:
        places = [place for key, _ in txn.scan(Table.SNAPSHOTS) for place in plan(txn, folder, key)]
    found: list[bytes | None] = []
    with Reader(OsFiles()) as reader:
        for place in places:
            try:
                found.append(bytes(reader.payload(place)))
            except CorruptError:
                found.append(None)
    return found


def test_every_flipped_bit_is_found_or_padding(filled: Filled) -> None:
    """One bit at a time, anywhere in the segment: found, or without effect; never other bytes. More: show/flips.py."""
    path, rng = segment(filled), random.Random(5)
    folder = filled.folder / "segments"
    with index_of(filled.folder) as index:
        with index.read() as txn:
            rows = [txn.page(key) for key, _ in txn.scan(Table.PAGES)]
            rows += [txn.snapshot(key) for key, _ in txn.scan(Table.SNAPSHOTS)]  # type: ignore[misc]
        live = [(row.offset, row.offset + 64 + row.payload_bytes) for row in rows if row]
        whole = read_all(index, folder)
        padding = 0
        n_flips = 200
        for _ in range(n_flips):
            offset, mask = rng.randrange(path.stat().st_size), 1 << rng.randrange(8)
            flip(path, offset, mask)
            found = list(verify(index, folder, OsFiles(), deep=True))
            matters = offset < 36 or any(start <= offset < end for start, end in live)
            assert bool(found) == matters, offset
            assert all(now is None or now == before for now, before in zip(read_all(index, folder), whole, strict=True))
            padding += not matters
            flip(path, offset, mask)
        assert padding < n_flips // 2
