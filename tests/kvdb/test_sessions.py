"""Sessions against everything that can come between two awaits: deletes, renames, cancels, failures. In one process,
with a synthetic model, so that a test decides what happens when."""

from __future__ import annotations

import asyncio
import signal
from array import array

import pytest

from kvdb import branches, storing, timelines
from kvdb.errors import EngineDownError, KvdbError, NoEngineError, NoSpaceError
from kvdb.sessions import Sessions
from kvdb.store.entries import Entry, EntryType, SessionValue
from kvdb.store.rows import Reason
from kvdb.storing import Background
from kvdb_engine.sampling import Sampling
from tests.kvdb.live import (
    DB,
    commits_wait,
    fresh_logits,
    live_ids,
    logits,
    prefill,
    prompt,
    resident,
    settled,
    snapshot,
    stop_worker,
    turns,
)

# -- a client that goes away -------------------------------------------------------------------------------------------


async def test_a_cancelled_snapshot_leaves_the_session_on_a_base_that_exists(sessions: Sessions) -> None:
    await prefill(sessions, b"s", prompt(300))
    await snapshot(sessions, b"s", b"k")
    await timelines.extend(sessions, DB, b"s", array("I", [5, 6]))
    with commits_wait(sessions) as gate:
        task = asyncio.create_task(snapshot(sessions, b"s", b"k"))
        await turns()
        task.cancel()
        await turns(3)
        gate.set()
        with pytest.raises(asyncio.CancelledError):
            await task
    await settled(sessions)
    session = await sessions.get(DB, b"s")
    assert session.base is not None and sessions.store.has_snapshot(session.base)
    found = sessions.keyspace.get(DB, b"s")
    assert found is not None and isinstance(found.value, SessionValue) and found.value.base == session.base
    await sessions.model().client.stop()
    assert await logits(sessions, b"s") == await fresh_logits(sessions, array("I", [*prompt(300), 5, 6]))


async def test_two_cancels_do_not_let_go_of_a_session_that_still_grows(sessions: Sessions) -> None:
    await prefill(sessions, b"s", prompt(10))
    task = asyncio.create_task(timelines.generate(sessions, DB, b"s", 100_000, Sampling(seed=1), []))
    session = await sessions.get(DB, b"s")
    while session.n_tokens < 20:
        await asyncio.sleep(0.001)
    task.cancel()
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    n_tokens = session.n_tokens
    await turns()
    assert session.n_tokens == n_tokens
    assert await logits(sessions, b"s") == await fresh_logits(sessions, session.ids[:])


async def test_a_cancelled_restore_leaves_nothing_in_the_worker(sessions: Sessions) -> None:
    await prefill(sessions, b"s", prompt(300))
    await snapshot(sessions, b"s", b"k")
    before = await resident(sessions)
    task = asyncio.create_task(branches.restore(sessions, DB, b"k", b"r", replace=False))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert sessions.keyspace.get(DB, b"r") is None
    await turns(5)
    await sessions.sweep()
    assert await resident(sessions) == before


async def test_a_failed_restore_leaves_nothing_in_the_worker(
    sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    await prefill(sessions, b"s", prompt(300))
    await snapshot(sessions, b"s", b"k")
    before = await resident(sessions)

    def adopt(*_: object) -> None:
        raise NoSpaceError("an error after the state was loaded")

    monkeypatch.setattr(sessions, "adopt", adopt)
    with pytest.raises(NoSpaceError):
        await branches.restore(sessions, DB, b"k", b"r", replace=False)
    await turns(5)
    await sessions.sweep()
    assert await resident(sessions) == before


async def test_a_state_that_the_worker_has_not_is_loaded_by_the_retry(sessions: Sessions) -> None:
    await prefill(sessions, b"s", prompt(300))
    await snapshot(sessions, b"s", b"k")
    await timelines.extend(sessions, DB, b"s", array("I", [5]))
    before = await logits(sessions, b"s")
    session = await sessions.get(DB, b"s")
    await session.model.client.forget(session.uid)  # behind the session's back
    with pytest.raises(EngineDownError, match="not resident"):
        await logits(sessions, b"s")
    assert await logits(sessions, b"s") == before


# -- keys that go or move while a state is being stored ----------------------------------------------------------------


async def test_a_session_deleted_while_it_is_evicted_stays_deleted(sessions: Sessions) -> None:
    await prefill(sessions, b"s", prompt(300))
    with commits_wait(sessions) as gate:
        sessions.keyspace.put(DB, b"x", Entry(EntryType.STRING, 0, b"x"))
        first = asyncio.ensure_future(sessions.keyspace.flush())
        await turns(5)
        parked = asyncio.create_task(sessions.park(sessions.model(), Reason.EVICT))
        await turns()
        assert sessions.keyspace.delete(DB, b"s")
        gate.set()
        await first
        await parked
    await settled(sessions)
    assert sessions.keyspace.get(DB, b"s") is None


async def test_a_session_renamed_while_it_is_evicted_has_one_name(sessions: Sessions) -> None:
    await prefill(sessions, b"s", prompt(300))
    with commits_wait(sessions) as gate:
        sessions.keyspace.put(DB, b"x", Entry(EntryType.STRING, 0, b"x"))
        first = asyncio.ensure_future(sessions.keyspace.flush())
        await turns(5)
        parked = asyncio.create_task(sessions.park(sessions.model(), Reason.EVICT))
        await turns()
        assert sessions.keyspace.rename(DB, b"s", b"t")
        gate.set()
        await first
        await parked
    await settled(sessions)
    assert sessions.keyspace.get(DB, b"s") is None
    assert (await sessions.get(DB, b"t")).n_tokens == 300
    assert await logits(sessions, b"t") == await fresh_logits(sessions, prompt(300))


async def test_a_renamed_session_keeps_its_live_state(sessions: Sessions) -> None:
    await prefill(sessions, b"s", prompt(300))
    sessions.keyspace.rename(DB, b"s", b"t")
    await sessions.sweep()
    reply = await timelines.extend(sessions, DB, b"t", array("I", [5]))
    assert (reply["tokens"], reply["computed"]) == (301, 1)


async def test_work_that_waited_for_a_session_finds_it_deleted(sessions: Sessions) -> None:
    await prefill(sessions, b"s", prompt(10))
    session = await sessions.get(DB, b"s")
    async with session.lock:
        waiting = asyncio.create_task(timelines.extend(sessions, DB, b"s", array("I", [5])))
        await turns(3)
        sessions.keyspace.delete(DB, b"s")
    with pytest.raises(KvdbError, match="no such session"):
        await waiting


async def test_sweeps_may_run_side_by_side(sessions: Sessions) -> None:
    for number in range(5):
        await prefill(sessions, b"%d" % number, prompt(10, number))
        sessions.keyspace.delete(DB, b"%d" % number)
    await asyncio.gather(*(sessions.sweep() for _ in range(3)))
    assert not sessions.open
    assert not await resident(sessions)


async def test_a_session_that_rests_is_forgotten_and_comes_back(sessions: Sessions) -> None:
    await prefill(sessions, b"s", prompt(300))
    expected = await logits(sessions, b"s")
    await sessions.sweep(forget_after_s=0)
    assert len(sessions.open) == 1, "what is live is not forgotten"
    await sessions.model().client.stop()
    await sessions.sweep(forget_after_s=0)
    assert not sessions.open
    assert await logits(sessions, b"s") == expected


# -- failures ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_engine(sessions: Sessions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions.model().client, "spec", "no-such-model")


@pytest.mark.usefixtures("no_engine")
async def test_prefill_without_an_engine_changes_nothing(sessions: Sessions) -> None:
    with pytest.raises(NoEngineError):
        await prefill(sessions, b"new", prompt(10))
    assert sessions.keyspace.get(DB, b"new") is None
    with pytest.raises(KvdbError, match="no live or stored prefix"):
        await prefill(sessions, b"new", prompt(10), "ONLY")
    assert sessions.keyspace.get(DB, b"new") is None


async def test_a_prefill_that_cannot_begin_keeps_the_old_timeline(
    sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    await prefill(sessions, b"s", prompt(300))
    await sessions.model().client.stop()
    monkeypatch.setattr(sessions.model().client, "spec", "no-such-model")
    with pytest.raises(NoEngineError):
        await prefill(sessions, b"s", prompt(50, salt=3))
    assert await live_ids(sessions, b"s") == prompt(300)


async def test_a_rewind_that_cannot_compute_loses_no_tokens(
    sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    await prefill(sessions, b"s", prompt(300))
    await snapshot(sessions, b"s", b"k")
    await timelines.extend(sessions, DB, b"s", array("I", [5, 6, 7]))
    client = sessions.model().client
    await client.stop()
    with monkeypatch.context() as broken:
        broken.setattr(client, "spec", "no-such-model")
        with pytest.raises(NoEngineError):
            await branches.rewind_tokens(sessions, DB, b"s", 302)
        assert await live_ids(sessions, b"s") == array("I", [*prompt(300), 5, 6])
    assert await logits(sessions, b"s") == await fresh_logits(sessions, array("I", [*prompt(300), 5, 6]))


async def test_an_engine_that_dies_during_rewind_loses_no_tokens(sessions: Sessions) -> None:
    await prefill(sessions, b"s", prompt(300))
    client = sessions.model().client
    assert client.process is not None
    client.process.send_signal(signal.SIGSTOP)
    task = asyncio.create_task(branches.rewind_tokens(sessions, DB, b"s", 290))
    await turns(3)
    client.kill()
    with pytest.raises(EngineDownError):
        await task
    assert await live_ids(sessions, b"s") == prompt(290)


async def test_a_full_disk_does_not_keep_states_in_memory(sessions: Sessions, monkeypatch: pytest.MonkeyPatch) -> None:
    sessions.cache_bytes = 1

    async def reserve(writer: str, n_bytes_hint: int = 0) -> None:
        raise NoSpaceError("the disk is full")

    monkeypatch.setattr(sessions.store, "reserve", reserve)
    await prefill(sessions, b"a", prompt(300, 1))
    await prefill(sessions, b"b", prompt(300, 2))  # has to drop `a`, which cannot be stored
    assert len(await resident(sessions)) == 1
    assert await logits(sessions, b"a") == await fresh_logits(sessions, prompt(300, 1))


async def test_a_restore_to_where_the_session_stands_reads_nothing(sessions: Sessions) -> None:
    await prefill(sessions, b"s", prompt(300))
    await snapshot(sessions, b"s", b"k")
    before = await sessions.get(DB, b"s")
    place = sessions.keyspace.session_place(before.uid)
    assert place is not None
    sessions.keyspace.put(DB, b"s", place[2]._replace(expire_ms=1 << 50))
    with pytest.raises(KvdbError, match="REPLACE"):
        await branches.restore(sessions, DB, b"k", b"s", replace=False)
    reply = await branches.restore(sessions, DB, b"k", b"s", replace=True)
    assert (reply["tokens"], reply["bytes_read"], reply["recomputed"]) == (300, 0, 0)
    assert await sessions.get(DB, b"s") is before
    found = sessions.keyspace.get(DB, b"s")
    assert found is not None and found.expire_ms == 0
    # A token more, another key, or a state that is not live: read again.
    assert (await branches.restore(sessions, DB, b"k", b"other", replace=True))["bytes_read"] > 0
    await timelines.extend(sessions, DB, b"s", array("I", [5]))
    assert (await branches.restore(sessions, DB, b"k", b"s", replace=True))["bytes_read"] > 0
    await sessions.model().client.stop()
    assert (await branches.restore(sessions, DB, b"k", b"s", replace=True))["bytes_read"] > 0
    assert await logits(sessions, b"s") == await fresh_logits(sessions, prompt(300))


async def test_a_session_that_a_restore_replaces_is_not_stored(
    sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where the cache has room for one state only, what is given up anyway costs no write."""
    await prefill(sessions, b"s", prompt(300))
    await snapshot(sessions, b"s", b"k")
    await timelines.extend(sessions, DB, b"s", array("I", [5]))
    sessions.cache_bytes = 1

    async def store(*_: object) -> None:
        raise AssertionError("it is written")

    monkeypatch.setattr(sessions, "_store_state", store)
    await branches.restore(sessions, DB, b"k", b"s", replace=True)
    assert await resident(sessions) == {(await sessions.get(DB, b"s")).uid}
    assert await logits(sessions, b"s") == await fresh_logits(sessions, prompt(300))


async def test_what_is_opened_again_is_not_closed_by_the_sweep_before(sessions: Sessions) -> None:
    await prefill(sessions, b"s", prompt(300))
    await snapshot(sessions, b"s", b"k")
    await sessions.model().client.stop()
    await prefill(sessions, b"other", prompt(50, 3))
    (await sessions.get(DB, b"s")).used = -1e9
    go_on = stop_worker(sessions)
    sweep = asyncio.create_task(sessions.sweep())
    await turns(3)
    use = asyncio.create_task(timelines.extend(sessions, DB, b"s", array("I", [7])))
    await turns(5)
    go_on()
    await asyncio.gather(sweep, use)
    assert (await timelines.extend(sessions, DB, b"s", array("I", [8])))["tokens"] == 302


async def test_reuse_only_gives_nothing_up_for_what_is_in_use_a_moment_later(
    sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    await prefill(sessions, b"o", prompt(300))
    other = await sessions.get(DB, b"o")
    real, n_lookups = sessions.store.longest_prefix, 0

    async def lookup(*args: object, **fields: object) -> object:
        nonlocal n_lookups
        n_lookups += 1
        match = await real(*args, **fields)  # type: ignore[arg-type]
        if n_lookups == 2:
            await other.lock.acquire()  # somebody extends it just now
        return match

    monkeypatch.setattr(sessions.store, "longest_prefix", lookup)
    assert (await prefill(sessions, b"new", prompt(310), "ONLY"))["tokens"] == 300
    assert n_lookups == 1 and await live_ids(sessions, b"new") == prompt(300)


async def test_a_session_that_is_deleted_while_its_prompt_is_looked_up_is_not_continued(
    sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    await prefill(sessions, b"s", prompt(300))
    real = sessions.store.longest_prefix

    async def lookup(*args: object, **fields: object) -> object:
        sessions.keyspace.delete(DB, b"s")
        return await real(*args, **fields)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(sessions.store, "longest_prefix", lookup)
        with pytest.raises(KvdbError, match="no live or stored prefix"):
            await prefill(sessions, b"s", prompt(310), "ONLY")
    assert sessions.entry(DB, b"s") is None


# -- background snapshots ----------------------------------------------------------------------------------------------


async def test_background_results_that_nobody_collects_do_not_pile_up(caplog: pytest.LogCaptureFixture) -> None:
    background = Background(keep=10)

    async def work(number: int) -> storing.Reply | None:
        if number == 3:
            raise NoSpaceError("the disk is full")
        return {"n": number}

    for number in range(100):
        background.start((DB, b"%d" % number), work(number))
        await asyncio.sleep(0)
    await background.idle()
    assert "the disk is full" in caplog.text
    assert await background.wait((DB, b"99")) == {"n": 99}
    assert await background.wait((DB, b"0")) is None
    assert await background.wait((DB, b"99")) is None


async def test_idle_waits_for_replaced_background_work_too() -> None:
    background, done = Background(), []

    async def work(number: int) -> storing.Reply | None:
        await asyncio.sleep(0.01)
        done.append(number)
        return {}

    for number in range(3):
        background.start((DB, b"k"), work(number))
    await background.idle()
    assert sorted(done) == [0, 1, 2]
