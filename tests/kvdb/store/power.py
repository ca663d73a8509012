"""Power may go at any moment: a mixed load on a recording file layer, the disks it may leave, and what they must hold.

Used by test_power_loss.py and, over many more states, by tests/show/power_loss.py.
"""

from __future__ import annotations

import asyncio
import random
import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from kvdb.errors import KvdbError, NoSpaceError, StalePagesError
from kvdb.store.entries import Entry, EntryType, SessionValue, StringRef
from kvdb.store.store import Store
from kvdb.store.strings import HeldString
from kvdb.store.verify import verify
from tests.kvdb.store.faults import KilledFiles, LoggingFiles, power_loss
from tests.kvdb.store.states import (
    FINGERPRINT,
    MODEL,
    PAGE,
    make_state,
    pack_ids,
    receive,
    snapshot_entry,
    string,
    tokens,
    write_snapshot,
)

KEYS = [b"k%d" % number for number in range(9)]
ACTIONS = (
    *["snapshot"] * 4, "fork", "copy", "rename", "string", "string", "receive", "delete", "expire", "gc", "compact",
    "evict", "evict",
)  # fmt: skip
FAR_MS = 1 << 44

Values = dict[bytes, set[bytes | None]]


async def client(store: Store, files: LoggingFiles, number: int, rng: random.Random, steps: int) -> None:
    """Commands on keys of its own; notes what it asks for and what was acknowledged."""
    keys = [key for key in KEYS if int(key[1:]) % 3 == number]
    for step in range(steps):
        key = rng.choice(keys)
        action = rng.choice(ACTIONS)
        files.note(("action", action))
        if action in ("gc", "compact"):
            await (store.gc() if action == "gc" else store.compact())
        elif action == "evict":
            await evict(store)
        elif action == "snapshot":
            await snapshot(store, files, number, key, rng)
        elif action in ("fork", "copy", "rename"):
            await derive(store, files, action, rng.choice(keys), key, rng)
        else:
            await change(store, files, action, key, rng, b"value %d %d " % (number, step) * rng.choice((500, 9000)))


async def snapshot(store: Store, files: LoggingFiles, number: int, key: bytes, rng: random.Random) -> None:
    ids = tokens(rng.randrange(1, 3 * PAGE), seed=rng.randrange(3))
    expire_ms = rng.choice((0, FAR_MS))
    files.note(("asked", {key: pack_ids(ids)}, expire_ms > 0))
    while True:
        try:
            new = await write_snapshot(store, ids, writer=f"w{number}")
            await store.commit_snapshot(new, key=(0, key), entry=snapshot_entry(new.id, expire_ms))
            break
        except StalePagesError:
            continue  # another client deleted what this one counted on
        except NoSpaceError:
            return  # while another client has the store evict
    files.note(("acknowledged", (key,)))


async def make_durable(store: Store, rng: random.Random) -> None:
    """As a command does, or as those that need the index."""
    await (store.keyspace.flush() if rng.random() < 0.3 else store.keyspace.make_durable())


async def derive(store: Store, files: LoggingFiles, action: str, source: bytes, key: bytes, rng: random.Random) -> None:
    """FORK, COPY and RENAME."""
    entry = store.keyspace.get(0, source)
    if entry is None or source == key or (action == "fork" and entry.type is not EntryType.SNAPSHOT):
        return
    value = await content(store, entry)
    if store.keyspace.get(0, source) != entry:
        return  # it was evicted, or committed
    may_go = entry.type is EntryType.SNAPSHOT and entry.expire_ms > 0
    if action == "rename":
        files.note(("asked", {key: value, source: None}, may_go))
        store.keyspace.rename(0, source, key)
        await make_durable(store, rng)
        files.note(("acknowledged", (key, source)))
        return
    if action == "fork":
        uid, base = rng_uid(source, key), entry.value.id  # type: ignore[union-attr]
        session = SessionValue(uid, FINGERPRINT, base, len(value) // 4, base)
        entry = Entry(EntryType.SESSION, 0, session)
        store.keyspace.journal_append(uid, len(value) // 4, pack_ids([1, 2, 3]))
        value += pack_ids([1, 2, 3])
        may_go = False
    files.note(("asked", {key: value}, may_go))
    store.keyspace.put(0, key, store.keyspace.held(entry))
    await make_durable(store, rng)
    files.note(("acknowledged", (key,)))


_forks = iter(range(1 << 60))


def rng_uid(source: bytes, key: bytes) -> bytes:
    return (source + key + b"%d" % next(_forks)).ljust(16, b"u")[:16]


async def change(store: Store, files: LoggingFiles, action: str, key: bytes, rng: random.Random, value: bytes) -> None:
    if action != "receive":
        files.note(("asked", {key: value if action == "string" else None}, False))
    if action == "receive":
        try:
            received = await receive(store, value * 20, is_urgent=value[-2] % 2 == 0)  # every other step
        except NoSpaceError:
            return  # while another client has the store evict
        files.note(("asked", {key: value * 20}, False))
        store.keyspace.put(0, key, Entry(EntryType.STRING, 0, received))
    elif action == "string":
        store.keyspace.put(0, key, string(value))  # nine thousand times: a record of its own
    elif action == "expire":
        store.keyspace.expire_at(0, key, 1)
        store.keyspace.expire_cycle(2)
    else:
        store.keyspace.delete(0, key)
    await make_durable(store, rng)
    files.note(("acknowledged", (key,)))


async def evict(store: Store) -> None:
    """Some of the snapshots with an expiry go; which, only the store knows."""
    budget = store.budget
    budget.policy, budget.maxstore = "volatile-lru", max(1, store.used_bytes - 1)
    try:
        await budget.make_room(0)
    except NoSpaceError:
        pass
    budget.maxstore = 0


async def content(store: Store, entry: Entry) -> bytes:
    """A key's value as bytes; of a state its token ids, after its tail was read and its id compared."""
    value = entry.value
    if isinstance(value, StringRef | HeldString):
        return store.strings.read(value)
    if isinstance(value, bytes):
        return value
    if isinstance(value, SessionValue):
        assert value.base is not None
        first, rest = store.keyspace.journal_read(value.uid)
        base = await store.token_ids(value.base)
        assert first * 4 == len(base)
        return base + rest
    ids = await store.token_ids(value.id)  # type: ignore[union-attr]
    tail = await store.read_tail(value.id)  # type: ignore[union-attr]
    numbers = [int.from_bytes(ids[at : at + 4], "little") for at in range(0, len(ids), 4)]
    assert value.id == make_state(numbers)[-1].id  # type: ignore[union-attr]
    assert tail.n_tokens == len(numbers)
    return ids


async def run_load(folder: Path, seed: int, steps: int = 14) -> LoggingFiles:
    """Three clients at once; the log of all they did."""
    files = LoggingFiles(folder / "index")
    store = Store.open(folder, loop=asyncio.get_running_loop(), files=files)
    files.take_index()
    await store.register_model(MODEL)
    files.note("ready")
    await asyncio.gather(*(client(store, files, n, random.Random(f"{seed} {n}"), steps) for n in range(3)))
    await store.close()
    return files


async def run_lives(folder: Path, seed: int, lives: int = 4) -> LoggingFiles:
    """The same load, killed some times at any call, also while it starts."""
    rng = random.Random(seed)
    files = KilledFiles(folder / "index", rng)
    loop = asyncio.get_running_loop()
    store = Store.open(folder, loop=loop, files=files)
    files.take_index()
    await store.register_model(MODEL)
    files.note("ready")
    for life in range(lives):
        files.calls_left = rng.randrange(1, 120)
        if life:
            try:
                store = Store.open(folder, loop=loop, files=files)
            except (KvdbError, OSError):
                continue  # killed while it started
        clients = (client(store, files, n, random.Random(f"{seed} {life} {n}"), 14) for n in range(3))
        await asyncio.gather(*clients, return_exceptions=True)
        files.calls_left = 0
        await store._committer.idle()
        store._release()
    files.calls_left = None
    store = Store.open(folder, loop=loop, files=files)
    await store.close()
    return files


def allowed(files: LoggingFiles, length: int) -> Values:
    """For each key the values it may have: the last acknowledged one, or one that was asked for since.

    A snapshot with an expiry may be evicted at any time: then there may also be none.
    """
    values: dict[bytes, list[tuple[bytes | None, bool]]] = {key: [(None, False)] for key in KEYS}
    for event in files.log[:length]:
        match event.note:
            case ("asked", dict() as effect, bool() as may_go):
                for key, value in effect.items():
                    values[key].append((value, may_go))
            case ("acknowledged", tuple() as keys):
                for key in keys:
                    del values[key][:-1]
    return {
        key: {value for value, _ in found} | ({None} if any(may_go for _, may_go in found) else set())
        for key, found in values.items()
    }


@dataclass
class Verdict:
    """What was compared in one or many states, and what was wrong, in words."""

    states: int = 0
    compared: int = 0
    certain: int = 0  # keys for which only the acknowledged value would do
    lost: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)

    def problems(self) -> list[str]:
        return self.lost + self.wrong + self.damaged


async def judge(folder: Path, expected: Values, verdict: Verdict) -> None:
    """Open a directory as a daemon would, check it deeply and compare every key."""
    verdict.states += 1
    store = Store.open(folder, loop=asyncio.get_running_loop())
    try:
        verdict.damaged += store.problems
        found = verify(store._index, folder / "segments", store._files, deep=True)
        verdict.damaged += [finding.message for finding in found]
        for key, values in expected.items():
            entry = store.keyspace.get(0, key)
            value = None if entry is None else await content(store, entry)
            verdict.compared += 1
            verdict.certain += len(values) == 1
            if value not in values:
                (verdict.lost if value is None else verdict.wrong).append(f"{key!r}: {value!r:.60}")
    finally:
        await store.close()


async def try_states(
    files: LoggingFiles, n_states: int, rng: random.Random, folder: Path, verdict: Verdict
) -> Counter[str]:
    """Judge disks as they may be after a power loss at random moments of the log; the first is the end of the log.

    Returns the actions of the load.
    """
    ready = next(number for number, event in enumerate(files.log) if event.note == "ready") + 1
    for state in range(n_states):
        # The end of the log is the one point at which everything was acknowledged.
        length = len(files.log) if not state else rng.randrange(ready, len(files.log))
        power_loss(files.log, length, rng, folder)
        await judge(folder, allowed(files, length), verdict)
        shutil.rmtree(folder)
    return Counter(event.note[1] for event in files.log if isinstance(event.note, tuple) and event.note[0] == "action")
