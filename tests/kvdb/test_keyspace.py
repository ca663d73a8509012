"""The overlay: every change is seen at once, in order, and survives as whole layers."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from kvdb.errors import KvdbError, NoSpaceError, WrongTypeError
from kvdb.keyspace import Keyspace
from kvdb.store.entries import KEY_INLINE_BYTES, Entry, EntryType, SessionValue, decode_entry, encode_entry
from kvdb.store.files import OsFiles
from kvdb.store.store import Store
from tests.kvdb.store.states import FINGERPRINT, pack_ids, snapshot_entry, string


class FailingCommits(OsFiles):
    """Commits fail with the given errno while it is set."""

    def __init__(self) -> None:
        self.errno = 0

    def commit(self, commit):  # type: ignore[no-untyped-def]
        if self.errno:
            raise OSError(self.errno, "injected")
        commit()


class Clock:
    def __init__(self) -> None:
        self.ms = 1000

    def __call__(self) -> int:
        return self.ms


@pytest.fixture
def files() -> FailingCommits:
    return FailingCommits()


@pytest.fixture
async def store(tmp_path: Path, files: FailingCommits) -> AsyncIterator[Store]:
    store = Store.open(tmp_path, loop=asyncio.get_running_loop(), files=files)
    yield store
    files.errno = 0
    await store.close()


@pytest.fixture
def clock(store: Store) -> Clock:
    clock = Clock()
    store.keyspace._clock = clock
    return clock


@pytest.fixture
def keys(store: Store, clock: Clock) -> Keyspace:
    return store.keyspace


def everything(keys: Keyspace, db: int = 0, count: int = 7) -> list[bytes]:
    cursor, found = 0, []
    while True:
        cursor, some = keys.scan(db, cursor, count)
        found += some
        if not cursor:
            return found


@pytest.mark.parametrize("flushed", [False, True])
async def test_put_get_delete(keys: Keyspace, flushed: bool) -> None:
    keys.put(0, b"a", string(b"1"))
    if flushed:
        await keys.flush()
    assert keys.get(0, b"a") == string(b"1")
    assert keys.get(1, b"a") is None
    assert keys.size(0) == 1
    assert keys.delete(0, b"a")
    assert not keys.delete(0, b"a")
    assert keys.get(0, b"a") is None
    assert keys.size(0) == 0
    if flushed:
        await keys.flush()
    assert keys.get(0, b"a") is None
    assert keys.size(0) == 0


async def test_what_is_flushed_survives_and_nothing_else(tmp_path: Path) -> None:
    store = Store.open(tmp_path, loop=asyncio.get_running_loop())
    store.keyspace.put(3, b"kept", string(b"1"))
    await store.keyspace.flush()
    store.keyspace.put(3, b"lost", string(b"2"))
    store._release()
    store = Store.open(tmp_path, loop=asyncio.get_running_loop())
    assert store.keyspace.get(3, b"kept") == string(b"1")
    assert store.keyspace.get(3, b"lost") is None
    assert store.keyspace.size(3) == 1
    await store.close()


async def test_changes_during_a_round_win(keys: Keyspace) -> None:
    keys.put(0, b"a", string(b"1"))
    keys.put(0, b"b", string(b"1"))
    flush = asyncio.ensure_future(keys.flush())
    while keys._frozen is None:
        await asyncio.sleep(0)
    keys.put(0, b"a", string(b"2"))
    keys.delete(0, b"b")
    assert (keys.get(0, b"a"), keys.get(0, b"b"), keys.size(0)) == (string(b"2"), None, 1)
    await flush
    assert (keys.get(0, b"a"), keys.get(0, b"b"), keys.size(0)) == (string(b"2"), None, 1)
    await keys.flush()
    assert (keys.get(0, b"a"), keys.get(0, b"b"), keys.size(0)) == (string(b"2"), None, 1)


async def test_a_failed_round_loses_nothing_and_says_so(store: Store, keys: Keyspace, files: FailingCommits) -> None:
    keys.put(0, b"a", string(b"1"))
    keys.put(0, b"b", string(b"1"))
    keys.put(1, b"s", Entry(EntryType.SESSION, 0, SessionValue(b"u" * 16, FINGERPRINT)))
    keys.journal_append(b"u" * 16, 0, pack_ids([1, 2]))
    files.errno = 28
    with pytest.raises(NoSpaceError):
        await keys.flush()
    assert isinstance(store.write_error, NoSpaceError)
    keys.put(0, b"a", string(b"2"))
    keys.journal_append(b"u" * 16, 2, pack_ids([3]))
    assert keys.get(0, b"b") == string(b"1")
    assert keys.size(0) == 2
    assert sorted(everything(keys)) == [b"a", b"b"]
    files.errno = 5
    with pytest.raises(KvdbError):
        await keys.flush()
    files.errno = 0
    await keys.flush()
    assert store.write_error is None
    assert keys.get(0, b"a") == string(b"2")
    assert keys.journal_read(b"u" * 16) == (0, pack_ids([1, 2, 3]))


async def test_clear_hides_what_is_stored(keys: Keyspace) -> None:
    for number in range(20):
        keys.put(0, b"%d" % number, string(b"x"))
        keys.put(1, b"%d" % number, string(b"x"))
    await keys.flush()
    keys.put(0, b"unflushed", string(b"x"))
    keys.clear(0)
    keys.put(0, b"later", string(b"y"))
    for _ in range(2):
        assert everything(keys) == [b"later"]
        assert (keys.size(0), keys.size(1)) == (1, 20)
        assert keys.get(0, b"3") is None
        await keys.flush()


async def test_expiry_is_lazy_and_active(keys: Keyspace, clock: Clock) -> None:
    keys.put(0, b"stored", string(b"1", expire_ms=2000))
    keys.put(0, b"moved", string(b"1", expire_ms=2000))
    keys.put(0, b"kept", string(b"1", expire_ms=2000))
    await keys.flush()
    assert keys.expire_at(0, b"moved", 5000)
    assert keys.expire_at(0, b"kept", None)
    assert not keys.expire_at(0, b"none", 5000)
    keys.put(0, b"fresh", string(b"1", expire_ms=1500))
    told: list[bytes] = []
    keys.on_expired = lambda db, key: told.append(key)
    clock.ms = 1999
    assert keys.get(0, b"fresh") is None
    assert told == [b"fresh"], "whoever listens hears it before anything else happens to the key"
    assert keys.get(0, b"stored") is not None
    clock.ms = 2000
    assert not keys.exists(0, b"stored")
    assert told == [b"fresh", b"stored"]
    assert keys.expire_cycle(2000) == []
    await keys.flush()
    assert keys.expire_cycle(4999) == []
    assert keys.expire_cycle(5000) == [(0, b"moved")]
    assert told == [b"fresh", b"stored", b"moved"]
    await keys.flush()
    assert everything(keys) == [b"kept"]
    assert keys.expire_cycle(10**13) == []


async def test_an_expire_cycle_is_bounded(keys: Keyspace) -> None:
    for number in range(50):
        keys.put(0, b"%d" % number, string(b"x", expire_ms=1500))
        if number == 25:
            await keys.flush()
    found: set[tuple[int, bytes]] = set()
    for _ in range(5):
        some = keys.expire_cycle(2000, limit=10)
        assert len(some) == 10
        found |= set(some)
    assert len(found) == 50


async def test_scan_returns_every_key_that_stays(keys: Keyspace) -> None:
    rng = random.Random(1)
    stay = [b"stay%d" % number for number in range(300)]
    for number, key in enumerate(stay):
        keys.put(0, key, string(b"x"))
        if number % 100 == 50:
            await keys.flush()
    for count in (1, 10, 1000):
        cursor, seen = 0, set()
        while True:
            cursor, some = keys.scan(0, cursor, count)
            seen |= set(some)
            for _ in range(3):
                key = b"other%d" % rng.randrange(200)
                if rng.random() < 0.5:
                    keys.put(0, key, string(b"y"))
                else:
                    keys.delete(0, key)
            if rng.random() < 0.1:
                await keys.flush()
            if not cursor:
                break
        assert seen >= set(stay)


async def test_scan_returns_each_key_once_when_nothing_changes(keys: Keyspace) -> None:
    for number in range(200):
        keys.put(0, b"%d" % number, string(b"x"))
    await keys.flush()
    for number in range(100, 300):
        keys.put(0, b"%d" % number, string(b"x"))
    keys.delete(0, b"7")
    found = everything(keys)
    assert sorted(found) == sorted(b"%d" % number for number in range(300) if number != 7)
    assert keys.size(0) == 299


async def test_long_keys_and_values(keys: Keyspace) -> None:
    long = [b"x" * n for n in (KEY_INLINE_BYTES, KEY_INLINE_BYTES + 1, 5000)] + [b"x" * 4999 + b"y", b""]
    for number, key in enumerate(long):
        keys.put(0, key, string(b"%d" % number * 3000, expire_ms=5000))
    await keys.flush()
    keys._clean[0].clear()
    for number, key in enumerate(long):
        assert keys.get(0, key) == string(b"%d" % number * 3000, expire_ms=5000)
    assert sorted(everything(keys)) == sorted(long)
    assert sorted(keys.expire_cycle(6000)) == sorted((0, key) for key in long)


async def test_random_picks_existing_keys(keys: Keyspace) -> None:
    assert keys.random(0) is None
    keys.put(0, b"gone", string(b"x"))
    keys.put(0, b"a", string(b"x"))
    await keys.flush()
    keys.put(0, b"b", string(b"x"))
    keys.delete(0, b"gone")
    assert {keys.random(0) for _ in range(200)} == {b"a", b"b"}


async def test_rename(keys: Keyspace) -> None:
    keys.put(0, b"a", string(b"1", expire_ms=5000))
    assert keys.rename(0, b"a", b"b")
    assert not keys.rename(0, b"a", b"b")
    assert keys.rename(0, b"b", b"b")
    assert keys.get(0, b"b") == string(b"1", expire_ms=5000)
    assert keys.size(0) == 1


async def test_journal(keys: Keyspace) -> None:
    uid = b"u" * 16
    keys.put(0, b"s", Entry(EntryType.SESSION, 0, SessionValue(uid, FINGERPRINT)))
    assert keys.journal_read(uid) == (0, b"")
    steps = [
        (lambda: keys.journal_append(uid, 5, pack_ids([5, 6, 7])), 5, [5, 6, 7]),
        (lambda: keys.journal_append(uid, 8, pack_ids([8])), 5, [5, 6, 7, 8]),
        (lambda: keys.journal_cut(uid, 7), 5, [5, 6]),
        (lambda: keys.journal_append(uid, 6, pack_ids([60, 70, 80])), 5, [5, 60, 70, 80]),
        (lambda: keys.journal_drop(uid, 7), 7, [70, 80]),
        (lambda: keys.journal_drop(uid, 9), 0, []),
        (lambda: keys.journal_append(uid, 9, pack_ids([9])), 9, [9]),
        (lambda: keys.journal_cut(uid, 0), 0, []),
        (lambda: keys.journal_append(uid, 0, pack_ids([1])), 0, [1]),
    ]
    for flush_each in (False, True):
        for step, first, ids in steps:
            step()
            if flush_each:
                await keys.flush()
            assert keys.journal_read(uid) == (first, pack_ids(ids))
        keys.journal_cut(uid, 0)
        await keys.flush()


async def test_a_gap_in_a_journal_is_an_error(keys: Keyspace) -> None:
    keys.journal_append(b"u" * 16, 0, pack_ids([1]))
    keys.journal_append(b"u" * 16, 2, pack_ids([1]))
    with pytest.raises(KvdbError, match="gap before position 2"):
        keys.journal_read(b"u" * 16)


async def test_a_session_replaced_before_a_commit_leaves_no_journal(keys: Keyspace) -> None:
    first, second = b"u" * 16, b"v" * 16
    for uid in (first, second):
        keys.put(0, b"s", Entry(EntryType.SESSION, 0, SessionValue(uid, FINGERPRINT)))
        keys.journal_append(uid, 0, pack_ids([1, 2]))
    await keys.flush()
    assert keys.journal_read(first) == (0, b"")
    assert keys.journal_read(second) == (0, pack_ids([1, 2]))


async def test_the_journal_goes_with_its_session(store: Store, keys: Keyspace) -> None:
    uid, other = b"u" * 16, b"v" * 16
    for key, which in ((b"s", uid), (b"t", other)):
        keys.put(0, key, Entry(EntryType.SESSION, 0, SessionValue(which, FINGERPRINT)))
        keys.journal_append(which, 0, pack_ids([1, 2, 3]))
    await keys.flush()
    keys.rename(0, b"s", b"moved")
    await keys.flush()
    assert keys.journal_read(uid) == (0, pack_ids([1, 2, 3]))
    assert keys.session_uids() == {uid, other}
    keys.delete(0, b"moved")
    assert keys.session_uids() == {other}
    await keys.flush()
    assert keys.journal_read(uid) == (0, b"")
    assert keys.journal_read(other) == (0, pack_ids([1, 2, 3]))


async def test_sessions_are_known_after_a_restart(tmp_path: Path) -> None:
    store = Store.open(tmp_path, loop=asyncio.get_running_loop())
    store.keyspace.put(2, b"s", Entry(EntryType.SESSION, 0, SessionValue(b"u" * 16, FINGERPRINT)))
    await store.close()
    store = Store.open(tmp_path, loop=asyncio.get_running_loop())
    assert store.keyspace.session_uids() == {b"u" * 16}
    await store.close()


async def test_typed(keys: Keyspace) -> None:
    keys.put(0, b"a", string(b"1"))
    assert keys.typed(0, b"a", EntryType.STRING) == string(b"1")
    assert keys.typed(0, b"none", EntryType.SNAPSHOT) is None
    with pytest.raises(WrongTypeError):
        keys.typed(0, b"a", EntryType.SNAPSHOT)


@pytest.mark.parametrize(
    "entry",
    [
        string(b""),
        string(b"x", expire_ms=1 << 42),
        snapshot_entry(b"i" * 32, 9),
        Entry(EntryType.SESSION, 0, SessionValue(b"u" * 16, b"f" * 32)),
        Entry(EntryType.SESSION, 0, SessionValue(b"u" * 16, b"f" * 32, b"b" * 32, 7, b"l" * 32)),
    ],
)
def test_entries_round_trip(entry: Entry) -> None:
    assert decode_entry(encode_entry(b"key", entry)) == entry


async def test_random_operations_match_a_dict(tmp_path: Path) -> None:
    """A dict model over restarts: every operation at random, 3,000 of them."""
    rng = random.Random(7)
    store = Store.open(tmp_path, loop=asyncio.get_running_loop())
    model: dict[bytes, bytes] = {}
    for number in range(3000):
        keys = store.keyspace
        key, other = b"%d" % rng.randrange(40), b"%d" % rng.randrange(40)
        match rng.choice(("put", "put", "delete", "rename", "flush", "log", "log", "check", "clear", "restart")):
            case "put":
                keys.put(0, key, string(b"%d" % number))
                model[key] = b"%d" % number
            case "delete":
                assert keys.delete(0, key) == (model.pop(key, None) is not None)
            case "rename":
                assert keys.rename(0, key, other) == (key in model)
                if key in model:
                    model[other] = model.pop(key)
            case "flush" if rng.random() < 0.3:
                keys.flush_soon()
                await asyncio.sleep(0)
            case "log" if rng.random() < 0.3:
                await keys.make_durable()
            case "clear" if rng.random() < 0.05:
                keys.clear(0)
                model.clear()
            case "restart" if rng.random() < 0.03:
                await store.close()
                store = Store.open(tmp_path, loop=asyncio.get_running_loop())
            case "check" if rng.random() < 0.2:
                assert keys.size(0) == len(model)
                assert sorted(everything(keys)) == sorted(model)
        found = store.keyspace.get(0, key)
        assert (found.value if found else None) == model.get(key)
    await store.close()
