"""Sessions against engines that die, hang, are busy or idle: what design.md promises, on a live daemon."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvdb_tools.cli.connection import Connection
from kvdb_tools.daemon import Caller, CommandError, Daemon

LONG = list(range(10, 1500)) * 6  # 8,940 tokens: seconds of prefill


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    with Daemon(tmp_path / "data", {"model": "dsv4-nano", "engine-hang-timeout": "2"}) as running:
        yield running


@pytest.fixture
def call(daemon: Daemon) -> Iterator[Caller]:
    with Connection(daemon.target, timeout=60) as connection:
        yield Caller(connection)


def wait_for(condition: Callable[[], bool], timeout_s: float = 20) -> None:
    """Until `condition` holds; fails the test when it never does."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "the condition never held"
        time.sleep(0.01)


def in_background(daemon: Daemon, *words: object) -> tuple[threading.Thread, list[object]]:
    """Run a command on a connection of its own; its reply, or its error as text, is put into the list."""
    found: list[object] = []

    def run() -> None:
        with Connection(daemon.target, timeout=60) as connection:
            try:
                found.append(Caller(connection)(*words))  # type: ignore[arg-type]
            except CommandError as error:
                found.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    return thread, found


def is_working(call: Caller, op: str, done: int = 1) -> bool:
    requests = call.map("ENGINE", "STATUS")["requests"]
    assert isinstance(requests, list)
    return any(request["op"] == op.encode() and request["done"] >= done for request in requests)


def test_a_killed_worker_fails_its_request_and_the_session_resumes(daemon: Daemon, call: Caller) -> None:
    call("PREFILL", "s", "TOKENS", 5, 1, 20, 30, 40, 50)
    call("SNAPSHOT", "s", "k")
    thread, found = in_background(daemon, "GENERATE", "s", "MAXTOKENS", 5000, "SEED", 3)
    wait_for(lambda: is_working(call, "generate", 5))
    pid = call.map("ENGINE", "STATUS")["pid"]
    assert isinstance(pid, int)
    os.kill(pid, signal.SIGKILL)
    thread.join()
    assert str(found[0]).startswith("ENGINEDOWN ")
    # The tokens that came before the kill are in the journal: the session stands where it was and goes on.
    before = call.map("EXTEND", "s", "TOKENS", 1, 60)["tokens"]
    assert isinstance(before, int) and before > 5 + 5
    assert call.map("ENGINE", "STATUS")["starts"] == 2
    assert call.map("REWIND", "s", "TO", "k")["tokens"] == 5


def test_a_hanging_worker_is_killed_and_the_session_resumes(daemon: Daemon, call: Caller) -> None:
    call("PREFILL", "s", "TOKENS", 3, 1, 20, 30)
    pid = call.map("ENGINE", "STATUS")["pid"]
    assert isinstance(pid, int)
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(CommandError, match="ENGINEDOWN"):
        call("GENERATE", "s", "MAXTOKENS", 2)
    assert call.map("GENERATE", "s", "MAXTOKENS", 2, "TEMPERATURE", 0)["tokens"] == 5


def test_a_worker_that_hangs_while_nothing_but_housekeeping_waits_for_it_is_killed(
    daemon: Daemon, call: Caller
) -> None:
    call("PREFILL", "s", "TOKENS", 3, 1, 20, 30)
    pid = call.map("ENGINE", "STATUS")["pid"]
    assert isinstance(pid, int)
    os.kill(pid, signal.SIGSTOP)
    call("DEL", "s")  # the next sweep asks the worker to drop the state
    wait_for(lambda: call.map("ENGINE", "STATUS")["state"] == b"stopped")
    assert call.map("PREFILL", "s", "TOKENS", 3, 1, 20, 30)["tokens"] == 3


def test_shutdown_stops_work_and_keeps_what_was_done(daemon: Daemon, call: Caller) -> None:
    thread, found = in_background(daemon, "GENERATE", "s", "MAXTOKENS", 1)
    thread.join()
    assert "no such session" in str(found[0])
    call("PREFILL", "s", "TOKENS", 3, 1, 20, 30)
    thread, found = in_background(daemon, "GENERATE", "s", "MAXTOKENS", 30_000, "SEED", 3)
    wait_for(lambda: is_working(call, "generate", 5))
    call("SNAPSHOT", "s", "later", "ASYNC")  # waits for the generation to end
    began = time.monotonic()
    daemon.stop()
    assert time.monotonic() - began < 20
    thread.join()
    assert str(found[0]).startswith("CANCELLED ")
    daemon.start()
    with Connection(daemon.target, timeout=60) as connection:
        again = Caller(connection)
        tokens = again.map("SNAPINFO", "later")["tokens"]
        assert isinstance(tokens, int) and tokens > 5
        assert again.map("EXTEND", "s", "TOKENS", 1, 7)["tokens"] == tokens + 1


def test_engine_cancel_stops_a_prefill_at_a_chunk(daemon: Daemon, call: Caller) -> None:
    thread, found = in_background(daemon, "PREFILL", "s", "TOKENS", len(LONG), *LONG)
    wait_for(lambda: is_working(call, "extend"))
    assert call.number("ENGINE", "CANCEL", "s") == 1
    thread.join()
    assert str(found[0]).startswith("CANCELLED ")
    tokens = call.map("EXTEND", "s", "TOKENS", 1, 7)["tokens"]
    assert isinstance(tokens, int) and 1 < tokens < len(LONG)
    assert call.number("ENGINE", "CANCEL", "s") == 0


def test_a_client_that_vanishes_cancels_its_work(daemon: Daemon, call: Caller) -> None:
    words = [b"PREFILL", b"s", b"TOKENS", b"%d" % len(LONG), *(b"%d" % token for token in LONG)]
    with socket.create_connection(("127.0.0.1", daemon.port)) as sock:
        sock.sendall(b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in words))
        wait_for(lambda: is_working(call, "extend"))
    wait_for(lambda: not is_working(call, "extend"))
    tokens = call.map("EXTEND", "s", "TOKENS", 1, 7)["tokens"]
    assert isinstance(tokens, int) and 1 < tokens < len(LONG)


def test_a_stop_string_that_no_frame_can_carry_is_refused(call: Caller) -> None:
    call("PREFILL", "s", "TOKENS", 3, 1, 20, 30)
    with pytest.raises(CommandError, match="longer than 1024 bytes"):
        call("GENERATE", "s", "MAXTOKENS", 1, "STOP", 1, "x" * 1025)
    assert call.map("ENGINE", "STATUS")["starts"] == 1


def test_a_deadline_stops_the_work(call: Caller) -> None:
    call("ENGINE", "LOAD")
    with pytest.raises(CommandError, match="CANCELLED the deadline of 300 ms passed"):
        call("PREFILL", "s", "TOKENS", len(LONG), *LONG, "DEADLINE", 300)
    tokens = call.map("GENERATE", "s", "MAXTOKENS", 1, "DEADLINE", 60_000)["tokens"]
    assert isinstance(tokens, int) and 1 < tokens < len(LONG)


def test_more_requests_than_the_queue_holds_are_busy(daemon: Daemon, call: Caller) -> None:
    call("CONFIG", "SET", "engine-queue-limit", 1)
    call("PREFILL", "other", "TOKENS", 2, 1, 2)
    thread, found = in_background(daemon, "PREFILL", "s", "TOKENS", len(LONG), *LONG)
    wait_for(lambda: is_working(call, "extend"))
    with pytest.raises(CommandError, match="BUSY"):
        call("GENERATE", "other", "MAXTOKENS", 1)
    call("ENGINE", "CANCEL", "s")
    thread.join()
    assert call.map("GENERATE", "other", "MAXTOKENS", 1)["tokens"] == 3
    assert str(found[0]).startswith("CANCELLED ")


def test_a_long_prefill_does_not_hold_up_another_session(daemon: Daemon, call: Caller) -> None:
    call("PREFILL", "other", "TOKENS", 2, 1, 2)
    thread, _ = in_background(daemon, "PREFILL", "s", "TOKENS", len(LONG), *LONG)
    wait_for(lambda: is_working(call, "extend"))
    call("GENERATE", "other", "MAXTOKENS", 10)
    assert is_working(call, "extend"), "the short request should have ended long before the long one"
    call("ENGINE", "CANCEL", "s")
    thread.join()


def test_states_over_the_cache_are_stored_and_dropped(call: Caller) -> None:
    call("CONFIG", "SET", "engine-cache-bytes", 1)
    expected = {}
    for name in ("a", "b", "c"):
        call("PREFILL", name, "TOKENS", 3, 1, 20, ord(name))
        expected[name] = call.data("LOGITS", name, "RAW")
    assert call.map("ENGINE", "STATUS")["resident_sessions"] == 1
    for name, logits in expected.items():
        assert call.data("LOGITS", name, "RAW") == logits
        lineage = call.list("LINEAGE", name)
        assert name == "c" or (isinstance(lineage[0], dict) and lineage[0]["reason"] == b"evict")


def test_an_idle_engine_ends_and_comes_back(call: Caller) -> None:
    call("PREFILL", "s", "TOKENS", 3, 1, 20, 30)
    logits = call.data("LOGITS", "s", "RAW")
    call("CONFIG", "SET", "engine-idle-timeout", 1)
    wait_for(lambda: call.map("ENGINE", "STATUS")["state"] == b"stopped")
    assert call.data("LOGITS", "s", "RAW") == logits  # from the snapshot that was taken on the way
    call("CONFIG", "SET", "engine-idle-timeout", 600)
    assert call.map("GENERATE", "s", "MAXTOKENS", 1)["tokens"] == 4


def test_tokens_since_the_last_snapshot_survive_a_kill(daemon: Daemon, call: Caller) -> None:
    call("PREFILL", "s", "TOKENS", 3, 1, 20, 30)
    call("SNAPSHOT", "s", "k")
    call("EXTEND", "s", "TOKENS", 4, 40, 50, 60, 70)
    time.sleep(1.5)  # everysec: the journal is durable after at most a second
    daemon.kill()
    daemon.start()
    with Connection(daemon.target, timeout=60) as connection:
        again = Caller(connection)
        reply = again.map("EXTEND", "s", "TOKENS", 1, 80)
        assert (reply["tokens"], reply["computed"]) == (8, 5)


def test_background_snapshots_are_awaited_by_waitsnap(call: Caller) -> None:
    call("PREFILL", "s", "TOKENS", 3, 1, 20, 30)
    assert call.map("SNAPSHOT", "s", "k", "ASYNC") == {"tokens": 3, "async": 1}
    assert call.map("WAITSNAP", "k")["tokens"] == 3
    assert call("WAITSNAP", "k") is None
    assert call.map("SNAPINFO", "k")["tokens"] == 3
    assert call.map("SNAPSHOT", "s", "missing", "XX", "ASYNC")["async"] == 1
    assert call("WAITSNAP", "missing") is None


def test_graceful_shutdown_stores_live_sessions(daemon: Daemon, call: Caller) -> None:
    call("PREFILL", "s", "TOKENS", 3, 1, 20, 30)
    logits = call.data("LOGITS", "s", "RAW")
    daemon.stop()
    daemon.start()
    with Connection(daemon.target, timeout=60) as connection:
        again = Caller(connection)
        assert again.data("LOGITS", "s", "RAW") == logits
        lineage = again.list("LINEAGE", "s")
        assert isinstance(lineage[0], dict) and lineage[0]["reason"] == b"shutdown"
        assert again.map("ENGINE", "STATUS")["starts"] == 0
