"""The store against a dict, in any order of operations, with restarts in between.

tests/show/machine.py runs many more steps and counts them.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvdb.errors import NoSpaceError
from kvdb.store import compact, segments
from kvdb.store.entries import Entry, EntryType, SessionValue, SnapshotValue
from kvdb.store.store import Store
from kvdb.store.verify import verify
from tests.kvdb.store.states import (
    FAMILY,
    FINGERPRINT,
    MODEL,
    PAGE,
    make_state,
    pack_ids,
    put_snapshot,
    read_entry,
    receive,
    string,
    tokens,
)

keys = st.sampled_from([b"a", b"b", b"c", b"d"])
lengths = st.sampled_from([1, PAGE - 1, PAGE, 2 * PAGE, 2 * PAGE + 9, 4 * PAGE + 1])
seeds = st.integers(0, 2)

Value = tuple[str, object]  # ("string", bytes) or ("snapshot" | "session", ids as a tuple)


class StoreMachine(RuleBasedStateMachine):
    """`model` says what each key holds. `runs` and `looks` count, over all machines, beginnings and comparisons."""

    runs = 0
    looks = 0

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.folder = Path(tempfile.mkdtemp(prefix="kvdb-machine"))
        self.model: dict[bytes, Value] = {}
        self.pinned: set[bytes] = set()

    @initialize()
    def begin(self) -> None:
        StoreMachine.runs += 1
        self.open()

    def open(self) -> None:
        self.store = Store.open(self.folder, loop=self.loop)
        assert self.store.problems == []
        self.run(self.store.register_model(MODEL))

    def run(self, awaitable):  # type: ignore[no-untyped-def]
        return self.loop.run_until_complete(awaitable)

    def forget(self, key: bytes) -> None:
        self.model.pop(key, None)
        self.pinned.discard(key)

    @rule(key=keys, n=lengths, seed=seeds)
    def snapshot(self, key: bytes, n: int, seed: int) -> None:
        ids = tokens(n, seed)
        done = self.run(put_snapshot(self.store, key, ids))
        if any(kind != "string" and value == tuple(ids) for kind, value in self.model.values()):
            assert done.existed
        self.forget(key)
        self.model[key] = ("snapshot", tuple(ids))

    @rule(key=keys, source=keys)
    def fork(self, key: bytes, source: bytes) -> None:
        kind, ids = self.model.get(source, ("none", ()))
        if kind != "snapshot" or key == source:
            return
        snapshot_id = make_state(ids)[-1].id  # type: ignore[arg-type]
        value = SessionValue(os.urandom(16), FINGERPRINT, snapshot_id, len(ids), snapshot_id)  # type: ignore[arg-type]
        self.store.keyspace.put(0, key, Entry(EntryType.SESSION, 0, value))
        self.store.keyspace.journal_append(value.uid, len(ids), pack_ids([1]))  # type: ignore[arg-type]
        self.forget(key)
        self.model[key] = ("session", ids)

    @rule(key=keys, source=keys)
    def copy(self, key: bytes, source: bytes) -> None:
        kind, value = self.model.get(source, ("none", ()))
        if kind not in ("snapshot", "string") or key == source:
            return
        entry = self.store.keyspace.get(0, source)
        assert entry is not None
        self.store.keyspace.put(0, key, self.store.keyspace.held(entry))
        self.forget(key)
        self.model[key] = (kind, value)
        if source in self.pinned:
            self.pinned.add(key)

    @rule(key=keys)
    def pin(self, key: bytes) -> None:
        if self.model.get(key, ("none",))[0] != "snapshot":
            return
        entry = self.store.keyspace.get(0, key)
        assert entry is not None
        assert isinstance(entry.value, SnapshotValue)
        self.store.keyspace.put(0, key, entry._replace(value=SnapshotValue(entry.value.id, {}, True)))
        self.pinned.add(key)

    @rule(key=keys, new=keys)
    def rename(self, key: bytes, new: bytes) -> None:
        assert self.store.keyspace.rename(0, key, new) == (key in self.model)
        if key in self.model and key != new:
            self.forget(new)
            self.model[new] = self.model.pop(key)
            if key in self.pinned:
                self.pinned.discard(key)
                self.pinned.add(new)

    @rule(key=keys, times=st.sampled_from([7_000, 40_000]))
    def receive_string(self, key: bytes, times: int) -> None:
        value = (b"received " + key) * times
        self.store.keyspace.put(0, key, Entry(EntryType.STRING, 0, self.run(receive(self.store, value))))
        self.forget(key)
        self.model[key] = ("string", value)

    @rule()
    def drop_received(self) -> None:
        self.run(receive(self.store, b"nobody needs it" * 9_000))

    @rule(key=keys, times=st.sampled_from([1, 10_000]))
    def set_string(self, key: bytes, times: int) -> None:
        value = (b"text of " + key) * times  # the longer one is a record of its own
        self.store.keyspace.put(0, key, string(value))
        self.forget(key)
        self.model[key] = ("string", value)

    @rule(key=keys)
    def delete(self, key: bytes) -> None:
        assert self.store.keyspace.delete(0, key) == (key in self.model)
        self.forget(key)

    @rule(key=keys)
    def expire(self, key: bytes) -> None:
        assert self.store.keyspace.expire_at(0, key, 1) == (key in self.model)
        self.store.keyspace.expire_cycle(2)
        self.forget(key)

    @rule()
    def clear(self) -> None:
        self.store.keyspace.clear(0)
        self.model.clear()
        self.pinned.clear()

    @rule()
    def flush(self) -> None:
        self.run(self.store.keyspace.flush())

    @rule()
    def collect(self) -> None:
        self.run(self.store.gc())

    @rule()
    def compact(self) -> None:
        self.run(self.store.compact())

    @rule(policy=st.sampled_from(["allkeys-lru", "allkeys-value", "volatile-ttl"]))
    def evict(self, policy: str) -> None:
        budget = self.store.budget
        budget.policy, budget.maxstore = policy, max(1, self.store.used_bytes - 1)
        protected = {key for key, (kind, _) in self.model.items() if kind != "snapshot"} | self.pinned
        try:
            self.run(budget.make_room(0))
        except NoSpaceError:
            pass
        budget.maxstore = 0
        left = {key for key in self.model if self.store.keyspace.get(0, key) is not None}
        assert left >= protected
        if policy.startswith("volatile"):
            assert left == set(self.model)
        for key in set(self.model) - left:
            self.forget(key)

    @rule()
    def restart(self) -> None:
        self.run(self.store.close())
        self.open()

    @rule()
    def crash(self) -> None:
        """Only what was not flushed may be lost, and here everything was."""
        self.run(self.store.keyspace.flush())
        self.run(self.store._committer.idle())
        self.store._release()
        self.open()

    @invariant()
    def holds_what_the_model_holds(self) -> None:
        if not hasattr(self, "store"):
            return
        StoreMachine.looks += 1
        space = self.store.keyspace
        assert space.size(0) == len(self.model)
        assert sorted(space.scan(0, 0, 100)[1]) == sorted(self.model)
        for key, (kind, value) in self.model.items():
            entry = read_entry(self.store, key)
            assert entry is not None
            assert entry.type.name.lower() == kind
            if kind == "string":
                assert entry.value == value
                continue
            snapshot_id = entry.value.id if kind == "snapshot" else entry.value.base  # type: ignore[union-attr]
            assert self.run(self.store.token_ids(snapshot_id)) == pack_ids(value)  # type: ignore[arg-type]

    @rule(n=lengths, seed=seeds)
    def longest_prefix(self, n: int, seed: int) -> None:
        """What is committed and a prefix of the prompt is found, the longest of it."""
        self.run(self.store.keyspace.flush())
        ids = tuple(tokens(n, seed))
        stored = {value for kind, value in self.model.values() if kind != "string"}
        fitting = [len(value) for value in stored if ids[: len(value)] == value]  # type: ignore[arg-type,misc]
        match = self.run(self.store.longest_prefix(FAMILY, FINGERPRINT, pack_ids(ids), cross_quant=True))
        # What a running hold keeps alive may be found although no key names it any more.
        assert (match.n_tokens if match else 0) >= max(fitting, default=0)

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.run(self.store.close())
            self.open()
            found = list(verify(self.store._index, self.folder / "segments", self.store._files, deep=True))
            self.run(self.store.close())
            assert found == []
        self.loop.close()
        shutil.rmtree(self.folder)


@pytest.fixture(autouse=True)
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "SEGMENT_BYTES", 300_000)
    monkeypatch.setattr(compact, "BATCH_BYTES", 100_000)


TestStore = StoreMachine.TestCase
TestStore.settings = settings(
    max_examples=15,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
