"""STORE STATS explains every byte: what it counts is what the file system has allocated."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from kvdb.store.ballast import BALLAST_BYTES
from kvdb.store.change_log import LOG_BYTES, LOG_NAME
from kvdb.store.store import Store
from tests.kvdb.store.states import MODEL, PAGE, put_snapshot, string, tokens


def allocated(folder: Path) -> dict[str, int]:
    """Allocated bytes by the first part of the path."""
    found: dict[str, int] = {}
    for path in folder.rglob("*"):
        if path.is_file():
            name = path.relative_to(folder).parts[0]
            found[name] = found.get(name, 0) + path.stat().st_blocks * 512
    return found


def data_bytes(path: Path) -> int:
    """Bytes of a file that are not in holes."""
    total = at = 0
    with path.open("rb") as file:
        size = path.stat().st_size
        while at < size:
            try:
                start = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError:
                break  # only a hole is left
            at = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            total += at - start
    return total


async def test_the_sum_is_what_the_file_system_has_allocated(tmp_path: Path) -> None:
    store = Store.open(tmp_path, loop=asyncio.get_running_loop())
    await store.register_model(MODEL)
    for n in range(8):
        await put_snapshot(store, b"k%d" % n, tokens(n * PAGE + 5, seed=n % 2))
        store.keyspace.put(0, b"text%d" % n, string(os.urandom(70_000 + 5000 * n)))
        store.keyspace.put(0, b"small%d" % n, string(os.urandom(1000)))
    await store.keyspace.flush()
    full = await store.stats()
    for n in range(0, 8, 2):
        store.keyspace.delete(0, b"k%d" % n)
        store.keyspace.delete(0, b"text%d" % n)
    await store.keyspace.flush()
    assert await store.gc() > 0
    await store.keyspace.flush()
    stats = await store.stats()
    files = allocated(tmp_path)
    assert stats.live < full.live
    assert stats.dead > 0
    # Dead bytes are punched: segments hold their headers and the live records, to the byte. What the file system
    # reports is that and its own blocks about the extents of files with many holes.
    assert sum(map(data_bytes, (tmp_path / "segments").iterdir())) == stats.headers + stats.live
    assert stats.segments_disk == files["segments"]
    assert 0 <= stats.segments_disk - stats.headers - stats.live <= 4096 * stats.segments
    assert files["index"] <= stats.index + 16384  # the index is sparse; beside it lies LMDB's table of readers
    assert files["ballast"] == BALLAST_BYTES
    assert stats.log == 0
    store.keyspace.put(0, b"another", string(b"value"))
    await store.keyspace.make_durable()
    assert (await store.stats()).log == LOG_BYTES == (tmp_path / LOG_NAME).stat().st_size
    assert set(files) == {"segments", "index", "ballast", "LOCK"}
    await store.close()


async def test_a_key_frees_what_it_owns(tmp_path: Path) -> None:
    store = Store.open(tmp_path, loop=asyncio.get_running_loop())
    await store.register_model(MODEL)
    ids = {}
    for n in (1, 3, 4):
        ids[n] = (await put_snapshot(store, b"k%d" % n, tokens(n * PAGE + 5))).id
    ids[9] = (await put_snapshot(store, b"k9", tokens(2 * PAGE, seed=1))).id
    stats = await store.stats()
    assert sum(store.usage(found).own_bytes for found in ids.values()) == stats.live_unique
    for n in (4, 9, 1, 3):
        before = (await store.stats()).live
        usage = store.usage(ids[n])
        store.keyspace.delete(0, b"k%d" % n)
        await store.keyspace.flush()
        assert before - (await store.stats()).live == usage.own_bytes
    assert (await store.stats()).live == 0
    await store.close()


async def test_verify_says_how_far_it_is_and_keeps_its_rate(tmp_path: Path) -> None:
    store = Store.open(tmp_path, loop=asyncio.get_running_loop())
    await store.register_model(MODEL)
    await put_snapshot(store, b"k", tokens(4 * PAGE))
    live = (await store.stats()).live
    began = asyncio.get_running_loop().time()
    running = asyncio.ensure_future(store.verify(deep=True, bytes_per_s=live / 0.2))
    while not 0 < store.verified[0] < live:
        await asyncio.sleep(0.001)
        assert not running.done()
    assert store.verified[1] == live
    assert await running == []
    assert store.verified == (live, live)
    assert asyncio.get_running_loop().time() - began > 0.15
    await store.close()
