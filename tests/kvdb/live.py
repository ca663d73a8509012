"""Sessions in one process with a synthetic model, so that a test decides what happens when."""

from __future__ import annotations

import asyncio
import signal
import threading
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from kvdb import branches, storing, timelines
from kvdb.session import Model
from kvdb.sessions import Sessions
from kvdb.store.entries import Entry, EntryType, SnapshotValue
from kvdb.store.records import ModelRecord
from kvdb.store.store import Store
from kvdb.storing import store_state
from kvdb_engine.catalog import open_model

SPEC = "synthetic:dsv4-nano,page_tokens=128"
DB = 0


def prompt(n_tokens: int, salt: int = 0) -> array[int]:
    return array("I", [(7 * number + 13 * salt) % 250 + 1 for number in range(n_tokens)])


async def open_sessions(folder: Path) -> Sessions:
    store = Store.open(folder, loop=asyncio.get_running_loop())
    info = open_model(SPEC)
    await store.register_model(ModelRecord(info.name, info.fingerprint, info.family, info.layout.to_bytes()))
    return Sessions(store, {info.name: Model(info, SPEC)}, store_state)


async def prefill(sessions: Sessions, name: bytes, ids: array[int], reuse: str = "YES") -> timelines.Reply:
    return await timelines.prefill(sessions, DB, name, sessions.model(), ids, reuse)


def named(snapshot_id: bytes) -> Entry:
    return Entry(EntryType.SNAPSHOT, 0, SnapshotValue(snapshot_id))


async def snapshot(sessions: Sessions, name: bytes, key: bytes) -> storing.Reply:
    reply = await storing.snapshot(sessions, DB, name, key, named, lambda: True)
    assert reply is not None
    return reply


async def live_ids(sessions: Sessions, name: bytes) -> array[int]:
    """What the worker's state is, seen through the logits: they are a function of the timeline."""
    session = await sessions.get(DB, name)
    return session.ids[:]


async def logits(sessions: Sessions, name: bytes) -> bytes:
    return (await branches.logits(sessions, DB, name))[2]


async def fresh_logits(sessions: Sessions, ids: array[int]) -> bytes:
    """The logits of a timeline, computed without anything that is stored or live."""
    await prefill(sessions, b"fresh", ids, "NO")
    return await logits(sessions, b"fresh")


async def settled(sessions: Sessions) -> None:
    """Everything that was begun is over."""
    await sessions.keyspace.flush()
    await sessions.store._committer.idle()


async def resident(sessions: Sessions) -> set[bytes]:
    """Uids of the states that the worker itself holds."""
    done = await sessions.model().client.call("status")
    return set(done["resident"])


@contextmanager
def commits_wait(sessions: Sessions) -> Iterator[threading.Event]:
    """Rounds stop before their commit until the event is set."""
    files = sessions.store.files
    gate, before = threading.Event(), files.commit

    def commit(call: object) -> None:
        gate.wait(20)
        before(call)  # type: ignore[arg-type]

    files.commit = commit  # type: ignore[method-assign,assignment]
    try:
        yield gate
    finally:
        gate.set()
        files.commit = before  # type: ignore[method-assign]


async def turns(n: int = 20) -> None:
    """Let everything run that is ready."""
    for _ in range(n):
        await asyncio.sleep(0.002)


def stop_worker(sessions: Sessions) -> Callable[[], None]:
    """The worker is in the middle of something, until what is returned is called."""
    process = sessions.model().client.process
    assert process is not None
    process.send_signal(signal.SIGSTOP)
    return lambda: process.send_signal(signal.SIGCONT)
