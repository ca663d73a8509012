"""Archives and `.kv` files: out and in again without loss; nothing wrong gets in."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from kvdb import ds4_exchange
from kvdb.errors import CorruptError, KvdbError, WrongModelError
from kvdb.store.exchange import plain_name, read_archive, read_archive_file, read_file, write_file
from kvdb.store.files import OsFiles
from kvdb.store.records import CommittedSnapshot, ModelRecord
from kvdb.store.store import Store
from kvdb.store.verify import verify
from kvdb_engine.catalog import ModelInfo, open_model
from kvdb_protocol.dsv4 import decode_payload
from kvdb_protocol.kvc import decode_kvc, encode_kvc
from tests.kvdb.store.faults import FailingFiles
from tests.kvdb.store.states import MODEL, PAGE, pack_ids, put_snapshot, snapshot_entry, tokens

DS4 = Path(__file__).parents[2] / "vectors" / "ds4"
KV_FILES = sorted((DS4 / "kv").glob("*.kv.gz"))


async def open_store(folder: Path) -> Store:
    store = Store.open(folder, loop=asyncio.get_running_loop())
    await store.register_model(MODEL)
    return store


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    store = await open_store(tmp_path / "one")
    yield store
    assert list(verify(store._index, tmp_path / "one" / "segments", store._files, deep=True)) == []
    await store.close()


async def export(store: Store, snapshot_id: bytes) -> bytes:
    return await store.export_archive(snapshot_id, lambda pieces: b"".join(bytes(piece) for piece in pieces))


async def take_in(store: Store, data: bytes, key: bytes = b"in") -> CommittedSnapshot:
    archive, state = read_archive(data)
    await store.register_model(ModelRecord(archive.model, archive.fingerprint, archive.family, archive.layout))
    return await store.import_state(state, key=(0, key), make_entry=snapshot_entry, created_ms=archive.created_ms)


# Archives


@pytest.mark.parametrize("n_tokens", [1, PAGE, 3 * PAGE + 7])
async def test_archives_move_states_between_stores(store: Store, tmp_path: Path, n_tokens: int) -> None:
    done = await put_snapshot(store, b"k", tokens(n_tokens))
    data = await export(store, done.id)
    assert data[:8] == b"KVDBARC1"
    assert len(data) % 4096 == 0
    other = Store.open(tmp_path / "two", loop=asyncio.get_running_loop())
    found = await take_in(other, data)
    assert found.id == done.id
    assert found.bytes_new == done.bytes_new
    assert await other.token_ids(found.id) == pack_ids(tokens(n_tokens))
    assert (await export(other, found.id))[4096:] == data[4096:]
    assert list(verify(other._index, tmp_path / "two" / "segments", other._files, deep=True)) == []
    await other.close()


async def test_import_shares_what_is_stored(store: Store) -> None:
    done = await put_snapshot(store, b"k", tokens(3 * PAGE + 7))
    data = await export(store, done.id)
    again = await take_in(store, data)
    assert (again.existed, again.bytes_new) == (True, 0)
    store.keyspace.delete(0, b"k")
    store.keyspace.delete(0, b"in")
    await put_snapshot(store, b"part", tokens(2 * PAGE))
    found = await take_in(store, data)
    assert found.pages_new == 1


async def test_damaged_archives_are_refused_whole(store: Store) -> None:
    done = await put_snapshot(store, b"k", tokens(2 * PAGE + 7))
    data = await export(store, done.id)
    store.keyspace.delete(0, b"k")
    await store.keyspace.flush()
    for at in (0, 9, 13, 17, 21, 40, 4096, 4096 + 40, 4096 + 100, len(data) // 2, len(data) - 9000):
        changed = bytearray(data)
        changed[at] ^= 0x21
        if bytes(changed) != data:
            with pytest.raises(CorruptError):
                read_archive(bytes(changed))
    for n_bytes in (0, 31, 100, 4096, 5000, len(data) - 4096):
        with pytest.raises(CorruptError):
            read_archive(data[:n_bytes])
    with pytest.raises(CorruptError):
        read_archive(data + bytes(4096))
    assert (await store.stats()).snapshots == 0


class CountingFiles(OsFiles):
    """Knows the largest piece that was read."""

    def __init__(self) -> None:
        self.largest = 0

    def read(self, fd: int, n_bytes: int, offset: int) -> bytes:
        self.largest = max(self.largest, n_bytes)
        return super().read(fd, n_bytes, offset)


async def test_an_archive_in_a_file_is_read_record_by_record(store: Store, tmp_path: Path) -> None:
    done = await put_snapshot(store, b"k", tokens(30 * PAGE + 7))
    path = tmp_path / "archive"
    path.write_bytes(await export(store, done.id))
    files = CountingFiles()
    archive, state = read_archive_file(files, path)
    assert 0 < files.largest < path.stat().st_size // 4
    assert archive == read_archive(path.read_bytes())[0]
    assert (state.n_tokens, state.n_bytes) == (30 * PAGE + 7, done.bytes_new)
    other = Store.open(tmp_path / "two", loop=asyncio.get_running_loop(), files=files)
    await other.register_model(ModelRecord(archive.model, archive.fingerprint, archive.family, archive.layout))
    found = await other.import_state(state, key=(0, b"in"), make_entry=snapshot_entry, created_ms=1)
    assert found.id == done.id
    assert files.largest < path.stat().st_size // 4
    assert await other.token_ids(found.id) == pack_ids(tokens(30 * PAGE + 7))
    assert list(verify(other._index, tmp_path / "two" / "segments", other._files, deep=True)) == []
    # One that changes between the check and the write is not taken in.
    other.keyspace.delete(0, b"in")
    await other.keyspace.flush()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptError, match="changed while it was imported"):
        await other.import_state(state, key=(0, b"in"), make_entry=snapshot_entry, created_ms=1)
    assert (await other.stats()).snapshots == 0
    await other.close()


async def test_damaged_archives_in_files_are_refused(store: Store, tmp_path: Path) -> None:
    done = await put_snapshot(store, b"k", tokens(2 * PAGE + 7))
    data = await export(store, done.id)
    path = tmp_path / "archive"
    for at in (0, 9, 13, 17, 21, 40, 4096, 4096 + 8, 4096 + 40, 4096 + 100, len(data) // 2, len(data) - 9000):
        changed = bytearray(data)
        changed[at] ^= 0x21
        if bytes(changed) != data:
            path.write_bytes(changed)
            with pytest.raises(CorruptError):
                read_archive_file(OsFiles(), path)
    for damaged in (b"", data[:31], data[:100], data[:4096], data[:5000], data[:-4096], data + bytes(4096)):
        path.write_bytes(damaged)
        with pytest.raises(CorruptError):
            read_archive_file(OsFiles(), path)


async def test_a_damaged_record_is_not_exported(store: Store) -> None:
    done = await put_snapshot(store, b"k", tokens(2 * PAGE + 7))
    place = store.plan(done.id)[1]
    raw = place.path.read_bytes()
    with place.path.open("r+b") as file:
        file.seek(place.offset + 300)
        file.write(bytes([raw[place.offset + 300] ^ 1]))
    with pytest.raises(CorruptError, match=f"page .* at {place.offset}"):
        await export(store, done.id)
    place.path.write_bytes(raw)


# Files


@pytest.mark.parametrize(
    "name", [b"", b".hidden", b"..", b"a/b", b"/etc/passwd", b"a\\b", b"a\0", b"\xff", b"x" * 201, b"a\n"]
)
def test_names_that_are_not_plain(name: bytes) -> None:
    with pytest.raises(KvdbError):
        plain_name(name)


def test_plain_names() -> None:
    assert plain_name(b"state 7.kv") == "state 7.kv"
    assert plain_name("café".encode()) == "café"


def test_files_are_whole_or_absent(tmp_path: Path) -> None:
    files, path = FailingFiles(), tmp_path / "transfer" / "x"
    assert write_file(files, path, [b"ab", memoryview(b"cd")]) == 4
    assert bytes(read_file(files, path)) == b"abcd"
    for call in ("create", "write", "datasync"):
        files.fail(call, times=1)
        with pytest.raises(OSError):
            write_file(files, path, [b"new"])
        files.heal()
        assert [entry.name for entry in path.parent.iterdir()] == ["x"]
        assert path.read_bytes() == b"abcd"
    with pytest.raises(KvdbError, match="no file 'y'"):
        read_file(files, tmp_path / "transfer" / "y")


# ds4


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ModelInfo:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    path.write_bytes(gzip.decompress((DS4 / "tiny.gguf.gz").read_bytes()))
    return open_model(str(path))


@pytest.mark.parametrize("path", KV_FILES, ids=lambda path: path.name[:8])
async def test_ds4_files_in_and_out(store: Store, tiny: ModelInfo, path: Path) -> None:
    data = gzip.decompress(path.read_bytes())
    file = decode_kvc(data)
    await store.register_model(ModelRecord("tiny", tiny.fingerprint, tiny.family, tiny.layout.to_bytes()))
    state, meta = ds4_exchange.read_kv([tiny], data, cross_quant=True)
    done = await store.import_state(state, key=(0, b"k"), make_entry=snapshot_entry, created_ms=1)
    assert await store.token_ids(done.id) == bytes(memoryview(file.payload)[52 : 52 + 4 * file.n_tokens])
    out = await store.read_places(done.id, partial(ds4_exchange.write_kv, tiny, meta=meta))
    assert out.name == file.name == path.name.removesuffix(".gz")
    assert (out.reason, out.context, out.hits, out.created_s, out.used_s) == (
        file.reason, file.context, file.hits, file.created_s, file.used_s,
    )  # fmt: skip
    assert out.text == file.text
    assert_same_payload(bytes(out.payload), bytes(file.payload), tiny)
    # In once more: the do-not-care rows made no difference to the state.
    encoded = b"".join(bytes(piece) for piece in encode_kvc(out))
    again, _ = ds4_exchange.read_kv([tiny], encoded, cross_quant=True)
    assert again.records[-1].id == done.id


def assert_same_payload(ours: bytes, theirs: bytes, info: ModelInfo) -> None:
    """Equal bytes, but for frontier rows that no token occupies."""
    one, two = decode_payload(ours, info.layout.ratios), decode_payload(theirs, info.layout.ratios)
    assert one.header == two.header
    assert (bytes(one.ids), bytes(one.logits)) == (bytes(two.ids), bytes(two.logits))
    n = one.header.n_tokens
    for left, right in zip(one.layers, two.layers, strict=True):
        for name in ("window", "compressed", "index"):
            assert bytes(getattr(left, name)) == bytes(getattr(right, name))
        for name in ("frontier_kv", "frontier_score", "index_frontier_kv", "index_frontier_score"):
            a, b = (np.frombuffer(getattr(layer, name), "<f4") for layer in (left, right))
            if not a.size:
                continue
            rows = 8 if left.ratio == 4 else left.ratio
            a, b = a.reshape(rows, -1), b.reshape(rows, -1)
            used = [*range(4 if n >= 4 else 0), *range(4, 4 + n % 4)] if left.ratio == 4 else [*range(n % left.ratio)]
            assert np.array_equal(a[used], b[used])
            unused = [row for row in range(rows) if row not in used]
            assert np.all(a[unused] == (0 if name.endswith("kv") else np.float32(-1e30)))


def test_a_kv_file_of_another_model_is_refused(tiny: ModelInfo) -> None:
    data = gzip.decompress(KV_FILES[0].read_bytes())
    with pytest.raises(WrongModelError, match="none is served"):
        ds4_exchange.read_kv([], data, cross_quant=True)
    with pytest.raises(WrongModelError, match="n_layers is 6 in the file"):
        ds4_exchange.read_kv([open_model("dsv4-nano")], data, cross_quant=True)
    other_quant = bytearray(data)
    other_quant[4] = 4
    ds4_exchange.read_kv([tiny], other_quant, cross_quant=True)
    with pytest.raises(WrongModelError, match="experts of 4 bits"):
        ds4_exchange.read_kv([tiny], other_quant, cross_quant=False)
    other_text = bytearray(data)
    other_text[60] ^= 1
    with pytest.raises(WrongModelError, match="another text"):
        ds4_exchange.read_kv([tiny], other_text, cross_quant=True)


def test_damaged_kv_files_are_refused(tiny: ModelInfo) -> None:
    data = gzip.decompress(KV_FILES[0].read_bytes())
    for n_bytes in (3, 51, 60, 400, len(data) - 1):
        with pytest.raises(CorruptError):
            ds4_exchange.read_kv([tiny], data[:n_bytes], cross_quant=True)
    wrong_count = bytearray(data)
    wrong_count[8] ^= 1
    with pytest.raises(CorruptError, match="header says"):
        ds4_exchange.read_kv([tiny], wrong_count, cross_quant=True)
