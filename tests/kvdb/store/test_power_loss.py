"""Power may go at any moment: what was acknowledged is there, bit by bit, and nothing else is wrong.

A mixed load runs once on a recording file layer. From its log the disk is rebuilt as it may be after a power loss at
many points, with un-synced writes dropped, torn and reordered; each such disk is opened, checked deeply and compared
with what clients had been told by then. KVDB_POWER_LOSSES sets how many states are tried.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
from pathlib import Path

import pytest

from kvdb.errors import StalePagesError
from kvdb.store.entries import Entry, EntryType
from kvdb.store.store import Store
from kvdb.store.verify import verify
from tests.kvdb.store.faults import LoggingFiles, power_loss
from tests.kvdb.store.states import (
    MODEL,
    PAGE,
    make_state,
    pack_ids,
    read_entry,
    receive,
    snapshot_entry,
    string,
    tokens,
    write_snapshot,
)

N_STATES = int(os.environ.get("KVDB_POWER_LOSSES", "120"))
KEYS = [b"k%d" % number for number in range(6)]


async def client(store: Store, files: LoggingFiles, number: int, rng: random.Random) -> None:
    """Snapshots, forks, strings and deletes on keys of its own; notes what it asks for and what was acknowledged."""
    keys = [key for key in KEYS if int(key[1:]) % 3 == number]
    for step in range(14):
        key = rng.choice(keys)
        action = rng.choice(("snapshot", "snapshot", "fork", "string", "receive", "delete", "expire", "gc", "compact"))
        if action == "snapshot":
            ids = tokens(rng.randrange(1, 3 * PAGE), seed=rng.randrange(3))
            files.note(("asked", key, pack_ids(ids)))
            while True:
                new = await write_snapshot(store, ids, writer=f"w{number}")
                try:
                    await store.commit_snapshot(new, key=(0, key), entry=snapshot_entry(new.id))
                    break
                except StalePagesError:
                    continue  # another client deleted what this one counted on
        elif action == "fork":
            source = rng.choice(keys)
            if (entry := store.keyspace.get(0, source)) is None:
                continue
            other = read_entry(store, source)
            assert other is not None
            value = other.value if isinstance(other.value, bytes) else await store.token_ids(other.value.id)  # type: ignore[union-attr]
            files.note(("asked", key, value))
            store.keyspace.put(0, key, store.keyspace.held(entry))
            await store.keyspace.flush()
        elif action == "string":
            value = b"value %d" % step * rng.choice((1, 9000))  # the larger one is a record of its own
            files.note(("asked", key, value))
            store.keyspace.put(0, key, string(value))
            await store.keyspace.flush()
        elif action == "receive":
            value = b"received %d" % step * rng.choice((9000, 40_000))
            held = await receive(store, value)
            if rng.random() < 0.3:
                continue  # nobody wants it: given back
            files.note(("asked", key, value))
            store.keyspace.put(0, key, Entry(EntryType.STRING, 0, held))
            await store.keyspace.flush()
        elif action in ("gc", "compact"):
            await (store.gc() if action == "gc" else store.compact())
            continue
        else:
            files.note(("asked", key, None))
            if action == "expire":
                store.keyspace.expire_at(0, key, 1)
                store.keyspace.expire_cycle(2)
            else:
                store.keyspace.delete(0, key)
            await store.keyspace.flush()
        files.note(("acknowledged", key))


async def run_load(folder: Path, seed: int) -> LoggingFiles:
    files = LoggingFiles(folder / "index")
    store = Store.open(folder, loop=asyncio.get_running_loop(), files=files)
    files.take_index()
    await store.register_model(MODEL)
    files.note("ready")
    await asyncio.gather(*(client(store, files, number, random.Random(f"{seed} {number}")) for number in range(3)))
    await store.close()
    return files


def allowed(files: LoggingFiles, length: int) -> dict[bytes, set[bytes | None]]:
    """For each key the values it may have: the last acknowledged one, or one that was asked for since."""
    values: dict[bytes, list[bytes | None]] = {key: [None] for key in KEYS}
    for event in files.log[:length]:
        match event.note:
            case ("asked", bytes() as key, value):
                values[key].append(value)
            case ("acknowledged", bytes() as key):
                del values[key][:-1]
    return {key: set(found) for key, found in values.items()}


async def check(folder: Path, expected: dict[bytes, set[bytes | None]]) -> None:
    store = Store.open(folder, loop=asyncio.get_running_loop())
    try:
        assert store.problems == []
        assert list(verify(store._index, folder / "segments", store._files, deep=True)) == []
        for key, values in expected.items():
            entry = read_entry(store, key)
            value: bytes | None = None
            if entry is not None:
                found = entry.value
                value = found if isinstance(found, bytes) else await store.token_ids(found.id)  # type: ignore[union-attr]
                if not isinstance(found, bytes):
                    tail = await store.read_tail(found.id)  # type: ignore[union-attr]
                    assert found.id == make_state(ids_of(value))[-1].id  # type: ignore[union-attr]
                    assert tail.n_tokens == len(value) // 4
            assert value in values, key
    finally:
        await store.close()


def ids_of(data: bytes) -> list[int]:
    return [int.from_bytes(data[at : at + 4], "little") for at in range(0, len(data), 4)]


@pytest.mark.parametrize("seed", [1, 2])
async def test_power_loss(tmp_path: Path, seed: int) -> None:
    files = await run_load(tmp_path / "load", seed)
    rng = random.Random(seed)
    ready = next(number for number, event in enumerate(files.log) if event.note == "ready") + 1
    n_states = max(2, N_STATES // 2)
    for state in range(n_states):
        # The end of the log is the one point at which everything was acknowledged.
        length = len(files.log) if not state else rng.randrange(ready, len(files.log))
        folder = tmp_path / f"state{state}"
        power_loss(files.log, length, rng, folder)
        try:
            await check(folder, allowed(files, length))
        except BaseException:
            print(f"seed {seed}, state {state}, {length} of {len(files.log)} events")
            raise
        shutil.rmtree(folder)


async def test_the_simulation_can_fail(tmp_path: Path) -> None:
    """A store that does not sync its segments is caught."""

    class Careless(LoggingFiles):
        def datasync(self, fd: int) -> None:
            pass

    files = Careless(tmp_path / "load" / "index")
    store = Store.open(tmp_path / "load", loop=asyncio.get_running_loop(), files=files)
    files.take_index()
    await store.register_model(MODEL)
    for number in range(5):
        new = await write_snapshot(store, tokens(PAGE, seed=number))
        files.note(("asked", KEYS[number], pack_ids(tokens(PAGE, seed=number))))
        await store.commit_snapshot(new, key=(0, KEYS[number]), entry=snapshot_entry(new.id))
        files.note(("acknowledged", KEYS[number]))
    await store.close()
    power_loss(files.log, len(files.log), random.Random(1), tmp_path / "state")
    with pytest.raises(AssertionError):
        await check(tmp_path / "state", allowed(files, len(files.log)))
