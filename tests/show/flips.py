"""Every flipped byte of a store is found or has no effect, in segments and in the index; none yields other bytes.

A store with snapshots that share pages, sessions with journals, strings, hashes, sorted sets, expiries and dead space
is made once. Then, flip by flip, one random byte of one of its files is changed to a random other value, and two
questions are asked of that copy: does kvdb-check --deep find it, and what does a daemon that opens the directory
without checking it first answer for every key? A claim holds for a flip if

    found      kvdb-check says so; the daemon refuses the directory, or each key gives its right bytes or CORRUPT
    no effect  kvdb-check is clean and every key, record and token is what it was

Other bytes served, a key missing, a daemon that dies, or anything changed that kvdb-check calls clean, is a violation.

    python tests/show/flips.py [--quick] [--flips N] [--seed N] [--jobs N]
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table as Printed

sys.path.insert(0, str(Path(__file__).parents[2]))

from kvdb.containers import Fields, Members
from kvdb.errors import KvdbError
from kvdb.store.entries import Entry, EntryType, SessionValue
from kvdb.store.read import Reader, plan
from kvdb.store.store import Store
from kvdb_tools.check import check
from tests.kvdb.store.states import FINGERPRINT, MODEL, pack_ids, put_snapshot, read_entry, string, tokens

Result = tuple[Counter[tuple[str, str, str]], list[str]]
Contents = dict[tuple[int, bytes], bytes]
SAME, ERROR, MISSING, OTHER, REFUSED, DIED = "same", "error", "missing", "other bytes", "refused", "daemon died"
WORDS = {
    SAME: "everything right",
    ERROR: "an error for what is hurt",
    MISSING: "a key is missing",
    REFUSED: "does not start",
    DIED: "dies",
    OTHER: "OTHER BYTES",
}


async def fill(folder: Path) -> None:
    """Make the store."""
    store = Store.open(folder, loop=asyncio.get_running_loop())
    await store.register_model(MODEL)
    space = store.keyspace
    for n in range(12):
        done = await put_snapshot(store, b"timeline%d" % (n % 3), tokens(100 + 60 * n, seed=n % 3))
        await put_snapshot(store, b"step%d" % n, tokens(90 * n + 5, seed=n % 3), parent=done.id)
        value = SessionValue(bytes([n]) * 16, FINGERPRINT, done.id, 100 + 60 * n, done.id)
        space.put(1, b"session%d" % n, Entry(EntryType.SESSION, 0, value))
        space.journal_append(value.uid, 100 + 60 * n, pack_ids(range(1 + 40 * n)))
        for size in (5, 700, 3000, 70_000):
            space.put(0, b"string %d of %d" % (n, size), string(random.Random(size + n).randbytes(size), (n % 2) << 45))
        space.put(2, b"hash%d" % n, Entry(EntryType.HASH, 0, Fields({b"f%d" % m: b"v%d" % m for m in range(20 * n)})))
        space.put(2, b"zset%d" % n, Entry(EntryType.ZSET, 0, Members({b"m%d" % m: m / 3 for m in range(9 * n)})))
        space.put(0, b"k" * 450 + b"%d" % n, string(b"a long key"))
        await space.flush()
        if n % 3 == 2:
            for gone in (b"step%d" % (n - 1), b"string %d of 70000" % (n - 2), b"string %d of 700" % n):
                space.delete(0, gone)
            await space.flush()
    await store.close()
    (folder / "ballast").unlink()


def contents(folder: Path, wanted: Iterable[tuple[int, bytes]] = ()) -> Contents:
    """All that a daemon would serve from a directory, each item as bytes, or its error. Raises KvdbError.

    wanted: (database, key) to ask for, listed or not.
    """
    logging.disable(logging.CRITICAL)

    async def read() -> Contents:
        found: Contents = {}
        store = Store.open(folder, loop=asyncio.get_running_loop())
        try:
            listed = {(db, key) for db in range(4) for key in store.keyspace.scan(db, 0, 10_000)[1]}
            for db, key in sorted(listed | set(wanted)):
                try:
                    if store.keyspace.exists(db, key):
                        found[db, key] = served(store, db, key)
                except KvdbError as error:
                    found[db, key] = b"!" + error.word.encode()
            return found
        finally:
            store._release()

    return asyncio.run(read())


def served(store: Store, db: int, key: bytes) -> bytes:
    """What a key gives: its value, and of states every record, checked as a reader checks it, and the journal."""
    entry = read_entry(store, key, db)
    assert entry is not None
    value = entry.value
    if entry.type is EntryType.STRING:
        return repr((entry.expire_ms, value)).encode()
    if entry.type in (EntryType.HASH, EntryType.ZSET):
        return repr(dict(value.items() if isinstance(value, Fields) else value.scores.items())).encode()  # type: ignore[union-attr]
    is_session = isinstance(value, SessionValue)
    snapshot_id = value.base if is_session else value.id  # type: ignore[union-attr]
    pieces = [repr(store.keyspace.journal_read(value.uid)).encode()] if is_session else []  # type: ignore[union-attr]
    with store._index.read() as txn:
        places = plan(txn, store._segments.folder, snapshot_id)
    with Reader(store._files) as reader:
        pieces += [bytes(reader.payload(place)) for place in places]
    return b"".join(pieces)


def serve(folder: Path, expected: Contents) -> str:
    """What a daemon that opens the directory serves, compared; in a child, since a broken index may kill it."""
    pid = os.fork()
    if not pid:
        signal.alarm(60)
        try:
            found = contents(folder, expected)
        except KvdbError:
            os._exit(10)
        except BaseException:
            os._exit(11)
        if any(value != expected.get(name) and value != b"!CORRUPT" for name, value in found.items()):
            os._exit(12)
        if found.keys() < expected.keys():
            os._exit(13)
        os._exit(0 if found == expected else 14)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return DIED
    return {0: SAME, 10: REFUSED, 11: DIED, 12: OTHER, 13: MISSING, 14: ERROR}[os.WEXITSTATUS(status)]


def is_found(folder: Path) -> bool:
    """Whether kvdb-check finds something, or refuses the directory."""
    try:
        return bool(check(folder, deep=True, mend=False).findings)
    except KvdbError:
        return True


def try_flips(
    source: Path, n_flips: int, seed: str, expected: Contents
) -> tuple[Counter[tuple[str, str, str]], list[str]]:
    """Counts by (file, verdict of kvdb-check, what is served), and violations in words."""
    logging.disable(logging.CRITICAL)
    rng = random.Random(seed)
    counts: Counter[tuple[str, str, str]] = Counter()
    violations = []
    index = [source / "index" / "data.mdb"]
    segments = sorted((source / "segments").iterdir())
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "copy"
        for number in range(n_flips):
            kind, files = ("index", index) if number % 2 else ("segments", segments)
            at = rng.randrange(sum(path.stat().st_size for path in files))
            path = files[0]
            for path in files:
                if at < path.stat().st_size:
                    break
                at -= path.stat().st_size
            shutil.copytree(source, folder)
            target = folder / path.relative_to(source)
            with target.open("r+b") as file:
                file.seek(at)
                old = file.read(1)[0]
                file.seek(at)
                file.write(bytes([old ^ rng.randrange(1, 256)]))
            found = is_found(folder)
            what = serve(folder, expected)
            verdict = "found" if found else "no effect"
            if what in (OTHER, MISSING, DIED) or (not found and what != SAME):
                verdict = "VIOLATION"
                violations.append(f"byte {at} of {path.name}, 0x{old:02x} before: found {found}, served: {WORDS[what]}")
            counts[kind, verdict, what] += 1
            shutil.rmtree(folder)
    return counts, violations


def _job(arguments: tuple[Path, int, str, Contents]) -> Result:
    return try_flips(*arguments)


@click.command()
@click.option("--quick", is_flag=True, help="40 flips.")
@click.option("--flips", default=10_000, show_default=True, help="Half of them in the index.")
@click.option("--seed", default=1, show_default=True)
@click.option("--jobs", default=2, show_default=True)
def main(quick: bool, flips: int, seed: int, jobs: int) -> None:
    """Print the classes and their counts; exit 1 when a flip is neither found nor without effect."""
    console = Console(highlight=False, soft_wrap=True)
    flips, jobs = (40, 1) if quick else (flips, jobs)
    began = time.time()
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "store"
        asyncio.run(fill(source))
        expected = contents_of_copy(source)
        assert not is_found(source)
        shares = [(source, len(range(job, flips, jobs)), f"{seed} {job}", expected) for job in range(jobs)]
        if jobs == 1:
            results = [try_flips(*shares[0])]
        else:
            with multiprocessing.get_context("fork").Pool(jobs) as pool:
                results = pool.map(_job, shares)
        sizes = {
            "index": (source / "index" / "data.mdb").stat().st_size,
            "segments": sum(path.stat().st_size for path in (source / "segments").iterdir()),
        }
    counts = sum((counts for counts, _ in results), Counter())
    violations = [line for _, lines in results for line in lines]
    table = Printed(title=f"{flips} flips over {len(expected)} keys in {time.time() - began:.0f} s, seed {seed}")
    for name in ("file", "bytes", "kvdb-check --deep", "a daemon that opens it serves", "flips"):
        table.add_column(name, justify="right" if name in ("bytes", "flips") else "left")
    for (kind, verdict, what), count in sorted(counts.items()):
        table.add_row(kind, f"{sizes[kind]:,}", verdict, WORDS[what], f"{count:,}")
    console.print(table)
    for line in violations:
        console.print(line, markup=False)
    found = sum(count for (_, verdict, _), count in counts.items() if verdict == "found")
    idle = sum(count for (_, verdict, _), count in counts.items() if verdict == "no effect")
    other = sum(count for (_, _, what), count in counts.items() if what == OTHER)
    neither = flips - found - idle
    console.print(f"{flips} flips: {found} found, {idle} without effect, {neither} neither; other bytes: {other}")
    sys.exit(1 if violations or neither else 0)


def contents_of_copy(source: Path) -> Contents:
    """The contents, read from a copy: opening a directory changes it."""
    with tempfile.TemporaryDirectory() as scratch:
        shutil.copytree(source, Path(scratch) / "copy")
        return contents(Path(scratch) / "copy")


if __name__ == "__main__":
    main()
