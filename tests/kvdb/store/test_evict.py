"""Budget and eviction: room is made before a write, by the policy's order, never from what is protected."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from kvdb.errors import KvdbError, NoSpaceError
from kvdb.store.budget import INDEX_MARGIN
from kvdb.store.entries import Entry, EntryType, SessionValue, SnapshotValue
from kvdb.store.evict import load, plan_eviction
from kvdb.store.index import Table
from kvdb.store.store import Store
from kvdb.store.uses import Use, Uses
from kvdb.store.verify import verify
from tests.kvdb.store.states import (
    FINGERPRINT,
    MODEL,
    PAGE,
    put_snapshot,
    snapshot_entry,
    string,
    tokens,
    write_snapshot,
)

FAR = 1 << 42


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    store = Store.open(tmp_path, loop=asyncio.get_running_loop())
    await store.register_model(MODEL)
    yield store
    assert list(verify(store._index, tmp_path / "segments", store._files, deep=True)) == []
    await store.close()


async def fill(store: Store, n: int = 5, expire_ms: int = 0) -> list[bytes]:
    """Snapshots a0, a1 ... of equal size that share nothing."""
    ids = []
    for number in range(n):
        new = await write_snapshot(store, tokens(2 * PAGE, seed=number))
        await store.commit_snapshot(new, key=(0, b"a%d" % number), entry=snapshot_entry(new.id, expire_ms))
        ids.append(new.id)
    return ids


def used_at(store: Store, **uses: int) -> None:
    """Say when snapshots a0, a1 ... were used last, and how often."""
    for name, ms in uses.items():
        entry = store.keyspace.get(0, name.encode())
        assert entry is not None
        store._uses._fresh[entry.value.id] = Use(1.0, ms)  # type: ignore[union-attr]


def keys(store: Store) -> set[bytes]:
    return set(store.keyspace.scan(0, 0, 1000)[1])


def limit(store: Store, policy: str, more: int = INDEX_MARGIN + 40000) -> None:
    """Leave room for `more` bytes besides what is stored now: by default the index may grow, and no snapshot fits."""
    store.budget.maxstore, store.budget.policy = store.used_bytes + more, policy


async def test_noeviction_refuses_before_the_write(store: Store) -> None:
    ids = await fill(store)
    limit(store, "noeviction")
    with pytest.raises(
        NoSpaceError, match=r"maxstore is \d+ bytes and \d+ bytes more do not fit \(policy noeviction\)"
    ):
        await store.reserve("worker", 1 << 16)
    with pytest.raises(NoSpaceError):
        await put_snapshot(store, b"new", tokens(3 * PAGE, seed=50))
    assert keys(store) == {b"a%d" % number for number in range(5)}
    assert store.snapshot(ids[0]) is not None
    store.keyspace.delete(0, b"a0")
    store.keyspace.delete(0, b"a1")
    await store.keyspace.flush()
    await put_snapshot(store, b"new", tokens(3 * PAGE, seed=50))


async def test_what_is_written_and_refused_is_given_back(store: Store) -> None:
    new = await write_snapshot(store, tokens(3 * PAGE, seed=50))
    limit(store, "noeviction", 0)
    before = new.reservation.path.stat().st_blocks
    with pytest.raises(NoSpaceError):
        await store.commit_snapshot(new, key=(0, b"new"), entry=snapshot_entry(new.id))
    assert new.reservation.path.stat().st_blocks < before


async def test_a_state_larger_than_the_budget_evicts_nothing(store: Store) -> None:
    await fill(store)
    store.budget.maxstore, store.budget.policy = store.used_bytes, "allkeys-lru"
    with pytest.raises(NoSpaceError):
        await store.reserve("worker", store.budget.maxstore + 1)
    assert len(keys(store)) == 5


async def test_lru_evicts_what_was_used_longest_ago(store: Store) -> None:
    await fill(store)
    used_at(store, a0=5000, a1=1000, a2=4000, a3=2000, a4=3000)
    limit(store, "allkeys-lru")
    done = await put_snapshot(store, b"new", tokens(2 * PAGE, seed=50))
    assert keys(store) == {b"a0", b"a2", b"a3", b"a4", b"new"}
    assert store.budget.evicted_keys == 1
    assert store.budget.excess() <= 0
    assert store.budget.evicted_bytes >= done.bytes_new


async def test_reading_counts_as_use(store: Store) -> None:
    ids = await fill(store, 2)
    used_at(store, a0=1000, a1=2000)
    await store.read_tail(ids[0])
    limit(store, "allkeys-lru")
    await put_snapshot(store, b"new", tokens(2 * PAGE, seed=50))
    assert keys(store) == {b"a0", b"new"}


async def test_lfu_and_ttl(store: Store) -> None:
    ids = await fill(store, 3)
    now = 1 << 41
    for snapshot_id, hits in zip(ids, (3.0, 1.0, 2.0), strict=True):
        store._uses._fresh[snapshot_id] = Use(hits, now)
    for number, ms in enumerate((FAR + 2, FAR + 3, FAR + 1)):
        store.keyspace.expire_at(0, b"a%d" % number, ms)
    await store.keyspace.flush()

    def order(name: str) -> list[bytes]:
        with store._index.read() as txn:
            stored = load(txn, store._uses.fresh(), (), only_volatile=False)
        return [eviction.names[0][1] for eviction in plan_eviction(stored, name, 1 << 40, now)]

    assert order("lfu") == [b"a1", b"a2", b"a0"]
    assert order("ttl") == [b"a2", b"a0", b"a1"]


async def test_volatile_spares_keys_without_expiry(store: Store) -> None:
    await fill(store, 3)
    store.keyspace.expire_at(0, b"a1", FAR)
    limit(store, "volatile-lru")
    await put_snapshot(store, b"new", tokens(2 * PAGE, seed=50))
    assert keys(store) == {b"a0", b"a2", b"new"}
    limit(store, "volatile-lru")
    with pytest.raises(NoSpaceError, match="nothing may be evicted"):
        await put_snapshot(store, b"more", tokens(2 * PAGE, seed=51))


async def test_a_key_that_lost_its_expiry_since_it_was_chosen_stays(store: Store, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    await fill(store, 2, FAR)
    limit(store, "volatile-lru")
    plan = store.budget._plan

    def persist_meanwhile(*arguments):  # type: ignore[no-untyped-def]
        chosen = plan(*arguments)
        for db, key in (name for eviction in chosen for name in eviction.names):
            store._loop.call_soon_threadsafe(store.keyspace.expire_at, db, key, None)
        return chosen

    monkeypatch.setattr(store.budget, "_plan", persist_meanwhile)
    with pytest.raises(NoSpaceError, match="nothing may be evicted"):
        await put_snapshot(store, b"new", tokens(4 * PAGE, seed=50))
    assert keys(store) == {b"a0", b"a1"}


async def test_protected_snapshots_stay(store: Store) -> None:
    ids = await fill(store, 4)
    pinned = store.keyspace.get(0, b"a0")
    assert pinned is not None
    store.keyspace.put(0, b"a0", pinned._replace(value=SnapshotValue(ids[0], {}, True)))
    session = SessionValue(b"u" * 16, FINGERPRINT, ids[1], 2 * PAGE)
    store.keyspace.put(0, b"session", Entry(EntryType.SESSION, 0, session))
    limit(store, "allkeys-lru")
    with store.hold(ids[2]):
        await put_snapshot(store, b"new", tokens(2 * PAGE, seed=50))
        assert keys(store) == {b"a0", b"a1", b"a2", b"session", b"new"}


async def test_a_snapshot_with_two_names_goes_with_both(store: Store) -> None:
    ids = await fill(store, 2)
    store.keyspace.put(3, b"other", snapshot_entry(ids[0]))
    used_at(store, a0=1000, a1=2000)
    gone: list[tuple[int, bytes]] = []
    store.budget.on_evicted = lambda db, key: gone.append((db, key))
    limit(store, "allkeys-lru")
    await put_snapshot(store, b"new", tokens(2 * PAGE, seed=50))
    assert sorted(gone) == [(0, b"a0"), (3, b"other")]


async def test_shared_bytes_do_not_count_as_freed(store: Store) -> None:
    """Steps of one timeline: evicting an early one frees its tail only, so more than one has to go."""
    ids = tokens(12 * PAGE)
    parent = None
    for n in range(4, 12):
        parent = (await put_snapshot(store, b"s%d" % n, ids[: n * PAGE + 1], parent=parent)).id
    used_at(store, **{f"s{n}": n for n in range(4, 12)})
    limit(store, "allkeys-lru")
    await put_snapshot(store, b"new", tokens(9 * PAGE, seed=50))
    assert store.budget.excess() <= 0
    assert b"s11" in keys(store)
    assert store.budget.evicted_keys >= 2
    # The lineage has closed over the gaps.
    chain = store.lineage(parent or b"")
    assert len(chain) == len(keys(store)) - 1


async def test_value_keeps_what_costs_most_to_compute_again(store: Store) -> None:
    """Of three equally used snapshots, the one whose parent is stored right before it is cheap to lose."""
    ids = tokens(40 * PAGE)
    base = await put_snapshot(store, b"base", ids[: 39 * PAGE])
    await put_snapshot(store, b"near", ids[: 39 * PAGE + 1], parent=base.id)
    await put_snapshot(store, b"far", tokens(PAGE, seed=3))
    used_at(store, base=1000, near=1000, far=1000)
    limit(store, "allkeys-value")
    await store.reserve("worker", 60000)
    assert keys(store) == {b"base", b"far"}


async def test_cached_snapshots_are_evicted_too(store: Store) -> None:
    new = await write_snapshot(store, tokens(2 * PAGE))
    await store.commit_snapshot(new)
    limit(store, "volatile-lru")
    await put_snapshot(store, b"k", tokens(PAGE, seed=1))
    assert store.snapshot(new.id) is None


async def test_a_lower_limit_is_enforced_at_once(store: Store) -> None:
    await fill(store, 6)
    store.budget.configure(store.used_bytes - 4096, "allkeys-lru")
    await store.budget.idle()
    assert len(keys(store)) == 5
    assert store.budget.excess() <= 0
    with pytest.raises(KvdbError, match="unknown policy 'random'"):
        store.budget.configure(1, "random")


async def test_writes_of_unknown_size(store: Store) -> None:
    await fill(store, 3)
    store.budget.check()
    limit(store, "noeviction", -1)
    with pytest.raises(NoSpaceError, match="it takes"):
        store.budget.check()
    store.budget.policy = "allkeys-lru"
    store.keyspace.put(0, b"text", string(b"x"))
    store.budget.check()
    await store.budget.idle()
    assert store.budget.excess() <= 0
    assert b"text" in keys(store)


async def test_uses_survive_a_restart_and_go_with_their_snapshot(tmp_path: Path) -> None:
    folder = tmp_path / "other"
    store = Store.open(folder, loop=asyncio.get_running_loop())
    await store.register_model(MODEL)
    ids = await fill(store, 2)
    for snapshot_id in ids:
        await store.read_tail(snapshot_id)
    await store.close()
    store = Store.open(folder, loop=asyncio.get_running_loop())
    store.keyspace.delete(0, b"a0")
    await store.keyspace.flush()
    with store._index.read() as txn:
        assert [key for key, _ in txn.scan(Table.USES)] == [ids[1]]
    await store.close()


async def test_reads_close_together_are_one_use(store: Store) -> None:
    uses = Uses()
    with store._index.read() as txn:
        for ms in (0, 10, 999):
            uses.touch(txn, b"i" * 32, ms)
        assert uses.fresh()[b"i" * 32].hits == 1.0
        uses.touch(txn, b"i" * 32, 6 * 3600 * 1000)
    assert uses.fresh()[b"i" * 32].hits == pytest.approx(1.5)
