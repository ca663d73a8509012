"""FORK beside a busy engine, one that dies, clients that leave, full disks: each branch gets its own state."""

from __future__ import annotations

import asyncio
import errno
from array import array

import pytest

from kvdb import branches, timelines
from kvdb.errors import EngineDownError, KvdbError, NoSpaceError
from kvdb.sessions import Sessions
from kvdb.store.entries import Entry, EntryType
from kvdb_protocol.frames import Message
from tests.kvdb.live import (
    DB,
    commits_wait,
    fresh_logits,
    logits,
    prefill,
    prompt,
    settled,
    snapshot,
    stop_worker,
    turns,
)


async def test_branches_that_are_live_count_against_the_cache(sessions: Sessions) -> None:
    await prefill(sessions, b"s", prompt(300))
    n_bytes = sessions.model().client.resident_bytes
    sessions.cache_bytes = 3 * n_bytes
    names = [b"b%d" % number for number in range(8)]
    await branches.fork(sessions, DB, b"s", names)
    for name in names:
        await timelines.extend(sessions, DB, name, array("I", [5]))
    assert sessions.model().client.resident_bytes <= 4 * n_bytes


async def test_fork_does_not_wait_for_a_busy_engine(sessions: Sessions) -> None:
    await prefill(sessions, b"s", prompt(300))
    go_on = stop_worker(sessions)
    assert await asyncio.wait_for(branches.fork(sessions, DB, b"s", [b"a", b"b"]), 10) == 2
    # The origin moves on, and is even put elsewhere, before the worker has made the copies.
    moved = asyncio.create_task(timelines.extend(sessions, DB, b"s", array("I", [5, 6])))
    used = asyncio.create_task(timelines.extend(sessions, DB, b"a", array("I", [7])))
    await turns(5)
    assert not moved.done() and not used.done()
    go_on()
    await asyncio.gather(moved, used)
    for name, ids in ((b"s", [*prompt(300), 5, 6]), (b"a", [*prompt(300), 7]), (b"b", prompt(300))):
        assert (await sessions.get(DB, name)).is_resident
        assert await logits(sessions, name) == await fresh_logits(sessions, array("I", ids))


async def test_what_comes_right_behind_a_fork_does_not_get_into_the_branch(sessions: Sessions) -> None:
    await prefill(sessions, b"s", prompt(300))
    await asyncio.gather(
        branches.fork(sessions, DB, b"s", [b"a"]),
        timelines.extend(sessions, DB, b"s", array("I", [5])),
        branches.fork(sessions, DB, b"s", [b"b"]),
        timelines.extend(sessions, DB, b"s", array("I", [6])),
    )
    for name, ids in ((b"s", [5, 6]), (b"a", []), (b"b", [5])):
        assert await logits(sessions, name) == await fresh_logits(sessions, array("I", [*prompt(300), *ids]))


async def test_a_branch_whose_engine_dies_before_the_copy_is_computed_again(sessions: Sessions) -> None:
    await prefill(sessions, b"s", prompt(300))
    stop_worker(sessions)
    await branches.fork(sessions, DB, b"s", [b"a"])
    sessions.model().client.kill()
    assert await logits(sessions, b"a") == await fresh_logits(sessions, prompt(300))


async def test_a_branch_is_not_locked_for_ever_when_the_worker_is_gone_and_nobody_knows_yet(
    sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    await prefill(sessions, b"s", prompt(300))
    client = sessions.model().client
    assert client._writer is not None

    def write(_: bytes) -> None:
        raise RuntimeError("unable to perform operation; the handler is closed")

    with monkeypatch.context() as patch:
        patch.setattr(client._writer, "write", write)
        assert await branches.fork(sessions, DB, b"s", [b"a", b"b"]) == 2
        with pytest.raises(EngineDownError):
            await timelines.extend(sessions, DB, b"s", array("I", [5]))
        assert not client.pending
    for name in (b"a", b"b"):
        assert await asyncio.wait_for(logits(sessions, name), 10) == await fresh_logits(sessions, prompt(300))


async def test_a_fork_that_is_cancelled_locks_nothing(sessions: Sessions) -> None:
    await prefill(sessions, b"s", prompt(300))
    for number in range(12):
        names = [b"a%d" % number, b"b%d" % number]
        with commits_wait(sessions) as gate:
            task = asyncio.ensure_future(branches.fork(sessions, DB, b"s", names))
            await turns(number)
            if number % 2:
                gate.set()
            task.cancel()
            await asyncio.wait([task])
        await turns(5)
        for name in names:
            if sessions.entry(DB, name) is not None:
                await asyncio.wait_for(timelines.extend(sessions, DB, name, array("I", [9])), 10)
                assert await logits(sessions, name) == await fresh_logits(sessions, array("I", [*prompt(300), 9]))


async def test_many_branches_do_not_fill_the_queue(sessions: Sessions) -> None:
    await prefill(sessions, b"s", prompt(300))
    sessions.model().client.queue_limit = 10
    go_on = stop_worker(sessions)
    await branches.fork(sessions, DB, b"s", [b"%d" % number for number in range(20)])
    task = asyncio.create_task(timelines.extend(sessions, DB, b"s", array("I", [5])))
    await turns(5)
    go_on()
    assert (await task)["tokens"] == 301


async def test_a_copy_that_the_engine_refuses_costs_only_time(
    sessions: Sessions, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    await prefill(sessions, b"s", prompt(300))

    async def refuse() -> Message:
        raise KvdbError("engine worker: MemoryError")

    with monkeypatch.context() as patch:
        patch.setattr(sessions.model().client, "ask", lambda *_, **__: refuse())
        await branches.fork(sessions, DB, b"s", [b"a"])
        await turns(3)
    assert "gets no copy of a live state: engine worker: MemoryError" in caplog.text
    assert not (await sessions.get(DB, b"a")).is_resident
    assert await logits(sessions, b"a") == await fresh_logits(sessions, prompt(300))


async def test_the_end_waits_for_copies_under_way(sessions: Sessions) -> None:
    await prefill(sessions, b"s", prompt(300))
    go_on = stop_worker(sessions)
    await branches.fork(sessions, DB, b"s", [b"a"])
    asyncio.get_running_loop().call_later(0.1, go_on)
    await sessions.close()
    assert not sessions._background and not sessions.open[(await sessions.get(DB, b"a")).uid].lock.locked()


async def test_fork_does_not_overwrite_a_key_that_appears_meanwhile(
    sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    await prefill(sessions, b"s", prompt(10))
    task = asyncio.create_task(branches.fork(sessions, DB, b"s", [b"a", b"b"]))
    await asyncio.sleep(0)
    for name in (b"a", b"b"):
        if sessions.keyspace.get(DB, name) is None:  # whoever finds the key free may take it
            sessions.keyspace.put(DB, name, Entry(EntryType.STRING, 0, b"mine"))
    try:
        await task
    except KvdbError:
        return
    for name in (b"a", b"b"):
        found = sessions.keyspace.get(DB, name)
        assert found is not None and found.type == EntryType.SESSION


async def test_names_that_could_not_be_committed_are_taken_back(sessions: Sessions) -> None:
    await prefill(sessions, b"s", prompt(300))
    await snapshot(sessions, b"s", b"k")
    await timelines.extend(sessions, DB, b"s", array("I", [5]))
    await snapshot(sessions, b"s", b"k2")
    before = sessions.keyspace.get(DB, b"k")
    files = sessions.store.files
    commit = files.commit

    def fail(call: object) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    files.commit = fail  # type: ignore[method-assign,assignment]
    sessions.store._change_log._txn = None  # the log takes nothing until the next commit
    for work in (
        branches.fork(sessions, DB, b"s", [b"a"]),
        branches.fork(sessions, DB, b"k", [b"b"]),
        snapshot(sessions, b"s", b"new"),
        snapshot(sessions, b"s", b"k"),
    ):
        with pytest.raises(NoSpaceError):
            await work
    files.commit = commit  # type: ignore[method-assign]
    await settled(sessions)
    assert all(sessions.keyspace.get(DB, key) is None for key in (b"a", b"b", b"new"))
    assert sessions.keyspace.get(DB, b"k") == before
    assert await branches.fork(sessions, DB, b"s", [b"a"]) == 1
