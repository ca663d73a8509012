"""The daemon's side of a worker: starting, ending and talking, with a real worker process of a synthetic model."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
from collections.abc import AsyncIterator

import numpy as np
import pytest

from kvdb.engine_client import EngineClient
from kvdb.errors import BusyError, CancelledError, EngineDownError, KvdbError, NoEngineError
from kvdb_protocol.frames import Message

SPEC = "synthetic:dsv4-nano"
S = b"s" * 16


@pytest.fixture
async def client() -> AsyncIterator[EngineClient]:
    made = EngineClient(SPEC, "nano")
    yield made
    made.kill()
    await made.stop()


async def test_a_caller_that_leaves_does_not_end_the_start(client: EngineClient) -> None:
    task = asyncio.create_task(client.start())
    while client.process is None:
        await asyncio.sleep(0.001)
    pid = client.process.pid
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await client.start()
    assert client.process is not None and client.process.pid == pid
    assert client.starts == 1


async def test_a_start_that_is_given_up_is_not_a_cancel_of_its_callers(client: EngineClient) -> None:
    task = asyncio.create_task(client.start())
    while client.process is None:
        await asyncio.sleep(0.001)
    await client.stop()
    with pytest.raises(EngineDownError):
        await task
    assert not client.running and client.process is None


async def test_the_next_worker_waits_until_the_last_one_has_ended(client: EngineClient) -> None:
    await client.call("open", sid=S, source=None, places=None)
    old = client.process
    assert old is not None
    old.send_signal(signal.SIGSTOP)  # it cannot see that its socket is closed, and may be in the middle of a write
    stopping = asyncio.create_task(client.stop())
    await asyncio.sleep(0)
    opening = asyncio.create_task(client.call("open", sid=S, source=None, places=None))
    for _ in range(20):
        await asyncio.sleep(0.01)
        assert client.process is old, "a second worker beside one that still lives"
    old.send_signal(signal.SIGCONT)
    await stopping
    assert (await opening)["tokens"] == 0  # and the end of the first does not fail the second one's request
    assert client.starts == 2


async def test_what_waits_fails_when_the_worker_dies_and_nothing_later_does(client: EngineClient) -> None:
    await client.start()
    assert client.process is not None
    client.process.send_signal(signal.SIGSTOP)
    waiting = asyncio.create_task(client.call("status"))
    await asyncio.sleep(0)
    client.kill()
    with pytest.raises(EngineDownError, match="retry"):
        await waiting
    assert (await client.call("status"))["resident"] == {}


async def test_a_worker_starts_in_a_daemon_with_thousands_of_descriptors(client: EngineClient) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2048:
        pytest.skip("this machine does not allow so many descriptors")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
    taken = [os.dup(0) for _ in range(1100)]
    try:
        assert (await client.call("open", sid=S, source=None, places=None))["tokens"] == 0
    finally:
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_bad_requests_are_answered_and_the_worker_goes_on(client: EngineClient) -> None:
    await client.call("open", sid=S, source=None, places=None)
    with pytest.raises(KvdbError, match="has no request 'dance'"):
        await client.call("dance")
    with pytest.raises(KvdbError, match="KeyError"):
        await client.call("open", sid=S)
    with pytest.raises(KvdbError, match="over the limit"):
        await client.call("extend", sid=S, ids=bytes(65 << 20))
    with pytest.raises(EngineDownError, match="not resident"):
        await client.call("extend", sid=b"other", ids=bytes(4))
    assert client.pending == 0
    assert (await client.call("status"))["resident"] == {S: [0, 0]}
    assert client.starts == 1


async def test_forgetting_starts_no_worker_and_bears_a_cancel(client: EngineClient) -> None:
    await client.forget(S)
    assert not client.running
    await client.call("open", sid=S, source=None, places=None)
    task = asyncio.create_task(client.forget(S))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (await client.call("status"))["resident"] == {}


async def test_work_is_refused_when_the_queue_is_full_or_the_daemon_ends(client: EngineClient) -> None:
    client.queue_limit = 0
    await client.call("open", sid=S, source=None, places=None)
    with pytest.raises(BusyError):
        await client.call("extend", sid=S, ids=bytes(4))
    client.is_closing = True
    with pytest.raises(CancelledError, match="shutting down"):
        await client.call("extend", sid=S, ids=bytes(4))


async def test_a_worker_that_cannot_run_says_why_each_time() -> None:
    client = EngineClient("no-such-model", "none")
    for _ in range(2):
        with pytest.raises(NoEngineError, match="no-such-model"):
            await client.start()
    assert client.process is None


async def test_an_exception_in_a_handler_of_events_fails_its_call_alone(client: EngineClient) -> None:
    """The worker goes on, and so does the session: at the last complete token when the request ended."""
    await client.call("open", sid=S, source=None, places=None)
    process = client.process

    def broken(message: Message) -> None:
        raise LookupError("of the caller's own making")

    ids = np.arange(30_000, dtype="<u4") % 100
    with pytest.raises(LookupError, match="own making"):
        await client.call("extend", on_event=broken, sid=S, ids=ids.tobytes())
    assert client.process is process and client.starts == 1 and not client.pending
    assert S in (await client.call("status"))["resident"]
    sampling = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 1}
    with pytest.raises(LookupError):
        await client.call("generate", on_event=broken, sid=S, max_tokens=2, sampling=sampling, stop=[], stop_ids=[])
    assert client.process is process
