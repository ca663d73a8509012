"""Threads in the event loop's service: results, errors, order, cancellation, closing."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from kvdb.store.store import Store
from kvdb.store.threads import Threads


@pytest.fixture
async def one() -> AsyncIterator[Threads]:
    threads = Threads(asyncio.get_running_loop(), 1, "test")
    yield threads
    threads.close()


async def test_results_and_errors_come_back(one: Threads) -> None:
    assert await one.run(lambda: 7) == 7

    def fail() -> None:
        raise OSError(5, "broken")

    with pytest.raises(OSError, match="broken"):
        await one.run(fail)
    assert await one.run(threading.get_ident) != threading.get_ident(), "after an error the thread goes on"


async def test_one_thread_keeps_the_order(one: Threads) -> None:
    seen: list[int] = []
    told: list[object] = []
    for number in range(100):
        one.start(lambda number=number: seen.append(number), lambda result, error: told.append((result, error)))  # type: ignore[misc]
    await one.run(lambda: None)
    assert seen == list(range(100)) and told == [(None, None)] * 100


async def test_what_is_cancelled_before_its_turn_is_not_run(one: Threads) -> None:
    gate = threading.Event()
    ran: list[int] = []
    first = one.run(gate.wait)
    second = one.run(lambda: ran.append(1))
    second.cancel()
    first.cancel()  # under way: it goes on, and its result is dropped
    gate.set()
    await one.run(lambda: None)
    assert not ran and first.cancelled()


async def test_a_thread_goes_on_once_the_loop_was_told(one: Threads) -> None:
    may_end = threading.Event()
    seen: list[object] = []

    def go_on() -> None:
        assert may_end.wait(10)
        seen.append(threading.get_ident())

    mine = await one.run(threading.get_ident, go_on)  # answered, though the thread is not done
    behind = one.run(lambda: seen.append("behind"))
    await asyncio.sleep(0.05)
    assert not seen
    may_end.set()
    await behind
    assert seen == [mine, "behind"]


async def test_it_does_not_go_on_after_an_error_or_a_cancelled_call(one: Threads) -> None:
    went_on: list[int] = []

    def fail() -> None:
        raise OSError(5, "broken")

    with pytest.raises(OSError, match="broken"):
        await one.run(fail, lambda: went_on.append(1))
    gate = threading.Event()
    first = one.run(gate.wait)
    one.run(lambda: None, lambda: went_on.append(2)).cancel()
    gate.set()
    await first
    await one.run(lambda: None)
    assert not went_on


async def test_what_fails_behind_a_call_is_logged_and_nothing_is_kept_meanwhile(
    one: Threads, caplog: pytest.LogCaptureFixture
) -> None:
    class Large:
        pass

    gone: list[weakref.ref[Large]] = []
    seen: list[object] = []

    def fail() -> None:
        seen.append(gone[0]())
        raise OSError(5, "broken")

    def start() -> asyncio.Future[None]:
        large = Large()
        gone.append(weakref.ref(large))

        def call() -> None:
            assert large is not None

        return one.run(call, fail)

    await start()
    await one.run(lambda: None)
    assert seen == [None]
    assert "behind its call failed" in caplog.text and "broken" in caplog.text
    assert await one.run(lambda: 7) == 7, "the thread goes on"


async def test_each_call_has_a_thread_while_there_are_some() -> None:
    threads = Threads(asyncio.get_running_loop(), 4, "test")
    gates = [threading.Event() for _ in range(4)]
    calls = [threads.run(lambda gate=gate: (gate.wait(10), threading.get_ident())[1]) for gate in gates]  # type: ignore[misc]
    fifth = threads.run(threading.get_ident)
    await asyncio.sleep(0.05)
    assert not fifth.done()
    for gate in gates:
        gate.set()
    found = await asyncio.gather(*calls)
    assert len(set(found)) == 4 and await fifth in found
    threads.close()


async def test_nothing_is_kept_between_calls(one: Threads) -> None:
    class Large:
        pass

    large = Large()
    gone = weakref.ref(large)
    await one.run(lambda large=large: None)  # type: ignore[misc]
    del large
    await one.run(lambda: None)
    assert gone() is None


async def test_closing_waits_for_what_was_asked_for() -> None:
    threads = Threads(asyncio.get_running_loop(), 3, "test")
    done: list[int] = []
    futures = [threads.run(lambda number=number: done.append(number)) for number in range(50)]  # type: ignore[misc]
    threads.close()
    assert sorted(done) == list(range(50))
    await asyncio.gather(*futures)
    with pytest.raises(RuntimeError, match="have ended"):
        threads.run(lambda: done.append(50))


def test_a_loop_that_is_gone_is_no_matter() -> None:
    loop = asyncio.new_event_loop()
    threads = Threads(loop, 1, "test")
    loop.close()
    threads.start(lambda: 1, lambda result, error: None)
    threads.close()


async def test_work_between_two_rounds_that_fails_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = Store.open(tmp_path, loop=asyncio.get_running_loop())

    def fail() -> None:
        raise OSError(5, "broken")

    store._committer.in_thread(fail)
    await store.keyspace.flush()
    assert "work between two rounds failed" in caplog.text and "broken" in caplog.text
    await store.close()
